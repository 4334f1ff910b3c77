"""Measurements that are saved one after the other, and shown as a page in the end: what their commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.arguments import Parser
from benchmarks.results import ResultsError, save

Rows = list[dict[str, Any]]


def run(
    jobs: Sequence[Callable[[], Rows]],
    info: dict[str, Any],
    path: Path,
    parser: Parser,
    name: Callable[[Mapping[str, Any]], str],
    page: Callable[[Sequence[Mapping[str, Any]], Mapping[str, Any]], str],
) -> int:
    """Run the jobs and write their rows, and beside them a page, which is printed too.

    Args:
        jobs: each gives rows.
        info: as of ``describe_run``; its threads are used.
        path: of the results.
        parser: says what cannot be written.
        name: of a job, from its last row, for the line that tells how far it is.
        page: what the page says of all rows.

    Returns:
        the exit code: 0, 1 if a result was wrong, 130 after Ctrl-C.
    """
    results: dict[str, Any] = {"run": info, "rows": [], "growth": []}
    before = torch.get_num_threads()
    torch.set_num_threads(info["threads"])
    try:
        for i, job in enumerate(jobs):
            results["rows"] += job()
            # Written after every job: even a kill leaves what was measured.
            save(results, path)
            print(f"{(i + 1) / len(jobs):4.0%} {name(results['rows'][-1])}", file=sys.stderr, flush=True)
        info["complete"] = True
    except KeyboardInterrupt:
        pass
    finally:
        torch.set_num_threads(before)
    text, beside = page(results["rows"], info), path.with_suffix(".md")
    try:
        save(results, path)
        beside.write_text(text, encoding="utf-8")
    except (ResultsError, OSError) as error:
        parser.error(str(error))
    print(text)
    print(f"{len(results['rows'])} rows in {path}, the page in {beside}")
    if not info["complete"]:
        return 130
    return 1 if any(row["status"] == "wrong" for row in results["rows"]) else 0

"""Markdown of a run of two versions, only from its results."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.cases import CELLS
from benchmarks.compare import verdict
from benchmarks.peers import OURS
from benchmarks.report import case_label, format_ms, machine
from benchmarks.versions.run import BEFORE, MIN_ROUNDS, TORCH, TORCH_BEFORE

Rows = Mapping[str, Mapping[str, Any]]
_PLAIN = "plain"


def kind(row: Mapping[str, Any]) -> str:
    """What sets a case apart from others of its size."""
    parts = [option.split("=")[0] if option.startswith("proj") else option for option in row["options"] if option != "summed"]
    parts += [row["dtype"]] if row["dtype"] != "float32" else []
    return " ".join(parts) or _PLAIN


def by_case(results: Mapping[str, Any]) -> list[dict[str, Mapping[str, Any]]]:
    """The rows of each case by provider."""
    cases: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in results["rows"]:
        cases.setdefault(row["case"], {})[row["provider"]] = row
    return list(cases.values())


def ratio_of(rows: Rows, provider: str, name: str = "ratio") -> Mapping[str, float] | None:
    """The median, p20 and p80 of a provider's paired ratios, or None where it was not measured."""
    row = rows.get(provider)
    found: Mapping[str, float] | None = row.get(name) if row is not None and row["status"] == "ok" else None
    return found


def case_verdict(rows: Rows) -> str:
    """What became of a case, in the words of ``benchmarks.compare``."""
    wrong = {name: rows[name]["status"] == "wrong" for name in (OURS, BEFORE) if name in rows}
    if wrong.get(OURS):
        return "wrong" if wrong.get(BEFORE) else "went wrong"
    if wrong.get(BEFORE):
        return "mended"
    spread = ratio_of(rows, BEFORE)
    if spread is None:
        return "not measured"
    if rows[BEFORE]["rounds"] < MIN_ROUNDS:
        return "unclear"
    twin = ratio_of(rows, TORCH_BEFORE, "twin")
    if twin is not None and _verdict(twin) != "same":
        # Where torch.nn differs from itself, the versions' difference is no more to be believed.
        return "unclear"
    return _verdict(spread)


def _verdict(spread: Mapping[str, float]) -> str:
    return verdict(1 / spread["median"], 1 / spread["high"], 1 / spread["low"])


def mean_of_ratios(values: Sequence[float]) -> tuple[float, float] | None:
    """Geometric mean, and its standard error as a share of it; None of nothing."""
    if not values:
        return None
    logs = [math.log(value) for value in values]
    error = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else 0.0
    mean = math.exp(statistics.mean(logs))
    return mean, mean * error


def markdown(results: Mapping[str, Any], every_case: bool = True) -> str:
    """The whole summary: machine, a line per kind of call, and every case."""
    cases = by_case(results)
    run = results["run"]
    lines = ["# Two versions, measured in turns", "", f"{machine(results)}.", ""]
    for name in ("before", "after"):
        version = run["compared"][name]
        lines.append(f"- {name}: fused_rnn {version['version']}, commit {version['commit'] or 'unknown'}")
    lines += ["", f"`{' '.join(run['command'])}`, {run['date']}, {run.get('seconds', 0):.0f} s, load {run['load']:.1f}."]
    if not run["complete"]:
        left = run.get("left_out", 0)
        reason = f"The machine was too busy: {left} cases were left out." if left else "Stopped early."
        lines += ["", f"{reason} This is what was measured."]
    lines += ["", *_legend()]
    lines += ["## By kind of call", "", *_kinds(cases)]
    wrong = [row for rows in cases for row in rows.values() if row["status"] == "wrong"]
    if wrong:
        lines += ["", "## Not timed", "", *(f"- {row['provider']} {row['case']}: {row['reason']}" for row in wrong)]
    if every_case:
        lines += ["", "## Every case", "", *_cases(cases)]
    return "\n".join(lines) + "\n"


def _legend() -> list[str]:
    return [
        "Each figure is a time over another, of slices that followed each other: above 1, the one after the stroke is faster.",
        "By kind: geometric means over the cases, ± the standard error. torch / torch is torch.nn in one process over torch.nn "
        "in the other: what it differs from 1 by, the measurement errs by.",
        "Of a case: the median of the paired ratios, and in brackets what it lies between 98 times of 100. How a process "
        "lies in memory can make one case some per cent faster or slower all the same; it averages out over a kind's cases.",
        "",
    ]


def _kinds(cases: Sequence[Rows]) -> list[str]:
    lines = [
        "| threads | mode | call | cell | cases | before / after | torch / before | torch / after | torch / torch | verdicts |"
    ]
    lines.append("|---:|---|---|---|---:|---:|---:|---:|---:|---|")
    # Threads apart: on a busy machine only the lines of one thread mean anything.
    groups: dict[tuple[int, str, str, str], list[Rows]] = {}
    for rows in cases:
        first = next(iter(rows.values()))
        groups.setdefault((first["threads"], first["mode"], kind(first), first["cell"]), []).append(rows)
    for (threads, mode, what, cell), found in groups.items():
        lines.append(_kind_line((str(threads), mode, what, CELLS[cell][0]), found))
    for threads, mode in dict.fromkeys(key[:2] for key in groups):
        found = [rows for key, members in groups.items() if key[:2] == (threads, mode) for rows in members]
        lines.append(_kind_line((str(threads), f"**{mode}**", "all", "all"), found))
    return lines


def _kind_line(head: Iterable[str], cases: Sequence[Rows]) -> str:
    shown = []
    for provider, name in ((BEFORE, "ratio"), (TORCH_BEFORE, "over_before"), (TORCH, "ratio"), (TORCH_BEFORE, "twin")):
        spreads = (ratio_of(rows, provider, name) for rows in cases)
        mean = mean_of_ratios([spread["median"] for spread in spreads if spread is not None])
        shown.append("–" if mean is None else f"{mean[0]:.3f} ± {mean[1]:.3f}")
    counts = Counter(case_verdict(rows) for rows in cases)
    verdicts = ", ".join(f"{count} {what}" for what, count in counts.most_common())
    return f"| {' | '.join((*head, str(len(cases)), *shown, verdicts))} |"


def _cases(cases: Sequence[Rows]) -> list[str]:
    lines = ["| case | ms before | ms after | ms torch | before / after | torch / before | torch / after | rounds | verdict |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|---|")
    for rows in cases:
        first = next(iter(rows.values()))
        label = f"{first['mode']} {CELLS[first['cell']][0]} {case_label(first)}"
        times = [format_ms((rows.get(name, {}).get("ms") or {}).get("median")) for name in (BEFORE, OURS, TORCH)]
        spreads = (ratio_of(rows, BEFORE), ratio_of(rows, TORCH_BEFORE, "over_before"), ratio_of(rows, TORCH))
        shown = [
            "–" if spread is None else f"{spread['median']:.2f} ({spread['low']:.2f} – {spread['high']:.2f})"
            for spread in spreads
        ]
        rounds = str(rows.get(OURS, {}).get("rounds", 0))
        lines.append(f"| {' | '.join((label, *times, *shown, rounds, case_verdict(rows)))} |")
    return lines

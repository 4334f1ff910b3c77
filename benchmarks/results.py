"""The results file: what ran where, and one JSON row per case and provider."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from benchmarks.json_file import write_document
from benchmarks.peers import Peer, fused

FORMAT = 1
_ROOT = Path(__file__).resolve().parent.parent
# What decides the figures. Results that lie about, new or changed, do not make the program another one.
_SOURCES = ("--", "csrc", "fused_rnn", "setup.py", "benchmarks", ":(exclude)benchmarks/results")


class ResultsError(Exception):
    """A results file cannot be read or written; the message is one line for the user."""


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "cpu model")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit(folder: Path = _ROOT) -> str | None:
    """The commit that is checked out in a folder, with "+changes" if files differ from it; None without git."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    name = git("rev-parse", "--short=12", "HEAD")
    return f"{name}+changes" if name and git("status", "--porcelain", *_SOURCES) else name


def describe_run(peers: Mapping[str, Peer], backend: str | None, threads: int) -> dict[str, Any]:
    """Where and with what a run is made.

    Args:
        peers: those measured, by name.
        backend: what was asked for, or None for the automatic choice.
    """
    versions = {"python": platform.python_version(), "numpy": numpy.__version__, "torch": torch.__version__}
    missing = {}
    for name, peer in peers.items():
        reason = peer.unavailable()
        if reason:
            missing[name] = reason
        else:
            versions[{"ours": "fused_rnn"}.get(name, name)] = peer.version()
    backends: dict[str, Any] = {}
    chosen = backend
    if "ours" in peers and "ours" not in missing:
        listed = fused.package().backends()
        backends = {k: {"available": v.available, "detail": v.detail} for k, v in listed.items()}
        # The package's rule: the environment variable, else the first that is available.
        chosen = backend or os.environ.get("FUSED_RNN_BACKEND") or next(k for k, v in backends.items() if v["available"])
    return {
        "format": FORMAT,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": "cpu",
        "cpu": cpu_model(),
        "cores": cores(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        # Of the last minute, before the run adds its own.
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        "threads": threads,
        "backend": chosen,
        "backend_asked_for": backend,
        "backends": backends,
        "providers": list(peers),
        "missing": missing,
        "versions": versions,
        "commit": commit(),
        # Where on a machine a file lay says nothing to others.
        "command": ["python", "-m", "benchmarks", *(Path(word).name if "/" in word else word for word in sys.argv[1:])],
        "complete": False,
    }


def default_path() -> Path:
    """benchmarks/out/<date>.json."""
    return _ROOT / "benchmarks" / "out" / f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}.json"


def check_writable(path: Path, option: str = "--json") -> None:
    """Make the folder and find out now whether the results can be written in the end.

    Raises:
        ResultsError: if they cannot.
    """
    try:
        if path.is_dir():
            raise ResultsError(f"{option}: {path} is a folder, expected a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(path.name + ".part")
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ResultsError(f"{option}: cannot write {path}: {error.strerror or error}") from error


def save(results: Mapping[str, Any], path: Path) -> None:
    """Write the file whole or not at all."""
    try:
        write_document(path, results)
    except OSError as error:
        raise ResultsError(f"cannot write {path}: {error.strerror or error}") from error


def merge(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One set of results from several runs on one machine. A case of a later run replaces that of an earlier one as a whole.

    Raises:
        ResultsError: if they are of different machines or numbers of threads: their times say nothing about one another.
    """
    runs = [part["run"] for part in parts]
    for name in ("device", "cpu", "threads"):
        values = dict.fromkeys(str(run.get(name)) for run in runs)
        if len(values) > 1:
            raise ResultsError(f"results of different machines cannot be put together: {name} is {' and '.join(values)}")
    cases: dict[str, list[Any]] = {}
    growth: dict[tuple[str, str], Any] = {}
    for part in parts:
        fresh: dict[str, list[Any]] = {}
        for row in part["rows"]:
            fresh.setdefault(row["case"], []).append(row)
        cases |= fresh
        growth |= {(row["cell"], row["provider"]): row for row in part["growth"]}
    run = dict(runs[-1])
    run["providers"] = list(dict.fromkeys(name for each in runs for name in each["providers"]))
    run["versions"] = {name: version for each in runs for name, version in each["versions"].items()}
    run["complete"] = all(each["complete"] for each in runs)
    return {"run": run, "rows": [row for rows in cases.values() for row in rows], "growth": list(growth.values())}


def lines(results: Mapping[str, Any]) -> Iterator[str]:
    """The rows as JSON, one a line, each with all that is known of its run: for pandas and the like."""
    run = results["run"]
    isa = run.get("backends", {}).get(run.get("backend"), {}).get("detail", "")
    about = {name: run.get(name) for name in ("device", "cpu", "torch_isa", "threads", "date", "commit", "versions")}
    for row in results["rows"]:
        yield json.dumps({**about, "isa": isa, **row})


def load(path: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        ResultsError: if it cannot be read, or is not one of ours.
    """
    try:
        results: dict[str, Any] = json.loads(path.read_text())
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ResultsError(f"{path} is not JSON: {error}") from error
    if not isinstance(results, dict) or not {"run", "rows", "growth"} <= set(results):
        raise ResultsError(f"{path} is not a results file of python -m benchmarks")
    if results["run"].get("format") != FORMAT:
        raise ResultsError(f"{path}: expected format {FORMAT}, got {results['run'].get('format')}; measure again")
    return results

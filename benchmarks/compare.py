"""What got faster or slower between two results files, beyond the noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.goals import figure
from benchmarks.peers import OURS
from benchmarks.report import case_label, times
from benchmarks.results import ResultsError

# A change below this is not worth a word, however sure.
THRESHOLD = 1.05

# Where the change could be anything within so much, "the same" cannot be said either.
WIDE = 1.3

# Who stands for the machine: its time in both runs says how fast the machine was.
CONTROL = "torch"

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """One provider in one case, then and now.

    Attributes:
        row: of the newer results, or of the older where there is no newer one.
        old, new: ms, or None where there is no figure.
        ratio: time now over time then, above 1 for slower; against the control where ``controlled``.
        low, high: the p20 to p80 of both runs allow the ratio to be anything between.
        controlled: whether the speed of the machine is divided out.
        verdict: "faster", "slower", "same", "unclear" (the spread is too wide to tell), "went wrong", "mended", "gone",
            "added".
    """

    row: Mapping[str, Any]
    old: float | None
    new: float | None
    ratio: float | None
    low: float | None
    high: float | None
    controlled: bool
    verdict: str

    @property
    def regression(self) -> bool:
        """Whether it should stop a change."""
        return self.verdict in ("slower", "went wrong")


def compare(old: Results, new: Results, providers: Sequence[str] = (OURS,), threshold: float = THRESHOLD) -> list[Change]:
    """Judge every case of both files.

    Where torch.nn was measured in both runs, by the same version, a provider's time is taken relative to torch.nn's of the
    same rounds: a machine that was busier or slower in one run is no regression. A change is real if the ranges p20 to p80 of
    the two runs do not overlap, and it exceeds ``threshold``.

    Raises:
        ResultsError: if the files share no case of these providers.
    """
    control = _controllable(old, new)
    before, after = _by_key(old), _by_key(new)
    changes = []
    for key in dict.fromkeys((*after, *before)):
        if key[1] not in providers:
            continue
        then, now = before.get(key), after.get(key)
        controls = (before.get((key[0], CONTROL)), after.get((key[0], CONTROL))) if control and key[1] == OURS else (None, None)
        change = _judge(then, now, controls, threshold)
        if change is not None:
            changes.append(change)
    if not any(change.ratio is not None or change.verdict in ("went wrong", "mended") for change in changes):
        raise ResultsError("the two files have no case in common")
    return changes


def _controllable(old: Results, new: Results) -> bool:
    versions = [results["run"]["versions"].get(CONTROL) for results in (old, new)]
    return versions[0] == versions[1] and versions[0] is not None


def _by_key(results: Results) -> dict[tuple[str, str], Mapping[str, Any]]:
    return {(row["case"], row["provider"]): row for row in results["rows"]}


def _judge(
    then: Mapping[str, Any] | None,
    now: Mapping[str, Any] | None,
    controls: tuple[Mapping[str, Any] | None, Mapping[str, Any] | None],
    threshold: float,
) -> Change | None:
    row = now or then
    assert row is not None
    old, new = figure(then, "ms"), figure(now, "ms")
    if then is None or now is None:
        return Change(row, old, new, None, None, None, False, "added" if then is None else "gone")
    if now["status"] == "wrong":
        return Change(row, old, new, None, None, None, False, "went wrong") if then["status"] != "wrong" else None
    if then["status"] == "wrong":
        return Change(row, old, new, None, None, None, False, "mended")
    if old is None or new is None:
        # Missing in both, or a peer that was not installed in one of them.
        return Change(row, old, new, None, None, None, False, "added" if new else "gone") if old or new else None
    spreads = _relative(then, controls[0]), _relative(now, controls[1])
    controlled = spreads[0] is not None and spreads[1] is not None
    (mid_old, low_old, high_old), (mid_new, low_new, high_new) = (
        spread if controlled and spread else (r["ms"]["median"], r["ms"]["p20"], r["ms"]["p80"])
        for spread, r in zip(spreads, (then, now), strict=True)
    )
    ratio, low, high = mid_new / mid_old, low_new / high_old, high_new / low_old
    return Change(row, old, new, ratio, low, high, controlled, verdict(ratio, low, high, threshold))


def verdict(ratio: float, low: float, high: float, threshold: float = THRESHOLD) -> str:
    """What to say of a time now over the time then that may be anything between low and high."""
    if low > 1 and ratio >= threshold:
        return "slower"
    if high < 1 and ratio <= 1 / threshold:
        return "faster"
    return "unclear" if high > WIDE * low else "same"


def _relative(row: Mapping[str, Any], control: Mapping[str, Any] | None) -> tuple[float, float, float] | None:
    """Median, p20 and p80 of the time over the control's, round by round, or None where the control has no figure."""
    reference = figure(control, "ms")
    if control is None or reference is None or "ratio" not in control:
        return None
    # The file holds the control's time over ours.
    spread = control["ratio"]
    return float(row["ms"]["median"]) / reference, 1 / spread["p80"], 1 / spread["p20"]


def warnings(old: Results, new: Results) -> list[str]:
    """What makes the two runs hard to compare."""
    found = []
    for name, words in (("cpu", "CPU"), ("threads", "number of threads"), ("device", "device"), ("backend", "backend")):
        then, now = old["run"].get(name), new["run"].get(name)
        if then != now:
            found.append(f"another {words}: {then} then, {now} now")
    if not _controllable(old, new):
        found.append(
            "torch.nn was not measured in both, or is of another version: a slower machine looks like a slower program"
        )
    for name, results in (("old", old), ("new", new)):
        if not results["run"]["complete"]:
            found.append(f"the {name} run was stopped early")
    return found


_STYLES = {"faster": "bold green", "mended": "bold green", "slower": "bold red", "went wrong": "bold red", "unclear": "yellow"}


def print_changes(old: Results, new: Results, changes: Sequence[Change], console: Console, everything: bool = False) -> None:
    """Print the changes that are more than noise, or every one, and a summary."""
    runs = [f"{results['run']['date'][:16]} {results['run'].get('commit') or ''}".strip() for results in (old, new)]
    console.print(f"old: {runs[0]}\nnew: {runs[1]}", highlight=False)
    for warning in warnings(old, new):
        console.print(f"[yellow]Mind: {warning}.[/yellow]", soft_wrap=True)
    shown = [change for change in changes if everything or change.verdict not in ("same", "unclear")]
    if shown:
        table = Table(header_style="bold", pad_edge=False)
        for name in ("mode", "cell", "B×T×H", "who", "ms old", "ms new", "new / old", "between", "verdict"):
            table.add_column(name, justify="right" if name.startswith(("ms", "new")) else "left")
        for change in shown:
            between = "" if change.low is None or change.high is None else f"{change.low:.2f} – {change.high:.2f}"
            table.add_row(
                change.row["mode"],
                change.row["cell"],
                case_label(change.row),
                change.row["provider"],
                *("–" if ms is None else f"{ms:.3g}" for ms in (change.old, change.new)),
                times(change.ratio) + ("" if change.controlled or change.ratio is None else " raw"),
                between,
                Text(change.verdict, style=_STYLES.get(change.verdict, "")),
            )
        console.print(table)
    counts = {
        verdict: sum(change.verdict == verdict for change in changes) for verdict in dict.fromkeys(c.verdict for c in changes)
    }
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()), highlight=False)
    ratios = [math.log(change.ratio) for change in changes if change.ratio is not None]
    if ratios:
        mean = math.exp(statistics.mean(ratios))
        console.print(f"geometric mean of new / old over {len(ratios)} cases: {mean:.3f}", highlight=False)
    if any(not change.controlled and change.ratio is not None for change in changes):
        console.print(
            "raw: milliseconds against milliseconds; the others relative to torch.nn in the same rounds.", highlight=False
        )

"""Two versions in turns: the arithmetic of paired slices, the summary, and the command with versions made of torch.nn."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks_support import TINY, no_pause, run_info  # noqa: F401, a fixture for every test

from benchmarks import __main__ as command
from benchmarks import results, timing
from benchmarks.cases import Case
from benchmarks.peers import Provider
from benchmarks.suite import row_of
from benchmarks.versions import report
from benchmarks.versions import run as versions_run
from benchmarks.versions.run import MIN_ROUNDS, Versions, figures, median_range, paired

# A fused_rnn made of torch.nn; what a test adds replaces parts of it.
STAND_IN = """
import contextlib, os, types, torch
from torch.nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
__version__ = "{version}"
backends = lambda: {{"cpp": types.SimpleNamespace(available=True, detail="avx0", devices=("cpu",))}}
backend = lambda name: contextlib.nullcontext()
{more}
"""
WRONG = "class GRU(GRU):\n    def forward(self, *a):\n        out, h = super().forward(*a)\n        return out + 1, h"
FALLS = "class GRU(GRU):\n    def forward(self, *a):\n        os._exit(3)"
OPTIONS = "--sets small --shapes 1x1x16 --kinds plain --only-threads 1 --modes inference --seconds 0.5".split()


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """However busy the machine, a test's run is not ended."""
    monkeypatch.setattr(versions_run, "PATIENCE", float("inf"))


def version(folder, version="1", more=""):
    (folder / "fused_rnn").mkdir(parents=True)
    (folder / "fused_rnn" / "__init__.py").write_text(STAND_IN.format(version=version, more=more))
    return str(folder)


def compare(tmp_path, *arguments, before="", after=""):
    """Run the command on two stand-ins. Returns the exit code, the results and the summary."""
    folders = version(tmp_path / "before", "1", before), version(tmp_path / "after", "2", after)
    path = tmp_path / "deep" / "r.json"
    code = command.main(
        ["compare-versions", "--before", folders[0], "--after", folders[1], "--json", str(path), *OPTIONS, *arguments]
    )
    return code, results.load(path), path.with_suffix(".md").read_text()


def rows(ours, before, torch_=None, torch_before=None, case=None):
    """The rows of one case from seconds of each round."""
    case = case or Case("gru", TINY, "training", summed=True, threads=1)
    rounds = {"ours": ours, "before": before}
    rounds |= {"torch": torch_, "torch-before": torch_before} if torch_ else {}
    return [row_of(case, case.key, name, {}) | figures(name, rounds) for name in rounds]


def document(*found):
    versions = {name: {"version": "1", "commit": None} for name in ("before", "after")}
    info = run_info(compared=versions, command=["python"], load=0.0)
    return {"run": info, "rows": [row for part in found for row in part], "growth": []}


# Arithmetic


def test_slices_of_a_round_are_divided_before_the_median_is_taken():
    # The machine was ten times as slow in the second round, for both: the medians' ratio would be 10.
    ours, before = [1.0, 10.0, 2.0], [2.0, 20.0, 4.0]
    assert paired(before, ours) == [2.0, 2.0, 2.0]
    row = figures("before", {"ours": ours, "before": before})
    assert row["ratio"] == dict.fromkeys(("median", "p20", "p80", "low", "high"), 2.0)
    assert row["ms"]["median"] == 4000.0
    assert (row["rounds"], row["noisy"]) == (3, False)
    assert "ratio" not in figures("ours", {"ours": ours, "before": before})


def test_torch_beside_each_version_tells_the_error_of_the_measurement():
    rounds = {"ours": [1.0] * 3, "before": [2.0] * 3, "torch": [4.0] * 3, "torch-before": [5.0] * 3}
    row = figures("torch-before", rounds)
    assert (row["ratio"]["median"], row["over_before"]["median"], row["twin"]["median"]) == (5.0, 2.5, 1.25)


@pytest.mark.parametrize(
    ("before", "rounds", "expected"),
    [
        (1.5, MIN_ROUNDS, "faster"),
        (0.5, MIN_ROUNDS, "slower"),
        (1.01, MIN_ROUNDS, "same"),
        # So few pairs have no spread to speak of.
        (1.5, MIN_ROUNDS - 1, "unclear"),
    ],
)
def test_verdicts_are_those_of_the_comparison_of_files(before, rounds, expected):
    found = {row["provider"]: row for row in rows([1.0] * rounds, [before] * rounds)}
    assert report.case_verdict(found) == expected


def test_a_ratio_that_may_be_anything_is_unclear():
    found = {row["provider"]: row for row in rows([1.0] * 8, [0.5, 0.6, 1.5, 1.6, 2.0, 2.0, 2.0, 2.0])}
    assert report.case_verdict(found) == "unclear"
    found["ours"] = found["ours"] | {"status": "wrong"}
    assert report.case_verdict(found) == "went wrong"


def test_a_verdict_is_not_believed_where_torch_differs_from_itself():
    n = MIN_ROUNDS
    for twin, expected in ((3.0, "faster"), (4.0, "unclear")):
        found = {row["provider"]: row for row in rows([1.0] * n, [1.5] * n, [3.0] * n, [twin] * n)}
        assert report.case_verdict(found) == expected


@pytest.mark.parametrize(("n", "k"), [(3, 1), (MIN_ROUNDS, 1), (10, 1), (11, 2), (20, 5), (40, 13)])
def test_the_range_of_a_median_is_that_of_the_sign_test(n, k):
    # Tables of the sign test, 2 % in all: 10 values 0, 11 values 1, 20 values 4, 40 values 12 on the lesser side.
    assert median_range(range(n)) == (k - 1, n - k)


def test_a_busy_machine_ends_the_run(monkeypatch):
    monkeypatch.setattr(versions_run, "PATIENCE", 0.0)
    cases = [Case(cell, TINY, "inference", threads=threads) for cell in ("gru", "rnn") for threads in (2, 1)]
    seen = []
    versions = Versions({}, 1, {}, 1.0)
    monkeypatch.setattr(Versions, "_case", lambda self, case, seconds: seen.append(case) or [])
    found = versions.run(cases)
    assert (found["run"]["complete"], found["run"]["left_out"], seen) == (False, 4, [])
    # Cases of two threads come last: others on the machine make them the first to be useless.
    monkeypatch.setattr(versions_run, "PATIENCE", 1e9)
    assert versions.run(cases)["run"]["complete"]
    assert [case.threads for case in seen] == [1, 1, 2, 2]


def test_the_mean_of_ratios_has_an_error():
    assert report.mean_of_ratios([]) is None
    assert report.mean_of_ratios([2.0]) == (pytest.approx(2.0), 0.0)
    mean, error = report.mean_of_ratios([1.0, 4.0])
    assert mean == pytest.approx(2.0)
    assert error == pytest.approx(2.0 * 0.693147, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"summed": True, "threads": 1}, "plain"),
        ({"summed": True, "proj_size": 2}, "proj_size"),
        ({"summed": True, "dtype": "bfloat16"}, "bfloat16"),
        ({"summed": True, "padded": True}, "lengths"),
        ({"loop": "cell"}, "loop=cell"),
    ],
)
def test_kinds_of_calls_have_short_names(options, expected):
    case = Case("lstm", TINY, "training", **options)
    assert report.kind(row_of(case, case.key, "ours", {})) == expected


def test_a_short_turn_lasts_for_its_length_and_disturbed_calls_do_not_count(monkeypatch):
    # Every second call is disturbed: a median would be of those.
    clock = itertools.count()
    seconds = itertools.cycle([0.001, 0.009, 0.001, 0.009])
    monkeypatch.setattr(timing, "timed_call", lambda provider: next(seconds))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    value, calls = timing.short_turn(Provider(lambda: None), False, 9.5)
    assert (value, calls) == (0.001, 10)
    assert timing.short_turn(Provider(lambda: None), False, 0.0)[1] == 1


def test_a_short_turn_has_an_untimed_call_where_it_is_asked_for():
    seen = []
    provider = Provider(lambda: seen.append(torch.is_grad_enabled()))
    assert timing.short_turn(provider, True, 0.0)[1] == 1
    assert seen == [True, True]
    timing.short_turn(provider, False, 0.0, first=False)
    assert seen == [True, True, False]


# Summary


def test_the_summary_has_a_line_per_kind_and_per_case():
    case = Case("lstm", TINY, "inference", loop="cell", threads=2)
    text = report.markdown(
        document(rows([1.0] * 7, [2.0] * 7, [3.0] * 7, [3.0] * 7), rows([0.001] * 7, [0.001] * 7, case=case))
    )
    assert (
        "| 1 | training | plain | GRU | 1 | 2.000 ± 0.000 | 1.500 ± 0.000 | 3.000 ± 0.000 | 1.000 ± 0.000 | 1 faster |" in text
    )
    assert "| 2 | inference | loop=cell | LSTM | 1 | 1.000 ± 0.000 | – | – | – | 1 same |" in text
    assert "| 1 | **training** | all | all | 1 |" in text
    assert "| training GRU 2×3×4×5 summed threads=1 | 2000 | 1000 | 3000 | 2.00 (2.00 – 2.00) |" in text
    assert "Every case" not in report.markdown(document(rows([1.0] * 7, [1.0] * 7)), every_case=False)


def test_a_run_that_was_stopped_says_so():
    found = document(rows([1.0] * 7, [1.0] * 7))
    found["run"] |= {"complete": False, "left_out": 7}
    assert "7 cases were left out" in report.markdown(found)
    del found["run"]["left_out"]
    assert "Stopped early" in report.markdown(found)


# The command


def test_two_versions_are_measured_and_written(tmp_path, capsys):
    code, found, summary = compare(tmp_path)
    assert code == 0
    assert found["run"]["complete"]
    assert [found["run"]["compared"][name]["version"] for name in ("before", "after")] == ["1", "2"]
    assert found["run"]["versions"]["fused_rnn"] == "2"
    assert len(found["rows"]) == 3 * 4
    by_provider = {row["provider"]: row for row in found["rows"] if row["cell"] == "gru"}
    assert list(by_provider) == ["ours", "before", "torch", "torch-before"]
    assert all(row["rounds"] >= 2 and row["gate"]["error"] <= row["gate"]["bound"] for row in by_provider.values())
    assert by_provider["before"]["ratio"]["p20"] <= by_provider["before"]["ratio"]["p80"]
    assert "| 1 | inference | plain | GRU | 1 |" in summary
    said = capsys.readouterr()
    assert "100% inference/rnn/1x1x16/float32/summed/threads=1: before / after" in said.err
    assert "Every case" not in said.out
    assert command.main(["show", str(tmp_path / "deep" / "r.json")]) == 0


@pytest.mark.parametrize(("broken", "provider", "code"), [("before", "before", 0), ("after", "ours", 1)])
def test_wrong_results_are_not_timed(tmp_path, capsys, broken, provider, code):
    ended, found, summary = compare(tmp_path, "--cells", "gru", **{broken: WRONG})
    assert ended == code
    assert "1 mended" in summary or "1 went wrong" in summary
    wrong = [row for row in found["rows"] if row["status"] == "wrong"]
    assert [row["provider"] for row in wrong] == [provider]
    assert "ms" not in wrong[0]
    assert f"- {provider} inference/gru/1x1x16/float32/summed/threads=1: wrong results, not timed" in summary


def test_a_process_that_ends_is_a_row_and_the_next_case_has_a_new_one(tmp_path, capsys):
    code, found, summary = compare(tmp_path, after=FALLS)
    assert code == 1
    assert found["run"]["complete"]
    status = {(row["cell"], row["provider"]): row["status"] for row in found["rows"]}
    assert (status["gru", "ours"], status["rnn", "ours"], status["rnn", "before"]) == ("wrong", "ok", "ok")
    assert "its process ended with code 3" in summary


def test_resets_have_no_torch_beside_them(tmp_path, capsys):
    more = (
        "class GRU(GRU):\n    def forward(self, x, hx=None, reset=None):\n        outs = []\n"
        "        h = torch.zeros(1, x.shape[1], self.hidden_size)\n        for t in range(len(x)):\n"
        "            out, h = super().forward(x[t : t + 1], h * ~reset[t][None, :, None])\n            outs.append(out)\n"
        "        return torch.cat(outs), h"
    )
    code, found, summary = compare(tmp_path, "--kinds", "resets=4", "--cells", "gru", before=more, after=more)
    assert code == 0
    assert [row["provider"] for row in found["rows"]] == ["ours", "before"]
    assert "| – | – | – |" in summary


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "--before"),
        (["--before", "/nowhere"], "--before: no package fused_rnn in /nowhere"),
        (["--before", ".", "--after", "/nowhere"], "--after: no package"),
        (["--before", ".", "--sets", "x"], "--sets: expected some of goals"),
        (["--before", ".", "--kinds", "x"], "--kinds: expected some of plain,bidirectional"),
        (["--before", ".", "--only-threads", "7"], "--only-threads: no case has 7"),
        (["--before", ".", "--seconds", "0"], "--seconds"),
        (["--before", ".", "--json", "/"], "--json: / is a folder"),
        (["--before", ".", "--json", "{tmp}/r.json", "--markdown", "/"], "--markdown: / is a folder"),
    ],
)
def test_a_wrong_option_is_one_line(tmp_path, capsys, monkeypatch, arguments, part):
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(SystemExit) as stopped:
        command.main(["compare-versions", *(word.format(tmp=tmp_path) for word in arguments)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip()
    assert part in said
    assert "\n" not in said


def test_a_version_that_cannot_be_imported_is_one_line(tmp_path, capsys):
    folder = version(tmp_path / "before", more="raise ImportError('no extension\\nhere')")
    with pytest.raises(SystemExit) as stopped:
        command.main(["compare-versions", "--before", folder, "--json", str(tmp_path / "r.json"), *OPTIONS])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.strip().endswith("--before: ImportError: no extension here")


def test_cases_are_listed_without_measuring(capsys):
    assert (
        command.main(["compare-versions", "--before", "nowhere", "--list", "--quick", *OPTIONS[:2], "--kinds", "ragged"]) == 0
    )
    assert all("/ragged/" in line for line in capsys.readouterr().out.splitlines())


def test_a_worker_ends_with_its_input(tmp_path):
    folder = version(tmp_path / "v")
    worker = Path(command.__file__).parent / "versions" / "worker.py"
    done = subprocess.run([sys.executable, str(worker), folder], input="", capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "{}\n")

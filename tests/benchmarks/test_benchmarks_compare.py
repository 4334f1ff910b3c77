"""What is made of results: the comparison of two files, the slopes of sweeps, rows, the report's pictures and page."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks_support import run_info

from benchmarks import __main__ as command
from benchmarks import compare, figures, page, results, scaling


def row(case="training/gru/1x2x3/float32", provider="ours", ms=2.0, spread=1.01, ratio=None, **more):
    mode, cell, name, *_ = case.split("/")
    B, T, H = (int(part) for part in name.split("x"))
    found = {
        "case": case,
        "mode": mode,
        "cell": cell,
        "shape": {"name": name, "B": B, "T": T, "I": H, "H": H, "origin": "test"},
        "provider": provider,
        "status": "ok",
        "ms": {"median": ms, "p20": ms / spread, "p80": ms * spread},
    }
    if ratio is not None:
        found["ratio"] = {"p20": ratio / spread, "p80": ratio * spread}
    return found | more


def pair(ours=2.0, torch=4.0, spread=1.01, **more):
    return [row(ms=ours, spread=spread), row(provider="torch", ms=torch, spread=spread, ratio=torch / ours, **more)]


def file(*rows, **run):
    return {"run": run_info(**run), "rows": [*rows], "growth": []}


def only(old, new, **options):
    (change,) = compare.compare(old, new, **options)
    return change


def test_slower_beyond_the_noise():
    change = only(file(*pair()), file(*pair(ours=2.4)))
    assert (change.verdict, change.controlled, change.regression) == ("slower", True, True)
    assert change.ratio == pytest.approx(1.2)
    assert only(file(*pair(ours=2.4)), file(*pair())).verdict == "faster"


def test_a_slower_machine_is_no_regression():
    change = only(file(*pair()), file(*pair(ours=4.0, torch=8.0)))
    assert change.verdict == "same"
    assert change.ratio == pytest.approx(1.0)


def test_without_the_control_milliseconds_count():
    old, new = file(row()), file(row(ms=4.0))
    assert only(old, new).verdict == "slower"
    assert not only(old, new).controlled
    # Another torch is another control.
    new = file(*pair(ours=4.0, torch=8.0), versions={"torch": "3"})
    assert only(file(*pair()), new).verdict == "slower"
    assert any("another version" in warning for warning in compare.warnings(old, new))


def test_noise_is_no_change():
    assert only(file(*pair(spread=1.2)), file(*pair(ours=2.4, spread=1.2))).verdict == "unclear"
    assert only(file(*pair()), file(*pair(ours=2.05))).verdict == "same"
    assert only(file(*pair()), file(*pair(ours=2.4)), threshold=1.3).verdict == "same"


def test_a_red_gate_is_a_regression_and_a_mended_one_is_not():
    wrong = file(row(status="wrong", reason="x") | {"ms": None})
    assert only(file(row()), wrong).verdict == "went wrong"
    assert only(file(row()), wrong).regression
    assert only(wrong, file(row())).verdict == "mended"
    assert not only(wrong, file(row())).regression


def test_cases_of_one_file_are_told_and_two_strangers_refused():
    other = row("inference/gru/1x2x3/float32")
    found = compare.compare(file(row(), other), file(row()))
    assert [change.verdict for change in found] == ["same", "gone"]
    assert [change.verdict for change in compare.compare(file(row()), file(other, row()))] == ["added", "same"]
    with pytest.raises(results.ResultsError, match="no case in common"):
        compare.compare(file(row()), file(other))


def test_providers_can_be_chosen():
    old, new = file(*pair()), file(*pair(torch=8.0))
    assert only(old, new, providers=["torch"]).verdict == "slower"


@pytest.mark.parametrize(("ours", "code"), [(2.0, 0), (2.4, 1), (1.0, 0)])
def test_command_ends_with_one_on_a_regression(tmp_path, capsys, ours, code):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(file(*pair())))
    new.write_text(json.dumps(file(*pair(ours=ours))))
    assert command.main(["compare", str(old), str(new)]) == code
    text = capsys.readouterr().out
    assert {2.0: "1 same", 2.4: "1 slower", 1.0: "1 faster"}[ours] in text
    assert ("gru" in text) == (ours != 2.0)
    assert command.main(["compare", str(old), str(new), "--all"]) == code
    assert "gru" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["compare"], "OLD"),
        (["compare", "nowhere.json", "nowhere.json"], "cannot read nowhere.json"),
        (["compare", "{old}", "{old}", "--threshold", "0.5"], "--threshold: expected a number of 1 or more"),
        (["compare", "{old}", "{old}", "--providers", "nobody"], "no case in common"),
    ],
)
def test_a_wrong_comparison_is_one_line(tmp_path, capsys, arguments, part):
    old = tmp_path / "old.json"
    old.write_text(json.dumps(file(*pair())))
    with pytest.raises(SystemExit) as stop:
        command.main([argument.format(old=old) for argument in arguments])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert part in err
    assert err.count("\n") == 1


def test_old_files_compare_with_new_ones():
    """Rows of before there were options and threads."""
    new = [copy.deepcopy(r) | {"options": [], "threads": 1, "device": "cpu"} for r in pair()]
    assert only(file(*pair()), file(*new)).verdict == "same"


# Scaling


def test_slopes_of_powers():
    rows = [row(f"training/gru/32x{T}x64/float32", ms=0.5 * T**1.5) for T in (8, 16, 64)]
    rows += [row(f"training/gru/{B}x8x64/float32", provider="torch", ms=B) for B in (1, 2, 4, 8)]
    rows += [row(f"training/gru/{B}x16x64/float32", provider="torch", ms=B) for B in (1, 2, 4)]
    rows += [row(f"training/gru/32x16x64/float32/threads={n}", ms=8 / n, threads=n) for n in (2, 4)]
    rows[1]["threads"] = 1
    found = {(sweep.axis, sweep.provider): sweep for sweep in scaling.sweeps(file(*rows))}
    assert set(found) == {("T", "ours"), ("B", "torch"), ("threads", "ours")}
    assert found["T", "ours"].slope == pytest.approx(1.5)
    assert found["T", "ours"].error == pytest.approx(0, abs=1e-9)
    assert [x for x, _ in found["B", "torch"].points] == [1, 2, 4, 8], "the sweep with the most points"
    assert "T 8" in found["B", "torch"].fixed
    assert found["threads", "ours"].error > 0.1, "no line"


def test_two_numbers_of_threads_are_a_sweep_without_an_error():
    rows = [row(f"training/gru/32x16x64/float32/threads={n}", ms=8 / n, threads=n) for n in (1, 2)]
    (sweep,) = scaling.sweeps(file(*rows))
    assert (sweep.axis, sweep.power) == ("threads", "-1.00")


def test_sweeps_keep_options_and_widths_apart():
    rows = [row(f"training/gru/32x{T}x64/float32", ms=T) for T in (8, 16)]
    rows += [row(f"training/gru/32x{T}x64/float32/ragged", ms=T, options=["ragged"]) for T in (32, 64)]
    assert scaling.sweeps(file(*rows)) == []
    wide = [row(f"training/gru/32x8x{H}/float32", ms=H) for H in (8, 16, 32)]
    wide[0]["shape"]["I"] = 3
    assert scaling.sweeps(file(*wide)) == []


# Rows, several files


def test_rows_carry_all_that_is_known_of_their_run(tmp_path, capsys):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(file(*pair(), device="cpu", commit="abc")))
    assert command.main(["show", str(path), "--rows"]) == 0
    first, last = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (first["cpu"], first["isa"], first["commit"], first["provider"]) == ("a CPU", "avx0", "abc", "ours")
    assert last["versions"]["torch"] == "2"


def test_a_later_file_replaces_whole_cases():
    other = row("inference/gru/1x2x3/float32")
    found = results.merge([file(*pair(), other), file(row(ms=7.0), complete=False)])
    assert [(r["provider"], r["ms"]["median"]) for r in found["rows"]] == [("ours", 7.0), ("ours", 2.0)]
    assert not found["run"]["complete"]
    with pytest.raises(results.ResultsError, match="cpu is a CPU and another"):
        results.merge([file(row()), file(row(), cpu="another")])


# Page


@pytest.fixture
def everything():
    """Results with a grid, sweeps and memory."""
    rows = []
    for B in (1, 4, 16):
        for H in (8, 16, 32):
            found = pair(ours=B * H, torch=3.0 * B * H, rounds=5)
            for r in found:
                r |= {"case": f"training/gru/{B}x2x{H}/float32", "held_bytes": 1 << 20, "peak_bytes": 2 << 20}
                r |= {"shape": {"name": f"{B}x2x{H}", "B": B, "T": 2, "I": H, "H": H, "origin": "<b>test</b>"}}
                r |= {
                    "floors": {"gemm": 1.0, "fma": 0.9, "bandwidth": 0.1},
                    "reaches": {"gemm": 0.5, "fma": 0.4, "bandwidth": 0.1},
                }
            rows += found
    rows.append(row("training/gru/1x2x8/float32", "jax", status="missing", reason="not installed: jax"))
    return file(*rows)


def test_page_holds_everything_in_one_file(everything, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, out = tmp_path / "r.json", tmp_path / "deep" / "report"
    path.write_text(json.dumps(everything))
    assert command.main(["report", str(path), "--out", str(out)]) == 0
    assert str(out / "index.html") in capsys.readouterr().out
    names = {file.stem for file in out.glob("*.png")}
    assert names == {file.stem for file in out.glob("*.svg")}
    assert {"heatmap-training-gru", "floors-training-gru", "scaling-B-training", "scaling-H-training"} <= names
    assert {"held-training-gru", "peak-training-gru"} <= names
    text = (out / "index.html").read_text()
    # Nothing is fetched, nothing from a file is markup.
    for part in ('src="http', "href=", "url(", "<script", "<b>test</b>"):
        assert part not in text
    assert text.count('<img src="data:image/svg+xml;base64,') == len(names)
    for part in (
        "width=device-width",
        "GRU training",
        "3.00×",
        "2.97 – 3.03",
        "&lt;b&gt;test",
        "not installed: jax",
        "a CPU",
        "± ",
    ):
        assert part in text


def test_page_shows_alarms(everything):
    pytest.importorskip("matplotlib")
    everything["rows"][0] |= {"status": "wrong", "reason": "out: error 1"}
    everything["run"]["complete"] = False
    text = page._render(everything, {})
    assert "stopped early" in text
    assert "Wrong results, not timed: ours in training/gru/1x2x8/float32: out: error 1" in text
    assert "WRONG" in text


def test_a_heat_map_needs_a_grid(everything):
    pytest.importorskip("matplotlib")
    everything["rows"] = [r for r in everything["rows"] if r["shape"]["B"] == 1]
    names = {picture.name for picture in figures.pictures(everything)}
    assert "heatmap-training-gru" not in names
    assert "scaling-H-training" in names


@pytest.mark.parametrize(("out", "part"), [("/dev/null/x", "cannot write to /dev/null/x"), ("{file}", "cannot write to")])
def test_an_unwritable_folder_is_one_line(everything, tmp_path, capsys, out, part):
    pytest.importorskip("matplotlib")
    path = tmp_path / "r.json"
    everything["rows"] = everything["rows"][:2]
    path.write_text(json.dumps(everything))
    with pytest.raises(SystemExit) as stop:
        command.main(["report", str(path), "--out", out.format(file=path)])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert part in err
    assert err.count("\n") == 1


def test_page_of_nothing_is_refused(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(results.ResultsError, match="no rows"):
        page.write(file(), tmp_path)


# pytest-benchmark


def pytest_benchmarks(*arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/test_speed.py", *arguments]
    # Under xdist, pytest-benchmark writes nothing; this run is none of its workers.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    root = Path(__file__).parents[2]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, env=environment)


def test_pytest_times_the_cases_and_writes_json(tmp_path):
    path = tmp_path / "b.json"
    options = "--shapes 2x3x4 --cells gru --modes inference --peers torch,onnxruntime,triton --benchmark-max-time 0.001"
    done = pytest_benchmarks(*options.split(), "--benchmark-json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    assert {b["extra_info"]["provider"] for b in found["benchmarks"]} >= {"ours", "torch"}
    assert {b["group"] for b in found["benchmarks"]} == {"inference/gru/2x3x4/float32"}
    assert found["versions"]["torch"]
    assert "SKIPPED" in done.stdout, "a peer that cannot run says so"


def test_pytest_refuses_what_it_does_not_know():
    done = pytest_benchmarks("--sets", "mine")
    assert done.returncode != 0
    assert "--sets: expected some of goals" in done.stdout + done.stderr

"""What the benchmark makes of its figures: goals, files, tables, pictures, the command."""

import contextlib
import json
import subprocess
import sys
import types

import pytest
from benchmarks_support import TINY, no_pause, rendered, run_info  # noqa: F401, a fixture for every test
from torch import nn

from benchmarks import __main__ as command
from benchmarks import goals, memory, plots, readme, report, results
from benchmarks.cases import CELLS, SHAPES
from benchmarks.floors import Floors
from benchmarks.peers import fused, peers, torch_nn


@pytest.fixture
def stand_in(monkeypatch):
    """A fused_rnn made of torch.nn, for the command line."""
    package = types.SimpleNamespace(
        LSTM=nn.LSTM,
        GRU=nn.GRU,
        RNN=nn.RNN,
        __version__="0",
        backends=lambda: {"cpp": types.SimpleNamespace(available=True, detail="avx0", devices=("cpu",))},
        backend=lambda name: contextlib.nullcontext(),
    )
    monkeypatch.setattr(fused, "package", lambda: package)
    return package


# Goals


def synthetic(speed_up=2.0, shapes=SHAPES, **ours):
    """Results of a run where ours is this many times as fast as everybody, and 1.1 × the floor."""
    rows = []
    for cell in CELLS:
        for shape in shapes:
            for mode in shape.modes:
                for provider in ("ours", "torch", "onnxruntime"):
                    ms = 3.0 if provider == "ours" else 3.0 * speed_up
                    rows.append(
                        {
                            "case": f"{mode}/{cell}/{shape.name}",
                            "mode": mode,
                            "cell": cell,
                            "shape": {"name": shape.name, "B": shape.B, "T": shape.T, "I": shape.I, "H": shape.H},
                            "provider": provider,
                            "status": "ok",
                            "ms": {"median": ms, "p20": ms, "p80": ms},
                            "ratio": {"p20": speed_up * 0.9, "p80": speed_up * 1.1},
                            "x_floor": 1.1,
                            "held_bytes": 1000000,
                        }
                    )
                    if provider == "ours":
                        rows[-1] |= ours
    row = {"provider": "ours", "status": "ok", "growth_bytes": 0, "peak_bytes": 5, "peak_bytes_long": 5}
    growth = [{"cell": cell} | row for cell in CELLS]
    return {"run": run_info(), "rows": rows, "growth": growth}


def verdicts(found):
    return {(g["mode"], g["cell"], g["goal"]): g["verdict"] for g in goals.evaluate(found)}


def test_goals_pass_and_fail():
    assert set(verdicts(synthetic(4.0)).values()) == {"pass"}
    of_two = verdicts(synthetic(2.0))
    mean = "torch.nn / ours, geometric mean"
    assert of_two["training", "lstm", mean] == "pass"
    assert of_two["training", "gru", mean] == "fail"
    assert of_two["training", "rnn", mean] == "fail"
    assert of_two["inference", "gru", mean] == "fail"
    assert of_two["streaming", "gru", "torch.nn / ours, one step"] == "pass"


def test_goals_see_the_slowest_shape_the_floor_and_the_memory():
    found = synthetic(4.0)
    row = next(r for r in found["rows"] if r["provider"] == "ours" and r["case"] == "training/rnn/32x50x1024")
    row |= {"ms": {"median": 11.5}, "x_floor": 1.16, "held_bytes": 1000001 + memory.HELD_NOISE}
    found["growth"][0]["growth_bytes"] = memory.PEAK_NOISE + 1
    failed = {key for key, verdict in verdicts(found).items() if verdict == "fail"}
    assert failed == {
        ("training", "rnn", "torch.nn / ours, slowest shape"),
        ("training", "rnn", "× GEMM floor, worst (B ≥ 16, H ≥ 256)"),
        ("training", "rnn", "bytes held, ours / torch.nn, worst"),
        ("growth", "lstm", "memory growth from T to 4T, bytes"),
    }


def test_a_part_of_the_shapes_is_no_pass():
    found = verdicts(synthetic(4.0, SHAPES[:1]))
    assert found["training", "lstm", "torch.nn / ours, slowest shape"] == "part"
    assert found["training", "lstm", "× GEMM floor, worst (B ≥ 16, H ≥ 256)"] == "not measured"
    assert found["streaming", "lstm", "torch.nn / ours, one step"] == "not measured"


def test_a_goal_from_noisy_rows_is_marked():
    found = synthetic(4.0)
    next(r for r in found["rows"] if r["provider"] == "torch" and r["case"] == "training/gru/256x20x64")["noisy"] = True
    noisy = {(g["mode"], g["cell"], g["goal"]) for g in goals.evaluate(found) if g["noisy"]}
    marks = ("torch.nn / ours, geometric mean", "torch.nn / ours, slowest shape")
    assert noisy == {("training", "gru", mark) for mark in marks}
    assert "4.00~" in rendered(found)


def test_numba_has_goals_where_it_was_asked_for():
    found = synthetic(4.0)
    assert not any("numba" in g["goal"] for g in goals.evaluate(found))
    found["run"]["providers"] += ["numba"]
    found["rows"] += [r | {"provider": "numba", "ms": {"median": 7.0}} for r in found["rows"] if r["provider"] == "torch"]
    judged = {(g["mode"], g["cell"]): g for g in goals.evaluate(found) if g["goal"].startswith("numba / ours")}
    assert judged["training", "gru"]["value"] == pytest.approx(7 / 3)
    assert judged["training", "gru"]["verdict"] == "fail"


# Results, tables, pictures


def test_tables_show_figures_and_never_round_up():
    text = rendered(synthetic(1.999))
    assert "1.99" in text
    assert "2.00 │" not in text.split("Goals")[0]
    assert "16×64×128" in text
    assert report.times(1.4999) == "1.49"
    assert report.times(0.29) == "0.29"
    assert (report.size(3 << 20), report.size(None)) == ("3.0 MiB", "–")


def test_run_info_names_machine_and_versions(stand_in):
    table = {"ours": peers()["ours"], "torch": torch_nn.PEER}
    info = results.describe_run(table, None, 2)
    assert info["cpu"]
    assert info["threads"] == 2
    assert info["backend"] == "cpp"
    assert info["backends"]["cpp"]["detail"] == "avx0"
    assert {"python", "torch", "numpy", "fused_rnn"} <= set(info["versions"])
    assert info["missing"] == {}
    json.dumps(info)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", json.dumps({"run": {"format": 0}, "rows": [], "growth": []}), None])
def test_what_is_no_results_file_is_one_line(tmp_path, capsys, content):
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    for name in ("readme", "show"):
        assert exit_code([name, str(path)]) == 2
        assert_one_line(capsys, str(path))


README = f"# A title\n\n{readme.BEGIN}\nold\n{readme.END}\nthe rest\n"


def test_readme_command_rewrites_its_block_only(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, target = tmp_path / "r.json", tmp_path / "README.md"
    found = synthetic(2.0)
    found["rows"][1] |= {"noisy": True}
    results.save(found, path)
    target.write_text(README)
    arguments = ["readme", str(path), "--readme", str(target), "--pictures", str(tmp_path / "pictures")]
    for _ in range(2):
        assert command.main(arguments) == 0
    text = target.read_text()
    assert text.startswith(f"# A title\n\n{readme.BEGIN}\n")
    assert text.endswith(f"{readme.END}\nthe rest\n")
    assert "old" not in text
    assert r"| 1 × 100 × 128 | 2.00×\* | 2.00× |" in text
    assert "a CPU, 1 thread on 2 cores, cpp backend (avx0)" in text
    assert "(pictures/speedup.png)" in text
    for name in ("speedup.png", "speedup.svg"):
        assert (tmp_path / "pictures" / name).stat().st_size > 5000
    capsys.readouterr()


@pytest.mark.parametrize("text", ["# A title\n", f"{readme.END}\n{readme.BEGIN}\n", README + README])
def test_readme_without_one_pair_of_markers_stays_as_it_is(tmp_path, capsys, text):
    pytest.importorskip("matplotlib")
    path, target = tmp_path / "r.json", tmp_path / "README.md"
    results.save(synthetic(), path)
    target.write_text(text)
    assert exit_code(["readme", str(path), "--readme", str(target), "--pictures", str(tmp_path / "pictures")]) == 2
    assert_one_line(capsys, readme.BEGIN)
    assert target.read_text() == text


def test_picture_of_results_without_a_ratio_is_refused(tmp_path):
    with pytest.raises(results.ResultsError, match=r"no speed-up over torch\.nn"):
        plots.speedups(synthetic(shapes=()), tmp_path)


# Command line


def exit_code(arguments):
    try:
        return command.main(arguments)
    except SystemExit as stop:
        return stop.code


def assert_one_line(capsys, part):
    err = capsys.readouterr().err
    assert part in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--threads", "0"], "expected a whole number of 1 or more, got '0'"),
        (["--threads", "two"], "got 'two'"),
        (["--seconds", "-1"], "--seconds: expected a number of seconds above 0"),
        (["--seconds", "nan"], "got 'nan'"),
        (["--cells", "lstm,foo"], "--cells: expected some of lstm,gru,rnn, got 'foo'"),
        (["--shapes", "1x2"], "--shapes: expected BxTxH or BxTxIxH, got '1x2'"),
        (["--shapes", "1x0x3"], "got '1x0x3'"),
        (["--sets", "goals,mine"], "--sets: expected some of goals,published"),
        (["--dtypes", "int8"], "--dtypes: expected some of float32"),
        (["--dtypes", "float64"], "leave no case"),
        (["--modes", "sleep"], "got 'sleep'"),
        (["--modes", "streaming", "--shapes", "16x64x128"], "leave no case"),
        (["--peers", "nobody"], "--peers: expected some of torch,onnxruntime"),
        (["--peers", "ours"], "got 'ours'"),
        (["--backend", "nope"], "--backend: "),
        (["--json", "/dev/null/x.json"], "cannot write"),
        (["--json", "/"], "is a folder"),
        (["--nonsense"], "--nonsense"),
        (["frobnicate"], "unknown command 'frobnicate'"),
        (["readme"], "results"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(capsys, arguments, part):
    assert exit_code(arguments) == 2
    assert_one_line(capsys, part)


def test_backend_of_the_environment_is_checked(monkeypatch, capsys):
    monkeypatch.setenv("FUSED_RNN_BACKEND", "nope")
    assert exit_code([]) == 2
    assert_one_line(capsys, "FUSED_RNN_BACKEND: ")


def test_command_measures_prints_and_writes(stand_in, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("benchmarks.cases.SHAPES", (TINY,))
    monkeypatch.setattr("benchmarks.suite.Floors", lambda: Floors(size=32, elements=64))
    path = tmp_path / "deep" / "r.json"
    options = "--quick --seconds 0.01 --no-memory --peers torch --threads 1 --shapes".split()
    code = command.main([*options, TINY.name, "--json", str(path)])
    assert code == 0
    found = results.load(path)
    assert found["run"]["complete"]
    assert found["run"]["providers"] == ["ours", "torch"]
    assert len(found["rows"]) == 3 * 2 * 2
    assert "torch.nn/ours" in capsys.readouterr().out
    assert list(path.parent.iterdir()) == [path]


def test_results_that_cannot_be_written_any_more(stand_in, monkeypatch, tmp_path, capsys):
    path = tmp_path / "r.json"
    write, calls = results.write_document, []

    def full(path, document):
        calls.append(path)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        write(path, document)

    monkeypatch.setattr(results, "write_document", full)
    monkeypatch.setattr(command, "SECONDS", 1e-9)
    options = "--shapes 2x3x4,2x3x5 --cells gru --modes inference --peers torch --no-memory --threads 1".split()
    assert exit_code([*options, "--json", str(path)]) == 2
    assert_one_line(capsys, "No space left on device")
    assert {row["shape"]["name"] for row in json.loads(path.read_text())["rows"]} == {"2x3x4"}, "the first case is kept"


def test_module_runs_as_a_command():
    done = subprocess.run([sys.executable, "-m", "benchmarks", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--threads" in done.stdout

"""The README's block and the results' page beyond the table of speed-ups: resets, slopes, whole jobs, and their files."""

import json
import math

import pytest
from benchmarks_support import run_info

from benchmarks import __main__ as command
from benchmarks import jobs, json_file, readme, readme_files, results

pytest.importorskip("matplotlib")
README = f"# A title\n\n{readme.BEGIN}\nold\n{readme.END}\nthe rest\n"


def case_rows(key, ours, torch, **more):
    mode, cell, name, _, *options = key.split("/")
    B, T, H = (int(part) for part in name.split("x"))
    shape = {"name": name, "B": B, "T": T, "I": H, "H": H, "origin": "test"}
    common = {"case": key, "mode": mode, "cell": cell, "shape": shape, "status": "ok", "options": options, "threads": 1}
    figures = {"ours": ours, "torch": torch}
    return [
        {
            **common,
            **more,
            "provider": provider,
            "ms": {"median": ms, "p20": ms, "p80": ms},
            "floor_ms": 2.0,
            "x_floor": ms / 2.0,
        }
        for provider, ms in figures.items()
    ]


def everything():
    """Results with a shape of the goals, a case with resets and a sweep over T."""
    rows = case_rows("training/gru/16x64x128/float32", 4.0, 8.0)
    rows += case_rows("training/gru/64x128x128/float32/resets=32", 3.0, 34.5)
    for T in (2, 4, 8):
        rows += case_rows(f"inference/lstm/3x{T}x5/float32", 1.0 * T, 0.5 * T**2)
    return {"run": run_info(commit="abc", command=["python", "-m", "benchmarks", "--quick"]), "rows": rows, "growth": []}


def job_rows(**more):
    common = {"job": "classifier", "task": "last", "title": "Digits, last", "rnn_seconds": 0.004, **more}
    return [
        {**common, "provider": "torch.nn", "accuracy": 0.96, "median_seconds": 0.02},
        {**common, "provider": "fused_rnn", "accuracy": 0.9549, "median_seconds": 0.005, "speed_up": 4.0, "rnn_seconds": 0.001},
        {**common, "provider": "linear softmax", "accuracy": 0.97, "median_seconds": None, "rnn_seconds": None},
    ]


@pytest.fixture
def folder(tmp_path):
    """A README, results and the files of a training job, as a working tree has them."""
    (tmp_path / "results" / "training").mkdir(parents=True)
    (tmp_path / "README.md").write_text(README)
    results.save(everything(), tmp_path / "results" / "cpu.json")
    json_file.write_rows(tmp_path / "results" / "training" / "classifier.json", job_rows())
    for name in ("classifier_last.png", "classifier_last.partial.png"):
        (tmp_path / "results" / "training" / name).write_bytes(b"a picture")
    return tmp_path


def arguments(folder, *more):
    paths = {"--readme": folder / "README.md", "--pictures": folder / "results"}
    options = [word for name, path in paths.items() for word in (name, str(path))]
    return ["readme", str(folder / "results/cpu.json"), *more, *options]


def test_everything_is_made_from_the_files(folder, capsys):
    assert command.main(arguments(folder)) == 0
    written = [line.rsplit("/", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert written == ["README.md", "README.md", "speedup.png", "speedup.svg"]
    block, page = (folder / "README.md").read_text(), (folder / "results" / "README.md").read_text()
    assert block.endswith(f"{readme.END}\nthe rest\n")
    assert "| 16 × 64 × 128 | 2.00× |" in block
    assert "(B = 64, T = 128, H = 128): training GRU 11.50×." in block
    # The yardstick is in no race; a ratio is not of the two accuracies.
    line = "| Digits, last | accuracy | 96.0% | 95.5% | 20.0 | 5.0 | 4.00× | 4.00× |"
    assert block.count(line) == page.count(line) == 1
    assert "[results/README.md](results/README.md)" in block
    for part in (
        "- [cpu.json](cpu.json): `python -m benchmarks --quick`, 2020-02-02, commit abc\n",
        "- [training/classifier.json](training/classifier.json): `python",
    ):
        assert part in page
    assert "| GRU training 64×128×128 resets=32 | 3.00 | 2.00 | 1.50 | torch.nn 34.5 (11.50×) |" in page
    assert "| T = 2 4 8 | inference | LSTM | 1.00 ± 0.00 | 2.00 ± 0.00 |" in page
    addresses = [part.split('"')[0] for part in page.split('src="')[1:]]
    assert "training/classifier_last.png" in addresses
    assert "pictures/scaling-T-inference.png" in addresses
    assert all((folder / "results" / address).is_file() for address in addresses)
    assert "partial" not in page


def test_a_file_from_elsewhere_is_named_without_its_folder(folder):
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (folder / "results" / "cpu.json").rename(elsewhere / "cpu.json")
    readme_files.write({elsewhere / "cpu.json": everything()}, folder / "README.md", folder / "results", folder / "nowhere")
    page = (folder / "results" / "README.md").read_text()
    assert "- cpu.json: `python" in page
    assert "elsewhere" not in page


def test_without_jobs_there_is_no_table_of_them(folder):
    (folder / "results" / "training" / "classifier.json").unlink()
    assert command.main(arguments(folder)) == 0
    assert "Whole trainings" not in (folder / "README.md").read_text() + (folder / "results" / "README.md").read_text()


def test_several_files_are_read_together(folder, capsys):
    later = everything() | {"rows": case_rows("training/gru/16x64x128/float32", 4.0, 12.0)}
    results.save(later, folder / "results" / "later.json")
    assert command.main(arguments(folder, str(folder / "results/later.json"))) == 0
    assert "| 16 × 64 × 128 | 3.00× |" in (folder / "README.md").read_text()
    assert "[later.json](later.json)" in (folder / "results" / "README.md").read_text()


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[{"provider": "torch.nn"}]'])
def test_what_is_no_file_of_a_job_is_one_line(folder, capsys, content):
    (folder / "results" / "training" / "classifier.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        command.main(arguments(folder))
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "classifier.json" in err
    assert err.count("\n") == 1
    assert (folder / "README.md").read_text() == README


def test_a_job_that_was_stopped_has_no_quality_to_show():
    rows = [row | {"accuracy": None, "median_seconds": None} for row in job_rows(speed_up=None)]
    assert jobs.table({"classifier": rows})[-1] == "| Digits, last | accuracy | – | – | – | – | 4.00× | 4.00× |"
    assert jobs.table({"classifier": rows[:1]}) == []


def test_a_job_of_another_machine_names_it():
    here, there = {"cpu": "A", "threads": 2}, {"cpu": "B", "threads": 1}
    trained = {"tagger": [row | here for row in job_rows()], "classifier": [row | there for row in job_rows()]}
    lines = jobs.table(trained)[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| Digits, last", "| Digits, last; on B, 1 thread"]


def test_pictures_that_cannot_be_written_are_one_line(folder):
    (folder / "results" / "pictures").write_text("in the way")
    with pytest.raises(results.ResultsError, match="cannot write to"):
        readme_files.write({folder / "r.json": everything()}, folder / "README.md", folder / "results", folder / "nowhere")


def test_the_page_does_not_write_over_the_readme(folder):
    with pytest.raises(results.ResultsError, match="would be written over"):
        readme_files.write({folder / "r.json": everything()}, folder / "README.md", folder, folder / "nowhere")
    assert (folder / "README.md").read_text() == README


# Files


def test_files_hold_a_row_a_line_and_six_digits(tmp_path):
    path = tmp_path / "r.json"
    rows = [{"ms": 1 / 3, "count": 12345678, "name": "é", "spread": [math.pi, math.nan]}, {"ms": math.inf}]
    json_file.write_document(path, {"run": {"date": "today"}, "rows": rows, "growth": []})
    read = json.loads(path.read_text(encoding="utf-8"))
    assert read["rows"] == [{"ms": 0.333333, "count": 12345678, "name": "é", "spread": [3.14159, None]}, {"ms": None}]
    assert (read["run"], read["growth"]) == ({"date": "today"}, [])
    assert [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith('{"ms"')] != []
    json_file.write_rows(path, rows)
    assert len(path.read_text(encoding="utf-8").splitlines()) == 4
    assert list(tmp_path.iterdir()) == [path]


def test_two_directions_have_a_line_of_their_own_and_no_part_in_the_mean():
    found = everything()
    found["rows"] += case_rows("training/gru/32x100x256/float32/bidirectional", 4.0, 40.0)
    block = readme.readme_block(found)
    assert "| **geometric mean** | **2.00×** |" in block
    assert "| 32 × 100 × 256, two directions | 10.00× |" in block
    assert "two directions" not in readme.readme_block(everything())

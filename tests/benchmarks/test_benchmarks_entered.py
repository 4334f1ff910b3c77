"""Counting the package's files that a call enters."""

import sys
from pathlib import Path

import pytest
import torch

import fused_rnn
from benchmarks import __main__ as command
from benchmarks import entered
from benchmarks.entered import CALLS

PACKAGE = Path(fused_rnn.__file__).parent


def function(path, body="return None", **names):
    """A function that says it comes from a file."""
    space = dict(names)
    exec(compile(f"def f():\n    {body}", str(path), "exec"), space)
    return space["f"]


def test_only_files_of_the_folder_count(tmp_path):
    inner = function(tmp_path / "package" / "inner.py")
    outer = function(tmp_path / "package" / "a" / "outer.py", "inner(), inner(), other()", inner=inner, other=lambda: inner())
    elsewhere = function(tmp_path / "package2" / "x.py", "outer()", outer=outer)
    assert list(entered.entered(elsewhere, tmp_path / "package").items()) == [("a/outer.py", 1), ("inner.py", 3)]
    assert sys.getprofile() is None


def test_what_tritons_interpreter_runs_does_not_count(tmp_path):
    kernel = function(tmp_path / "kernel.py")
    interpreter = function("/lib/triton/runtime/interpreter.py", "kernel()", kernel=kernel)
    launch = function(tmp_path / "launch.py", "interpreter()", interpreter=interpreter)
    assert entered.entered(launch, tmp_path) == {"launch.py": 1}


def test_the_profile_ends_with_a_call_that_raises(tmp_path):
    with pytest.raises(ZeroDivisionError):
        entered.entered(function(tmp_path / "x.py", "1 / 0"), tmp_path)
    assert sys.getprofile() is None


def test_forward_and_backward_of_a_layer_are_seen():
    layer, x = fused_rnn.GRU(3, 4), torch.randn(2, 1, 3)
    # What is made once is made before.
    layer(x)[0].sum().backward()
    forward = entered.entered(lambda: layer(x), PACKAGE)
    assert forward["nn/layers.py"] >= 1
    both = entered.entered(lambda: layer(x)[0].sum().backward(), PACKAGE)
    assert sum(both.values()) > sum(forward.values())


def test_every_call_is_counted():
    found = entered.count(CALLS)
    assert list(found) == list(CALLS)
    assert all(files for files in found.values())
    # The short way of a plain layer is shorter.
    assert len(found["LSTM inference"]) <= len(found["LSTM training, lengths"])


def test_the_command_writes_a_table(capsys):
    root = str(PACKAGE.parent)
    assert command.main(["files", root, "--no-triton", "--names"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"| call | files, {PACKAGE.parent.name} | entries |\n|---|---:|---:|\n")
    assert all(f"| {name} |" in text for name in CALLS)
    assert ", LSTM inference: nn/layers.py" in text


def test_a_folder_without_the_package_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["files", str(tmp_path / "nowhere")])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.endswith("no package fused_rnn in " + str(tmp_path / "nowhere"))
    assert "\n" not in said

"""What the sdist and the wheel hold, and that an install without a compiler runs on Numba.

Each build happens once, on a copy of the tree; the compiler optimises little, so that it takes seconds.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.install,
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="the tests run away from the source tree"),
]

# Reports which backends there are, then runs a layer and says which one served and what was warned of.
PROBE = """
import json, warnings
import fused_rnn, torch
from fused_rnn.kernels import dispatch
from fused_rnn.cells import LSTM
report = {"package": fused_rnn.__file__}
report["backends"] = {name: [status.available, status.detail] for name, status in fused_rnn.backends().items()}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    layer = fused_rnn.LSTM(3, 5)
    x = torch.randn(4, 2, 3)
    for _ in range(2):
        out, _ = layer(x)
    out.sum().backward()
report["warnings"] = [str(w.message) for w in caught if "fused_rnn" in str(w.message)]
report["chosen"] = dispatch.choose(torch.device("cpu")).name
peer = torch.nn.LSTM(3, 5)
peer.load_state_dict(layer.state_dict())
report["error"] = (out - peer(x)[0]).abs().max().item()
print(json.dumps(report))
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Runs a command with no setting of ours from outside; returns what it printed, which is also the failure's message."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FUSED_RNN_", "PYTHON"))}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-6000:]}"
    return done.stdout


def probe(target: Path, cwd: Path) -> dict:
    # Without site (-S), the hooks of an editable install do not run; they would find this tree's extension for the target's
    # package. What the package depends on still comes from this environment.
    path = os.pathsep.join([str(target), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    printed = run(sys.executable, "-S", "-c", PROBE, cwd=cwd, PYTHONPATH=path)
    (line,) = [line for line in printed.splitlines() if line.startswith("{")]
    report = json.loads(line)
    assert Path(report["package"]).is_relative_to(target), "the probe imported another fused_rnn than the one just installed"
    return report


def extension_in(names: Iterable[str]) -> str:
    (extension,) = [name for name in names if name.startswith("fused_rnn/_C.") and name.endswith(".so")]
    return extension


def sources(folder: str) -> set[str]:
    found = (path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.as_posix() for path in found if "__pycache__" not in path.parts and path.suffix not in (".so", ".pyc")}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of a copy of the tree, so that nothing built or listed earlier gets into it."""
    tree = tmp_path_factory.mktemp("tree") / "fused_rnn"
    left_out = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "out", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
    )
    shutil.copytree(ROOT, tree, ignore=left_out)
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tree / "dist", cwd=tree)
    (archive,) = (tree / "dist").iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that the sdist builds, where importing torch, numpy or numba during the build would fail."""
    folder = tmp_path_factory.mktemp("wheel")
    absent = folder / "absent"
    absent.mkdir()
    for name in ("torch", "numpy", "numba"):
        (absent / f"{name}.py").write_text("raise ImportError(f'{__name__} is not a build requirement')\n")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder / "out")
    run(*pip, sdist, cwd=folder, FUSED_RNN_REQUIRE_CPP="1", FUSED_RNN_CFLAGS="-O1", PYTHONPATH=str(absent))
    (built,) = (folder / "out").iterdir()
    return built


def test_sdist_holds_all_sources(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = sources("csrc") | sources("fused_rnn") | sources("tests")
    wanted |= {"pyproject.toml", "setup.py", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile"}
    assert wanted - held == set()
    assert [name for name in held if name.endswith((".so", ".pyc"))] == []


def test_wheel_holds_the_package_alone(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    extension = extension_in(held)
    assert held - {extension} == sources("fused_rnn")
    assert "fused_rnn/py.typed" in held


def test_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel, cwd=tmp_path)
    report = probe(target, tmp_path)
    assert report["backends"]["cpp"][0], report["backends"]
    assert report["chosen"] == "cpp"
    assert report["warnings"] == []
    assert report["error"] < 1e-5


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 instructions")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump (binutils) disassembles the extension")
def test_old_processors_meet_no_newer_instruction(wheel: Path, tmp_path: Path) -> None:
    """AVX code stays in the namespaces of its instruction sets.

    An inline function that is emitted in every object keeps one copy in the library. If the linker kept that of a newer
    instruction set, an older processor would stop at it.
    """
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract(extension_in(archive.namelist()), tmp_path)
    namespaces = {"ymm": ("avx2", "avx512"), "zmm": ("avx512",), "vex": ("avx2", "avx512")}
    function, seen, misplaced = "", set(), set()
    for line in run("objdump", "-d", "--no-show-raw-insn", library, cwd=tmp_path).splitlines():
        if line.endswith(">:"):
            function = line.split("<")[1]
        elif "\t" in line:
            instruction = line.split("\t")[1]
            kind = "zmm" if "%zmm" in instruction else "ymm" if "%ymm" in instruction else "vex"
            if instruction.startswith("v") or kind != "vex":
                seen.add(kind)
                if not any(name in function for name in namespaces[kind]):
                    misplaced.add(function)
    assert "zmm" in seen
    assert misplaced == set()


def test_install_without_a_compiler_runs_on_numba(sdist: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    target = tmp_path / "target"
    hidden = {name: str(tmp_path / "no-such-compiler") for name in ("CC", "CXX")} | {"PATH": str(empty)}
    pip = (sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation", "--target", target, sdist)
    said = run(*pip, cwd=tmp_path, **hidden)
    assert "WARNING: fused_rnn is being installed without its C++ kernels: no working C++17 compiler" in said
    assert list(target.glob("fused_rnn/_C*.so")) == []

    report = probe(target, tmp_path)
    available, reason = report["backends"]["cpp"]
    assert not available
    assert reason
    assert report["backends"]["numba"][0], report["backends"]
    assert report["chosen"] == "numba"
    (warning,) = report["warnings"]
    assert "cpp" in warning
    assert "numba" in warning
    assert report["error"] < 1e-5


def test_a_required_extension_fails_loudly(sdist: Path, tmp_path: Path) -> None:
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, sdist)
    with pytest.raises(AssertionError, match="no working C\\+\\+17 compiler"):
        run(*pip, cwd=tmp_path, CC="no-such-compiler", CXX="no-such-compiler", FUSED_RNN_REQUIRE_CPP="1")
    assert list(tmp_path.glob("*.whl")) == []

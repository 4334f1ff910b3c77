"""Builds ``fused_rnn._C``, the kernels compiled once per instruction set. The rest is in pyproject.toml.

Environment:
    FUSED_RNN_REQUIRE_CPP=1: a failed build of the extension fails the install. Without it the package installs all the same
        and runs on Numba.
    FUSED_RNN_CFLAGS: flags appended to those of the compiler and the linker, such as "-O0 -g".
    FUSED_RNN_ISAS: the instruction sets to build, such as "avx512" or "baseline,avx2"; the extension is then required. Without
        it all that the compiler knows are built. What is built for this machine alone does not load on a lesser one.

Objects stay in build/, and one is compiled again only if what it was made of has changed: a source, a header, a flag, a macro
or the compiler. Contents are compared, not times. ``build_ext --force`` compiles all.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, NamedTuple

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError, OptionError, PlatformError

# Compiled once per instruction set.
OF_SET = ["csrc/kernels/table.cpp", "csrc/kernels/int8.cpp"]
# Compiled once per instruction set and dtype. Those that take longest first, or one processor waits for them in the end.
KERNELS = [f"csrc/kernels/{name}.cpp" for name in ("backward", "forward", "others")]
ELEMENTS = ("float", "double")
# Everything else, the binding among it, is compiled once and without instruction set flags.
COMMON = sorted(path.as_posix() for path in Path("csrc").rglob("*.cpp") if path.parent.name != "kernels")
HEADERS = sorted(path.as_posix() for path in Path("csrc").rglob("*.h"))
# Where the cells' header and their list go, which are made from the equations in fused_rnn/cells/.
GENERATED = Path("build/generated")

# Lowest first, because objects are linked in this order, after those of COMMON: of an inline function that several objects emit
# (std::vector, say) the linker keeps the first copy, which must be one that runs on every machine.
# Each set is named with a macro that the compiler defines when it really generates code for it.
INSTRUCTION_SETS: dict[str, tuple[str, list[str]]] = {
    "baseline": ("__cplusplus", []),
    "avx2": ("__AVX2__", ["-mavx2", "-mfma", "-mf16c"]),
    "avx512": (
        "__AVX512BW__",
        ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
    ),
}

# Neither -march=native (the result must run elsewhere) nor -ffast-math (NaN and Inf must flow through as in torch).
# -g0 undoes the -g that some Pythons are configured with: it doubles the time and makes the library ten times larger.
# Loops begin on a boundary, or a change in one place makes a product in another some 3 % slower.
COMPILE_FLAGS = (
    "-std=c++17 -O3 -g0 -falign-loops=64 -fvisibility=hidden "
    "-fno-math-errno -fno-trapping-math -ffp-contract=fast -Wall -Wextra -Wno-psabi"
).split()

WANTED_SETS = [name for name in os.environ.get("FUSED_RNN_ISAS", "").replace(" ", "").split(",") if name]
# Who names instruction sets wants the extension.
REQUIRE_CPP = os.environ.get("FUSED_RNN_REQUIRE_CPP", "0") not in ("", "0") or bool(WANTED_SETS)
EXTRA_FLAGS = shlex.split(os.environ.get("FUSED_RNN_CFLAGS", ""))

# Compiling one object takes a few hundred MB, so not as many at once as there are cores.
JOBS = 2

NOT_BUILT = """\
WARNING: fused_rnn is being installed without its C++ kernels: {reason}
WARNING: the slower Numba backend serves instead. For the C++ kernels, get a C++17 compiler and the Python headers
WARNING: (Debian: apt install g++ python3-dev) and install again. FUSED_RNN_REQUIRE_CPP=1 makes this an error."""


class Job(NamedTuple):
    """One object. Those of the same source differ in their directory."""

    source: str
    directory: str
    macros: list[tuple[str, str | None]]
    flags: list[str]


class Compiler:
    """Compiles objects and tells which are still those of their sources.

    Beside an object lies a list of the headers that it was made from, which the compiler writes, and a stamp: a hash of all
    that went into it, and of itself.
    """

    def __init__(self, command: BuildKernels, directory: str, include_dirs: list[str]) -> None:
        self.compiler = command.compiler
        self.directory = directory
        self.include_dirs = include_dirs
        # The version is of the compiler in PATH now; the variables add folders to those where headers are looked for.
        told = subprocess.run([*self.compiler.compiler_so_cxx, "--version"], capture_output=True, text=True, check=True).stdout
        searched = [os.environ.get(name, "") for name in ("CPATH", "CPLUS_INCLUDE_PATH", "GCC_EXEC_PREFIX")]
        self.made_by = [told, *self.compiler.compiler_so_cxx, *searched, *self.compiler.include_dirs, *include_dirs]

    def object_of(self, job: Job) -> Path:
        return Path(self.directory, job.directory, job.source).with_suffix(".o")

    def compile(self, job: Job) -> None:
        """Raises CompileError."""
        target, began = self.object_of(job), time.time_ns()
        stamp, listed = target.with_suffix(".stamp"), target.with_suffix(".d")
        stamp.unlink(missing_ok=True)
        try:
            self.compiler.compile(
                [job.source],
                output_dir=str(Path(self.directory, job.directory)),
                macros=job.macros,
                include_dirs=self.include_dirs,
                extra_postargs=[*job.flags, *EXTRA_FLAGS, "-MD", "-MF", str(listed)],
            )
        except CompileError as error:
            raise CompileError(f"{job.source} for {job.directory} did not compile; pip shows why with -v") from error
        # A source that was written meanwhile may not be what was compiled.
        if all(Path(name).stat().st_mtime_ns < began for name in _dependencies(listed)):
            stamp.write_text(self._stamp(job))

    def is_fresh(self, job: Job) -> bool:
        try:
            return self.object_of(job).with_suffix(".stamp").read_text() == self._stamp(job)
        except FileNotFoundError:
            return False

    def _stamp(self, job: Job) -> str:
        target = self.object_of(job)
        words = [*self.made_by, *(f"{name}={value}" for name, value in job.macros), *job.flags, *EXTRA_FLAGS]
        for name in _dependencies(target.with_suffix(".d")):
            words += [name, _hash(name)]
        return hashlib.sha256("\0".join([*words, hashlib.sha256(target.read_bytes()).hexdigest()]).encode()).hexdigest()


def _dependencies(listed: Path) -> list[str]:
    """The files of a rule of make, which escapes a blank and ends a line with a backslash."""
    _, _, files = listed.read_text().replace("\\\n", " ").partition(": ")
    return [name.replace("\0", " ") for name in files.replace("\\ ", "\0").split()]


@functools.cache
def _hash(name: str) -> str:
    return hashlib.sha256(Path(name).read_bytes()).hexdigest()


def write_cells() -> None:
    """Write the cells as C++, where what is there differs."""
    # Without the packages' own __init__: that of fused_rnn needs torch, which a build does not have.
    bare = ["fused_rnn", "fused_rnn.data", "fused_rnn.kernels", "fused_rnn.kernels.cpp"]
    for name in bare:
        package = types.ModuleType(name)
        package.__path__ = [str(Path(__file__).resolve().parent.joinpath(*name.split(".")))]
        sys.modules[name] = package
    try:
        cells = importlib.import_module("fused_rnn.cells")
        written = importlib.import_module("fused_rnn.kernels.cpp.derived")
        definitions = list(cells.BUILT_IN.values())
        texts = {"cells/cells.def": written.list_of(definitions), "cells/equations.h": written.header_of(definitions)}
    finally:
        for name in [each for each in sys.modules if each.split(".")[0] == "fused_rnn"]:
            del sys.modules[name]
    for name, text in texts.items():
        path = GENERATED / name
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


class WriteCells(Command):
    """``python setup.py write_cells``: for what compiles the kernels in another way."""

    description = "write the C++ header of the cells"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        write_cells()


class BuildKernels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        # Always linked again: the linker goes by the objects' times, which do not tell that the flags have changed.
        output.unlink(missing_ok=True)
        try:
            self._build(output)
        except (CompileError, LinkError, OptionError, PlatformError) as error:
            if REQUIRE_CPP:
                raise
            print(NOT_BUILT.format(reason=error), file=sys.stderr, flush=True)

    def _build(self, output: Path) -> None:
        if self.compiler.compiler_type != "unix":
            raise PlatformError(f"the kernels are written for GCC and Clang, not for {self.compiler.compiler_type!r}")
        try:
            import pybind11
        except ImportError as error:
            raise PlatformError(f"pybind11 is needed to build the extension: {error}") from error

        if not self._accepts([], "int main() {}"):
            raise CompileError(f"no working C++17 compiler ({self.compiler.compiler_so_cxx[0]})")
        if not self._accepts([f"-I{path}" for path in self.include_dirs], "#include <Python.h>\nint main() {}"):
            raise CompileError("the headers of Python are missing (Python.h)")
        openmp = ["-fopenmp"] if self._accepts(["-fopenmp"], "#include <omp.h>\nint main() { return omp_get_level(); }") else []
        if not openmp:
            print("fused_rnn: the compiler has no OpenMP; the kernels will run on one thread", file=sys.stderr)
        flags = COMPILE_FLAGS + (openmp or ["-Wno-unknown-pragmas"])

        built = self._instruction_sets()
        print(f"fused_rnn: instruction sets: {', '.join(built)}; OpenMP: {'yes' if openmp else 'no'}")

        have: list[tuple[str, str | None]] = [(f"FUSED_RNN_HAVE_{name.upper()}", None) for name in built]
        jobs = [Job(source, "common", have, flags) for source in COMMON]
        for name in built:
            isa: list[tuple[str, str | None]] = [("FUSED_RNN_ISA", name)]
            isa_flags = flags + INSTRUCTION_SETS[name][1]
            jobs += [Job(source, name, isa, isa_flags) for source in OF_SET]
            jobs += [
                Job(source, f"{name}-{element}", [*isa, ("FUSED_RNN_ELEMENT", element)], isa_flags)
                for source in KERNELS
                for element in ELEMENTS
            ]
        # An editable install would have them in a directory that is gone afterwards.
        kept = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}" if self.editable_mode else self.build_temp
        write_cells()
        compiler = Compiler(self, kept, ["csrc", str(GENERATED), pybind11.get_include()])
        stale = [job for job in jobs if self.force or not compiler.is_fresh(job)]
        print(f"fused_rnn: {len(stale)} of {len(jobs)} objects to compile")
        with ThreadPoolExecutor(JOBS) as pool:
            list(pool.map(compiler.compile, sorted(stale, key=lambda job: job.source != KERNELS[0])))
        self.compiler.link_shared_object(
            [str(compiler.object_of(job)) for job in jobs],
            str(output),
            libraries=self.get_libraries(self.extensions[0]),
            extra_postargs=openmp + EXTRA_FLAGS,
            build_temp=kept,
            target_lang="c++",
        )

    def _instruction_sets(self) -> list[str]:
        """Those wanted, or else all that the compiler knows."""
        known = [
            name
            for name, (macro, isa_flags) in INSTRUCTION_SETS.items()
            if self._accepts(isa_flags, f"#ifndef {macro}\n#error\n#endif\nint main() {{}}")
        ]
        for name in WANTED_SETS:
            if name not in INSTRUCTION_SETS:
                raise OptionError(f"FUSED_RNN_ISAS: expected some of {', '.join(INSTRUCTION_SETS)}, got {name!r}")
            if name not in known:
                raise OptionError(f"FUSED_RNN_ISAS: the compiler has no {name} for this processor, but {', '.join(known)}")
        return [name for name in known if not WANTED_SETS or name in WANTED_SETS]

    def _accepts(self, flags: list[str], source: str) -> bool:
        """Whether the compiler takes the flags and can link the program."""
        with tempfile.TemporaryDirectory() as directory:
            program = Path(directory, "probe.cpp")
            program.write_text(source + "\n")
            command = [*self.compiler.compiler_so_cxx, "-std=c++17", *flags, str(program), "-o", str(program.with_suffix(""))]
            try:
                return subprocess.run(command, capture_output=True, check=False).returncode == 0
            except OSError:
                return False


# "optional" lets setuptools go on without the file that build_extension did not make.
EXTENSION = Extension("fused_rnn._C", [*COMMON, *OF_SET, *KERNELS], depends=HEADERS, language="c++", optional=not REQUIRE_CPP)

setup(ext_modules=[EXTENSION], cmdclass={"build_ext": BuildKernels, "write_cells": WriteCells})

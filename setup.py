"""Builds ``fused_rnn._C``, one kernel source compiled once per instruction set. The rest is in pyproject.toml.

Environment:
    FUSED_RNN_REQUIRE_CPP=1: a failed build of the extension fails the install. Without it the package installs all the same
        and runs on Numba.
    FUSED_RNN_CFLAGS: flags appended to those of the compiler and the linker, such as "-O0 -g".
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError, PlatformError

KERNELS = "csrc/kernels.cpp"
# Everything else, the binding among it, is compiled once and without instruction set flags.
COMMON = sorted(path.as_posix() for path in Path("csrc").glob("*.cpp") if path.as_posix() != KERNELS)
HEADERS = sorted(path.as_posix() for pattern in ("*.h", "*.hpp", "*.inl", "*.def") for path in Path("csrc").glob(pattern))

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

REQUIRE_CPP = os.environ.get("FUSED_RNN_REQUIRE_CPP", "0") not in ("", "0")
EXTRA_FLAGS = shlex.split(os.environ.get("FUSED_RNN_CFLAGS", ""))

# Compiling one object takes a few hundred MB, so not as many at once as there are cores.
JOBS = 2

NOT_BUILT = """\
WARNING: fused_rnn is being installed without its C++ kernels: {reason}
WARNING: the slower Numba backend serves instead. For the C++ kernels, get a C++17 compiler and the Python headers
WARNING: (Debian: apt install g++ python3-dev) and install again. FUSED_RNN_REQUIRE_CPP=1 makes this an error."""


class BuildKernels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        # Always rebuilt: no time stamp knows that the compiler or its flags have changed.
        output.unlink(missing_ok=True)
        try:
            self._build(output)
        except (CompileError, LinkError, PlatformError) as error:
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

        built = [
            name
            for name, (macro, isa_flags) in INSTRUCTION_SETS.items()
            if self._accepts(isa_flags, f"#ifndef {macro}\n#error\n#endif\nint main() {{}}")
        ]
        print(f"fused_rnn: instruction sets: {', '.join(built)}; OpenMP: {'yes' if openmp else 'no'}")

        have: list[tuple[str, str | None]] = [(f"FUSED_RNN_HAVE_{name.upper()}", None) for name in built if name != "baseline"]
        jobs = [(source, "common", have, flags) for source in COMMON]
        jobs += [(KERNELS, name, [("FUSED_RNN_ISA", name)], flags + INSTRUCTION_SETS[name][1]) for name in built]

        def compile_one(job: tuple[str, str, list[tuple[str, str | None]], list[str]]) -> str:
            source, directory, macros, job_flags = job
            try:
                (compiled,) = self.compiler.compile(
                    [source],
                    output_dir=str(Path(self.build_temp, directory)),
                    macros=macros,
                    include_dirs=["csrc", pybind11.get_include()],
                    extra_postargs=job_flags + EXTRA_FLAGS,
                )
            except CompileError as error:
                raise CompileError(f"{source} for {directory} did not compile; pip shows why with -v") from error
            return str(compiled)

        with ThreadPoolExecutor(JOBS) as pool:
            objects = list(pool.map(compile_one, jobs))
        self.compiler.link_shared_object(
            objects,
            str(output),
            libraries=self.get_libraries(self.extensions[0]),
            extra_postargs=openmp + EXTRA_FLAGS,
            build_temp=self.build_temp,
            target_lang="c++",
        )

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
EXTENSION = Extension("fused_rnn._C", [*COMMON, KERNELS], depends=HEADERS, language="c++", optional=not REQUIRE_CPP)

setup(ext_modules=[EXTENSION], cmdclass={"build_ext": BuildKernels})

"""Compiles CUDA kernels for the CPU and runs them: the Python side of cuhost.h and ptx_to_cpp.py.

Two layers, the same driver program over both:

    source   dbf-kernels.cuh, compiled by g++ against cuhost.h
    ptx      dbf-kernels.cuh, compiled by nvcc to PTX for one architecture, translated to C++ by ptx_to_cpp.py

Builds: `plain` (optimised), `asan` (AddressSanitizer and UndefinedBehaviorSanitizer, of the source; the translated PTX
checks bounds and alignment by itself) and `tsan` (ThreadSanitizer). ccache is used when there is one.
"""

import os
import shutil
import subprocess
from pathlib import Path

import ptx_to_cpp

from dbf_gguf import machine

HERE = Path(__file__).parent

# -ffp-contract=off: where nvcc contracts a product and a sum the PTX says so, and the source layer does without.
# -g1: the line numbers that a sanitizer's report needs, and no more.
BUILDS = {
    "plain": ["-O1"],
    "asan": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-O1", "-g1", "-fsanitize=thread"],
}
# The flags of ggml-cuda's own build that change what nvcc emits.
NVCC_FLAGS = ["-std=c++17", "-O3", "-use_fast_math", "-extended-lambda"]
PTX_ARCHS = (75, 80, 90, 120)

ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0",  # a kernel that is stopped half-way frees nothing
    "TSAN_OPTIONS": "halt_on_error=1",
}


def run(*command, timeout: float = 900) -> subprocess.CompletedProcess:
    """Runs a program. Where the kernel places it at addresses that ThreadSanitizer cannot handle, once more without."""
    command = [str(c) for c in command]
    options = {"capture_output": True, "text": True, "timeout": timeout, "env": {**os.environ, **ENVIRONMENT}}
    result = subprocess.run(command, **options)
    if "unexpected memory mapping" in result.stderr:
        result = subprocess.run(["setarch", "-R", *command], **options)
    return result


class Emulator:
    """Compiled objects in one folder, each made once. `root` is a CUDA toolkit, for its headers and nvcc."""

    def __init__(self, root: Path, folder: Path, kernels: Path):
        self.root = root
        self.folder = folder
        self.kernels = kernels  # the folder of dbf-kernels.cuh and dbf-launch.h
        self.compiler = machine.compiler("CXX", "g++", "c++")
        if shutil.which("ccache"):
            self.compiler.insert(0, "ccache")

    def _compile(self, source: Path, name: str, *flags) -> Path:
        """An object file; `name` is what tells it from others made of the same source."""
        target = self.folder / name
        if not target.exists():
            folders = (HERE, self.kernels, self.root / "include", self.root / "include" / "cccl")
            always = ["-std=c++17", "-DDBF_ON_CPU", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
            include = (f"-I{p}" for p in folders)
            result = run(*self.compiler, *always, *include, *flags, "-x", "c++", "-c", source, "-o", target)
            assert result.returncode == 0, result.stderr
        return target

    def runtime(self, build: str) -> Path:
        """The fibers. No sanitizer in their own code, see cuhost.cpp."""
        tell = [] if build == "plain" else [f"-DCUHOST_{build.upper()}"]
        return self._compile(HERE / "cuhost.cpp", f"cuhost-{build}.o", "-O2", *tell)

    def program(self, source: Path, build: str, *objects: Path, name: str | None = None) -> Path:
        """`source` linked with the runtime and other objects."""
        main = self._compile(source, f"{source.stem}-{build}.o", *BUILDS[build])
        return self._link(self.folder / (name or f"{source.stem}-{build}"), build, main, *objects)

    def _link(self, target: Path, build: str, *objects: Path) -> Path:
        if not target.exists():
            result = run(self.compiler[-1], *BUILDS[build], *objects, self.runtime(build), "-o", target)
            assert result.returncode == 0, result.stderr
        return target

    def ptx(self, source: Path, arch: int) -> str:
        """What nvcc emits for `source`."""
        target = self.folder / f"{source.stem}-{arch}.ptx"
        if not target.exists():
            include = [f"-I{HERE}", f"-I{self.kernels}"]
            command = [self.root / "bin/nvcc", *NVCC_FLAGS, *include, f"-arch=compute_{arch}", "-ptx"]
            result = run(*command, source, "-o", target)
            assert result.returncode == 0, result.stderr
        return target.read_text()

    def ptx_object(self, source: Path, arch: int, build: str) -> Path:
        """The same as an object file for this CPU."""
        cpp = self.folder / f"{source.stem}-ptx{arch}.cpp"
        if not cpp.exists():
            cpp.write_text(ptx_to_cpp.translate(self.ptx(source, arch)))
        return self._compile(cpp, f"{source.stem}-ptx{arch}-{build}.o", *BUILDS[build], "-Og")  # quick to compile

    def source_object(self, source: Path, build: str) -> Path:
        return self._compile(source, f"{source.stem}-source-{build}.o", *BUILDS[build])

    def driver_object(self, build: str) -> Path:
        """The driver and the host side of the op. Not optimised, see driver.cpp."""
        return self._compile(HERE / "driver.cpp", f"driver-{build}.o", *BUILDS[build], "-O0")

    def driver(self, build: str, *objects: Path, name: str) -> Path:
        """The program of a driver and kernels."""
        return self._link(self.folder / name, build, *objects)

    def with_kernels(self, kernels: Path, folder: Path) -> "Emulator":
        """The same for another copy of the kernels' folder."""
        other = Emulator(self.root, folder, kernels)
        other.runtime = self.runtime
        return other

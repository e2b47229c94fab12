"""The CUDA compiler from PyPI: nvcc, its libraries and the tools that read machine code, on a machine without any GPU.

NVIDIA publishes the parts of its toolkit as wheels. Their common folder `nvidia/cu13` is nearly a toolkit root. It
lacks what an installer would make: the folder `lib64`, library names without a version, and the driver's library
`libcuda.so`, which comes with a driver and not with a toolkit. `toolkit_root` unpacks the wheels into one folder of the
cache and adds these, so that nvcc works on its own and CMake finds a complete CUDA toolkit there.

The wheels are pinned by version and sha256. About 105 MB are fetched, once. cuBLAS is another 420 MB. Every file of
ggml-cuda includes its headers and the link needs the library, so only `toolkit_root(cublas=True)` has it.

Alone: python tests/cuda/toolchain.py    (prints the folder; with --cublas the one that has cuBLAS as well)
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from dbf_gguf import fetch, llama_cpp
from dbf_gguf.errors import DBFError
from dbf_gguf.paths import cache_dir

# requirement -> sha256 of the wheel for each machine
_WHEELS = {
    "nvidia-cuda-nvcc==13.0.88": {
        "x86_64": "56fe502eb77625a12f25172caa3cdddb4e4c8ba2c8c17dba44b164761b380f03",
        "aarch64": "c7ff28f86a24effdc6c034fa15230c549a273e4771b10a7fec14996f8cf3307f",
    },
    "nvidia-nvvm==13.0.88": {
        "x86_64": "c5f41ffeb6466944a026dfa5317d7d85355c119bbec279205d22f1869d1054e0",
        "aarch64": "c4376a291d72d22a315d9d2f69bdae8f8cd83a627f75bad395cee49a0fe65dc1",
    },
    "nvidia-cuda-crt==13.0.88": {
        "x86_64": "2c8043c7c9e02492716426e9919fc78d2c5b3b2a7a768a88e952676b08aa55a4",
        "aarch64": "ee2ea2a97073e02ee62bb27841f437332be2c248e3eac013df07997ada39c003",
    },
    "nvidia-cuda-runtime==13.0.96": {
        "x86_64": "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548",
        "aarch64": "ef9bcbe90493a2b9d810e43d249adb3d02e98dd30200d86607d8d02687c43f55",
    },
    "nvidia-cuda-cccl==13.0.85": {
        "x86_64": "e0da7ad981f3a8aff08241b5bfc1af868742a63e2762f53a5171c492ef242649",
        "aarch64": "6f0203e29fed809ee2b7fe9b1344df66ecab990c37d6a2e0e189b26d6c97ed7c",
    },
    # The first of these on PyPI; they read the output of every older compiler.
    "nvidia-cuda-cuobjdump==13.2.51": {
        "x86_64": "95c69d3ddf0c2c1f535ec44c3433a66aeee19f588d9d22f73356e20b25f12b50",
        "aarch64": "f2f3bc433a91f4ff910841f2de8bc9e7ce92556602d6e363054fe2bb62a587c4",
    },
    "nvidia-cuda-nvdisasm==13.2.51": {
        "x86_64": "5a7acf77c55d6d2911ed6155d4d5bc156ffadf9df7a68a89b0c1155f4b13688c",
        "aarch64": "483c8f652c1ca006135584b4faf7ea1d2bafe4c40ec1c9ef57a04c6acfbdd57f",
    },
}
_CUBLAS = {
    "nvidia-cublas==13.0.2.14": {
        "x86_64": "0cf238ffdbe46c00cb9aa98e7bca745c223a5ca5a53e686ac8b3e5a08fe80d6c",
        "aarch64": "17165c296de689662b96e0ef4f21dfbff3092ff00d0e3e59470f5acb08c0f87d",
    },
}

_LAYOUT = 1  # to be counted up when `_unpack` or `_complete` makes other folders of the same wheels

# What ggml-cuda calls of the driver. CMake wants a libcuda to link against; nobody here runs it.
_DRIVER_FUNCTIONS = (
    "cuGetErrorString",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuMemCreate",
    "cuMemAddressReserve",
    "cuMemAddressFree",
    "cuMemMap",
    "cuMemUnmap",
    "cuMemRelease",
    "cuMemSetAccess",
    "cuMemGetAllocationGranularity",
)
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


def _unpack(wheel: Path, target: Path) -> None:
    """The files below `nvidia/cu13` of a wheel into `target`, with the permissions that the archive states."""
    prefix = "nvidia/cu13/"
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                if member.is_dir() or not member.filename.startswith(prefix):
                    continue
                path = target / member.filename[len(prefix) :]
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as src, open(path, "wb") as dst:
                    shutil.copyfileobj(src, dst, 1 << 20)
                # pip marks the programs by the same bits; wheels made on Windows lack them, hence the folder's name
                executable = (member.external_attr >> 16) & 0o111 or path.parent.name == "bin"
                path.chmod(0o755 if executable else 0o644)
    except zipfile.BadZipFile:
        raise DBFError(f"{wheel} is damaged: delete it, and it is fetched again") from None


def _complete(root: Path) -> None:
    """Adds to the unpacked wheels what nvcc and CMake expect beside them."""
    (root / "lib64").symlink_to("lib")
    for path in sorted((root / "lib").glob("*.so.*")):
        plain = root / "lib" / (path.name.partition(".so.")[0] + ".so")
        if not plain.exists():
            plain.symlink_to(path.name)
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise DBFError("no C compiler (apt-get install build-essential)")
    stubs = root / "lib" / "stubs"
    stubs.mkdir(exist_ok=True)
    source = "".join(f"int {name}(void) {{ return {_NO_DEVICE}; }}\n" for name in _DRIVER_FUNCTIONS)
    command = [compiler, "-shared", "-fPIC", "-xc", "-", "-Wl,-soname,libcuda.so.1", "-o", str(stubs / "libcuda.so")]
    run = subprocess.run(command, input=source, capture_output=True, text=True)
    if run.returncode != 0:
        raise DBFError(f"{compiler} could not make a stub of libcuda: {run.stderr.strip().splitlines()[-1]}")
    (stubs / "libcuda.so.1").symlink_to("libcuda.so")  # what a program linked with it asks for


def toolkit_root(cublas: bool = False) -> Path:
    """A folder that nvcc and CMake accept as CUDA 13.0 toolkit: bin/nvcc, bin/cuobjdump, bin/nvdisasm, include, lib64.

    Fetched, checked and unpacked once; it appears in the cache under its name only when complete.
    Raises DBFError, one line, when it cannot be had: another kind of machine, PyPI out of reach, no room.
    """
    machine = platform.machine()
    wheels = _WHEELS | _CUBLAS if cublas else _WHEELS
    if sys.platform != "linux" or machine not in ("x86_64", "aarch64"):
        raise DBFError(f"no CUDA toolkit: NVIDIA's wheels are for Linux on x86_64 and aarch64, not {machine}")
    recipe = hashlib.sha256(repr((_LAYOUT, machine, sorted(wheels.items()))).encode())
    folder = cache_dir() / "cuda"
    folder.mkdir(parents=True, exist_ok=True)
    root = folder / f"13.0-{recipe.hexdigest()[:12]}"
    if root.is_dir():
        return root
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if root.is_dir():
            return root
        try:
            with tempfile.TemporaryDirectory(dir=folder, prefix="part.") as tmp:
                part = Path(tmp) / "root"
                for requirement, sha256 in wheels.items():
                    _unpack(fetch.pypi_archive(requirement, sha256[machine]), part)
                _complete(part)
                os.replace(part, root)
        except DBFError as error:
            raise DBFError(f"no CUDA toolkit: {error}") from None
        except OSError as error:
            raise DBFError(f"no CUDA toolkit: {error.strerror} ({error.filename})") from None
    return root


@contextlib.contextmanager
def as_nvcc(root: Path) -> Iterator[None]:
    """For as long as it lasts, `dbf_gguf.llama_cpp` takes the nvcc of this toolkit."""
    before = os.environ.get("CUDACXX")
    os.environ["CUDACXX"] = str(root / "bin" / "nvcc")
    try:
        yield
    finally:
        del os.environ["CUDACXX"]
        if before is not None:
            os.environ["CUDACXX"] = before


class Backend:
    """ggml-cuda as `dbf-gguf build --cuda` would compile it, but one file at a time.

    root           a toolkit with cuBLAS
    folder         empty; cmake configures it, in half a minute
    architectures  "75,89"
    """

    def __init__(self, root: Path, folder: Path, architectures: str):
        self.folder = folder
        with as_nvcc(root):
            architectures = llama_cpp.cuda_architectures(architectures)
            tree = llama_cpp.source_tree()
            llama_cpp.configure(tree, folder, architectures, CMAKE_EXPORT_COMPILE_COMMANDS="ON")
        self._commands = json.loads((folder / "compile_commands.json").read_text())
        self._done: dict[str, tuple[Path, str]] = {}

    def command(self, source: str) -> list[str]:
        """How cmake would have a file of the folder ggml-cuda compiled."""
        (entry,) = (e for e in self._commands if e["file"].endswith(f"ggml/src/ggml-cuda/{source}"))
        return shlex.split(entry["command"])

    def compile(self, source: str, *flags: str) -> tuple[Path, str]:
        """The object file and what the compiler had to say; made once. Raises DBFError when it does not compile."""
        name = " ".join([source, *flags])
        if name not in self._done:
            command = self.command(source)
            target = self.folder / f"{len(self._done)}-{source}.o"
            command[command.index("-o") + 1] = str(target)
            run = subprocess.run([*command, *flags, "--threads", "2"], cwd=self.folder, capture_output=True, text=True)
            if run.returncode != 0:
                raise DBFError(f"{source} does not compile: {run.stderr[-5000:]}")
            self._done[name] = target, run.stderr
        return self._done[name]


if __name__ == "__main__":
    try:
        print(toolkit_root(cublas="--cublas" in sys.argv[1:]))
    except DBFError as error:
        sys.exit(f"error: {error}")

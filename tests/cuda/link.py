"""`make cuda-link`: compiles and links all of ggml-cuda with the toolkit from wheels, and loads the library.

One architecture is enough: which functions exist does not depend on it, and tests/test_cuda_build.py compiles our own
file for all. The linker is told to leave nothing undefined (-z defs); without that a shared library links however much
it lacks, and fails on the user's machine. Then the library is loaded, with the stub of the driver beside it.

About 30 minutes of one core: once for a release, not in `make test`. Objects are kept for the next run.

    python tests/cuda/link.py [--jobs N]
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import toolchain

from dbf_gguf import llama_cpp
from dbf_gguf.errors import DBFError

ARCHITECTURE = "89-real"


def link(jobs: int) -> Path:
    """The linked libggml-cuda.so. Raises DBFError when the wheels cannot be had or when it does not compile or link."""
    root = toolchain.toolkit_root(cublas=True)
    folder = llama_cpp._key_dir() / "cuda-link"
    options = {"GGML_NATIVE": "OFF", "LLAMA_BUILD_TESTS": "OFF", "CMAKE_SHARED_LINKER_FLAGS": "-Wl,-z,defs"}
    with toolchain.as_nvcc(root):
        log, env = llama_cpp.configure(llama_cpp.source_tree(), folder, ARCHITECTURE, **options)
    command = ["cmake", "--build", str(folder), "-j", str(jobs), "--target", "ggml-cuda"]
    llama_cpp._run(command, log, env, f"building ggml-cuda for {ARCHITECTURE} with {jobs} jobs (up to half an hour)")
    return folder / "bin" / "libggml-cuda.so"


def undefined(library: Path) -> list[str]:
    """ggml's own functions that the library expects of others, demangled."""
    command = ["nm", "--dynamic", "--demangle", "--undefined-only", str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in (line.split(maxsplit=1)[1] for line in lines) if name.startswith("ggml_cuda_")]


def loads(library: Path) -> str:
    """"" when a process can load the library with all its symbols at once, else the loader's complaint."""
    stubs = toolchain.toolkit_root(cublas=True) / "lib"
    env = os.environ | {"LD_LIBRARY_PATH": f"{stubs}:{stubs / 'stubs'}:{library.parent}"}
    program = "import ctypes, os, sys; ctypes.CDLL(sys.argv[1], os.RTLD_NOW).ggml_backend_cuda_reg"
    run = subprocess.run([sys.executable, "-c", program, str(library)], capture_output=True, text=True, env=env)
    return "" if run.returncode == 0 else (run.stderr.splitlines() or [f"status {run.returncode}"])[-1]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=llama_cpp.default_jobs(), help="parallel compilers")
    arguments = parser.parse_args(argv)
    start = time.monotonic()
    try:
        library = link(arguments.jobs)
    except DBFError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    names, complaint = undefined(library), loads(library)
    minutes = (time.monotonic() - start) / 60
    print(f"{library}: {library.stat().st_size / 1e6:.0f} MB, {minutes:.1f} minutes")
    print(f"undefined ggml_cuda_ symbols: {', '.join(names) or 'none'}")
    print(f"loads: {complaint or 'yes'}")
    return 1 if names or complaint else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The CUDA backend as far as a compiler can vouch for it: the toolkit, what is compiled, its symbols, its machine code.

Run alone: pytest tests/test_cuda_build.py          (a minute or two; the first time the wheels are fetched as well)
Without compiling: pytest tests/test_cuda_build.py -k command

No GPU takes part. What follows from these tests and what does not:
- ggml-cuda.cu (upstream's file, with our hooks) and dbf.cu compile for every architecture, by the very command that
  `dbf-gguf build --cuda` would run.
- Linked with each other, ggml-base and the CUDA libraries they lack nothing but functions of upstream's other files in
  that folder. Those files are not compiled here: half an hour for one architecture. That they define what is lacking is
  looked up by name in their text. `make cuda-link` compiles and links all of it.
- The machine code keeps within what docs/gpu-model.md assumes.
"""

import re
import subprocess
from pathlib import Path

import link
import pytest
import sass
import toolchain
from click.testing import CliRunner

from dbf_gguf import llama_cpp, machine
from dbf_gguf.cli import cli
from dbf_gguf.errors import DBFError

# --- the toolkit


def test_toolkit_compiles(cuda_toolkit, tmp_path):
    (tmp_path / "a.cu").write_text("#include <cuda_fp16.h>\n__global__ void f(half * x) { x[threadIdx.x] *= x[1]; }\n")
    subprocess.run([cuda_toolkit / "bin/nvcc", "-arch=sm_75", "-cubin", "a.cu"], cwd=tmp_path, check=True)
    (kernel,) = sass.kernels(cuda_toolkit, tmp_path / "a.cubin")
    assert (kernel.arch, kernel.name) == (75, "f")
    assert kernel.count("^HMUL2") == 1 and kernel.spills == 0


def test_toolkit_is_kept_and_only_shown_when_complete(cuda_toolkit, tmp_path, monkeypatch):
    assert toolchain.toolkit_root() == cuda_toolkit
    monkeypatch.setenv("DBF_GGUF_CACHE", str(tmp_path))
    monkeypatch.setattr(toolchain.fetch, "pypi_archive", lambda requirement, sha256: _raise(DBFError("no network")))
    with pytest.raises(DBFError, match="^no CUDA toolkit: no network$"):
        toolchain.toolkit_root()
    (tmp_path / "wheel").write_bytes(b"cut off")
    monkeypatch.setattr(toolchain.fetch, "pypi_archive", lambda requirement, sha256: tmp_path / "wheel")
    with pytest.raises(DBFError, match="^no CUDA toolkit: .*wheel is damaged"):
        toolchain.toolkit_root()
    assert [path.name for path in (tmp_path / "cuda").iterdir()] == ["lock"]


def test_toolkit_names_a_machine_without_wheels(monkeypatch):
    monkeypatch.setattr(toolchain.platform, "machine", lambda: "riscv64")
    with pytest.raises(DBFError, match="^no CUDA toolkit: .*x86_64 and aarch64, not riscv64$"):
        toolchain.toolkit_root()


def _raise(error):
    raise error


# --- the command line


@pytest.fixture
def build_command(monkeypatch, tmp_path):
    """`dbf-gguf build ARGUMENTS` up to the build itself, which is only noted: (result, what was built)."""
    built = []

    def note(tree, folder, cuda_arch, jobs):
        (folder / "bin").mkdir(parents=True, exist_ok=True)
        for name in llama_cpp.TARGETS:
            (folder / "bin" / name).touch()
        (folder / ".complete").write_text(cuda_arch)
        built.append((folder.name, cuda_arch))

    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nprintf 'sm_%s\\n' 80 89 120\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("DBF_GGUF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDACXX", str(nvcc))
    monkeypatch.setattr(llama_cpp, "source_tree", lambda source: tmp_path)
    monkeypatch.setattr(llama_cpp, "_build", note)
    monkeypatch.setattr(llama_cpp, "cuda_capabilities", lambda: [])
    return lambda *arguments: (CliRunner().invoke(cli, ["build", *arguments]), built)


def test_command_builds_for_the_cards_of_the_machine(build_command, monkeypatch):
    monkeypatch.setattr(llama_cpp, "cuda_capabilities", lambda: [89, 120])
    result, built = build_command("--cuda")
    assert result.exit_code == 0 and built == [("build-cuda", "89-real;120-real")]
    assert result.output.splitlines()[-1] == str(llama_cpp.bin_dir())
    monkeypatch.setattr(llama_cpp, "cuda_capabilities", lambda: [])
    assert build_command("--cuda")[0].exit_code == 0 and len(built) == 1  # a finished build asks for no card


def test_command_builds_for_named_cards(build_command):
    _, built = build_command("--cuda", "--cuda-arch", "80, 89-virtual;120a")
    assert built == [("build-cuda", "80-real;89-virtual;120a-real")]
    build_command("--cuda", "--cuda-arch", "80;89-virtual,120a")
    assert len(built) == 1
    build_command("--cuda", "--cuda-arch", "89")
    assert built[1:] == [("build-cuda", "89-real")]
    build_command()
    assert built[2:] == [("build", "")]
    assert llama_cpp.tool("llama-cli").parent.parent.name == "build-cuda"  # which runs on the CPU as well


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cuda",), "no NVIDIA card is visible.*--cuda-arch 89"),
        (("--cuda", "--cuda-arch", "ada"), "'ada' is no architecture.*86,89,120"),
        (("--cuda", "--cuda-arch", "89,"), "'' is no architecture"),
        (("--cuda", "--cuda-arch", "61"), "nvcc knows sm_80 to sm_120 but no sm_61"),
        (("--cuda-arch", "89"), "--cuda-arch goes with --cuda"),
    ],
)
def test_command_refuses(build_command, arguments, message):
    result, built = build_command(*arguments)
    assert result.exit_code != 0 and not built
    error = str(result.exception) if isinstance(result.exception, DBFError) else result.output
    assert re.search(message, error)
    assert not isinstance(result.exception, DBFError) or "\n" not in error


def test_command_names_a_compiler_that_does_not_work(build_command, monkeypatch, tmp_path):
    (tmp_path / "nvcc").write_text("#!/bin/sh\necho broken >&2; exit 1\n")
    result, built = build_command("--cuda", "--cuda-arch", "89")
    assert re.fullmatch(r".*/nvcc does not work: broken", str(result.exception)) and not built


def test_command_asks_the_driver_for_cards(monkeypatch, tmp_path):
    """Through a library that pretends to be the driver of three cards, the second of which does not answer."""
    assert isinstance(machine.cuda_capabilities(), list)
    monkeypatch.setattr(machine, "CUDA_DRIVER", str(tmp_path / "no-such-library.so"))
    assert machine.cuda_capabilities() == []
    source = """
        int cuInit(unsigned flags) { return STATUS; }
        int cuDeviceGetCount(int * count) { *count = 3; return 0; }
        int cuDeviceGet(int * device, int index) { *device = 10 + index; return index == 1; }
        int cuDeviceGetAttribute(int * value, int attribute, int device) {
            *value = attribute == 75 ? (device == 10 ? 12 : 8) : attribute == 76 ? (device == 10 ? 0 : 9) : -1;
            return 0;
        }
    """
    for status, expected in ((0, [89, 120]), (100, [])):
        library = tmp_path / f"driver{status}.so"
        command = ["cc", "-shared", "-fPIC", "-xc", "-", f"-DSTATUS={status}", "-o", library]
        subprocess.run(command, input=source, text=True, check=True)
        monkeypatch.setattr(machine, "CUDA_DRIVER", str(library))
        assert machine.cuda_capabilities() == expected


# --- what is compiled


@pytest.fixture(scope="session")
def backend(cuda_toolkit_with_cublas, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda") / "build"
    return toolchain.Backend(cuda_toolkit_with_cublas, folder, ",".join(map(str, sass.ARCHITECTURES)))


def test_cmake_takes_the_toolkit_as_a_whole(backend, cuda_toolkit_with_cublas):
    """Not the compiler from one toolkit and the libraries from another, which the machine may have too."""
    cache = (backend.folder / "CMakeCache.txt").read_text()
    for name in ("CUDA_CUDART", "CUDA_cublas_LIBRARY", "CUDA_cuda_driver_LIBRARY"):
        (path,) = re.findall(rf"^{name}:FILEPATH=(.*)$", cache, re.MULTILINE)
        assert Path(path).resolve().is_relative_to(cuda_toolkit_with_cublas), name


@pytest.mark.parametrize("source", ["dbf.cu", "ggml-cuda.cu"])
def test_compiles_for_every_architecture(backend, source, cuda_toolkit, tmp_path):
    target, warnings = backend.compile(source)
    assert "dbf" not in "\n".join(line for line in warnings.splitlines() if "warning" in line)
    found = {int(re.search(r"sm_(\d+)", path.name)[1]) for path in sass.cubins(cuda_toolkit, target, tmp_path)}
    assert found == set(sass.ARCHITECTURES)


def test_lacks_only_functions_of_other_files(backend, cuda_toolkit_with_cublas, llama_bin, patched_tree, tmp_path):
    """The linker says what is missing; a function that our hook calls and nobody defines would be among it."""
    objects = [backend.compile(source)[0] for source in ("ggml-cuda.cu", "dbf.cu")]
    libraries = cuda_toolkit_with_cublas / "lib"
    command = ["c++", "-shared", "-o", tmp_path / "partial.so", *objects, f"-L{llama_bin}", "-lggml-base"]
    command += [f"-L{libraries}", f"-L{libraries / 'stubs'}", "-lcudart", "-lcublas", "-lcuda"]
    command += ["-Wl,-z,defs", "-Wl,--warn-unresolved-symbols", "-Wl,--demangle"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    missing = set(re.findall(r"undefined reference to `(.*)'", run.stderr))
    assert len(missing) > 50  # upstream's own operators: the linker does tell
    text = "\n".join(
        path.read_text()
        for path in (patched_tree / "ggml/src/ggml-cuda").rglob("*.cu")
        if path.name not in ("ggml-cuda.cu", "dbf.cu")
    )
    undefined = sorted(symbol for symbol in missing if not defines(text, symbol.partition("(")[0]))
    assert undefined == []


def defines(text: str, function: str) -> bool:
    """Whether a C++ text has the body of a function: its name at the top level, parameters, an opening brace."""
    return bool(re.search(rf"^[a-z][^\n;{{}}=]*[\s*&]{re.escape(function)}\([^;{{}}]*\)\s*\{{", text, re.MULTILINE))


def test_definitions_are_told_from_declarations():
    text = "void f(int a);\nstatic bool g(\n    int a) {\n    return h(a);\n}\n"
    assert defines(text, "g") and not defines(text, "f") and not defines(text, "h") and not defines(text, "")


def test_link_check_sees_what_is_missing(cuda_toolkit_with_cublas, tmp_path):
    """What `make cuda-link` looks at, on a library of three lines."""
    source = "int ggml_cuda_here(void) { return 0; } int other(void); int ggml_cuda_gone(void);"
    for name, body in (("good", "ggml_cuda_here()"), ("bad", "ggml_cuda_gone() + other()")):
        program = f"{source} int ggml_backend_cuda_reg(void) {{ return {body}; }}"
        command = ["cc", "-shared", "-fPIC", "-xc", "-", "-o", tmp_path / f"{name}.so"]
        subprocess.run(command, input=program, text=True, check=True)
    assert link.undefined(tmp_path / "good.so") == [] and link.loads(tmp_path / "good.so") == ""
    assert link.undefined(tmp_path / "bad.so") == ["ggml_cuda_gone"]
    assert "undefined symbol" in link.loads(tmp_path / "bad.so")


# --- HIP and MUSA

HEADERS = {
    "GGML_USE_HIP": ("hip/hip_runtime.h", "hipblas/hipblas.h", "hip/hip_fp16.h", "hip/hip_bf16.h"),
    "GGML_USE_MUSA": ("musa_runtime.h", "musa.h", "mublas.h", "musa_bf16.h", "musa_fp16.h"),
}


@pytest.mark.parametrize("macro", HEADERS)
def test_amd_and_moore_threads_get_no_kernels(macro, patched_tree, tmp_path):
    """Their builds compile the same folder. Neither toolkit is here: empty headers stand for theirs, the preprocessor
    says what of dbf.cu is left, and that must be plain C++ that knows nothing of a GPU."""
    for name in HEADERS[macro]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    ggml = patched_tree / "ggml"
    include = [f"-I{path}" for path in (tmp_path, ggml / "include", ggml / "src")]
    command = ["c++", "-std=c++17", f"-D{macro}", "-D__HIP_PLATFORM_AMD__", "-xc++", *include, ggml / "src/ggml-cuda/dbf.cu"]
    text = subprocess.run([*command, "-E"], capture_output=True, text=True, check=True).stdout
    ours, file = [], ""
    for line in text.splitlines():
        if match := re.match(r'# \d+ "(.*)"', line):
            file = Path(match[1]).name
        elif re.match(r"dbf\b.*\.(cu|cuh|h)$", file):
            ours.append(line)
    ours = "\n".join(ours)
    assert "ggml_cuda_op_dbf_mul_mat" in ours
    assert not re.search(r"__global__|__device__|\basm\b|<<<|cudaFuncSetAttribute", ours)
    plain = f'#include "ggml.h"\n#include "ggml-impl.h"\nstruct ggml_backend_cuda_context;\n{ours}'
    compiled = subprocess.run(
        ["c++", "-std=c++17", "-Wall", "-Werror", *include, "-xc++", "-fsyntax-only", "-"],
        input=plain, capture_output=True, text=True,
    )  # fmt: skip
    assert compiled.returncode == 0, compiled.stderr

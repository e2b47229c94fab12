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
from dataclasses import replace
from pathlib import Path

import gpu_model
import link
import pytest
import sass
import toolchain
from click.testing import CliRunner

from dbf_gguf import llama_cpp, machine
from dbf_gguf.cli import cli
from dbf_gguf.errors import DBFError
from dbf_gguf.paths import data_dir

SOURCES = data_dir("cuda_patches") / "src/ggml/src/ggml-cuda"
INSTRUCTIONS = 24  # a thread's for 32 signs, in the decode kernels

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
    assert result.output.splitlines()[-1].endswith("/build-cuda/bin")
    monkeypatch.setattr(llama_cpp, "cuda_capabilities", lambda: [])
    assert build_command("--cuda")[0].exit_code == 0 and len(built) == 1  # a finished build asks for no card


def test_command_builds_for_named_cards(build_command):
    _, built = build_command("--cuda", "--cuda-arch", "80, 89-virtual;120a")
    assert built == [("build-cuda", "80-real;89-virtual;120a-real")]
    build_command("--cuda", "--cuda-arch", "80;89-virtual,120a")
    assert len(built) == 1
    build_command("--cuda", "--cuda-arch", "89")
    assert built[1:] == [("build-cuda", "89-real")]


def test_command_leaves_the_right_build_in_use(build_command, monkeypatch):
    def in_use(driver):
        monkeypatch.setattr(llama_cpp, "cuda_driver", lambda: driver)
        return llama_cpp.tool("llama-cli").parent.parent.name

    build_command("--cuda", "--cuda-arch", "89")
    assert in_use(None) == "build-cuda"
    _, built = build_command()
    assert built == [("build-cuda", "89-real"), ("build", "")]
    assert in_use(None) == "build"  # programs of the other do not start without the driver
    assert in_use(object()) == "build-cuda"


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
    libraries = cuda_toolkit_with_cublas / "lib"
    text = "\n".join(
        path.read_text()
        for path in (patched_tree / "ggml/src/ggml-cuda").rglob("*.cu")
        if path.name not in ("ggml-cuda.cu", "dbf.cu")
    )

    def undefined(*sources: str) -> list[str]:
        objects = [backend.compile(source)[0] for source in sources]
        command = ["c++", "-shared", "-o", tmp_path / "partial.so", *objects, f"-L{llama_bin}", "-lggml-base"]
        command += [f"-L{libraries}", f"-L{libraries / 'stubs'}", "-lcudart", "-lcublas", "-lcuda"]
        command += ["-Wl,-z,defs", "-Wl,--warn-unresolved-symbols", "-Wl,--demangle"]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        missing = set(re.findall(r"undefined reference to `(.*)'", run.stderr))
        assert len(missing) > 50  # upstream's own operators: the linker does tell
        return sorted(symbol for symbol in missing if not defines(text, symbol.partition("(")[0]))

    assert undefined("ggml-cuda.cu", "dbf.cu") == []
    assert [symbol.partition("(")[0] for symbol in undefined("ggml-cuda.cu")] == [
        "ggml_cuda_dbf_supports_op",
        "ggml_cuda_op_dbf_mul_mat",
    ]


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


# --- the machine code


@pytest.fixture(scope="session")
def kernels(backend, cuda_toolkit, tmp_path_factory):
    """All kernels of dbf.cu, for all architectures."""
    file, _ = backend.compile("dbf.cu")
    folder = tmp_path_factory.mktemp("cubins")
    return [k for cubin in sass.cubins(cuda_toolkit, file, folder) for k in sass.kernels(cuda_toolkit, cubin)]


def listed() -> set[str]:
    """Names of the kernels that dbf-launch.h lists, as the demangler writes them."""
    text = (SOURCES / "dbf-launch.h").read_text()
    names = re.findall(r"^ *X\(\w+, *\((.*)\)\)", text, re.MULTILINE)
    return {re.sub(r"\s*,\s*", ", ", name).replace("< ", "<") for name in names}


def faults(kernel: sass.Kernel) -> list[str]:
    """What is wrong with the machine code of a kernel of dbf.cu."""
    found = []
    if kernel.spills or kernel.stack:
        found.append(f"{kernel.spills} spills, {kernel.stack} bytes of stack")
    if kernel.shared:
        found.append(f"{kernel.shared} bytes of static shared memory, which the launch plan does not know of")
    name, *arguments = re.findall(r"\w+", kernel.name)
    if name == "dbf_decode":
        warps, words, tensor = int(arguments[0]), int(arguments[1]), arguments[2] == "true"
        blocks = 2 if warps == 8 else 1  # DBF_DECODE_BLOCKS
        if sass.resident(kernel.arch, kernel.registers, 32 * warps, 0) < blocks:
            found.append(f"{kernel.registers} registers: no room for {blocks} blocks of {warps} warps")
        if words == 4:
            wide = sum(bool(re.match(sass.STREAM, i.name)) for i in kernel.main_loop.instructions)
            if wide * 32 * 16 * 8 * sass.repeats(kernel.name) < kernel.main_loop.signs:
                found.append(f"{wide} loads of 16 bytes for {kernel.main_loop.signs} signs")
            step = gpu_model.KERNEL.rows * gpu_model.KERNEL.step // 8
            if kernel.ahead < gpu_model.KERNEL.ahead * step:
                found.append(f"{kernel.ahead} bytes of signs under way")
            instructions = sum(kernel.per_32_signs(sass.repeats(kernel.name)).values())
            if tensor and instructions > INSTRUCTIONS:
                found.append(f"{instructions:.1f} instructions for 32 signs")
    if name == "dbf_gemm":
        tiles = int(arguments[0])
        blocks = 4 if tiles <= 2 else 2  # DBF_GEMM_BLOCKS
        if sass.resident(kernel.arch, kernel.registers, 128, gemm_shared(tiles)) < blocks:
            found.append(f"{kernel.registers} registers: no room for {blocks} blocks of 4 warps")
    return [f"sm_{kernel.arch} {kernel.name}: {fault}" for fault in found]


def gemm_shared(tiles: int) -> int:
    """Bytes that dbf_plan_gemm gives a block: sums of 4 warps for 32 rows, or the input of a step (fp16 has half the
    tiles, of twice the tokens)."""
    return 4 * 32 * 8 * tiles * 4 if tiles <= 2 else 32 << 10


def test_machine_code_of_every_kernel(kernels):
    """Nothing but what ships, all of that, for all architectures; and none of it has a fault."""
    assert sorted((k.arch, k.name) for k in kernels) == sorted((a, n) for a in sass.ARCHITECTURES for n in listed())
    assert [fault for kernel in kernels for fault in faults(kernel)] == []


def test_model_assumes_the_measured_instructions(kernels):
    """docs/gpu-model.md calculates with at least as many as the cards' machine code has."""
    architectures = {86: "3090", 89: "4090", 120: "5090", 80: "A100", 90: "H100"}
    for kernel in kernels:
        if kernel.arch in architectures and re.fullmatch(r"dbf_decode<\d+, 4, true>", kernel.name):
            count = sum(kernel.per_32_signs(1).values())
            assert count <= gpu_model.KERNEL.instructions + 0.05, (architectures[kernel.arch], kernel.name, count)


def test_model_assumes_the_measured_instructions_and_blocks_of_gemm(kernels):
    """The same for several tokens: instructions, and room for as many blocks."""
    kinds = {kind.tiles: kind for kind in (*gpu_model.FEW.values(), gpu_model.MANY)}
    checked = 0
    for kernel in kernels:
        if kernel.arch >= 80 and (match := re.fullmatch(r"dbf_gemm<(\d+), 4, false>", kernel.name)):
            kind = kinds[int(match[1])]
            count = sum(kernel.per_32_signs(sass.repeats(kernel.name)).values())
            assert count <= kind.instructions + 0.05, (kernel.arch, kernel.name, count)
            room = sass.resident(kernel.arch, kernel.registers, 32 * kind.warps, gemm_shared(kind.tiles))
            assert room >= kind.blocks, (kernel.arch, kernel.name)
            checked += 1
    assert checked == 3 * sum(arch >= 80 for arch in sass.ARCHITECTURES)


def test_blocks_fit_as_the_model_assumes(kernels):
    """For the shapes of the tables: registers and shared memory leave room for its blocks on a multiprocessor."""
    sizes = {n for n_in, n_out in gpu_model.PAPER_SHAPES for n in (n_in, gpu_model.width(n_in, n_out, 2.3))}
    for kernel in kernels:
        for n in sizes:
            warps = gpu_model.KERNEL.warps(n)
            if kernel.arch >= 80 and kernel.name == f"dbf_decode<{warps}, 4, true>":
                shared = -(-n // 512) * 1024 + 2 * warps * 16 * 4  # planes in whole steps, sums of two tiles
                room = sass.resident(kernel.arch, kernel.registers, 32 * warps, shared)
                assert room >= gpu_model.KERNEL.blocks(n), (kernel.arch, kernel.name, n)


def test_gate_catches_spills(cuda_toolkit, tmp_path):
    """One of the kernels, after it was promised that six of its blocks fit a multiprocessor: 40 registers a thread."""
    for name in ("dbf-kernels.cuh", "dbf-launch.h"):
        text = (SOURCES / name).read_text()
        promise = r"(#define DBF_DECODE_BLOCKS\(warps\)).*"
        (tmp_path / name).write_text(re.sub(promise, r"\1 6", text))
    instance = "template __global__ void dbf_decode<8, 4, true>(const dbf_args);"
    (tmp_path / "a.cu").write_text(f'#include "dbf-kernels.cuh"\n{instance}\n')
    nvcc = [cuda_toolkit / "bin/nvcc", "-std=c++17", "-O3", "-arch=sm_86", "-cubin", "a.cu"]
    subprocess.run(nvcc, cwd=tmp_path, check=True)
    (kernel,) = sass.kernels(cuda_toolkit, tmp_path / "a.cubin")
    assert kernel.registers <= 40
    assert any(re.fullmatch(r"sm_86 dbf_decode<8, 4, true>: [1-9]\d* spills, .*", fault) for fault in faults(kernel))


def test_gate_catches_narrow_loads(kernels):
    """The instances for rows that 16-byte loads do not fit, taken for the others."""
    for kernel in kernels:
        if kernel.name == "dbf_decode<8, 1, true>":
            assert any("0 loads of 16 bytes" in f for f in faults(replace(kernel, name="dbf_decode<8, 4, true>")))


def test_gate_catches_instructions_and_registers(kernels):
    kernel = next(k for k in kernels if k.name == "dbf_decode<8, 4, true>" and k.arch == 89)
    loop = kernel.main_loop
    longer = [*loop.instructions, *[i for i in loop.instructions if not sass.multiplier(i.name)]]
    assert any("instructions for 32 signs" in f for f in faults(replace(kernel, loops=[sass.Loop(longer)])))
    assert faults(replace(kernel, registers=128)) == []
    assert any("no room for 2 blocks" in fault for fault in faults(replace(kernel, registers=129)))
    assert any("static shared memory" in fault for fault in faults(replace(kernel, shared=4)))
    few = next(k for k in kernels if k.name == "dbf_gemm<2, 4, false>" and k.arch == 89)
    assert faults(replace(few, registers=128)) == []
    assert any("no room for 4 blocks" in fault for fault in faults(replace(few, registers=129)))


def test_main_loop_is_found_and_counted(cuda_toolkit, tmp_path):
    """A kernel whose loop is known: 4 dot products, an if and an else, a loop without any. A smaller one follows."""
    (tmp_path / "a.cu").write_text("""
        __global__ void f(const uint4 * w, int * out, int n, int flag) {
            int acc = 0;
            for (int i = 0; i < n; ++i) {
                const uint4 v = __ldcs(w + i);
                acc = __dp4a((int) v.x, 1, acc); acc = __dp4a((int) v.y, 2, acc);
                acc = __dp4a((int) v.z, 3, acc); acc = __dp4a((int) v.w, 4, acc);
                if (acc == flag) {
                    asm volatile("membar.gl; membar.gl;");
                } else {
                    asm volatile("membar.gl; membar.gl; membar.gl;");
                }
                for (int k = 0; k < acc; ++k) {
                    asm volatile("bar.sync 0;");
                }
                __syncthreads();
            }
            for (int i = 0; i < n; i += 2) {
                acc = __dp4a(out[i], 5, acc);
                asm volatile("membar.gl;");
            }
            out[0] = acc;
        }
    """.replace("for (int i", "_Pragma(\"unroll 1\") for (int i"))
    for arch in (75, 90, 120):  # they differ most in how they write loops
        nvcc = [cuda_toolkit / "bin/nvcc", f"-arch=sm_{arch}", "-cubin", "-o", f"{arch}.cubin", "a.cu"]
        subprocess.run(nvcc, cwd=tmp_path, check=True)
        (kernel,) = sass.kernels(cuda_toolkit, tmp_path / f"{arch}.cubin")
        names = [i.name.split(".")[0] for i in kernel.main_loop.instructions]
        assert (len(kernel.loops), kernel.main_loop.signs) == (2, 4 * 128)
        assert (names.count("IDP"), names.count("MEMBAR")) == (4, 3)
        assert kernel.per_32_signs(1)["FMA"] >= 8 and kernel.wide_loads == 1 and kernel.ahead == 0
        assert sum(kernel.per_32_signs(2).values()) == len(names) * 32 * 32 * 2 / 512


def test_resident_blocks():
    """By the rules of NVIDIA's occupancy calculator."""
    assert sass.resident(89, 128, 256, 0) == 2 and sass.resident(89, 129, 256, 0) == 1
    assert sass.resident(80, 64, 256, 0) == 4 and sass.resident(80, 32, 256, 0) == 8
    assert sass.resident(86, 32, 256, 0) == 6
    assert sass.resident(86, 32, 32, 49 << 10) == 2 and sass.resident(86, 32, 32, (49 << 10) + 1) == 1
    assert sass.resident(75, 32, 32, 32 << 10) == 2


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
    defines = [f"-D{macro}", "-D__HIP_PLATFORM_AMD__"]
    command = ["c++", "-std=c++17", *defines, *include, "-E", "-xc++", ggml / "src/ggml-cuda/dbf.cu"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
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

"""The patch set, the build, and what the patched programs do with good and malformed DBF files.

Run alone: pytest tests/test_llama_cpp.py     (fast on a warm cache; else it builds llama.cpp first)
Without the build: pytest tests/test_llama_cpp.py -k "patch or git or tools"

The models are tiny, random and written byte by byte here. The reference for a DBF model is the same weights multiplied
out to F32 in float64, run by the same program through upstream's own code.
"""

import json
import platform
import re
import shutil
import struct
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path

import cpu
import numpy as np
import pytest
from click.testing import CliRunner

from dbf_gguf import llama_cpp
from dbf_gguf.cli import cli
from dbf_gguf.errors import DBFError
from dbf_gguf.paths import data_dir

# --- the patch set


@pytest.fixture(scope="session")
def pristine_tree(tmp_path_factory):
    """The pinned tree without the patch set; read-only."""
    tree = tmp_path_factory.mktemp("pristine")
    llama_cpp._extract(tree)
    return tree


@pytest.fixture
def tree(pristine_tree, tmp_path):
    """A writable copy of what the hooks touch."""
    folder = tmp_path / "tree"
    for name in [*hooked_files(), "ggml/CMakeLists.txt"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pristine_tree / name, folder / name)
    return folder


def hooked_files() -> list[str]:
    return list(llama_cpp.parse_hooks((data_dir("cuda_patches") / "hooks.patch").read_bytes()))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_patch_applies_like_patch(tree, tmp_path):
    """Our applier and patch(1), which knows nothing of it, make the same files."""
    if not shutil.which("patch"):
        pytest.skip("no patch(1) here")
    other = tmp_path / "other"
    shutil.copytree(tree, other)
    diff = (data_dir("cuda_patches") / "hooks.patch").read_bytes()
    subprocess.run(["patch", "-p1", "--fuzz=0", "-s"], cwd=other, input=diff, check=True)
    assert llama_cpp.apply_patch(tree)
    got = contents(tree)
    assert {name: got[name] for name in contents(other)} == contents(other)
    assert {name: got[name] for name in llama_cpp.own_files()} == llama_cpp.own_files()


def test_patch_is_idempotent_and_resumes(tree):
    before = contents(tree)
    assert llama_cpp.apply_patch(tree)
    patched = contents(tree)
    assert patched != before
    assert not llama_cpp.apply_patch(tree)
    assert contents(tree) == patched
    # as after a kill between two files
    for name in ["ggml/src/ggml.c", "src/llama-model.cpp"]:
        (tree / name).write_bytes(before[name])
    (tree / "src/llama-dbf.cpp").unlink()
    assert llama_cpp.apply_patch(tree)
    assert contents(tree) == patched


@pytest.mark.parametrize("name", ["src/llama-graph.cpp", "ggml/src/ggml.c"])
def test_patch_refuses_a_tree_that_fits_neither(tree, name):
    path = tree / name
    path.write_bytes(b"// another version\n" + path.read_bytes())
    before = contents(tree)
    with pytest.raises(DBFError, match=f"{name} is neither.*{llama_cpp.pin().commit}"):
        llama_cpp.apply_patch(tree)
    assert contents(tree) == before


def test_patch_refuses_another_version_of_itself(tree):
    llama_cpp.apply_patch(tree)
    with open(tree / "src/llama-dbf.h", "a") as f:
        f.write("// older\n")
    with pytest.raises(DBFError, match="src/llama-dbf.h is from another version"):
        llama_cpp.apply_patch(tree)


def test_patch_refuses_what_is_no_llama_cpp(tmp_path):
    with pytest.raises(DBFError, match="no llama.cpp tree"):
        llama_cpp.source_tree(tmp_path)


def test_regenerated_patch_is_the_same(patched_tree, tmp_path):
    shipped = data_dir("cuda_patches")
    (tmp_path / "src" / "stale").mkdir(parents=True)
    names = llama_cpp.regenerate_patch(patched_tree, tmp_path)
    assert (tmp_path / "hooks.patch").read_bytes() == (shipped / "hooks.patch").read_bytes()
    assert contents(tmp_path / "src") == contents(shipped / "src")
    assert set(names) == {*hooked_files(), *llama_cpp.own_files()}


def test_hooks_stay_small():
    """What upstream changes under us should be a few KB; the rest belongs into own files."""
    assert (data_dir("cuda_patches") / "hooks.patch").stat().st_size < 10_000


def test_key_follows_the_patch_set(tmp_path):
    shutil.copytree(data_dir("cuda_patches"), tmp_path / "set")
    key = llama_cpp.patch_key(tmp_path / "set")
    assert key == llama_cpp.patch_key()
    with open(tmp_path / "set" / "src" / "src" / "llama-dbf.cpp", "a") as f:
        f.write("\n")
    assert llama_cpp.patch_key(tmp_path / "set") != key


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_git_checkout_with_own_changes_is_refused(tree):
    def git(*args):
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *args], cwd=tree, check=True, timeout=60)

    git("init", "-q")
    (tree / "README.md").write_text("readme\n")
    git("add", ".")
    git("commit", "-q", "-m", "pristine")
    assert llama_cpp.source_tree(tree) == tree
    assert llama_cpp.source_tree(tree) == tree  # our own changes are no obstacle

    (tree / "README.md").write_text("changed\n")
    with pytest.raises(DBFError, match=r"uncommitted changes \(README.md\)"):
        llama_cpp.source_tree(tree)
    git("checkout", "-q", "README.md")

    with open(tree / "src/llama-graph.cpp", "a") as f:  # behind our hooks, which still match
        f.write("// mine\n")
    with pytest.raises(DBFError, match=r"uncommitted changes \(src/llama-graph.cpp\)"):
        llama_cpp.source_tree(tree)


def test_git_pointer_to_nowhere_is_no_checkout(tree):
    """An sdist unpacked by hand has the `.git` file of a submodule."""
    (tree / ".git").write_text("gitdir: ../../.git/modules/vendor/llama.cpp\n")
    assert llama_cpp.source_tree(tree) == tree


# --- the build


def test_missing_tools_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for variable in ("CC", "CXX", "CUDACXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("DBF_GGUF_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DBFError) as error:
        llama_cpp.build()
    assert "\n" not in str(error.value)
    for word in ("C and C++ compiler", "make or ninja", "cmake", "apt-get install build-essential make cmake"):
        assert word in str(error.value)
    assert not (tmp_path / "cache" / "pypi").exists()  # found out before anything was fetched


def test_missing_nvcc_is_named_by_tools_check(monkeypatch):
    monkeypatch.setattr(llama_cpp, "_nvcc", lambda: None)
    monkeypatch.setattr(llama_cpp.shutil, "which", lambda name: f"/bin/{name}")
    llama_cpp.check_tools()
    with pytest.raises(DBFError, match="missing: nvcc"):
        llama_cpp.check_tools(cuda=True)


def test_unbuilt_tools(tmp_path, monkeypatch):
    monkeypatch.setenv("DBF_GGUF_CACHE", str(tmp_path))
    assert llama_cpp.bin_dir() is None
    with pytest.raises(DBFError, match="dbf-gguf build"):
        llama_cpp.tool("llama-cli")


def test_failed_command_shows_its_end(tmp_path, capfd):
    log = tmp_path / "log"
    with pytest.raises(DBFError, match=f"compiling failed.*{log}"):
        llama_cpp._run(["sh", "-c", "seq 1 100; echo oops; exit 3"], log, {}, "compiling")
    err = capfd.readouterr().err
    assert "oops" in err and "\n72\n" in err and "\n71\n" not in err
    assert "\n1\n2\n" in log.read_text()


def test_build_command(llama_bin):
    result = CliRunner().invoke(cli, ["build"])
    assert result.exit_code == 0
    assert result.output.splitlines()[-1] == str(llama_bin)
    assert all((llama_bin / name).exists() for name in llama_cpp.TARGETS)
    assert llama_cpp.tool("llama-cli").parent == llama_cpp.bin_dir()
    version = run(llama_bin / "llama-cli", "--version")
    commit, patch = llama_cpp.patch_key().split("-")
    assert f"{commit}-dbf-{patch}" in version.stdout + version.stderr


def run(program: Path, *args, timeout=300) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(a) for a in (program, *args)], capture_output=True, text=True, errors="replace", timeout=timeout
    )


# --- the op


def test_backend_ops(llama_bin):
    """The CPU backend, in the build for this machine, against its scalar reference."""
    result = run(llama_bin / "test-backend-ops", "test", "-b", "CPU", "-o", "DBF_MUL_MAT")
    assert result.returncode == 0, result.stdout[-2000:]
    passed = re.search(r"(\d+)/(\d+) tests passed", re.sub(r"\x1b\[[0-9;]*m", "", result.stdout))
    assert passed and passed[1] == passed[2] and int(passed[1]) == 76, result.stdout[-2000:]


@pytest.mark.parametrize("name", cpu.INSTRUCTION_SETS)
def test_kernels_of_every_instruction_set(name, patched_tree, llama_bin, tmp_path):
    """dbf.cpp compiled for each: accuracy, ragged shapes, threads, NaN, infinity, zero, denormals."""
    if name != "generic" and platform.machine() != "x86_64":
        pytest.skip(f"this CPU has no {name}")
    cpu.compile_kernels(cpu.INSTRUCTION_SETS[name].flags, patched_tree, llama_bin, tmp_path / "kernels")
    if not cpu.available(name):
        pytest.skip(f"compiled, but this CPU has no {name}")
    result = run(tmp_path / "kernels")
    assert result.returncode == 0, result.stdout
    takes_tiles = name != "generic" or platform.machine() == "aarch64"
    rows = {"avx2": 32, "avx512": 64}.get(name, 16)
    assert (f"tiles of {rows} rows" in result.stdout) == takes_tiles
    for layout in cpu.LAYOUTS:  # what bench/cpu.py --micro calls
        timed = run(tmp_path / "kernels", layout, 64, 32, 64, 1, 2, 1)
        if layout == "tiles" and not takes_tiles:
            assert timed.returncode == cpu.NO_TILES
        else:
            assert timed.returncode == 0 and float(timed.stdout) > 0, timed.stdout + timed.stderr


def test_avx512_kernels_on_any_cpu(patched_tree, llama_bin, tmp_path):
    """What their source says, with the intrinsics in plain C (avx512_simde.h)."""
    if not cpu.available("avx2"):
        pytest.skip("this CPU has no AVX2, which the rest of these kernels needs")
    if not any(Path(folder, "simde/x86/avx512.h").exists() for folder in ("/usr/include", "/usr/local/include")):
        pytest.skip("no SIMDe here (on Debian or Ubuntu: apt-get install libsimde-dev)")
    shim = Path(__file__).with_name("avx512_simde.h")
    flags = (*cpu.INSTRUCTION_SETS["avx2"].flags, "-include", str(shim))
    cpu.compile_kernels(flags, patched_tree, llama_bin, tmp_path / "kernels")
    result = run(tmp_path / "kernels")
    assert result.returncode == 0, result.stdout
    assert "tiles of 64 rows" in result.stdout  # AVX-512 it is


def test_kernels_for_arm(patched_tree, llama_bin, tmp_path):
    """The same for 64-bit ARM, whose NEON every such CPU has, in an emulator."""
    compilers = ["aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++"]
    missing = [name for name in [*compilers, "qemu-aarch64"] if not shutil.which(name)]
    if missing:
        packages = "gcc-aarch64-linux-gnu g++-aarch64-linux-gnu qemu-user"
        pytest.skip(f"no {', '.join(missing)} here (on Debian or Ubuntu: apt-get install {packages})")
    ggml = patched_tree / "ggml"
    folders = [f"-I{ggml / folder}" for folder in ("include", "src", "src/ggml-cpu")]
    folders.append(f"-I{llama_bin.parent / 'ggml' / 'src'}")  # ggml-version.h
    objects = []
    for source in ("ggml.c", "ggml-quants.c", "ggml-dbf.c", "ggml-threading.cpp"):  # what the kernels need of ggml
        objects.append(tmp_path / f"{source}.o")
        compiler = compilers[source.endswith(".cpp")]
        options = ["-O0", "-w", "-ffunction-sections", "-c", *folders]
        compiled = run(compiler, *options, ggml / "src" / source, "-o", objects[-1])
        assert compiled.returncode == 0, compiled.stderr
    sources = [Path(__file__).with_name("dbf_cpu_kernels.cpp"), ggml / "src/ggml-cpu/dbf.cpp"]
    options = ["-std=c++17", "-O2", "-w", "-static", "-Wl,--gc-sections", *folders]
    compiled = run(compilers[1], *options, *sources, *objects, "-o", tmp_path / "kernels", "-lm", "-pthread")
    assert compiled.returncode == 0, compiled.stderr
    result = run("qemu-aarch64", tmp_path / "kernels", "quick")
    assert result.returncode == 0, result.stdout


# --- model files

F32, F16, I32, DBF = 0, 1, 26, 90
N_VOCAB, N_EMBD, N_FF, N_HEAD, N_HEAD_KV, N_LAYER = 32000, 64, 96, 2, 1, 2
N_KV = N_EMBD // N_HEAD * N_HEAD_KV
LINEARS = {  # name -> n_in, k, n_out
    "attn_q": (N_EMBD, 96, N_EMBD),
    "attn_k": (N_EMBD, 32, N_KV),
    "attn_v": (N_EMBD, 64, N_KV),
    "attn_output": (N_EMBD, 64, N_EMBD),
    "ffn_gate": (N_EMBD, 160, N_FF),
    "ffn_up": (N_EMBD, 96, N_FF),
    "ffn_down": (N_FF, 96, N_EMBD),
}
PARTS = {"attn_qkv": ["attn_q", "attn_k", "attn_v"], "ffn_gate_up": ["ffn_gate", "ffn_up"]}
JOINT_LINEARS = {
    "attn_qkv": (N_EMBD, 160, N_EMBD + 2 * N_KV),
    "attn_output": LINEARS["attn_output"],
    "ffn_gate_up": (N_EMBD, 128, 2 * N_FF),
    "ffn_down": LINEARS["ffn_down"],
}


@dataclass
class Tensor:
    type: int
    ne: tuple[int, ...]
    data: bytes


def f32(x) -> Tensor:
    return Tensor(F32, tuple(reversed(np.shape(x))), np.ascontiguousarray(x, "<f4").tobytes())


def f16(x) -> Tensor:
    return Tensor(F16, tuple(reversed(np.shape(x))), np.ascontiguousarray(x, "<f2").tobytes())


def signs(x) -> Tensor:
    """[rows, columns] of +1 and -1: bit j of each little-endian word is element j, 1 = +1."""
    bits = np.packbits(np.asarray(x) > 0, axis=1, bitorder="little")
    return Tensor(DBF, tuple(reversed(x.shape)), bits.tobytes())


def gguf_string(s: str) -> bytes:
    return struct.pack("<Q", len(s.encode())) + s.encode()


def kv(value) -> bytes:
    """Type and value of a metadata entry: str -> string, int -> u32, float -> f32, bytes -> as they are."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return struct.pack("<I", 8) + gguf_string(value)
    return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)


def write(path: Path, meta: dict, tensors: dict[str, Tensor]) -> Path:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(meta))
    head += b"".join(gguf_string(key) + kv(value) for key, value in meta.items())
    offset = 0
    for name, t in tensors.items():
        head += gguf_string(name) + struct.pack(f"<I{len(t.ne)}QIQ", len(t.ne), *t.ne, t.type, offset)
        offset += len(t.data) + -len(t.data) % 32
    with open(path, "wb") as f:
        f.write(head + bytes(-len(head) % 32))
        for t in tensors.values():
            f.write(t.data + bytes(-len(t.data) % 32))
    return path


def read_meta(path: Path) -> dict[str, bytes]:
    """The metadata entries of a GGUF file, undecoded."""
    data = path.read_bytes()
    size = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

    def skip(at: int, kind: int) -> int:
        if kind == 8:
            return at + 8 + struct.unpack_from("<Q", data, at)[0]
        if kind == 9:
            inner, count = struct.unpack_from("<IQ", data, at)
            at += 12
            if inner in size:
                return at + size[inner] * count
            for _ in range(count):
                at = skip(at, inner)
            return at
        return at + size[kind]

    at, meta = 24, {}
    for _ in range(struct.unpack_from("<Q", data, 16)[0]):
        end = skip(at, 8)
        key = data[at + 8 : end].decode()
        at = skip(end + 4, struct.unpack_from("<I", data, end)[0])
        meta[key] = data[end:at]
    return meta


@pytest.fixture(scope="session")
def meta(patched_tree):
    tokenizer = read_meta(patched_tree / "models" / "ggml-vocab-llama-spm.gguf")
    return {
        "general.architecture": "llama",
        "llama.context_length": 256,
        "llama.embedding_length": N_EMBD,
        "llama.block_count": N_LAYER,
        "llama.feed_forward_length": N_FF,
        "llama.attention.head_count": N_HEAD,
        "llama.attention.head_count_kv": N_HEAD_KV,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": N_EMBD // N_HEAD,
        **{key: value for key, value in tokenizer.items() if key.startswith("tokenizer.")},
    }


def random_model(seed: int, linears=LINEARS) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a model as DBF and multiplied out. Scales are F16 in the even layers and F32 in the odd ones.

    Joint linears are multiplied out to those that their rows belong to.
    """
    rng = np.random.default_rng(seed)
    common = {
        "token_embd.weight": f32(rng.normal(size=(N_VOCAB, N_EMBD)) * 0.3),
        "output_norm.weight": f32(np.ones(N_EMBD)),
    }
    factored, dense = dict(common), dict(common)
    for layer in range(N_LAYER):
        for name in ("attn_norm", "ffn_norm"):
            factored[f"blk.{layer}.{name}.weight"] = dense[f"blk.{layer}.{name}.weight"] = f32(np.ones(N_EMBD))
        for name, (n_in, k, n_out) in linears.items():
            base = f"blk.{layer}.{name}"
            b = rng.choice([-1.0, 1.0], size=(k, n_in))
            a = rng.choice([-1.0, 1.0], size=(n_out, k))
            scales = [rng.lognormal(sigma=0.5, size=n) * rng.choice([-1, 1], size=n) for n in (n_in, k, n_out)]
            scales[1] *= 2 / np.sqrt(n_in * k)
            sb, sm, sa = (s.astype(np.float16 if layer % 2 == 0 else np.float32) for s in scales)
            scale = f16 if layer % 2 == 0 else f32
            parts = {
                "dbf_b": signs(b),
                "dbf_a": signs(a),
                "dbf_sb": scale(sb),
                "dbf_sm": scale(sm),
                "dbf_sa": scale(sa),
            }
            factored |= {f"{base}.{part}": t for part, t in parts.items()}
            sb, sm, sa = (s.astype(np.float64) for s in (sb, sm, sa))
            weight, start = (sa[:, None] * a * sm) @ (b * sb), 0
            for part in PARTS.get(name, [name]):
                rows = n_out if part == name else LINEARS[part][2]
                dense[f"blk.{layer}.{part}.weight"] = f32(weight[start : start + rows])
                start += rows
    return factored, dense


@pytest.fixture(scope="session")
def model():
    return random_model(1)


@pytest.fixture(scope="session")
def joint_model():
    return random_model(2, JOINT_LINEARS)


@pytest.fixture(scope="session")
def files(meta, model, joint_model, tmp_path_factory):
    """dbf.gguf and dense.gguf of the same weights, joint-*.gguf with joint linears, and a text."""
    folder = tmp_path_factory.mktemp("models")
    for prefix, (factored, dense) in (("", model), ("joint-", joint_model)):
        write(folder / f"{prefix}dbf.gguf", meta | {"dbf.version": 1}, factored)
        write(folder / f"{prefix}dense.gguf", meta, dense)
    rng = np.random.default_rng(7)
    words = ["the", "river", "carries", "old", "stones", "past", "seven", "quiet", "mills", "before", "winter", "comes"]
    (folder / "text").write_text(" ".join(rng.choice(words, size=400)))
    return folder


def perplexity(llama_bin, model_file, files, *args) -> tuple[float, str]:
    result = run(llama_bin / "llama-perplexity", "-m", model_file, "-f", files / "text", "-c", 64, "-t", 1, *args)
    out = result.stdout + result.stderr
    assert result.returncode == 0, out[-3000:]
    found = re.search(r"Final estimate: PPL = ([\d.]+)|Mean PPL\(Q\)\s*:\s*([\d.]+)", out)
    assert found, out[-3000:]
    return float(found[1] or found[2]), out


@pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])
def test_dbf_model_computes_what_the_dense_one_does(joint, llama_bin, files, meta, model, joint_model, tmp_path):
    """The dense one has seven linears in a block either way, and goes through upstream's code for these."""
    prefix, (factored, _) = ("joint-", joint_model) if joint else ("", model)
    base = tmp_path / "logits"
    dense, _ = perplexity(llama_bin, files / f"{prefix}dense.gguf", files, "--kl-divergence-base", base)

    def kld(path) -> tuple[float, float]:
        ppl, out = perplexity(llama_bin, path, files, "--kl-divergence-base", base, "--kl-divergence")
        return ppl, float(re.search(r"Mean\s+KLD:\s*(-?[\d.]+)", out)[1])

    ppl, divergence = kld(files / f"{prefix}dbf.gguf")
    # Random weights, at a perplexity of half a million, make more of the CPU's rounding than a trained model does.
    assert ppl == pytest.approx(dense, rel=2e-3)
    assert abs(divergence) < 3e-4

    # and the test would notice one wrong vector of one linear
    wrong, vector = dict(factored), "blk.1.ffn_gate_up.dbf_sa" if joint else "blk.1.ffn_down.dbf_sa"
    wrong[vector] = f32(np.frombuffer(wrong[vector].data, "<f4")[::-1])
    _, divergence = kld(write(tmp_path / "wrong.gguf", meta | {"dbf.version": 1}, wrong))
    assert divergence > 1e-2


@pytest.mark.parametrize("name", ["dbf.gguf", "joint-dbf.gguf"])
def test_load_modes_and_batch_sizes_agree(name, llama_bin, files):
    ppl, _ = perplexity(llama_bin, files / name, files)
    assert perplexity(llama_bin, files / name, files, "--load-mode", "none")[0] == ppl
    assert perplexity(llama_bin, files / name, files, "-ub", 1)[0] == pytest.approx(ppl, rel=1e-3)
    assert perplexity(llama_bin, files / name, files, "-t", 3)[0] == pytest.approx(ppl, rel=1e-6)


@pytest.mark.parametrize("name", ["dbf.gguf", "joint-dbf.gguf"])
def test_factors_in_tiles_compute_the_same(name, llama_bin, files):
    """Where the kernels look sums up, the loader puts the factors into tiles: the products are the same to the bit."""
    ppl, log = perplexity(llama_bin, files / name, files, "-v")
    in_rows, log_of_rows = perplexity(llama_bin, files / name, files, "-v", "--no-repack")
    assert ppl == in_rows
    one_by_one = [perplexity(llama_bin, files / name, files, "-ub", 1, *more)[0] for more in ((), ("--no-repack",))]
    assert one_by_one[0] == one_by_one[1]
    assert ("CPU_DBF model buffer" in log) == has_tiles()
    assert "CPU_DBF model buffer" not in log_of_rows


def has_tiles() -> bool:
    """Whether the kernels of this CPU take tiles: those that look sums up."""
    return cpu.available("avx2") if platform.machine() == "x86_64" else platform.machine() == "aarch64"


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages in this kernel")
@pytest.mark.skipif(not has_tiles(), reason="the kernels of this CPU take rows")
def test_tiles_ask_for_huge_pages(llama_bin, files):
    command = [llama_bin / "llama-bench", "-m", files / "dbf.gguf", "-p", "0", "-n", "1000", "-r", "1000", "-t", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        flags, end = "", time.monotonic() + 60
        while " hg" not in flags and time.monotonic() < end and process.poll() is None:
            time.sleep(0.1)
            flags = "".join(re.findall("^VmFlags:.*$", Path(f"/proc/{process.pid}/smaps").read_text(), re.M))
            if not flags and process.poll() is None:
                pytest.skip("this kernel does not tell what was asked for")
        assert " hg" in flags
    finally:
        process.kill()
        process.wait()


def test_bench_names_the_type_and_the_size(llama_bin, files, model):
    """The parameters are those of the weights, as for the dense model, and not the number of signs."""
    tables = [
        run(llama_bin / "llama-bench", "-m", files / f"{name}.gguf", "-p", 8, "-n", 4, "-t", 1, "-o", "json")
        for name in ("dbf", "dense")
    ]
    dbf, dense = (json.loads(table.stdout)[0] for table in tables)
    assert dbf["model_type"].endswith(" DBF")
    assert dbf["model_n_params"] == dense["model_n_params"]
    assert dbf["avg_ts"] > 0


@pytest.mark.parametrize(
    ("prefix", "names"),
    [("", ["attn_q", "ffn_down"]), ("joint-", ["attn_q"]), ("joint-", ["attn_v", "ffn_gate"]), ("joint-", ["ffn_up"])],
    ids=str,
)
def test_lora_works_on_top(prefix, names, llama_bin, files, tmp_path):
    """Of adapters for the separate linears too where their factors are joint."""
    rng = np.random.default_rng(3)
    adapter = {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 4.0,
    }
    tensors = {}
    for name in names:
        n_in, _, n_out = LINEARS[name]
        tensors[f"blk.1.{name}.weight.lora_a"] = f32(rng.normal(size=(4, n_in)))
        tensors[f"blk.1.{name}.weight.lora_b"] = f32(rng.normal(size=(n_out, 4)))
    lora = ("--lora", write(tmp_path / "lora.gguf", adapter, tensors))
    plain, _ = perplexity(llama_bin, files / f"{prefix}dbf.gguf", files)
    dbf, _ = perplexity(llama_bin, files / f"{prefix}dbf.gguf", files, *lora)
    dense, _ = perplexity(llama_bin, files / f"{prefix}dense.gguf", files, *lora)
    assert dbf == pytest.approx(dense, rel=8e-3)  # and an adapter of random numbers even more
    assert abs(dbf / plain - 1) > 1e-2


def test_quantize_keeps_the_factors(llama_bin, files, model, tmp_path):
    """llama-quantize quantizes the embeddings and leaves signs and scales as they are."""
    out = tmp_path / "q8_0.gguf"
    result = run(llama_bin / "llama-quantize", files / "dbf.gguf", out, "q8_0", "1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert out.stat().st_size < (files / "dbf.gguf").stat().st_size / 2
    data = out.read_bytes()
    for name, t in model[0].items():
        if ".dbf_" in name:
            assert gguf_string(name) + struct.pack(f"<I{len(t.ne)}QI", len(t.ne), *t.ne, t.type) in data, name
            assert t.data in data, name
    before, _ = perplexity(llama_bin, files / "dbf.gguf", files)
    assert perplexity(llama_bin, out, files)[0] == pytest.approx(before, rel=0.02)


Q, DOWN = "blk.0.attn_q", "blk.1.ffn_down"


def missing(name):
    return lambda meta, t: t.pop(name)


def put(name, change):
    def edit(meta, tensors):
        tensors[name] = change(tensors[name])

    return edit


def version(value):
    def edit(meta, tensors):
        meta["dbf.version"] = value

    return edit


def random_signs(rows, columns):
    return signs(np.random.default_rng(0).choice([-1, 1], size=(rows, columns)))


def poke(index, value, dtype):
    def change(t):
        x = np.frombuffer(t.data, dtype).copy()
        x[index] = value
        return replace(t, data=x.tobytes())

    return change


MALFORMED = {
    "version 2": (version(2), f"{Q.replace('attn_q', 'attn_k')}.dbf_b", "dbf.version 2"),
    "version as string": (version("1"), "dbf_b", "dbf.version is not of type u32"),
    "no version": (lambda meta, t: meta.pop("dbf.version"), "dbf_b", "no key dbf.version"),
    **{
        f"no {p}": (missing(f"{Q}.{p}"), f"{Q}.{p}", "is missing")
        for p in ("dbf_b", "dbf_a", "dbf_sb", "dbf_sm", "dbf_sa")
    },
    "short sm": (put(f"{Q}.dbf_sm", lambda t: f32(np.ones(64))), f"{Q}.dbf_sm", "one scale for each row of .dbf_b"),
    "long sb": (put(f"{Q}.dbf_sb", lambda t: f16(np.ones(96))), f"{Q}.dbf_sb", "one scale for each column of .dbf_b"),
    "sa of rank 2": (put(f"{Q}.dbf_sa", lambda t: f32(np.ones((2, N_EMBD)))), f"{Q}.dbf_sa", "one scale for each row"),
    "k differs": (
        put(f"{Q}.dbf_a", lambda t: random_signs(N_EMBD, 64)),
        f"{Q}.dbf_a",
        "as many columns as .dbf_b has rows",
    ),
    "n_out differs": (
        lambda meta, t: t.update({f"{Q}.dbf_a": random_signs(65, 96), f"{Q}.dbf_sa": f32(np.ones(65))}),
        f"{Q}.dbf_a",
        "the architecture's n_out",
    ),
    "n_in differs": (
        lambda meta, t: t.update({f"{Q}.dbf_b": random_signs(96, 96), f"{Q}.dbf_sb": f32(np.ones(96))}),
        f"{Q}.dbf_b",
        "the architecture's n_in",
    ),
    "n_in no multiple of 32": (
        put(f"{Q}.dbf_b", lambda t: replace(t, ne=(48, 128))),
        f"{Q}.dbf_b",
        "not a multiple of block size",
    ),
    "dense factor": (
        put(f"{Q}.dbf_b", lambda t: f32(np.ones((96, N_EMBD)))),
        f"{Q}.dbf_b",
        "has type f32, expected dbf",
    ),
    "integer scale": (
        put(f"{DOWN}.dbf_sa", lambda t: replace(t, type=I32)),
        f"{DOWN}.dbf_sa",
        "has type i32, expected f16 or f32",
    ),
    "unknown type": (put(f"{DOWN}.dbf_sa", lambda t: replace(t, type=60)), f"{DOWN}.dbf_sa", "of type 60"),
    "NaN": (put(f"{DOWN}.dbf_sa", poke(5, np.nan, "<f4")), f"{DOWN}.dbf_sa", "scale 5 is not finite"),
    "infinity": (put(f"{Q}.dbf_sb", poke(63, -np.inf, "<f2")), f"{Q}.dbf_sb", "scale 63 is not finite"),
    "weight beside": (
        lambda meta, t: t.update({f"{Q}.weight": f32(np.ones((N_EMBD, N_EMBD)))}),
        f"{Q}.dbf_b",
        f"the file also has '{Q}.weight'",
    ),
    "signs under another name": (
        put("token_embd.weight", lambda t: random_signs(N_VOCAB, N_EMBD)),
        "token_embd.weight",
        "type dbf",
    ),
    "factored embedding": (
        lambda meta, t: (
            t.pop("token_embd.weight"),
            t.update(
                {f"token_embd.{part.split('.')[-1]}": t[part] for part in list(t) if part.startswith(f"{Q}.dbf_")}
            ),
        ),
        "token_embd.dbf_a",
        "not a plain linear layer",
    ),
}


def separate(name: str):
    """Adds one of the linears whose rows a joint one holds."""

    def edit(meta, tensors):
        n_in, k, n_out = LINEARS[name]
        tensors |= {f"blk.0.{name}.dbf_b": random_signs(k, n_in), f"blk.0.{name}.dbf_a": random_signs(n_out, k)}
        tensors |= {f"blk.0.{name}.dbf_s{c}": f32(np.ones(n)) for c, n in zip("bma", LINEARS[name], strict=True)}

    return edit


QKV, GATE_UP = "blk.0.attn_qkv", "blk.0.ffn_gate_up"
MALFORMED_JOINT = {
    "no sm": (missing(f"{GATE_UP}.dbf_sm"), f"{GATE_UP}.dbf_sm", "is missing"),
    "factors of k beside": (separate("attn_k"), f"{QKV}.dbf_b", "the file also has 'blk.0.attn_k'"),
    "weight of up beside": (
        lambda meta, t: t.update({"blk.0.ffn_up.weight": f32(np.ones((N_FF, N_EMBD)))}),
        f"{GATE_UP}.dbf_b",
        "the file also has 'blk.0.ffn_up'",
    ),
    "gate alone": (
        lambda meta, t: t.update(
            {f"{GATE_UP}.dbf_a": random_signs(N_FF, 128), f"{GATE_UP}.dbf_sa": f32(np.ones(N_FF))}
        ),
        f"{GATE_UP}.dbf_a",
        "the architecture's n_out",
    ),
    "q and k alone": (
        lambda meta, t: t.update({f"{QKV}.dbf_a": random_signs(96, 160), f"{QKV}.dbf_sa": f32(np.ones(96))}),
        f"{QKV}.dbf_a",
        "the architecture's n_out",
    ),
    "NaN": (put(f"{GATE_UP}.dbf_sb", poke(5, np.nan, "<f2")), f"{GATE_UP}.dbf_sb", "scale 5 is not finite"),
}


@pytest.mark.parametrize("case", MALFORMED_JOINT)
def test_malformed_file_with_joint_linears_is_refused(case, llama_bin, files, meta, joint_model, tmp_path):
    edit, tensor, reason = MALFORMED_JOINT[case]
    tensors = dict(joint_model[0])
    edit(meta, tensors)
    path = write(tmp_path / "bad.gguf", meta | {"dbf.version": 1}, tensors)
    result = run(llama_bin / "llama-perplexity", "-m", path, "-f", files / "text", "-c", 64, "-t", 1)
    check_refusal(result, tensor, reason)


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file_is_refused(case, llama_bin, files, meta, model, tmp_path):
    edit, tensor, reason = MALFORMED[case]
    bad_meta, tensors = meta | {"dbf.version": 1}, dict(model[0])
    edit(bad_meta, tensors)
    path = write(tmp_path / "bad.gguf", bad_meta, tensors)
    result = run(llama_bin / "llama-perplexity", "-m", path, "-f", files / "text", "-c", 64, "-t", 1)
    check_refusal(result, tensor, reason)


def check_refusal(result, tensor, reason):
    out = result.stdout + result.stderr
    assert 0 < result.returncode < 128, out[-3000:]  # a negative one is a crash
    assert any(tensor in line and reason in line for line in out.splitlines()), out[-3000:]


@pytest.mark.parametrize("program", ["llama-perplexity", "llama-cli", "llama-completion", "llama-bench"])
def test_every_program_refuses_a_truncated_file(program, llama_bin, files, tmp_path):
    path = tmp_path / "short.gguf"
    path.write_bytes((files / "dbf.gguf").read_bytes()[:-100])
    extra = {"llama-perplexity": ["-f", files / "text"], "llama-bench": ["-v"]}.get(program, ["-p", "x"])
    result = run(llama_bin / program, "-m", path, "-t", 1, *extra)
    check_refusal(result, f"blk.{N_LAYER - 1}.ffn_down.dbf_s", "not within the file bounds")

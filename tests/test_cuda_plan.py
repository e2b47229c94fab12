"""What the host side of the CUDA kernels plans: which kernels, grids, shared memory, pointers and strides for a shape.

These are plain functions (dbf-launch.h), the same that dbf.cu calls; a C++ compiler is all it takes to test them. That
kernels launched this way compute the right thing is in test_cuda_kernels.py.

Run alone: pytest tests/test_cuda_plan.py     (seconds)
"""

import itertools
import json
import math
from pathlib import Path

import pytest
from emulator import run

from dbf_gguf import machine
from dbf_gguf.paths import data_dir

KERNELS = data_dir("cuda_patches") / "src/ggml/src/ggml-cuda"
DEFAULT, F16 = range(2)
NONE, HALF, FLOAT = range(3)  # enum dbf_scale_type

# cc, multiprocessors, shared memory of a block
CARDS = [(610, 20, 48 << 10), (800, 1, 48 << 10), (700, 80, 96 << 10), (750, 40, 64 << 10), (800, 108, 163 << 10)]
CARDS += [(860, 82, 99 << 10), (890, 128, 99 << 10), (900, 132, 227 << 10), (1000, 148, 227 << 10)]
CARDS += [(1200, 170, 99 << 10)]
# n_in, k, n_out: the smallest, ragged ones, a real layer, the largest layer of a 70B model
SHAPES = [(32, 32, 1), (96, 416, 333), (576, 1120, 17), (4096, 2048, 4096), (8192, 28672, 8192)]
# rows longer than 2^15 and weights of more than 2^31 bytes; an input that fits no shared memory
SHAPES += [(65536, 131072, 262144), (1 << 20, 32, 33), (32, 1 << 20, 64)]
TOKENS = [*range(1, 10), 16, 17, 32, 33, 512, 8192]

# where plan.cpp puts the operands
A, B, SA, SM, SB, X, Y, WORKSPACE = (i << 50 for i in range(1, 9))


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """plan(list of the nine numbers of plan.cpp) -> list of plans"""
    program = tmp_path_factory.mktemp("plan") / "plan"
    compiler = machine.compiler("CXX", "c++", "g++", "clang++")
    source = Path(__file__).parent / "cuda/plan.cpp"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    compiled = run(*compiler, *flags, f"-I{KERNELS}", source, "-o", program)
    assert compiled.returncode == 0, compiled.stderr

    def call(requests):
        result = run(program, *itertools.chain(*requests))
        assert result.returncode == 0, result.stderr
        return [json.loads(line) for line in result.stdout.splitlines()]

    return call


@pytest.fixture(scope="module")
def plans(plan):
    """All combinations: (request, plan)"""
    products = itertools.product(SHAPES, TOKENS, CARDS, (0, 1), (DEFAULT, F16))
    requests = [(*shape, tokens, *card, aligned, path) for shape, tokens, card, aligned, path in products]
    result = []
    for i in range(0, len(requests), 1000):  # a command line is not endless
        part = requests[i : i + 1000]
        result += zip(part, plan(part), strict=True)
    return result


def tile(kernel: str) -> tuple[int, int]:
    """(tokens of a column tile, column tiles of a block) of a gemm kernel, by its name"""
    kind, tiles = kernel.removeprefix("DBF_KERNEL_GEMM_").split("_")[:2]
    return {"Q8": 4, "F16": 8}[kind], int(tiles)


def divides_steps(kernel: str) -> bool:
    """Whether the warps of a gemm block divide the steps, and not the rows."""
    return tile(kernel)[1] <= 2


def test_number_of_launches(plans):
    """One token is two launches on every card, whatever the shape; several are four with tensor cores."""
    for (*_, n_tokens, cc, _, _, _, path), p in plans:
        kernels = [launch["kernel"].removeprefix("DBF_KERNEL_") for launch in p["launches"]]
        assert [launch["stage"] for launch in p["launches"]] == ([0, 1] if len(kernels) == 2 else [0, 0, 1, 1])
        if cc < 750:
            assert len(kernels) == 2 and all(k.startswith("DECODE_DP4A_") for k in kernels)
        elif path == DEFAULT and n_tokens == 1:
            assert len(kernels) == 2 and all(k.startswith("DECODE_MMA_") for k in kernels)
        else:
            assert len(kernels) == 4
            assert [k.split("_")[0] for k in kernels] == ["ROUND", "GEMM", "ROUND", "GEMM"]
            assert all(("F16" in k) == (path == F16) for k in kernels)


def test_limits_of_the_card(plans):
    for (*_, shared, _, _), p in plans:
        for launch in p["launches"]:
            assert 0 < launch["shared"] <= shared
            assert 32 <= launch["block"] <= 1024 and launch["block"] % 32 == 0
            assert 1 <= launch["grid"][0] < 2**31 and 1 <= launch["grid"][1] <= 65535


def test_every_row_and_token_has_a_block(plans):
    """Decode blocks walk over the tiles of 16 rows: one is enough, and more than there are tiles, or than run at the
    same time, is too many. In a gemm each block has its place."""
    for (*_, n_tokens, _, n_sm, _, _, _), p in plans:
        for launch in p["launches"]:
            name, (x, y), rows = launch["kernel"], launch["grid"], launch["rows"]
            if "DECODE" in name:
                assert 1 <= x <= min(-(-rows // 16), 2 * n_sm) and y == n_tokens
                assert launch["block"] == 32 * int(name.split("_")[4])
            elif "ROUND" in name:
                assert (x, y) == (n_tokens, 1)
            else:
                tokens = tile(name)[0] * tile(name)[1]
                height = 32 if divides_steps(name) else 128
                assert (x - 1) * height < rows <= x * height
                assert launch["block"] == 128
                assert (y - 1) * tokens < n_tokens <= y * tokens


def busiest(rows, rows_of_block, groups, tiles, n_sm):
    return math.ceil(math.ceil(rows / rows_of_block) * math.ceil(groups / tiles) / n_sm)


def test_small_blocks_where_large_ones_would_leave_the_card_idle(plans):
    """Many columns only where the multiprocessor that has most blocks has less to do, one of these counted as 13."""
    kinds = set()
    for (*_, n_tokens, _, n_sm, _, _, path), p in plans:
        for launch in p["launches"]:
            if "GEMM" not in launch["kernel"]:
                continue
            tokens, many = (8, 4) if path == F16 else (4, 8)
            groups = -(-n_tokens // tokens)
            few = 1 if path == F16 or groups == 1 else 2
            rows = launch["rows"]
            large = 13 * busiest(rows, 128, groups, many, n_sm) <= busiest(rows, 32, groups, few, n_sm)
            assert tile(launch["kernel"]) == (tokens, many if large else few), (n_tokens, n_sm, launch)
            kinds.add(tile(launch["kernel"]))
    assert kinds == {(4, 1), (4, 2), (4, 8), (8, 1), (8, 4)}


def test_small_blocks_use_the_whole_card(plan):
    """4096 rows would be 32 blocks of 128; from 2 tokens on each multiprocessor of a 4090 has a block."""
    for n_tokens, path in itertools.product((2, 8, 16, 32, 64, 100), (DEFAULT, F16)):
        (p,) = plan([(4096, 4096, 4096, n_tokens, 890, 128, 99 << 10, 1, path)])
        for launch in p["launches"]:
            if "GEMM" in launch["kernel"]:
                assert launch["grid"][0] * launch["grid"][1] >= 128


def test_shared_memory_of_gemm(plans):
    """Blocks of 128 rows have the input of a step in it; those of 32 the sums of 4 warps, 4 bytes each."""
    for _, p in plans:
        for launch in p["launches"]:
            if "GEMM" in launch["kernel"]:
                tokens, tiles = tile(launch["kernel"])
                sums, input_ = 4 * 32 * 8 * tiles * 4, tokens * tiles * 1024
                assert launch["shared"] == (sums if divides_steps(launch["kernel"]) else input_)


def test_sums_fit_32_bits(plans):
    """Twice the sum of a plane, whose bytes are at most 128. In a decode block a warp adds up its share of a chunk, and
    a register of 4 signs counts up to 128 times (bit 7)."""
    for _, p in plans:
        for launch in p["launches"]:
            if "DECODE" in launch["kernel"]:
                steps = -(-launch["chunk_steps"] // (launch["block"] // 32))
                assert steps * 512 * 128 * 2 < 2**31 and steps * 64 * 128 * 128 < 2**31
            elif "GEMM" in launch["kernel"]:
                assert launch["n_words"] * 32 * 128 * 2 < 2**31


def test_operands(plans):
    """Stage 0 goes from x through B to u, stage 1 from u through A to y; each with its scales, types and strides."""
    names = ("signs", "x", "s_in", "s_out", "y", "x_stride", "n_words", "rows", "n_tokens", "s_in_type", "s_out_type")
    for (n_in, k, n_out, n_tokens, *_), p in plans:
        u = WORKSPACE + p["u"]
        stages = (
            (B, X, SB, SM, u, n_in + 8, n_in // 32, k, n_tokens, FLOAT, FLOAT),
            (A, u, 0, SA, Y, k, k // 32, n_out, n_tokens, NONE, HALF),
        )
        for launch in p["launches"]:
            assert tuple(launch[name] for name in names) == stages[launch["stage"]]
            assert launch["rounded"] == WORKSPACE + p["rounded"] and launch["info"] == WORKSPACE + p["info"]
            assert launch["x_vector"] == 1


def test_loads_are_aligned(plans):
    """Rows lie one behind the other: loads of 16 bytes are aligned in all if their length is a multiple of it."""
    for (*_, aligned, _), p in plans:
        for launch in p["launches"]:
            if "ROUND" not in launch["kernel"]:
                assert launch["kernel"].endswith("_WORDS") == (launch["n_words"] % 4 != 0 or not aligned)


def test_workspace(plans):
    """u, the rounded input and its scales lie apart, at multiples of 256, and end before the workspace does."""
    for (n_in, k, _, n_tokens, *_), p in plans:
        parts = [(p["u"], 4 * n_tokens * k)]
        if len(p["launches"]) == 4:
            tokens, _ = tile(p["launches"][1]["kernel"])
            parts += [(p["rounded"], -(-n_tokens // tokens) * tokens * -(-max(n_in, k) // 512) * 1024),
                      (p["info"], 12 * n_tokens)]
        parts.sort()
        for (start, size), (following, _) in zip(parts, [*parts[1:], (p["workspace"], 0)], strict=True):
            assert start % 256 == 0 and start + size <= following


def test_chunks(plans):
    """The input of a decode block is in shared memory at once if it fits. If not, the warps take whole rounds."""
    for (*_, shared, _, _), p in plans:
        for launch in p["launches"]:
            if "DECODE" not in launch["kernel"]:
                continue
            chunk, warps, n_steps = launch["chunk_steps"], launch["block"] // 32, -(-launch["n_words"] // 16)
            assert 1 <= chunk <= n_steps
            assert launch["shared"] >= chunk * 1024 + 2 * warps * 16 * 4
            if chunk < n_steps:
                assert chunk % warps == 0 and (chunk + warps) * 1024 + 2 * warps * 16 * 4 > shared


def test_most_tokens(plan):
    """A grid has at most 65535 blocks in y, where the tokens are: what is beyond is refused."""
    for cc, path in ((610, DEFAULT), (890, DEFAULT), (890, F16)):
        requests = [(64, 32, 48, n_tokens, cc, 20, 48 << 10, 1, path) for n_tokens in (65535, 65536, 1 << 20, 1 << 22)]
        supported = [p for p in plan(requests) if "unsupported" not in p]
        assert supported
        for p in supported:
            assert all(max(launch["grid"][1:]) <= 65535 for launch in p["launches"])


def test_unsupported_shapes(plan):
    """Refused with a reason, not planned."""
    card = (890, 128, 99 << 10, 1, DEFAULT)
    requests = {
        (4096, 2048, 4096, 1, 600, *card[1:]): "dp4a",
        (4090, 2048, 4096, 1, *card): "multiples of 32",
        (4096, 2040, 4096, 1, *card): "multiples of 32",
        (0, 32, 1, 1, *card): "empty",
        (32, 32, 1 << 30, 1, *card): "too large",
    }
    for (request, reason), result in zip(requests.items(), plan(requests), strict=True):
        assert reason in result.get("unsupported", ""), request

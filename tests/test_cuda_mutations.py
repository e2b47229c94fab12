"""Defects planted in the CUDA kernels, one at a time: each of them must be noticed.

A mutation is an edit of the kernels' source, and a layer of test_cuda_kernels.py that has to fail because of it, with
the message that it fails with. Where the text to be edited is no longer there exactly once, the test says so: bring the
list up to date with the kernels.

To be quick, only the kernel that the defect is in is compiled anew; the others are those of the sound program.

Run alone: pytest tests/test_cuda_mutations.py     (minutes)
"""

import shutil
from dataclasses import dataclass

import numpy as np
import ptx_to_cpp
import pytest
from cases import Case, Device, errors, write_cases
from emulator import HERE, run

OFF = "beyond the bound"
RACE = "ThreadSanitizer: data race"
OVERFLOW = "heap-buffer-overflow"

DECODE = "dbf_decode<8, 4, true>"
DECODE_WORDS = "dbf_decode<8, 1, true>"
DECODE_DP4A = "dbf_decode<8, 4, false>"
ROUND = "dbf_round<false>"
GEMM = "dbf_gemm<8, 4, false>"
GEMM_FEW = "dbf_gemm<2, 4, false>"
GEMM_WORDS = "dbf_gemm<1, 1, false>"
GEMM_F16 = "dbf_gemm<1, 4, true>"

AMPERE = Device(800, 2, 163 << 10)
PASCAL = Device(610, 2, 48 << 10)
# what the kernels above run, with rows of several steps, tiles that end in the middle, and strides
CASES = {
    DECODE: [Case(4224, 128, 50, 1, AMPERE), Case(128, 4224, 83, 1, AMPERE)],
    DECODE_WORDS: [Case(96, 160, 33, 1, AMPERE)],
    DECODE_DP4A: [Case(128, 640, 50, 3, PASCAL, padding=4)],
    ROUND: [Case(4224, 128, 50, 5, AMPERE, padding=4)],
    GEMM: [Case(1152, 256, 50, 29, AMPERE, padding=4), Case(128, 1152, 228, 27, AMPERE)],
    GEMM_FEW: [Case(1152, 128, 50, 5, AMPERE, padding=4), Case(128, 5248, 50, 7, AMPERE)],
    GEMM_WORDS: [Case(96, 160, 33, 3, AMPERE)],
    GEMM_F16: [Case(128, 640, 50, 3, AMPERE, path="f16")],
}
CHUNKS = [Case(6272, 128, 40, 1, Device(610, 2, 10 << 10))]


@dataclass
class Mutation:
    what: str
    kernel: str
    layer: str  # source-plain, source-asan, source-tsan or ptx-<architecture>
    message: str
    old: str
    new: str
    file: str = "dbf-kernels.cuh"
    cases: list[Case] | None = None


MUTATIONS = [
    # --- barriers
    Mutation("no barrier before the sum over warps", DECODE, "source-tsan", RACE,
             "= sum1;\n        }\n        __syncthreads();", "= sum1;\n        }"),
    Mutation("both tiles use one half of the sums", DECODE, "source-tsan", RACE, ", parity ^= 1)", ")"),
    Mutation("no barrier between rounding and use", DECODE, "source-tsan", RACE,
             "lane, scales);\n                __syncwarp();", "lane, scales);"),
    Mutation("no barrier before the next chunk", DECODE_DP4A, "source-tsan", RACE,
             "__syncwarp(); // the last chunk", "// the last chunk", cases=CHUNKS),
    Mutation("no barrier after the maximum of each warp", ROUND, "source-tsan", RACE,
             "shared[warp] = largest;\n    }\n    __syncthreads();", "shared[warp] = largest;\n    }"),
    Mutation("no barrier before the input is loaded", GEMM, "source-tsan", RACE,
             "__syncthreads(); // the last step's", "// the last step's"),
    Mutation("no barrier after the input is loaded", GEMM, "source-tsan", RACE,
             "__syncthreads(); // the input is there", "// the input is there"),
    Mutation("no barrier before the sums of the warps are added", GEMM_FEW, "source-tsan", RACE,
             "__syncthreads(); // the sums of all warps", "// the sums of all warps"),
    Mutation("x is read before the previous kernel is done", ROUND, "source-tsan", RACE,
             "dbf_wait_for_previous_kernel();\n\n    uint32_t largest", "uint32_t largest"),
    Mutation("x is read before the previous kernel is done, one token", DECODE, "source-tsan", RACE,
             "dbf_wait_for_previous_kernel();\n\n    // The six", "// The six"),
    # --- bounds
    Mutation("a row too many in decode", DECODE, "source-asan", OVERFLOW,
             "row < args.rows) {\n            float sum", "row <= args.rows) {\n            float sum"),
    Mutation("no check of the rows in gemm", GEMM, "source-asan", OVERFLOW,
             "row >= args.rows) {\n                continue;", "row >= args.rows + 16) {\n                continue;"),
    Mutation("no check of the rows in gemm, few columns", GEMM_FEW, "source-asan", OVERFLOW,
             "row >= args.rows) {\n            return;", "row >= args.rows + 16) {\n            return;"),
    Mutation("no check of the groups of tokens", GEMM_FEW, "source-asan", OVERFLOW,
             "min(tile, n_groups - 1 - group)", "tile", cases=[Case(1152, 128, 50, 9, AMPERE)]),
    Mutation("shared memory for the sums of half the warps", GEMM_FEW, "source-asan", OVERFLOW,
             "? DBF_GEMM_WARPS*DBF_GEMM_ROWS(tiles)*8", "? DBF_GEMM_WARPS/2*DBF_GEMM_ROWS(tiles)*8", "dbf-launch.h"),
    Mutation("signs of a row too many", DECODE, "source-asan", OVERFLOW,
             "min(row, args.rows - 1)", "min(row, args.rows)"),
    Mutation("a word too many at the ragged end of a row", DECODE_WORDS, "source-asan", OVERFLOW,
             "n_words - VECTOR;", "n_words - VECTOR + 1;"),
    Mutation("a word too many of the input", DECODE_WORDS, "source-asan", OVERFLOW,
             "lane, c) < args.n_words) {\n        dbf_load", "lane, c) <= args.n_words) {\n        dbf_load"),
    Mutation("a word too many of the input for several tokens", ROUND, "source-asan", OVERFLOW,
             "word < args.n_words;", "word <= args.n_words;"),
    Mutation("a word too many of the scales", DECODE_WORDS, "source-asan", OVERFLOW,
             "lane, c) < args.n_words;\n    return there", "lane, c) <= args.n_words;\n    return there"),
    Mutation("a token too many", GEMM_WORDS, "source-asan", OVERFLOW,
             "+ t;\n        if (token < args.n_tokens)", "+ t;\n        if (token <= args.n_tokens)"),
    # --- alignment
    Mutation("loads of 16 bytes from rows of 8 bytes", DECODE, "source-asan", "misaligned address",
             "n % (4*DBF_WORD) != 0", "n % (2*DBF_WORD) != 0", "dbf-launch.h", [Case(192, 64, 33, 1, AMPERE)]),
    Mutation("loads of 16 bytes from x at odd strides", ROUND, "source-asan", "misaligned address",
             "a.x_stride % 4 == 0", "a.x_stride % 1 == 0", "dbf-launch.h", [Case(128, 64, 33, 2, AMPERE, padding=3)]),
    # --- values
    Mutation("the two steps ahead do not take turns", DECODE, "source-plain", OFF,
             "turned = !use_all(ahead[1], ahead[0]);", "turned = use_all(ahead[1], ahead[0]);"),
    Mutation("planes swapped in decode", DECODE, "source-plain", OFF, "half == 0 ? hi : lo;", "half == 0 ? lo : hi;"),
    Mutation("bytes of two lanes not exchanged", DECODE, "source-plain", OFF, "? 0x3276 : 0x5410", "? 0x3210 : 0x3210"),
    Mutation("scales of the first chunk kept", DECODE_DP4A, "source-plain", OFF,
             "load_scales(begin + warp);", "", cases=CHUNKS),
    Mutation("planes swapped for gemm", ROUND, "source-plain", OFF, "half, at + 4)] = lo;", "half, at + 8)] = lo;"),
    Mutation("rows swapped in a fragment", DECODE, "source-plain", OFF, "{ w0 & m, w1 & m, ", "{ w1 & m, w0 & m, "),
    Mutation("wrong mask", DECODE, "source-plain", OFF, "<< (4*half + 2*i)", "<< (4*half + i)"),
    Mutation("wrong mask, dp4a", DECODE_DP4A, "source-plain", OFF, "<< (4*half + 2*i)", "<< (2*half + 2*i)"),
    Mutation("powers of two kept in the sums", DECODE, "source-plain", OFF, "acc[j][i] >> (2*j)", "acc[j][i] >> j"),
    Mutation("sum of q not taken off", DECODE, "source-plain", OFF, "2*s[1] - info.sum_lo", "2*s[1]"),
    Mutation("sum of q not taken off, gemm", GEMM, "source-plain", OFF, "2*c1 - info.sum_lo", "2*c1"),
    Mutation("the last group of steps left out", GEMM_FEW, "source-plain", OFF,
             "if (step + STRIDE < n_steps)", "if (step + 2*STRIDE < n_steps)"),
    Mutation("one warp's sum left out", GEMM_FEW, "source-plain", OFF,
             "w < DBF_GEMM_WARPS; ++w", "w < DBF_GEMM_WARPS - 1; ++w"),
    Mutation("steps divided by two warps", GEMM_FEW, "source-plain", OFF,
             "STRIDE  = DIVIDES ? DBF_GEMM_WARPS : 1", "STRIDE  = DIVIDES ? DBF_GEMM_WARPS/2 : 1"),
    Mutation("signs of few columns one step ahead too late", GEMM_FEW, "source-plain", OFF,
             "load_ahead(signs, step + 2*STRIDE);", "load_ahead(signs, step + STRIDE);"),
    Mutation("scale of another row", DECODE, "source-plain", OFF,
             "args.s_out_type, row) : 0;", "args.s_out_type, row/2) : 0;"),
    Mutation("one warp left out of the sum", DECODE, "source-plain", OFF,
             "w < WARPS; ++w) {\n                sum +=", "w < WARPS - 1; ++w) {\n                sum +="),
    Mutation("wrong stride of x", DECODE_DP4A, "source-plain", OFF,
             "token*args.x_stride + i", "token*(args.n_words*DBF_WORD) + i"),
    Mutation("signs of half the fp16 turned round", GEMM_F16, "source-plain", OFF, "^ 0xbc00bc00u", "^ 0xbc003c00u"),
    # --- what only the compiled code has
    Mutation("quarters of the mma of sm_75 swapped", DECODE, "ptx-75", OFF, '"r"(a[2*k + r])', '"r"(a[2*r + k])'),
    Mutation("wrong type in the mma of sm_80", DECODE, "ptx-80", "unknown PTX",
             "m16n8k32.row.col.s32.u8.s8", "m16n8k32.row.col.s32.s8.s8"),
    Mutation("misaligned load in the PTX", DECODE, "ptx-80", "misaligned access",
             "4*t;\n    const int last", "3*t;\n    const int last"),
]


def first_failure(cases, program, folder) -> str:
    """What is wrong with the results or with the run, or nothing."""
    write_cases(cases, folder / "cases")
    result = run(program, folder / "cases", folder / "results")
    if result.returncode != 0:
        return result.stderr
    flat = np.fromfile(folder / "results", np.float32)
    for case in cases:
        n = case.n_tokens * case.n_out
        wrong = errors(case, flat[:n].reshape(case.n_tokens, case.n_out))
        if wrong:
            return f"{OFF}: {wrong}"
        flat = flat[n:]
    return ""


def build(sound, layer: str, kernel: str, kernels, folder, host_too: bool = False):
    """A driver with one kernel (or the host side) from the folder `kernels` and all else from the sound program."""
    made = sound.with_kernels(kernels, folder)
    one = folder / "one.cu"
    one.write_text(f'#include "dbf-kernels.cuh"\n\ntemplate __global__ void {kernel}(const dbf_args);\n')
    kind, which = layer.split("-")
    if kind == "source":
        objects = [made.source_object(one, which)]
    else:
        objects = [made.ptx_object(one, int(which), "plain")]
        which = "plain"
    # Of two definitions the linker takes the first: instances of templates are weak symbols.
    host = (made if host_too else sound).driver_object(which)
    objects += [host, sound.source_object(HERE / "kernels.cu", which)]
    return made.driver(which, *objects, name="driver")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_defect_is_noticed(cuda_emulator, tmp_path, mutation):
    kernels = tmp_path / "kernels"
    shutil.copytree(cuda_emulator.kernels, kernels)
    file = kernels / mutation.file
    text = file.read_text()
    assert text.count(mutation.old) == 1, f"{mutation.file} has changed: bring this list up to date"
    file.write_text(text.replace(mutation.old, mutation.new))
    cases = mutation.cases or CASES[mutation.kernel]
    host_too = mutation.file == "dbf-launch.h"
    try:
        program = build(cuda_emulator, mutation.layer, mutation.kernel, kernels, tmp_path, host_too)
        failure = first_failure(cases, program, tmp_path)
    except ptx_to_cpp.Unknown as error:
        failure = str(error)
    assert mutation.message in failure, failure or "not noticed"


@pytest.mark.parametrize("layer", sorted({m.layer for m in MUTATIONS}))
def test_nothing_is_noticed_without_defect(cuda_emulator, tmp_path, layer):
    """The same cases through the same builds, with the kernels as they are."""
    kernels = sorted({m.kernel for m in MUTATIONS if m.layer == layer})
    for i, kernel in enumerate(kernels):
        folder = tmp_path / str(i)
        folder.mkdir()
        cases = [c for m in MUTATIONS if m.kernel == kernel for c in m.cases or []] + CASES[kernel]
        assert first_failure(cases, build(cuda_emulator, layer, kernel, cuda_emulator.kernels, folder), folder) == ""

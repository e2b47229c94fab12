"""The CUDA kernels of the DBF product, executed on the CPU: what comes out equals a float64 numpy product.

Two layers (see cuda/emulator.py): the kernels' source, with sanitizers, and the PTX that nvcc made of it. Both are
launched with what dbf-launch.h planned, as dbf.cu does it. How far a result may be off is derived in cuda/cases.py.

Run alone: pytest tests/test_cuda_kernels.py     (minutes; CUDA's compiler is fetched once)
"""

import itertools

import numpy as np
import pytest
from cases import PATHS, Case, Device, errors, reference, run_cases
from emulator import HERE

# Few multiprocessors, so that persistent blocks have several tiles of rows to walk over.
PASCAL = Device(610, 3, 48 << 10)
VOLTA = Device(700, 2, 96 << 10)
TURING = Device(750, 4, 64 << 10)
AMPERE = Device(800, 3, 163 << 10)
ADA = Device(890, 5, 99 << 10)
HOPPER = Device(900, 132, 227 << 10)
BLACKWELL = Device(1200, 2, 99 << 10)

LAYERS = ("source-asan", "source-tsan", "ptx-75", "ptx-80", "ptx-90", "ptx-120")
DEVICES = {
    "source-asan": (PASCAL, TURING, AMPERE, HOPPER),
    "source-tsan": (PASCAL, AMPERE),
    "ptx-75": (PASCAL, VOLTA, TURING),
    "ptx-80": (AMPERE, ADA),
    "ptx-90": (HOPPER,),
    "ptx-120": (BLACKWELL,),
}


def program(emulator, layer: str):
    source = HERE / "kernels.cu"
    kind, which = layer.split("-")
    if kind == "source":
        kernels, build = emulator.source_object(source, which), which
    else:
        kernels, build = emulator.ptx_object(source, int(which), "plain"), "plain"
    return emulator.driver(build, emulator.driver_object(build), kernels, name=f"driver-{layer}")


# --- cases: each group is a function of the device

MIXED = ("f16", "f32", "f16")


def by_tokens(device):
    """Every number of tokens up to 9, and where the tiles of columns end."""
    for n_tokens in (*range(1, 10), 16, 17, 33):
        yield Case(160, 96, 33, n_tokens, device, MIXED)
    yield Case(64, 32, 24, 512, device)


def by_shape(device):
    """Rows of 1 word and up; a number of rows that is no multiple of anything."""
    shapes = [(32, 32, 1), (64, 32, 17), (96, 416, 333), (416, 160, 16), (512, 512, 40), (1056, 544, 70)]
    for (n_in, k, n_out), n_tokens in itertools.product(shapes, (1, 3)):
        yield Case(n_in, k, n_out, n_tokens, device)


def by_type(device):
    for types in itertools.product(("f16", "f32"), repeat=3):
        for n_tokens in (1, 2, 11):
            yield Case(96, 64, 18, n_tokens, device, types)


def by_alignment(device):
    """Pointers that are aligned to their elements and no more; rows whose length is no multiple of 16 bytes."""
    everything = {"A": 4, "B": 12, "sa": 2, "sm": 6, "sb": 10, "x": 4, "y": 12}
    for n_in, n_tokens in itertools.product((32, 128, 160, 512), (1, 2, 9)):
        yield Case(n_in, 96, 19, n_tokens, device, padding=n_tokens, offsets=everything)
        yield Case(128, n_in, 19, n_tokens, device, offsets={"A": 8, "B": 8, "x": 8})


def by_order(device):
    """Other orders of threads and blocks, another poison."""
    for seed, poison, n_tokens in itertools.product((1, 2, 3), (0xFF, 0x7B), (1, 3, 20)):
        yield Case(416, 96, 50, n_tokens, device, MIXED, seed=seed, poison=poison)


def by_memory(device):
    """Shared memory that the input does not fit at once."""
    for shape, n_tokens in itertools.product(((9248, 96, 20), (64, 8320, 33)), (1, 3)):
        shared = (20 if device.cc >= 750 else 10) << 10
        yield Case(*shape, n_tokens, Device(device.cc, device.n_sm, shared))


def by_magnitude(device):
    """Scales and inputs far from 1, up to where products of floats would overflow."""
    magnitudes = [(1e30, 1e-30, 1, 1), (1e-30, 1e25, 1, 1), (1, 1e-25, 1e28, 1), (1, 1, 1e-30, 1e25)]
    magnitudes += [(1, 1, 1e10, 1e25), (1, 1, 1, 1e-36), (1e-38, 1, 1, 1)]
    magnitudes += [(0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0)]
    for magnitude, n_tokens in itertools.product(magnitudes, (1, 3)):
        yield Case(160, 96, 20, n_tokens, device, ("f32", "f32", "f32"), magnitude=magnitude)


def spike(a):
    a["x"][:, 7] = 1e4


def loud_and_quiet(a):
    a["x"] *= np.logspace(-12, 12, len(a["x"]), dtype=np.float32)[:, None]


def denormal(a):
    a["sm"][::2] = 6e-8
    a["sb"][::3] = 6e-8


def empty(a):
    a["x"][0] = 0


def not_finite(value, where):
    def edit(a):
        a["x"][len(a["x"]) // 2, where] = value

    return edit


def by_content(device):
    """One element that dwarfs the rest, tokens of very different size, half denormals, an empty token."""
    for edit, n_tokens in itertools.product((spike, loud_and_quiet, denormal, empty), (1, 4, 10)):
        yield Case(160, 96, 20, n_tokens, device, edit=edit)


def by_nan(device):
    """A NaN or an infinity makes all of its token NaN, and of no other."""
    for value, where, n_tokens in itertools.product((np.nan, np.inf, -np.inf), (0, 95, 159), (1, 4, 10)):
        yield Case(160, 96, 20, n_tokens, device, edit=not_finite(value, where))


def by_path(device):
    """Inputs in fp16 instead of two planes of bytes: what GGML_DBF_CUDA_F16 asks for."""
    shapes = [(32, 32, 1), (96, 416, 333), (512, 512, 40), (1056, 160, 70)]
    for shape, n_tokens in itertools.product(shapes, (1, 2, 8, 9, 17, 33)):
        yield Case(*shape, n_tokens, device, MIXED, path="f16")
    for edit, n_tokens in itertools.product((loud_and_quiet, empty, not_finite(np.inf, 3)), (4, 10)):
        yield Case(160, 96, 20, n_tokens, device, path="f16", edit=edit)


def by_blocks(device):
    """Both kinds of gemm block, with rows and steps that end in the middle, up to 11 steps for 4 warps. On a card of
    one multiprocessor the plan takes many columns where they are less work; with very many it takes few."""
    if device.cc < 750:
        return  # no tensor cores, no gemm
    shapes = [(32, 96, 31), (512, 1056, 33), (2048, 544, 161), (5312, 64, 40)]
    for n_sm, (shape, path) in itertools.product((1, 1000), itertools.product(shapes, PATHS)):
        card = Device(device.cc, n_sm, device.shared)
        for n_tokens in (3, 8, 26, 32, 61):
            yield Case(*shape, n_tokens, card, MIXED, path=path, seed=n_tokens % 3)


def by_race(device):
    """Few and small, for ThreadSanitizer: it looks at accesses and not at values, and is slow."""
    for n_tokens in (1, 2, 5, 9, 17):
        yield Case(160, 96, 140, n_tokens, device)
        yield Case(1152, 1056, 33, n_tokens, device, seed=n_tokens)
    yield from itertools.islice(by_memory(device), 4)
    yield Case(160, 96, 140, 9, device, path="f16")
    for n_sm, path in itertools.product((1, 1000), PATHS):
        yield Case(2592, 224, 200, 27, Device(device.cc, n_sm, device.shared), path=path, seed=n_sm)


GROUPS = (by_tokens, by_shape, by_type, by_alignment, by_order, by_memory, by_magnitude, by_content, by_nan, by_path)
GROUPS += (by_blocks,)


def check(results, cases):
    wrong = [e for e in (errors(c, y) for c, y in zip(cases, results, strict=True)) if e]
    assert not wrong, f"{len(wrong)} of {len(cases)} cases:\n" + "\n".join(wrong[:10])


@pytest.mark.parametrize("layer, group", [
    *((layer, group) for layer in LAYERS if layer != "source-tsan" for group in GROUPS),
    ("source-tsan", by_race),
])
def test_kernels(cuda_emulator, tmp_path, layer, group):
    cases = [case for device in DEVICES[layer] for case in group(device)]
    check(run_cases(program(cuda_emulator, layer), cases, tmp_path), cases)


@pytest.mark.parametrize("layer", ("source-asan", "ptx-80"))
def test_result_does_not_depend_on_the_order(cuda_emulator, tmp_path, layer):
    """Sums are made in a fixed order: the same bits whichever thread comes first."""
    for n_tokens in (1, 3, 20):
        cases = [Case(416, 96, 50, n_tokens, AMPERE, seed=seed) for seed in range(5)]
        first, *others = run_cases(program(cuda_emulator, layer), cases, tmp_path)
        assert all(np.array_equal(first, y) for y in others)


def test_errors_are_seen():
    """The comparison itself: a flipped sign, 8 bits instead of 16, a NaN and a missing row are all beyond the bound."""
    case = Case(160, 96, 33, 2)
    _, _, y = reference(case)
    assert errors(case, y) == ""
    for name in "AB":
        flipped = Case(160, 96, 33, 2)
        flipped.arrays[name][5, 1] ^= 1 << 9
        assert "off" in errors(case, reference(flipped)[2])
    coarse = Case(160, 96, 33, 2)
    step = np.abs(coarse.arrays["x"]).max(1, keepdims=True) / 127
    coarse.arrays["x"] = np.rint(coarse.arrays["x"] / step) * step
    assert "off" in errors(case, reference(coarse)[2])
    y[1, 32] = np.nan
    assert "NaN" in errors(case, y)
    assert "shape" in errors(case, y[:, :-1])

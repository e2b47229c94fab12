"""Signs and scales of one linear, the budget that chooses k, and the work folder they are kept in.

Run alone: pytest tests/test_factors.py     (seconds, nothing is downloaded)
"""

import errno
import math
import os
import signal
import struct
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from dbf_gguf import checkpoint
from dbf_gguf.budget import (
    DEPTH,
    FLOOR,
    MAX_BITS,
    MIN_BITS,
    adaptive_budget,
    bits_for_size,
    bits_per_weight,
    linear_bits,
    uniform_budget,
    weighted,
)
from dbf_gguf.checkpoint import WorkFolder
from dbf_gguf.errors import DBFError
from dbf_gguf.factors import Factors, pack_signs, unpack_signs


def random_factors(n_out: int, k: int, n_in: int, seed: int = 0) -> Factors:
    g = torch.Generator().manual_seed(seed)
    signs = [torch.randint(0, 2, shape, generator=g, dtype=torch.int8) * 2 - 1 for shape in ((n_out, k), (k, n_in))]
    return Factors(*signs, *(torch.randn(n, generator=g) for n in (n_out, k, n_in)))


# --- packing


def pack_by_the_book(signs: np.ndarray) -> bytes:
    """FORMAT's text, word by word: 32 signs in a little-endian 32-bit word, bit j is element j, 1 = +1, 0 = -1."""
    out = b""
    for row in signs:
        for start in range(0, len(row), 32):
            word = 0
            for j in range(32):
                if row[start + j] == 1:
                    word |= 1 << j
            out += struct.pack("<I", word)
    return out


@pytest.mark.parametrize("shape", [(1, 32), (3, 64), (32, 96), (7, 160), (5, 576)])
def test_packing_is_that_of_the_format(shape):
    signs = np.random.default_rng(shape[1]).choice(np.array([-1, 1], dtype=np.int8), shape)
    packed = pack_signs(torch.from_numpy(signs))
    assert packed.dtype == np.uint8 and packed.shape == (shape[0], shape[1] // 8)
    assert packed.tobytes() == pack_by_the_book(signs)
    back = unpack_signs(packed)
    assert back.dtype == torch.int8 and np.array_equal(back.numpy(), signs)


def test_packing_single_bits():
    """Element j alone is +1: the word is 2^j."""
    for j in range(32):
        signs = -torch.ones(1, 32)
        signs[0, j] = 1
        assert pack_signs(signs).view("<u4").tolist() == [[1 << j]]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32, torch.bfloat16])
def test_packing_takes_any_dtype_and_layout(dtype):
    signs = random_factors(64, 96, 32).signs_a
    expected = pack_by_the_book(signs.numpy())
    assert pack_signs(signs.to(dtype)).tobytes() == expected
    assert pack_signs(signs.t().contiguous().t().to(dtype)).tobytes() == expected


@pytest.mark.parametrize("shape", [(4, 48), (4, 31), (32,), (2, 32, 32)])
def test_packing_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="multiple of 32"):
        pack_signs(torch.ones(shape))


# --- factors


@pytest.mark.parametrize("n_out, k, n_in", [(32, 32, 32), (37, 64, 96), (16, 224, 64), (1, 32, 320)])
def test_dense_is_the_formula(n_out, k, n_in):
    """W = diag(a) A diag(m) B diag(b), and y = a ⊙ (A (m ⊙ (B (b ⊙ x)))), against float64 numpy."""
    f = random_factors(n_out, k, n_in)
    a, m, b = (t.double().numpy() for t in (f.scale_a, f.scale_m, f.scale_b))
    signs_a, signs_b = f.signs_a.numpy().astype(float), f.signs_b.numpy().astype(float)
    w = np.diag(a) @ signs_a @ np.diag(m) @ signs_b @ np.diag(b)
    assert (f.n_out, f.k, f.n_in) == (n_out, k, n_in)
    assert np.allclose(f.dense(torch.float64).numpy(), w, rtol=1e-12, atol=1e-12)
    assert f.dense().dtype == torch.float32
    assert np.allclose(f.dense().numpy(), w, rtol=1e-4, atol=1e-4)
    x = np.random.default_rng(0).standard_normal(n_in)
    assert np.allclose(w @ x, a * (signs_a @ (m * (signs_b @ (b * x)))), rtol=1e-10, atol=1e-10)


def test_factors_that_do_not_chain_are_refused():
    f = random_factors(8, 32, 64)
    with pytest.raises(ValueError, match="do not chain"):
        Factors(f.signs_a, f.signs_b[:16], f.scale_a, f.scale_m, f.scale_b)
    with pytest.raises(ValueError, match="do not chain"):
        Factors(f.signs_a, f.signs_b, f.scale_a, f.scale_m[:16], f.scale_b)


# --- budget

SMOLLM2_BLOCK = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
SMOLLM2 = {f"model.layers.{i}.{name}": shape for i in range(30) for name, shape in SMOLLM2_BLOCK.items()}


def counted_bits(shapes, ks) -> float:
    """Bits per weight counted tensor by tensor: one bit a sign, 16 a scale."""
    stored = 0
    for name, (n_out, n_in) in shapes.items():
        stored += n_out * ks[name] + ks[name] * n_in + 16 * n_out + 16 * ks[name] + 16 * n_in
    return stored / sum(n_out * n_in for n_out, n_in in shapes.values())


@pytest.mark.parametrize("bits", [0.5, 0.8, 1.0, 1.1, 1.25, 1.37, 1.5, 1.73, 2.0, 2.1, 2.3, 3.0, 4.0, 6.0])
def test_budget_hits_the_request(bits):
    ks = uniform_budget(SMOLLM2, bits)
    assert ks.keys() == SMOLLM2.keys()
    assert all(k % 32 == 0 and k >= 32 for k in ks.values())
    assert counted_bits(SMOLLM2, ks) == pytest.approx(bits, abs=0.03)
    assert bits_per_weight(SMOLLM2, ks) == pytest.approx(counted_bits(SMOLLM2, ks), abs=1e-12)


def test_budget_is_even():
    """Linears of one shape differ by two steps of 32 at most: nothing drifts over the depth of the model."""
    ks = uniform_budget(SMOLLM2, 1.37)
    for name in SMOLLM2_BLOCK:
        of_name = [k for full, k in ks.items() if full.endswith(name)]
        assert max(of_name) - min(of_name) <= 64, name
    q = [ks[f"model.layers.{i}.self_attn.q_proj"] for i in range(30)]
    assert len(set(q)) > 1  # up here and down there, as one value would miss the request


def test_budget_does_not_clamp_k():
    shapes = {"mlp.gate_proj": (11008, 4096)}
    (k,) = uniform_budget(shapes, 1.5).values()
    assert k > 4096
    assert counted_bits(shapes, {"mlp.gate_proj": k}) == pytest.approx(1.5, abs=0.01)


def test_linear_bits_are_those_of_the_stored_tensors():
    f = random_factors(40, 64, 96)
    signs = 8 * (pack_signs(f.signs_a).nbytes + pack_signs(f.signs_b).nbytes)
    scales = 8 * sum(t.half().nbytes for t in (f.scale_a, f.scale_m, f.scale_b))
    assert linear_bits(40, 96, 64) == signs + scales


@pytest.mark.parametrize("bits", [0.0, 17.0, -1.0, MIN_BITS / 2, MAX_BITS + 0.1, float("nan"), float("inf")])
def test_budget_refuses_impossible_bits(bits):
    with pytest.raises(DBFError, match="choose between") as refusal:
        uniform_budget(SMOLLM2, bits)
    assert "\n" not in str(refusal.value)


def test_budget_refuses_a_width_the_format_cannot_hold():
    with pytest.raises(DBFError, match=r"odd_proj.*100.*multiple of 32"):
        uniform_budget({"odd_proj": (64, 100)}, 2.0)
    uniform_budget({"odd_proj": (100, 64)}, 2.0)  # the output's width may be anything


def random_curves(shapes, seed: int) -> dict:
    """Effects over three orders of magnitude, falling to 0.3 to 0.9 from 1 to 2 bits."""
    g = np.random.default_rng(seed)
    low, high = uniform_budget(shapes, 1.0), uniform_budget(shapes, 2.0)
    effects = {name: 10 ** g.uniform(-3, 0) for name in shapes}
    return {n: ((low[n], e), (max(high[n], low[n] + 32), e * g.uniform(0.3, 0.9))) for n, e in effects.items()}


def total_bits(shapes, ks) -> int:
    return sum(linear_bits(*shapes[name], k) for name, k in ks.items())


def effect_at(curve, k: int) -> float:
    (k_0, e_0), (k_1, e_1) = curve
    return e_0 * (e_1 / e_0) ** ((k - k_0) / (k_1 - k_0))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [0.5, 1.0, 1.37, 1.5, 2.0, 2.3, 4.0])
def test_adaptive_budget_spends_the_bits(bits, seed):
    curves = random_curves(SMOLLM2, seed)
    ks = adaptive_budget(SMOLLM2, bits, curves)
    assert list(ks) == list(SMOLLM2)
    even = uniform_budget(SMOLLM2, bits)
    step = 32 * min(n_out + n_in + 16 for n_out, n_in in SMOLLM2.values())
    assert abs(bits * sum(n_out * n_in for n_out, n_in in SMOLLM2.values()) - total_bits(SMOLLM2, ks)) <= step / 2
    for name, (n_out, n_in) in SMOLLM2.items():
        assert ks[name] % 32 == 0 and ks[name] >= 32
        one_more = linear_bits(n_out, n_in, ks[name] + 32) / (n_out * n_in)  # the floor, up to a step of 32
        assert one_more > FLOOR * bits
    assert ks != even
    assert sum(effect_at(curves[n], ks[n]) for n in ks) < sum(effect_at(curves[n], even[n]) for n in ks)


def test_more_bits_are_more_channels():
    curves = random_curves(SMOLLM2, 7)
    totals = [total_bits(SMOLLM2, adaptive_budget(SMOLLM2, bits / 20, curves)) for bits in range(8, 60)]
    assert totals == sorted(totals) and len(set(totals)) == len(totals)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_widths_of_the_same_bits_have_less_effect(seed):
    """Equal shapes, so that the steps fit exactly: compared with every way to spend the bits above the floors."""
    shapes = dict.fromkeys("abc", (256, 128))
    curves = random_curves(shapes, seed)
    found = adaptive_budget(shapes, 3.0, curves)
    steps = sum(found.values()) // 32
    lowest = int((FLOOR * 3.0 * 256 * 128 - linear_bits(256, 128, 0)) / 400 // 32)
    others = [
        sum(effect_at(curves[name], 32 * k) for name, k in zip("abc", (a, b, steps - a - b), strict=True))
        for a in range(lowest, steps)
        for b in range(lowest, steps - a - lowest + 1)
    ]
    assert len(others) > 10
    assert sum(effect_at(curves[name], k) for name, k in found.items()) == pytest.approx(min(others), rel=1e-12)


def test_the_more_a_linear_matters_the_more_bits_it_gets():
    shapes = {str(i): (256, 256) for i in range(6)}
    curves = {name: ((128, 2.0 ** int(name)), (256, 0.3 * 2.0 ** int(name))) for name in shapes}
    ks = list(adaptive_budget(shapes, 1.5, curves).values())
    assert ks == sorted(ks) and ks[0] < ks[-1]


def test_effects_count_for_the_more_the_further_down_the_block_is():
    """Of effects that are equal: by a constant factor from block to block, e^(2 DEPTH) from first to last."""
    curves = {name: ((32, 0.4), (64, 0.1)) for name in SMOLLM2}
    found = weighted(curves)
    assert list(found) == list(curves)
    at = [found[f"model.layers.{i}.mlp.down_proj"] for i in range(30)]
    ratios = [later[1][1] / earlier[1][1] for earlier, later in pairwise(at)]
    assert ratios == pytest.approx([math.exp(2 * DEPTH / 29)] * 29)
    assert math.prod(effect for _, (_, effect) in at) == pytest.approx(0.1**30)
    assert all(curve[0][1] == pytest.approx(4 * curve[1][1]) and curve[1][0] == 64 for curve in found.values())
    shapes = {name: (256, 256) for name in SMOLLM2}
    ks = adaptive_budget(shapes, 1.5, found)
    assert ks["model.layers.0.mlp.down_proj"] < ks["model.layers.29.mlp.down_proj"]
    one = {"model.layers.0.mlp.down_proj": curves["model.layers.0.mlp.down_proj"]}
    assert weighted(one)["model.layers.0.mlp.down_proj"][1][1] == pytest.approx(0.1 * math.exp(-DEPTH))


def test_bits_for_a_size():
    """A file that is larger by what the linears grow by needs as many bits as they then have."""
    least, wanted = uniform_budget(SMOLLM2, MIN_BITS), uniform_budget(SMOLLM2, 1.7)
    rest = 12345678
    smallest, size = (rest + total_bits(SMOLLM2, ks) // 8 for ks in (least, wanted))
    found = bits_for_size(SMOLLM2, size, smallest, least)
    assert 0 <= counted_bits(SMOLLM2, wanted) - found < 1.01e-4


@pytest.mark.parametrize("d, ff, kv, blocks", [(4096, 11008, 4096, 32), (4096, 14336, 1024, 32), (2048, 5632, 256, 22)])
def test_the_smallest_file_needs_the_fewest_bits(d, ff, kv, blocks):
    """Whole channels come to a little less than MIN_BITS in Llama 2 7B, Llama 3 8B and TinyLlama."""
    block = {"qkv": (d + 2 * kv, d), "o": (d, d), "gate_up": (2 * ff, d), "down": (d, ff)}
    shapes = {f"{i}.{name}": shape for i in range(blocks) for name, shape in block.items()}
    least = uniform_budget(shapes, MIN_BITS)
    assert counted_bits(shapes, least) < MIN_BITS
    assert uniform_budget(shapes, bits_for_size(shapes, 1000, 1000, least)) == least


# --- work folder


def same(left: Factors, right: Factors) -> bool:
    names = ("signs_a", "signs_b", "scale_a", "scale_m", "scale_b")
    return all(torch.equal(getattr(left, n), getattr(right, n)) for n in names)


def test_linear_comes_back_as_written(tmp_path):
    f = random_factors(48, 96, 64)
    work = WorkFolder.create(tmp_path / "work")
    work.write_linear("model.layers.0.mlp.up_proj", f, {"k": 96, "error": 0.5})
    again = WorkFolder.open(tmp_path / "work")
    assert again.linears() == ["model.layers.0.mlp.up_proj"]
    assert again.manifest["linears"]["model.layers.0.mlp.up_proj"] == {"k": 96, "error": 0.5}
    assert same(again.factors("model.layers.0.mlp.up_proj"), f)
    packed_a, packed_b = again.packed_signs("model.layers.0.mlp.up_proj")
    assert packed_a.tobytes() == pack_by_the_book(f.signs_a.numpy())
    assert packed_b.tobytes() == pack_by_the_book(f.signs_b.numpy())


def test_final_scales_win_over_the_factorized_ones(tmp_path):
    f = random_factors(48, 96, 64)
    work = WorkFolder.create(tmp_path / "work")
    work.write_linear("x", f, {})
    assert work.final_norms() == {}
    tuned = {f"x.{scale}": (2 * getattr(f, scale)).half() for scale in ("scale_a", "scale_m", "scale_b")}
    norm = torch.randn(64)
    work.write_tensors("final.safetensors", {**tuned, "model.norm.weight": norm}, {"note": 1})
    again = WorkFolder.open(tmp_path / "work")
    assert torch.equal(again.scales("x")["scale_m"], tuned["x.scale_m"])
    assert again.factors("x").scale_a.dtype == torch.float16
    assert list(again.final_norms()) == ["model.norm.weight"]
    assert torch.equal(again.final_norms()["model.norm.weight"], norm)
    assert again.read_metadata("final.safetensors") == {"note": 1}


class Killed(BaseException):
    """Stands for SIGKILL: no `except Exception` sees it, so nothing is tidied up."""


@pytest.mark.parametrize("moment", range(4))
def test_killed_while_writing_a_linear(tmp_path, monkeypatch, moment):
    """Dying before any of the four steps to the disk (flush and rename, of the linear and of the manifest) loses that
    linear at most, and writing it again is not in the way of what is left over."""
    first, second = random_factors(32, 64, 32, seed=1), random_factors(32, 64, 32, seed=2)
    work = WorkFolder.create(tmp_path / "work")
    work.write_linear("first", first, {"k": 64})

    calls = 0

    def dying(real):
        def call(*args):
            nonlocal calls
            calls += 1
            if calls == moment + 1:
                raise Killed
            return real(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", dying(os.fsync))
        patch.setattr(checkpoint.os, "replace", dying(os.replace))
        with pytest.raises(Killed):
            work.write_linear("second", second, {"k": 64})

    again = WorkFolder.open(tmp_path / "work")
    assert again.linears() == ["first"]
    assert same(again.factors("first"), first)
    again.write_linear("second", second, {"k": 64})
    last = WorkFolder.open(tmp_path / "work")
    assert last.linears() == ["first", "second"]
    assert same(last.factors("first"), first) and same(last.factors("second"), second)
    assert not list(last.path.rglob("*.part"))


WRITER = """
import sys
from pathlib import Path
import torch
from dbf_gguf.checkpoint import WorkFolder
from dbf_gguf.factors import Factors
signs = torch.ones(256, 256, dtype=torch.int8)
work = WorkFolder.create(Path(sys.argv[1]))
for i in range(100000):
    work.write_linear(f"linear{i}", Factors(signs, signs, *(torch.full([256], 1.0 * i) for _ in "amb")), {})
    print(i, flush=True)
"""


def test_kill_9_while_writing(tmp_path):
    """A process that writes without pause is killed: what the manifest names is whole, what was finished is named."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "work")], stdout=subprocess.PIPE) as process:
        for _ in range(20):
            done = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        done = max([done, *map(int, process.stdout.read().split())])
    work = WorkFolder.open(tmp_path / "work")
    assert work.linears() in ([f"linear{i}" for i in range(done + 1)], [f"linear{i}" for i in range(done + 2)])
    for i, name in enumerate(work.linears()):
        assert work.factors(name).scale_m.eq(i).all()


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    work = WorkFolder.create(tmp_path / "work")
    before = sorted(p.name for p in work.path.rglob("*"))

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", full)
        with pytest.raises(DBFError, match="No space left") as refusal:
            work.write_tensors("tuning.safetensors", {"x": torch.ones(3)})
    assert "\n" not in str(refusal.value)
    assert sorted(p.name for p in work.path.rglob("*")) == before


def test_claim_names_what_changed(tmp_path):
    work = WorkFolder.create(tmp_path / "work")
    settings = {"bits": 2.0, "seed": 0, "seq_len": 512, "shape": (1, 2)}
    work.claim({"factorize": settings})
    again = WorkFolder.open(tmp_path / "work")
    again.claim({"factorize": dict(settings)})  # the same: no complaint, tuples or not
    with pytest.raises(DBFError) as refusal:
        again.claim({"factorize": {**settings, "bits": 1.5, "seq_len": 256}})
    text = str(refusal.value)
    assert "bits was 2.0, now 1.5" in text and "seq-len was 512, now 256" in text and "seed" not in text
    assert "\n" not in text
    with pytest.raises(DBFError, match="iterations was None, now 9"):
        again.claim({"factorize": {**settings, "iterations": 9}})
    again.claim({"tune": {"bits": 1.5}})  # another stage has settings of its own
    with pytest.raises(DBFError, match=r"\(bits was 1.5, now 3; seed was 0, now 1\).*start anew$"):  # of all at once
        again.claim({"factorize": {**settings, "seed": 1}, "tune": {"bits": 3}}, {"tune": "or that"})
    with pytest.raises(DBFError, match=r"\(bits was 1.5, now 3\).*; or that$"):
        again.claim({"factorize": settings, "tune": {"bits": 3}}, {"tune": "or that"})
    with pytest.raises(DBFError, match=r"\(importance was True, now False; join was none, now qkv\)"):
        again.claim({"factorize": settings | {"importance": False, "join": "qkv", "budget": "uniform"}})
    assert WorkFolder.open(tmp_path / "work").manifest["settings"]["factorize"]["bits"] == 2.0


def test_folders_that_are_no_work_folders(tmp_path):
    with pytest.raises(DBFError, match="no work folder"):
        WorkFolder.open(tmp_path / "absent")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(DBFError, match="is no work folder"):
        WorkFolder.create(tmp_path / "full")
    for text in ("", "[]", '{"format": 99}', "{"):
        (tmp_path / "full" / "manifest.json").write_text(text)
        with pytest.raises(DBFError):
            WorkFolder.open(tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "years of work"

"""Compression block by block, the tuning of a block, and the training of signs.

Run alone: pytest tests/test_blockwise.py     (seconds; the models are tiny and random)
"""

import copy
import functools
import weakref

import numpy as np
import pytest
import torch
from test_blocks import BLOCKS, HIDDEN, LENGTH, ids, save

from dbf_gguf import blockwise
from dbf_gguf.blocks import MIDDLE, BlockModel, linears, replace
from dbf_gguf.blockwise import LEAST_EIGENVALUE, TOKEN_CAP, Streams, Tuning, compress, corrected, groups
from dbf_gguf.checkpoint import WorkFolder, block_file
from dbf_gguf.factorize import InputMoment, factorize
from dbf_gguf.factors import Factors
from dbf_gguf.importance import measure
from dbf_gguf.model import DBFLinear, load_dense
from dbf_gguf.model import apply_work as apply_to_whole
from dbf_gguf.signs import SHARE, WARM_UP, SignTraining

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOWS = ids(24, LENGTH, seed=5)


@pytest.fixture
def work(tmp_path):
    return WorkFolder.create(tmp_path / "work")


@functools.cache
def saved(kind: str, root):
    folder = root / kind
    save(kind, folder)
    return folder


@pytest.fixture
def model(tmp_path_factory, request):
    kind = getattr(request, "param", "llama-tied")
    return BlockModel(saved(kind, tmp_path_factory.getbasetemp()))


# --- groups and moments


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        ("llama-tied", ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"]),
        ("qwen3", ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"]),
        ("phi3", ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    ],
    indirect=["model"],
)
def test_linears_with_the_same_input_are_a_group(model, wanted):
    found = groups(model, 1, model.block(1), model.embed(ids(1, LENGTH)))
    assert [" ".join(name.rpartition(".")[2] for name in group) for group in found] == wanted
    assert sorted(sum(found, [])) == sorted(linears(1, model.block(1)))


def inputs(model, index, block, hidden, name) -> np.ndarray:
    """Inputs of a module for all windows, [tokens, n] in float64."""
    seen = []
    handle = block.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        model.run(index, block, hidden)
    handle.remove()
    return seen[0].flatten(0, 1).double().numpy()


def changed(model, index, seed=3):
    """Block `index` with all weights off by some noise."""
    block = model.block(index)
    g = torch.Generator().manual_seed(seed)
    for module in linears(index, block).values():
        noise = torch.randn(module.weight.shape, generator=g)
        module.weight.data += 0.3 * module.weight.std() * noise
    return block


def test_moments_are_those_of_both_streams(model, work, monkeypatch):
    monkeypatch.setattr(blockwise, "TOKEN_CAP", 1e9)
    streams = Streams(model, WINDOWS, work)
    dense, other = model.block(0), changed(model, 0)
    streams.advance(0, streams.dense, dense)
    streams.advance(0, streams.compressed, other)
    xs = [stream.read(slice(None)) for stream in (streams.dense, streams.compressed)]
    dense, other = model.block(1), changed(model, 1)
    residual = {"self_attn.o_proj": None, "mlp.down_proj": "post_attention_layernorm"}
    for name in ("self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        x, x_hat = (inputs(model, 1, b, h, name) for b, h in zip((dense, other), xs, strict=True))
        h, halves, at_output = streams.moments(1, dense, other, [f"model.layers.1.{name}"])
        assert np.allclose(h, x_hat.T @ x_hat / len(x), rtol=1e-3, atol=1e-5 * h.abs().max().item())
        assert at_output == (name in residual)
        missing = x - x_hat
        if at_output:
            missing = missing @ dense.get_submodule(name).weight.double().numpy().T
            if residual[name] is None:
                rest = [h.flatten(0, 1).double().numpy() for h in xs]
            else:
                rest = [inputs(model, 1, b, h, residual[name]) for b, h in zip((dense, other), xs, strict=True)]
            missing += rest[0] - rest[1]
        odd = np.repeat(np.arange(len(WINDOWS)) % 2, LENGTH)[:, None]
        for half, chosen in zip(halves, (1 - odd, odd), strict=True):
            wanted = missing.T @ (chosen * x_hat) / len(x)
            assert np.allclose(half, wanted, rtol=1e-3, atol=1e-5 * half.abs().max().item())


@pytest.mark.parametrize("keep_inputs", [False, True])
def test_the_last_moments_of_a_block_may_take_the_dense_stream_on(model, work, keep_inputs):
    streams = Streams(model, WINDOWS, work, keep_inputs)
    dense, other, name = model.block(0), changed(model, 0), "model.layers.0.mlp.down_proj"
    before = streams.dense.read(slice(None))
    there, there_and_on = (streams.moments(0, dense, other, [name], advance_dense=on) for on in (False, True))
    assert all(one.equal(same) for one, same in zip(there[:2], there_and_on[:2], strict=True))
    assert torch.allclose(streams.dense.read(slice(None)), model.run(0, dense, before), atol=1e-5)
    assert streams.compressed.read(slice(None)).equal(before) == keep_inputs


@pytest.mark.parametrize("model", ["llama-tied", "mistral", "qwen2", "qwen3", "phi3"], indirect=True)
def test_the_second_half_of_a_block(model):
    block, hidden, seen = changed(model, 1), model.embed(WINDOWS[:3]), []
    handle = getattr(block, MIDDLE).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        whole = model.run(1, block, hidden)
        handle.remove()
        assert model.run_mlp(block, seen[0]).equal(whole) and not seen[0].equal(hidden)


@pytest.mark.parametrize("keep_inputs", [False, True])
@pytest.mark.parametrize("begun_at", [0, 1, 2, 3])
@pytest.mark.parametrize("model", ["llama-tied", "phi3"], indirect=True)
def test_passages_from_the_middle_give_the_same(model, work, keep_inputs, begun_at, monkeypatch):
    """Bit for bit what passages through whole blocks give, also when a resumed run begins within a block."""
    shorter, longer = (Streams(model, WINDOWS, work, keep_inputs) for _ in range(2))
    runs, run = [], model.run
    monkeypatch.setattr(model, "run", lambda *arguments: runs.append(0) or run(*arguments))
    order = groups(model, 0, model.block(0), model.embed(WINDOWS[:1]))
    for index in range(2):
        dense, other = model.block(index), changed(model, index)
        for place, group in list(enumerate(order))[begun_at if index == 0 else 0 :]:
            names = [name.replace("layers.0", f"layers.{index}") for name in group]
            arguments = (index, dense, other, names, place == 3)
            found = shorter.moments(*arguments)
            inputs = longer.dense.read(slice(None)), longer.compressed.read(slice(None))
            wanted = longer.moments(*arguments)
            for stream, values in zip((longer.dense, longer.compressed), inputs, strict=True):
                if stream in longer.halfway:  # never let it be
                    longer.halfway.remove(stream)
                    stream.write(slice(None), values)
            assert all(a.equal(b) for a, b in zip(found[:2], wanted[:2], strict=True)) and found[2] == wanted[2]
        for streams in (shorter, longer):
            streams.advance(index, streams.compressed, other)
        assert not shorter.halfway
        for name in ("dense", "compressed"):
            assert getattr(shorter, name).read(slice(None)).equal(getattr(longer, name).read(slice(None)))
    # the passages for four groups, and the way to the end: how many begin where the block does
    runs.clear()
    for place, group in enumerate(order):
        shorter.moments(0, model.block(0), model.block(0), group, place == 3)
    shorter.advance(0, shorter.compressed, model.block(0))
    assert len(runs) == len(WINDOWS) * (2 + (5 if keep_inputs else 3))


def test_no_token_counts_for_much_more_than_the_median(model, work):
    x = torch.randn(50, 8)
    x[3] *= 1000
    weights = Streams.token_weights(x)
    energy = x.square().sum(dim=1, keepdim=True)
    assert (weights * energy).max() <= 1.001 * TOKEN_CAP * energy.median()
    assert (weights == 1).sum() >= 45 and weights[3] < 1e-3


def missing(seed: int, n: int = 2000, signal: float = 0.3, noise: float = 3.0):
    """Inputs [n, 24] with a few strong directions, what is missing at the output [n, 200]: linear in them, noise."""
    g, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(0)
    mix = torch.randn(24, 24, generator=fixed) * torch.logspace(0, -2, 24)
    x = torch.randn(n, 24, generator=g) @ mix
    return x, signal * x @ torch.randn(24, 200, generator=fixed) + noise * torch.randn(n, 200, generator=g)


def halves_of(x, e):
    return torch.stack([e[half::2].T @ x[half::2] / len(x) for half in range(2)])


def test_a_correction_that_both_halves_agree_on_is_that_of_least_squares():
    """Against lstsq in float64; the same text twice has no noise that the halves could disagree on."""
    x, e = (value.repeat_interleave(2, dim=0) for value in missing(seed=1))
    w, h = torch.randn(200, 24), x.T @ x / len(x)
    ridge = (LEAST_EIGENVALUE * h.diagonal()).sqrt().diag()
    system = torch.cat([x / len(x) ** 0.5, ridge]).double()
    wanted = torch.cat([e / len(x) ** 0.5, torch.zeros(24, 200)]).double()
    best = w + torch.linalg.lstsq(system, wanted).solution.T
    found = corrected({"one": w, "same": w}, InputMoment(h.clone()), halves_of(x, e), True)
    assert (found["one"] - best).norm() < 1e-3 * (best - w).norm() and found["same"].equal(found["one"])
    nothing = corrected({"one": w}, InputMoment(h.clone()), torch.zeros(2, 24, 24), False)
    assert nothing["one"].equal(w)


def test_inputs_differences_are_multiplied_with_the_weight():
    x, _ = missing(seed=1)
    w, e = torch.randn(24, 24), 0.1 * x @ torch.randn(24, 24)  # square: the shape does not tell
    differences = halves_of(x, e)
    one, other = (
        corrected({"w": w}, InputMoment(x.T @ x / len(x)), *given)["w"]
        for given in ((differences, False), (w @ differences, True))
    )
    assert torch.allclose(one, other, atol=1e-5) and not torch.allclose(one, w, atol=1e-2)


@pytest.mark.parametrize("noise", [3.0, 10.0, 30.0])
def test_noise_is_no_reason_for_a_correction(noise):
    """On other inputs it leaves little more error than the best ridge, which nobody knows beforehand."""
    (x, e), (x_new, e_new) = missing(seed=1, noise=noise), missing(seed=2, n=20000, noise=0.0)
    w, h = torch.zeros(200, 24), x.T @ x / len(x)

    def left(change):
        return ((x_new @ change.T - e_new).square().sum() / e_new.square().sum()).item()

    def ridge(delta):
        return (e.T @ x / len(x)) @ torch.linalg.inv(h + delta * h.diagonal().diag())

    found = left(corrected({"w": w}, InputMoment(h.clone()), halves_of(x, e), True)["w"])
    ridges = [left(ridge(delta)) for delta in (0, 1e-3, 1e-2, 0.1, 0.3, 1, 3)]
    assert found < 1.2 * min(ridges)
    assert noise < 10 or found < 0.85 * ridges[0]


def test_a_correction_by_chance_is_left_out():
    x, _ = missing(seed=1)
    (x_new, _), w, h = missing(seed=2), torch.zeros(200, 24), x.T @ x / len(x)
    only_noise = halves_of(x, 3 * torch.randn(2000, 200, generator=torch.Generator().manual_seed(3)))
    by_chance = corrected({"w": w}, InputMoment(h.clone()), only_noise, True)["w"]
    least_squares = only_noise.sum(0) @ torch.linalg.inv(h)
    assert (x_new @ by_chance.T).square().sum() < 0.5 * (x_new @ least_squares.T).square().sum()
    one_window = torch.stack([only_noise[0], torch.zeros(200, 24)])
    assert corrected({"w": w}, InputMoment(h.clone()), one_window, True)["w"].equal(w)


# --- the whole


def plain(work, k=32, iterations=20, noise=0.0):
    """A `factorize` argument for `compress`, which stores its factors, with `noise` on their scales."""

    def put(weights, moment):
        for name, weight in weights.items():
            found, errors = factorize(weight[None], k, moment=moment, iterations=iterations)
            for scale in (found[0].scale_m, found[0].scale_a):
                scale *= 1 + noise * torch.randn(scale.shape, generator=torch.Generator().manual_seed(1))
            work.write_linear(name, found[0], {"k": k, "error": errors[0].item()})

    return put


def output_error(model, work) -> float:
    """Relative squared error of the last hidden state on windows of other text, by transformers' own forward pass."""
    dense, other = load_dense(model.folder), load_dense(model.folder)
    apply_to_whole(other, work, torch.float32)
    with torch.no_grad():
        a, b = (m.model(ids(8, LENGTH, seed=77)).last_hidden_state for m in (dense, other))
    return ((a - b).square().sum() / a.square().sum()).item()


@pytest.mark.parametrize("model", ["llama-tied", "mistral", "qwen2", "qwen3", "phi3"], indirect=True)
def test_fitted_blocks_are_closer_to_the_dense_model(model, tmp_path):
    fitted, alone = (WorkFolder.create(tmp_path / name) for name in ("fitted", "alone"))
    compress(model, WINDOWS, fitted, plain(fitted))
    for index in range(BLOCKS):
        for name, linear in linears(index, model.block(index)).items():
            found, _ = factorize(linear.weight[None], 32, iterations=20)
            alone.write_linear(name, found[0], {"k": 32})
    assert output_error(model, fitted) < 0.9 * output_error(model, alone)


def test_no_block_is_kept_while_linears_are_factorized(model, work, monkeypatch):
    """Freed by then, not left to the garbage collector: of a large model either takes gigabytes."""
    blocks, inner, read = [], plain(work), model.block

    def block(index):
        found = read(index)
        blocks.append(weakref.ref(found))
        return found

    def put(weights, moment):
        assert blocks and not any(reference() for reference in blocks)
        inner(weights, moment)

    monkeypatch.setattr(model, "block", block)
    compress(model, WINDOWS, work, put)
    assert len(work.manifest["linears"]) == 7 * BLOCKS


def with_importance(model, path) -> WorkFolder:
    work = WorkFolder.create(path)
    work.write_tensors("importance.safetensors", measure(model, WINDOWS[:4], work.path))
    return work


OFF = {"k": 96, "noise": 0.3}  # factors that leave tuning something to do


@pytest.mark.parametrize("sign_lr", [None, 0.2])
def test_tuned_blocks_are_closer_still_and_interruptions_leave_no_trace(model, sign_lr, tmp_path, monkeypatch):
    monkeypatch.setattr(blockwise.blocktune, "STEP_TOKENS", 2 * LENGTH)
    tuning, reports = Tuning(lr=0.03, sign_lr=sign_lr, seed=0), []
    work = with_importance(model, tmp_path / "whole")
    compress(model, WINDOWS, work, plain(work, **OFF), tuning, lambda *args: reports.append(args))
    assert [index for index, _, _ in reports] == list(range(BLOCKS))
    assert all(after <= before for _, before, after in reports)
    assert any(after < 0.9 * before for _, before, after in reports)
    turned = 0
    for name in work.manifest["linears"]:
        before = work.read_tensors(f"linears/{name}.safetensors")["signs_a"].numpy()
        turned += (before != work.packed_signs(name)[0]).sum()
    assert (turned > 0) == (sign_lr is not None)

    class Killed(Exception):
        pass

    cut, count = with_importance(model, tmp_path / "cut"), 0
    inner = plain(cut, **OFF)

    def put(weights, moment):
        nonlocal count
        count += 1
        inner(weights, moment)
        if count in (3, 6):  # in the middle of block 0, then of block 1
            raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            compress(model, WINDOWS, cut, put, tuning)
        cut = WorkFolder.open(cut.path)
        inner = plain(cut, **OFF)
    compress(model, WINDOWS, cut, put, tuning)
    for index in range(BLOCKS):
        a, b = (w.read_tensors(block_file(index)) for w in (work, cut))
        assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


# --- signs


def linear_with(signs_a, signs_b) -> DBFLinear:
    k, n_in = signs_b.shape
    scales = (torch.ones(len(signs_a)), torch.full((k,), 0.1), torch.ones(n_in))
    return DBFLinear(Factors(signs_a.to(torch.int8), signs_b.to(torch.int8), *scales))


def random_signs(*shape, seed) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).sign()


def test_signs_that_are_wrong_are_turned():
    """Some signs of a known linear are flipped; training on its outputs turns most of them back, and few others."""
    right = linear_with(random_signs(64, 96, seed=1), random_signs(96, 64, seed=2))
    wrong = copy.deepcopy(right)
    places = torch.randperm(64 * 96, generator=torch.Generator().manual_seed(3))[:40]
    with torch.no_grad():
        wrong.signs_a.view(-1)[places] *= -1
    training = SignTraining([wrong])
    g = torch.Generator().manual_seed(4)
    for step in range(160):
        x = torch.randn(128, 64, generator=g)
        with torch.no_grad():
            wanted = right(x)
        loss = (wrong(x) - wanted).square().mean()
        before = [s.detach().clone() for s in training.signs]
        training.step(torch.autograd.grad(loss, training.signs), 0.05)
        for old, new in zip(before, training.signs, strict=True):
            flipped = (old != new).sum().item()
            assert flipped <= (0 if step < WARM_UP else max(1, SHARE * new.numel()))
            assert new.abs().eq(1).all()
    training.close()
    assert not wrong.signs_a.requires_grad
    still = (wrong.signs_a != right.signs_a).sum().item()
    assert still <= 8 and (wrong.signs_b != right.signs_b).sum().item() <= 8


def test_steps_by_hand():
    linear = linear_with(random_signs(32, 32, seed=1), random_signs(32, 32, seed=2))
    training = SignTraining([linear])
    v, z = 0.0, linear.signs_a.detach().double().numpy().copy()
    for t in range(1, 4):
        g = [torch.randn(s.shape, generator=torch.Generator().manual_seed(t)) for s in training.signs]
        training.step(g, 0.02)
        v = 0.95 * v + 0.05 * np.square(g[0].double().numpy()).mean()
        z -= 0.02 * g[0].double().numpy() / np.sqrt(v / (1 - 0.95**t))
    assert np.allclose(training.latent[0], z, atol=1e-5)


def test_norms_of_a_tuned_block_are_read_before_the_end(model, work):
    work.write_tensors(block_file(1), {"model.layers.1.input_layernorm.weight": torch.full((HIDDEN,), 3.0)})
    other = load_dense(model.folder)
    apply_to_whole(other, work, torch.float32)
    assert other.model.layers[1].input_layernorm.weight.eq(3).all()
    assert not other.model.layers[0].input_layernorm.weight.eq(3).any()


def test_a_replaced_linear_is_tapped_as_well(model, work):
    """Within a block the first groups are factors already when the later ones are measured."""
    streams, again = Streams(model, WINDOWS, work), Streams(model, WINDOWS, work)
    dense, other = model.block(0), model.block(0)
    for name, linear in list(linears(0, other).items())[:3]:
        found, _ = factorize(linear.weight[None], 64, iterations=10)
        replace(0, other, name, found[0], torch.float32)
    h, halves, _ = streams.moments(0, dense, other, ["model.layers.0.self_attn.o_proj"])
    same, none, _ = again.moments(0, dense, dense, ["model.layers.0.self_attn.o_proj"])
    assert not torch.allclose(h, same, rtol=0.01) and halves.any() and not none.any()

"""Models with factorized linears, losses, perplexity, importance and distillation, against plain float64 autograd.

Run alone: pytest tests/test_tuning.py     (under a minute, nothing is downloaded)
The models are tiny and random: what is compared is arithmetic and bookkeeping, not quality.
"""

import copy
import math
import re
import shutil
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import dbf_gguf
from dbf_gguf import distill as distill_module
from dbf_gguf import evaluate, importance, loss, sensitivity
from dbf_gguf.blocks import BlockModel
from dbf_gguf.checkpoint import WorkFolder
from dbf_gguf.distill import Trainables, distill, learning_rate
from dbf_gguf.errors import DBFError
from dbf_gguf.evaluate import dense_and_compressed, perplexity
from dbf_gguf.factorize import InputMoment, factorize
from dbf_gguf.factors import Factors, unpack_signs
from dbf_gguf.model import (
    DBFLinear,
    apply_work,
    block_linears,
    check_weights,
    checkpointing,
    linear_shapes,
    load_dense,
    norm_weights,
    replace_linear,
    weight_files,
)

SCALES = ("scale_a", "scale_m", "scale_b")
VOCABULARY, HIDDEN, FEED_FORWARD, LAYERS, K = 200, 64, 96, 2, 32
LENGTH = 48  # tokens in a tuning window: ten of them are a step
BATCH = 10
STEP = BATCH * LENGTH  # tokens
N_WINDOWS = 61  # 7 held out, 54 to train on: five steps and four windows over


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def step_of_512_tokens(monkeypatch):
    """The counts below are made for it, whatever the module's own figures are."""
    monkeypatch.setattr(distill_module, "STEP_TOKENS", 512)
    monkeypatch.setattr(distill_module, "HELD_OUT_TOKENS", 4096)


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": FEED_FORWARD,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
}
CONFIGS = {
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-untied": LlamaConfig(**SIZES, tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=False),  # heads wider than hidden / 4
}


def tiny(kind: str):
    """A random model, frozen, in eval mode; norms and biases random as well (fresh ones are all 1 and all 0)."""
    torch.manual_seed(7)
    model = (Qwen3ForCausalLM if kind == "qwen3" else LlamaForCausalLM)(copy.deepcopy(CONFIGS[kind]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.2 * torch.randn_like(parameter) + (0 if name.endswith("bias") else 1))
    return model.requires_grad_(False).eval()


def random_factors(n_out: int, k: int, n_in: int, seed: int = 0) -> Factors:
    g = torch.Generator().manual_seed(seed)

    def signs(*shape):
        return torch.randint(2, shape, generator=g, dtype=torch.int8) * 2 - 1

    def scale(n, size=1.0):
        return size * (0.3 * torch.randn(n, generator=g)).exp()

    return Factors(signs(n_out, k), signs(k, n_in), scale(n_out, 0.1), scale(k, 0.2), scale(n_in))


def ids(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.double(), wanted.double()
    assert found.shape == wanted.shape
    return ((found - wanted).norm() / wanted.norm().clamp_min(1e-300)).item()


def is_checkpointing(model) -> bool:
    """Under either of transformers' names."""
    old = "is_gradient_checkpointing"
    return getattr(model, "is_activation_checkpointing" if hasattr(model, "is_activation_checkpointing") else old)


def one_line(error) -> str:
    """The message of a DBFError, after checking that it is one line that says something."""
    text = str(error.value)
    assert text.strip() == text and text and "\n" not in text
    return text


# --- DBFLinear


def dense_reference(factors: Factors, x: torch.Tensor, bias: torch.Tensor | None, weight: torch.Tensor):
    """y and the gradients of sum(weight · y) for a, m, b and x, through the dense matrix, all in float64."""
    a, m, b = (getattr(factors, scale).detach().double().requires_grad_() for scale in SCALES)
    x = x.detach().double().requires_grad_()
    dense = torch.diag(a) @ factors.signs_a.double() @ torch.diag(m) @ factors.signs_b.double() @ torch.diag(b)
    y = x @ dense.T + (0 if bias is None else bias.double())
    (y * weight.double()).sum().backward()
    return y.detach(), [a.grad, m.grad, b.grad, x.grad]


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 17), (7, 32, 64), (64, 96, 33), (130, 32, 96)], ids=str)
@pytest.mark.parametrize("leading", [(), (1,), (2, 3)], ids=str)
def test_dbf_linear_is_the_dense_layer(shape, leading, with_bias):
    n_out, k, n_in = shape
    factors = random_factors(*shape)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(*leading, n_in, generator=g, requires_grad=True)
    weight = torch.randn(*leading, n_out, generator=g)
    bias = torch.randn(n_out, generator=g) if with_bias else None
    layer = DBFLinear(factors, bias)
    y = layer(x)
    (y * weight).sum().backward()
    wanted, gradients = dense_reference(factors, x, bias, weight)
    assert y.dtype == torch.float32 and relative(y, wanted) < 1e-5
    found = [getattr(layer, scale).grad for scale in SCALES] + [x.grad]
    assert [relative(f, w) < 1e-5 for f, w in zip(found, gradients, strict=True)] == [True] * 4


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_dbf_linear_with_bfloat16_products(x_dtype, with_bias):
    factors = random_factors(65, 96, 64)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(11, 64, generator=g).to(x_dtype).requires_grad_()
    weight = torch.randn(11, 65, generator=g).to(x_dtype)
    bias = torch.randn(65, generator=g) if with_bias else None
    layer = DBFLinear(factors, bias, torch.bfloat16)
    assert layer.signs_a.dtype == layer.signs_b.dtype == torch.bfloat16
    assert layer.signs_a.equal(factors.signs_a.bfloat16())  # ±1 is exact in it
    y = layer(x)
    (y * weight).sum().backward()
    wanted, gradients = dense_reference(factors, x, bias, weight)
    assert y.dtype == x.grad.dtype == x_dtype and relative(y, wanted) < 0.01
    for scale, gradient in zip(SCALES, gradients, strict=False):
        parameter = getattr(layer, scale)
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert relative(parameter.grad, gradient) < 0.02
    assert relative(x.grad, gradients[3]) < 0.02


def test_only_the_scales_are_trained():
    bias = nn.Parameter(torch.randn(7))
    layer = DBFLinear(random_factors(7, 32, 64), bias)
    layer(torch.randn(3, 64)).square().sum().backward()
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == set(SCALES)
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == set(SCALES)
    assert {name for name, _ in layer.named_buffers()} == {"signs_a", "signs_b"}
    assert not any(b.requires_grad or b.grad is not None for b in layer.buffers())
    assert layer.bias.equal(bias) and bias.grad is None
    assert not any("signs" in name for name in layer.state_dict())


# --- losses


class TallestLogits(TorchDispatchMode):
    """Notes the most rows that any tensor as wide as the vocabulary has while it is entered."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.ndim == 2 and result.shape[1] == self.vocabulary:
            self.rows = max(self.rows, result.shape[0])
        return result


def loss_inputs(n: int, vocabulary: int, d: int = 24):
    g = torch.Generator().manual_seed(n)
    student, teacher = (torch.randn(n, d, generator=g) for _ in range(2))
    return student, teacher, 0.5 * torch.randn(vocabulary, d, generator=g), torch.randint(vocabulary, (n,), generator=g)


def log_softmax64(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    logits = hidden.double() @ head.double().T
    return logits - torch.log(torch.exp(logits - logits.amax(1, True)).sum(1, True)) - logits.amax(1, True)


def reference_loss(kind: str, student, teacher, head, targets):
    """The loss in float64 from all logits at once, and its gradient by autograd."""
    student = student.detach().double().requires_grad_()
    log_q = log_softmax64(student, head)
    if kind == "cross_entropy":
        value = -log_q[torch.arange(len(targets)), targets].sum()
    else:
        log_p = log_softmax64(teacher, head)
        value = (log_p.exp() * (log_p - log_q)).sum()
    value.backward()
    return value.item(), student.grad


def call_loss(kind: str, student, teacher, head, targets, **options):
    if kind == "cross_entropy":
        return loss.cross_entropy(student, head, targets, **options)
    return loss.kl_divergence(student, teacher, head, **options)


LOSSES = pytest.mark.parametrize("kind", ["cross_entropy", "kl_divergence"])


@LOSSES
@pytest.mark.parametrize(("vocabulary", "piece"), [(2, 2048), (211, 2048), (211, 64), (128, 64)])
@pytest.mark.parametrize("n", [1, loss.PIECE - 1, loss.PIECE, loss.PIECE + 1, 2 * loss.PIECE + 77])
def test_loss_and_closed_form_gradient(kind, n, vocabulary, piece, monkeypatch):
    monkeypatch.setattr(loss, "VOCABULARY_PIECE", piece)
    inputs = loss_inputs(n, vocabulary)
    kept = [t.clone() for t in inputs]
    wanted, wanted_gradient = reference_loss(kind, *inputs)
    value, gradient = call_loss(kind, *inputs)
    assert value == pytest.approx(wanted, rel=1e-5)
    assert gradient.dtype == torch.float32 and relative(gradient, wanted_gradient) < 1e-5
    assert all(a.equal(b) for a, b in zip(inputs, kept, strict=True))  # the work in place is on its own tensors
    again, none = call_loss(kind, *inputs, gradient=False)
    assert none is None and again == value


@LOSSES
@pytest.mark.parametrize("piece", [2048, 16])
def test_loss_with_a_bfloat16_head(kind, piece, monkeypatch):
    monkeypatch.setattr(loss, "VOCABULARY_PIECE", piece)
    student, teacher, head, targets = (t.bfloat16() if t.is_floating_point() else t for t in loss_inputs(300, 211))
    wanted, wanted_gradient = reference_loss(kind, student, teacher, head, targets)
    value, gradient = call_loss(kind, student, teacher, head, targets)
    assert value == pytest.approx(wanted, rel=0.02)
    assert gradient.dtype == torch.bfloat16 and relative(gradient, wanted_gradient) < 0.02


@LOSSES
def test_extreme_logits_stay_finite(kind):
    student, teacher, head, targets = loss_inputs(40, 211)
    inputs = 40 * student, -40 * teacher, head, targets  # probabilities that underflow
    wanted, wanted_gradient = reference_loss(kind, *inputs)
    value, gradient = call_loss(kind, *inputs)
    assert value == pytest.approx(wanted, rel=1e-4) and relative(gradient, wanted_gradient) < 1e-3


@LOSSES
def test_logits_exist_only_piece_by_piece(kind):
    inputs = loss_inputs(3 * loss.PIECE + 5, 211)
    with TallestLogits(211) as seen:
        call_loss(kind, *inputs)
    assert 0 < seen.rows <= loss.PIECE


def test_kl_of_equal_states_is_zero():
    student, _, head, _ = loss_inputs(300, 211)
    value, gradient = loss.kl_divergence(student, student.clone(), head)
    assert value == 0 and gradient.abs().max() < 1e-6


# --- perplexity


@pytest.mark.parametrize("bos", [None, 3])
@pytest.mark.parametrize(("n_ctx", "kind"), [(3, "llama-tied"), (10, "qwen3"), (37, "llama-untied"), (600, "qwen3")])
def test_perplexity_of_the_second_halves(kind, n_ctx, bos):
    """llama-perplexity's count: the logits at positions n_ctx / 2 … n_ctx - 2, each for the token that follows."""
    model, windows = tiny(kind), ids(3, n_ctx)
    windows[:, 0] = 5  # never the BOS
    done = []
    found = perplexity(model, windows, bos, done.append)
    losses = []
    dense = tiny(kind).double()
    for window in windows.tolist():
        fed = window if bos is None else [bos, *window[1:]]
        with torch.no_grad():
            logits = dense(torch.tensor([fed])).logits[0].double().numpy()
        for position in range(n_ctx // 2, n_ctx - 1):
            row = logits[position]
            losses.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[window[position + 1]])
    assert found == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert done == [1, 2, 3]
    assert (windows[:, 0] == 5).all()  # the caller's windows are not written to


@pytest.mark.parametrize("in_memory", [True, False], ids=["memory", "file"])
@pytest.mark.parametrize("bos", [None, 3])
@pytest.mark.parametrize(("n_ctx", "kind"), [(3, "llama-tied"), (37, "llama-untied"), (600, "qwen3")])
def test_block_by_block_perplexity_is_that_of_the_whole_models(kind, n_ctx, bos, in_memory, tmp_path, monkeypatch):
    """Half of the linears replaced, a norm of a block and the last one tuned."""
    whole = saved(kind, tmp_path / "model")
    work = WorkFolder.create(tmp_path / "work")
    for name in list(block_linears(whole))[::2]:
        n_out, n_in = whole.get_submodule(name).weight.shape
        work.write_linear(name, random_factors(n_out, K, n_in), {})
    final = {f"{name}.{scale}": value for name in work.linears() for scale, value in work.scales(name).items()}
    norms = ["model.layers.1.post_attention_layernorm.weight", "model.norm.weight"]
    work.write_tensors("final.safetensors", final | {name: torch.linspace(0.5, 2, HIDDEN) for name in norms})
    windows, done = ids(3, n_ctx), []
    windows[:, 0] = 5
    if not in_memory:
        monkeypatch.setattr(evaluate, "MEMORY_BYTES", 0)
    model = BlockModel(tmp_path / "model")
    found = dense_and_compressed(model, work, windows, bos, lambda *step: done.append(step))
    dense = perplexity(whole, windows, bos)
    apply_work(whole, work, torch.float32)
    compressed = perplexity(whole, windows, bos)
    assert compressed > 1.01 * dense or compressed < 0.99 * dense
    assert found == pytest.approx((dense, compressed), rel=1e-6)
    assert done == [(number, 6 * LAYERS) for number in range(1, 6 * LAYERS + 1)]
    assert (windows[:, 0] == 5).all()
    assert sorted(path.name for path in work.path.iterdir()) == ["final.safetensors", "linears", "manifest.json"]


# --- importance


def reference_importance(kind: str, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Float64, kept activations, all logits, all windows: no checkpointing, nothing streamed."""
    model = tiny(kind).double()
    squares: dict[str, list] = {}
    for window in windows:
        seen = {}

        def keep(name, module, args, output, seen=seen):
            output.retain_grad()
            seen[name] = args[0], output

        modules = block_linears(model).items()
        handles = [m.register_forward_hook(lambda *a, name=name: keep(name, *a)) for name, m in modules]
        embedded = model.get_input_embeddings()(window[None]).requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0, :-1]
        nn.functional.cross_entropy(logits, window[1:]).backward()
        for handle in handles:
            handle.remove()
        for name, (x, y) in seen.items():
            squares.setdefault(f"{name}.input", []).append(x[0].detach().square())
            energy = y.grad[0].square().sum(dim=1, keepdim=True)
            some = energy[energy > 1e-10 * energy.max()]  # not the last token, and of the first no query
            bound = importance.TOKEN_CAP * some.median()
            squares.setdefault(f"{name}.output", []).append(y.grad[0].square() * (bound / energy).clamp(max=1))
    return {key: torch.cat(values).mean(dim=0).sqrt() for key, values in squares.items()}


@pytest.mark.parametrize("windows_in_a_group", [1, 2, 3])
@pytest.mark.parametrize(("kind", "length"), [("llama-tied", 21), ("llama-untied", 3), ("qwen3", 300)])
def test_importance_is_that_of_plain_autograd(kind, length, windows_in_a_group, tmp_path, monkeypatch):
    """In memory as in a file; and the groups do not show in a single bit."""
    saved(kind, tmp_path)
    model, windows = BlockModel(tmp_path), ids(3, length)
    read = []
    monkeypatch.setattr(model, "block", lambda index, block=model.block: read.append(index) or block(index))
    each = (LAYERS + 1) * length * HIDDEN * 4
    monkeypatch.setattr(importance, "MEMORY_BYTES", {1: each, 2: 0, 3: 3 * each}[windows_in_a_group])
    monkeypatch.setattr(importance, "GROUP_BYTES", windows_in_a_group * each)
    done = []
    found = importance.measure(model, windows, tmp_path, lambda *step: done.append(step))
    there_and_back = [*range(LAYERS), *reversed(range(LAYERS))]
    assert read == there_and_back * math.ceil(3 / windows_in_a_group)  # no block is read more often than it must
    wanted = reference_importance(kind, windows)
    assert list(found) == [key for name in linear_shapes(tmp_path) for key in (f"{name}.input", f"{name}.output")]
    assert found.keys() == wanted.keys() and len(found) == 2 * 7 * LAYERS
    for key, value in found.items():
        assert value.dtype == torch.float32 and relative(value, wanted[key]) < 1e-5, key
    assert done == [(number, 6 * LAYERS) for number in range(1, 6 * LAYERS + 1)]
    monkeypatch.undo()
    plain = importance.measure(BlockModel(tmp_path), windows, tmp_path)
    assert all(found[key].equal(plain[key]) for key in plain)


def test_a_token_with_an_enormous_gradient_counts_for_little_more_than_others():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    x[3], x[7:20] = 1000 * x[3], 0  # tokens without a gradient: the bound is not that of all tokens' median, 0
    energy = x.square().sum(dim=1, keepdim=True)
    others = torch.cat([x[:3], x[4:]]).square().sum(dim=0)
    found = importance._squares(x[None], 10.0)
    bound = 10 * energy[energy > 0].median().item()
    assert (found >= others).all() and (found - others).sum() == pytest.approx(bound, rel=1e-3)
    assert importance._squares(x[None]).sum() == pytest.approx(energy.sum().item(), rel=1e-5)
    assert importance._squares(torch.zeros(1, 5, 8), 10.0).equal(torch.zeros(8))


def test_importance_side_by_side_is_the_same_every_time(tmp_path):
    """Windows finish in any order on two threads; they are added up in their own."""
    saved("llama-untied", tmp_path)
    windows = ids(7, 50)
    wanted = importance.measure(BlockModel(tmp_path), windows, tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = BlockModel(tmp_path)
        assert model.workers(50, backward=True) == 2
        for _ in range(5):
            found = importance.measure(model, windows, tmp_path)
            assert all(found[key].equal(wanted[key]) for key in wanted)
    finally:
        torch.set_num_threads(threads)


def test_importance_can_be_interrupted(tmp_path):
    saved("llama-tied", tmp_path)
    model = BlockModel(tmp_path)

    def stop(done, total):
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        importance.measure(model, ids(2, 9), tmp_path, stop)
    assert threading.active_count() == before
    again = importance.measure(model, ids(2, 9), tmp_path)
    fresh = importance.measure(BlockModel(tmp_path), ids(2, 9), tmp_path)
    assert all(again[key].equal(fresh[key]) for key in fresh)


# --- models


def saved(kind: str, folder, **options):
    """A model folder as a user has it; the tokenizer is only looked for, never read."""
    model = tiny(kind)
    model.save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text("{}")
    return model


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.mark.parametrize("kind", CONFIGS)
def test_names_and_shapes_of_linears(kind, tmp_path):
    head = 32 if kind == "qwen3" else HIDDEN // 4
    shapes = {"q_proj": (4 * head, HIDDEN), "k_proj": (2 * head, HIDDEN), "v_proj": (2 * head, HIDDEN)}
    shapes |= {"o_proj": (HIDDEN, 4 * head), "gate_proj": (FEED_FORWARD, HIDDEN), "up_proj": (FEED_FORWARD, HIDDEN)}
    shapes |= {"down_proj": (HIDDEN, FEED_FORWARD)}
    wanted = {
        f"model.layers.{i}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}": shape
        for i in range(LAYERS)
        for name, shape in shapes.items()
    }
    CONFIGS[kind].save_pretrained(tmp_path)  # no weights: the config is enough
    assert linear_shapes(tmp_path) == wanted
    model = tiny(kind)
    found = block_linears(model)
    assert {name: tuple(m.weight.shape) for name, m in found.items()} == wanted
    assert list(found) == list(linear_shapes(tmp_path))
    assert all(model.get_submodule(name) is module for name, module in found.items())


@pytest.mark.parametrize("kind", CONFIGS)
def test_names_of_norms(kind):
    of_a_block = ["input_layernorm", "post_attention_layernorm"]
    if kind == "qwen3":
        of_a_block += ["self_attn.q_norm", "self_attn.k_norm"]
    wanted = {f"model.layers.{i}.{name}.weight" for i in range(LAYERS) for name in of_a_block} | {"model.norm.weight"}
    model = tiny(kind)
    found = norm_weights(model)
    assert found.keys() == wanted
    assert all(model.get_parameter(name) is weight for name, weight in found.items())


@pytest.mark.parametrize("kind", CONFIGS)
def test_load_dense(kind, tmp_path):
    model = saved(kind, tmp_path)
    found = load_dense(tmp_path)
    assert not found.training and not any(p.requires_grad for p in found.parameters())
    tokens = ids(2, 9)
    assert found(tokens).logits.equal(model(tokens).logits)
    assert load_dense(tmp_path, torch.bfloat16).dtype == torch.bfloat16


def no_such_model(folder):
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"xyz"'))


def wrong_shapes(folder):
    config = folder / "config.json"
    config.write_text(config.read_text().replace(f'"intermediate_size": {FEED_FORWARD}', '"intermediate_size": 128'))


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def no_config(folder):
    (folder / "config.json").write_text("{")


def bad_value(folder):
    config = folder / "config.json"
    config.write_text(config.read_text().replace(f'"hidden_size": {HIDDEN}', '"hidden_size": "wide"'))


def no_heads(folder):
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"num_attention_heads": 4', '"num_attention_heads": 0'))


def cut_off(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def one_missing(folder):
    weights = folder / "model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(weights).items() if "layers.1.mlp.up_proj" not in name}
    assert len(tensors) < len(load_file(weights))
    save_file(tensors, weights, metadata={"format": "pt"})


BAD_CONFIGS = [no_such_model, no_config, bad_value, no_heads]
BAD_WEIGHTS = [
    wrong_shapes,
    no_weights,
    cut_off,
    one_missing,
]


@pytest.mark.parametrize(
    "read, damage",
    [(load_dense, bad) for bad in BAD_CONFIGS + BAD_WEIGHTS] + [(linear_shapes, bad) for bad in BAD_CONFIGS],
)
def test_a_damaged_folder_is_refused_in_one_line(read, damage, tmp_path):
    saved("llama-tied", tmp_path)
    damage(tmp_path)
    with pytest.raises(DBFError) as error:
        read(tmp_path)
    assert tmp_path.name in one_line(error)


@pytest.mark.parametrize("shard", ["60KB", "5GB"])
def test_weight_files(shard, tmp_path):
    model = saved("llama-untied", tmp_path, max_shard_size=shard)
    files = weight_files(tmp_path)
    assert (len(set(files.values())) > 1) == (shard == "60KB")
    assert files.keys() == model.state_dict().keys()
    assert all(load_file(path)[name].equal(model.state_dict()[name]) for name, path in files.items())


def test_weight_files_are_those_that_transformers_reads(tmp_path):
    saved("llama-tied", tmp_path)
    whole = weight_files(tmp_path)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "consolidated.safetensors")  # Mistral's own format
    assert weight_files(tmp_path) == whole and len(set(whole.values())) == 1


def test_check_weights(tmp_path):
    model = saved("llama-untied", tmp_path)
    shapes = check_weights(tmp_path, weight_files(tmp_path), "tiny")
    assert shapes == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("lm_head.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight"):
        save_file({n: t for n, t in tensors.items() if n != name}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(DBFError, match=f"tiny has no weight {name}: its safetensors are incomplete") as error:
            check_weights(tmp_path, weight_files(tmp_path), "tiny")
        one_line(error)
    wrong = tensors | {"model.norm.weight": torch.ones(HIDDEN + 1)}
    save_file(wrong, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(DBFError, match=rf"model.norm.weight is \[{HIDDEN + 1}\], config.json makes it \[{HIDDEN}\]"):
        check_weights(tmp_path, weight_files(tmp_path), "tiny")


@pytest.mark.parametrize("kind", ["llama-tied", "llama-untied"])
def test_replace_linear_keeps_the_bias(kind):
    model = tiny(kind)
    name = "model.layers.1.self_attn.k_proj"
    old, others = model.get_submodule(name), {n: m for n, m in block_linears(model).items() if n != name}
    factors = random_factors(32, 32, HIDDEN)
    replace_linear(model, name, factors, torch.float32)
    new = model.get_submodule(name)
    assert isinstance(new, DBFLinear) and (old.bias is None) == (kind == "llama-tied")
    x = torch.randn(5, HIDDEN)
    wanted = x @ factors.dense().T + (0 if old.bias is None else old.bias)
    assert relative(new(x), wanted) < 1e-5
    assert block_linears(model) == others


def work_folder(tmp_path, kind: str, norms: bool):
    """A folder and its work folder, nearly all linears factorized by hand; and the dense model that it stands for."""
    wanted = saved(kind, tmp_path / "model")
    work = WorkFolder.create(tmp_path / "work")
    work.manifest["model"] = str(tmp_path / "model")
    final = {}
    for number, (name, linear) in enumerate(list(block_linears(wanted).items())[1:]):  # the first one stays dense
        factors = random_factors(linear.weight.shape[0], 32 * (1 + number % 3), linear.weight.shape[1], seed=number)
        work.write_linear(name, factors, {})
        for scale in SCALES:  # tuning has moved the scales: those of linears/ are not the last word
            value = (1.5 * getattr(factors, scale)).half()
            setattr(factors, scale, value)
            final[f"{name}.{scale}"] = value
        linear.weight.data = factors.dense()
    if norms:
        for name, weight in norm_weights(wanted).items():
            weight.data = weight + 0.3 * torch.randn_like(weight)
            final[name] = weight.detach().clone()
    return work, final, wanted


@pytest.mark.parametrize("norms", [False, True], ids=["scales", "norms"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_load_gives_the_model_of_the_work_folder(kind, norms, tmp_path):
    work, final, wanted = work_folder(tmp_path, kind, norms)
    with pytest.raises(DBFError, match="not finished"):
        dbf_gguf.load(work.path)
    work.write_tensors("final.safetensors", final)
    tokens = ids(3, 40)
    logits = wanted(tokens).logits
    model = dbf_gguf.load(work.path)
    assert sum(isinstance(m, DBFLinear) for m in model.modules()) == 7 * LAYERS - 1 and not model.training
    assert relative(model(tokens).logits, logits) < 1e-4
    low = dbf_gguf.load(str(work.path), dtype=torch.bfloat16)
    found = low(tokens).logits
    assert found.dtype == torch.bfloat16 and relative(found, logits) < 0.1
    scales = {p.dtype for name, p in low.named_parameters() if name.endswith(SCALES)}
    assert scales == {torch.float32} and low.model.norm.weight.dtype == torch.bfloat16


def test_load_refuses_what_is_no_finished_work_folder(tmp_path):
    work, final, _ = work_folder(tmp_path, "llama-tied", True)
    work.write_tensors("tuning.safetensors", final)  # a snapshot does not make it finished
    for folder, word in ((work.path, "not finished"), (tmp_path, "no work folder"), (tmp_path / "none", "no work")):
        with pytest.raises(DBFError) as error:
            dbf_gguf.load(folder)
        assert word in one_line(error) and folder.name in one_line(error)


def test_checkpointing_gives_the_same_gradients():
    def gradients(enabled: bool):
        model = tiny("qwen3")
        for weight in norm_weights(model).values():
            weight.requires_grad_()
        calls = []
        model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
        with checkpointing(model, enabled):
            assert model.training == is_checkpointing(model) == enabled
            model.model(ids(3, 20), use_cache=False).last_hidden_state.square().mean().backward()
        assert len(calls) == 1 + enabled  # recomputed once
        assert not model.training and not is_checkpointing(model)
        return {name: weight.grad for name, weight in norm_weights(model).items()}

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) == 4 * LAYERS + 1 and all(g.abs().max() > 0 for g in plain.values())
    for name, gradient in recomputed.items():
        assert relative(gradient, plain[name]) < 1e-6, name


def test_checkpointing_leaves_no_graph_behind():
    model = tiny("llama-tied")
    assert not model(ids(1, 4)).logits.requires_grad
    with checkpointing(model):
        pass
    assert not model(ids(1, 4)).logits.requires_grad


def test_checkpointing_ends_after_an_exception():
    model = tiny("llama-tied")
    with pytest.raises(KeyboardInterrupt), checkpointing(model):
        raise KeyboardInterrupt
    assert not model.training and not is_checkpointing(model)


def test_dropout_of_a_config_stays_off(tmp_path):
    """Checkpointing needs training mode, in which attention drops out what the config says: results would vary."""
    model = saved("llama-tied", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"attention_dropout": 0.0', '"attention_dropout": 0.5'))
    wanted = model(ids(2, 30), use_cache=False).logits
    loaded = load_dense(tmp_path)
    with checkpointing(loaded):
        assert loaded(ids(2, 30), use_cache=False).logits.equal(wanted)


# --- distillation


@pytest.fixture(scope="module", params=["llama-tied", "qwen3"])
def pair(request):
    """(teacher, a function that makes a new student): the same model, its linears roughly factorized."""
    return make_pair(request.param)


@pytest.fixture(scope="module")
def llama():
    return make_pair("llama-tied")


_MADE = {}


def make_pair(kind: str):
    if kind not in _MADE:
        teacher = tiny(kind)
        rough = {}
        for name, linear in block_linears(teacher).items():
            (factors,), _ = factorize(linear.weight[None], K, iterations=6, dtype=torch.float32)
            rough[name] = factors
        base = copy.deepcopy(teacher)
        for name, factors in rough.items():
            replace_linear(base, name, factors, torch.float32)
        _MADE[kind] = teacher, lambda: copy.deepcopy(base)
    return _MADE[kind]


@pytest.fixture
def work(tmp_path):
    return WorkFolder.create(tmp_path / "work")


WINDOWS = ids(N_WINDOWS, LENGTH, seed=11)
HELD_OUT = 7  # an eighth


def kl64(student, teacher, windows: torch.Tensor) -> float:
    """KL(teacher ‖ student) per token in float64, from transformers' own logits."""
    with torch.no_grad():
        log_q, log_p = (model(windows).logits.double().log_softmax(-1) for model in (student, teacher))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def put(student, tensors: dict[str, torch.Tensor]):
    for name, value in tensors.items():
        student.get_parameter(name).data = value.float()
    return student


def state(student) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in Trainables(student).parameters.items()}


def teacher_kind(teacher) -> str:
    return "qwen3" if isinstance(teacher, Qwen3ForCausalLM) else "llama-tied"


def trained_names(teacher) -> set[str]:
    return {f"{name}.{scale}" for name in block_linears(teacher) for scale in SCALES} | norm_weights(teacher).keys()


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not (found[name].equal(wanted[name]))] == []


def test_trainables_write_theta(pair):
    teacher, new = pair
    student = new()
    before = {name: p.detach().double().numpy().copy() for name, p in student.named_parameters()}
    trained = Trainables(student)
    names = trained_names(teacher)
    assert trained.parameters.keys() == names
    assert {name for name, p in student.named_parameters() if p.requires_grad} == names
    delta = torch.randn(len(trained.start), generator=torch.Generator().manual_seed(2))
    trained.set(delta)
    tensors, position = trained.tensors(delta), 0
    assert tensors.keys() == names
    for name in trained.parameters:
        old = before[name]
        rms = math.sqrt(np.mean(old**2))
        wanted = old + rms * delta[position : position + old.size].double().numpy()
        position += old.size
        now = student.get_parameter(name).detach()
        assert np.abs(now.numpy() - wanted).max() < 1e-5 * rms, name
        exported = tensors[name]
        assert exported.dtype == (torch.float16 if name.endswith(SCALES) else torch.float32)
        assert exported.equal(now.to(exported.dtype)), name
    assert position == len(delta)
    for name, p in student.named_parameters():
        assert name in names or np.array_equal(p.detach().double().numpy(), before[name]), name
    trained.set(torch.zeros_like(delta))
    assert all(np.array_equal(student.get_parameter(n).detach().double().numpy(), before[n]) for n in names)


def test_trainables_round_to_modules_of_lower_precision(llama):
    student = llama[1]()
    student.model.norm.to(torch.bfloat16)
    trained = Trainables(student)
    assert trained.start.dtype == torch.float32
    step = torch.full_like(trained.start, 1e-3)  # less than bfloat16 resolves: the sum of many must not be lost
    trained.set(8 * step)
    weight = student.model.norm.weight
    assert weight.dtype == torch.bfloat16
    fine = trained.tensors(8 * step)["model.norm.weight"]
    assert fine.dtype == torch.float32 and weight.equal(fine.bfloat16()) and not weight.float().equal(fine)


def reference_gradient(student, theta_of, delta: torch.Tensor, objective):
    """d objective(model at θ(δ)) / dδ in float64. `theta_of(δ)` gives {parameter: value}."""
    delta = delta.detach().double().clone().requires_grad_()
    model = copy.deepcopy(student).double()
    value = objective(lambda *args: torch.func.functional_call(model, theta_of(delta), args, {"use_cache": False}))
    value.backward()
    return value.item(), delta.grad


def theta_function(student):
    """θ(δ) of a student in float64, from its present values, in the order of Trainables."""
    names = list(Trainables(copy.deepcopy(student)).parameters)
    start = {name: student.get_parameter(name).detach().double() for name in names}
    sizes = [len(start[name]) for name in names]

    def theta(delta):
        return {
            name: start[name] + start[name].square().mean().sqrt() * d
            for name, d in zip(names, delta.split(sizes), strict=True)
        }

    return theta, names, sizes


def test_gradient_with_respect_to_delta(pair):
    _, new = pair
    student = new()
    theta, names, sizes = theta_function(student)
    trained = Trainables(student)
    delta = 0.1 * torch.randn(len(trained.start), generator=torch.Generator().manual_seed(2))
    trained.set(delta)
    tokens = ids(2, 17)
    weight = torch.randn(2, 17, VOCABULARY, generator=torch.Generator().manual_seed(3))
    found, _ = trained.gradient(student(tokens, use_cache=False).logits, weight / weight.numel())
    assert all(p.grad is None for p in student.parameters())
    _, wanted = reference_gradient(new(), theta, delta, lambda run: (run(tokens).logits * weight).mean())
    for name, f, w in zip(names, found.split(sizes), wanted.split(sizes), strict=True):
        assert relative(f, w) < 1e-4, name


@pytest.mark.parametrize("steps", [1, 10, 19, 20, 21, 100, 2503])
@pytest.mark.parametrize("peak", [0.02, 1.0])
def test_learning_rate(steps, peak):
    rates = np.array([learning_rate(step, steps, peak) for step in range(steps + 1)])
    step = np.arange(steps + 1)
    cosine = 0.02 + 0.98 * (1 + np.cos(np.pi * step / steps)) / 2
    np.testing.assert_allclose(rates, peak * np.minimum(1, (step + 1) / 20) * cosine, rtol=1e-9)
    assert rates.min() > 0 and rates.max() <= peak
    if steps > 100:
        assert rates[0] == pytest.approx(peak / 20) and rates[19:40].min() > 0.99 * peak  # warm by step 20
        assert (np.diff(rates[20:]) < 0).all()
    if steps >= 20:
        assert rates[-1] == pytest.approx(0.02 * peak)
    assert learning_rate(steps + 50, steps, peak) == pytest.approx(0.02 * peak)  # never up again


def test_learning_rate_while_the_steps_are_unknown():
    rates = [learning_rate(step, None, 0.5) for step in range(30)]
    assert rates == pytest.approx([0.5 * min(1.0, (step + 1) / 20) for step in range(30)])


def test_distillation_lowers_the_held_out_kl(pair, work):
    teacher, new = pair
    reports = []
    student = new()
    options = {"lr": 0.05, "seed": 3, "tokens": 24 * STEP + 1}  # not a whole number of steps: rounded up
    found = distill(student, teacher, WINDOWS, work, report=reports.append, **options)
    assert [p.step for p in reports] == list(range(26)) and {p.steps for p in reports} == {25}
    assert [p.step for p in reports if p.held_out is not None] == [0, 25]  # the start, and the end whenever it comes
    assert found.keys() == trained_names(teacher)
    for name, value in found.items():
        assert value.dtype == (torch.float16 if name.endswith(SCALES) else torch.float32)
        assert value.shape == student.get_parameter(name).shape and torch.isfinite(value).all()
    held_out = WINDOWS[:HELD_OUT]
    before, after = kl64(new(), teacher, held_out), kl64(put(new(), found), teacher, held_out)
    assert reports[0].held_out == reports[0].best == pytest.approx(before, rel=1e-4)
    assert reports[-1].best == pytest.approx(after, rel=0.01)  # float16 is all the difference
    assert after < 0.8 * before
    assert reports[-1].kl < 0.9 * reports[1].kl  # and on what is trained on
    # it moved everything; the dense model not at all
    start = state(new())
    assert all(not value.equal(start[name].to(value.dtype)) for name, value in found.items())
    assert_same(dict(teacher.named_parameters()), dict(tiny(teacher_kind(teacher)).named_parameters()))
    # finished: asked again it does nothing, and gives the same
    again = []
    assert_same(distill(new(), teacher, WINDOWS, work, report=again.append, **options), found)
    assert again == []


def test_first_steps_are_adam_on_delta(llama, work):
    """Three steps by hand in float64: full logits, autograd, Adam written out."""
    teacher, new = llama
    student = new()
    batches = []
    student.get_input_embeddings().register_forward_hook(
        lambda module, args, output: batches.append(args[0].clone()) if torch.is_grad_enabled() else None
    )
    kls = []
    distill(student, teacher, WINDOWS, work, lr=0.3, seed=3, tokens=3 * STEP, report=lambda p: kls.append(p.kl))
    assert [b.shape for b in batches] == [(BATCH, LENGTH)] * 3
    theta, names, sizes = theta_function(new())
    dense = copy.deepcopy(teacher).double()
    delta = torch.zeros(sum(sizes), dtype=torch.float64)
    m, v = torch.zeros_like(delta), torch.zeros_like(delta)
    for t, batch in enumerate(batches):
        log_p = dense(batch).logits.double().log_softmax(-1)

        def objective(run, batch=batch, log_p=log_p):
            return (log_p.exp() * (log_p - run(batch).logits.log_softmax(-1))).sum(-1).mean()

        value, gradient = reference_gradient(new(), theta, delta, objective)
        assert kls[t + 1] == pytest.approx(value, rel=1e-3)
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        rate = 0.3 * (t + 1) / 20 * (0.02 + 0.98 * (1 + math.cos(math.pi * t / 3)) / 2)
        delta = delta - rate * (m / (1 - 0.9 ** (t + 1))) / ((v / (1 - 0.99 ** (t + 1))).sqrt() + 1e-12)
    snapshot = work.read_tensors("tuning.safetensors")
    assert relative(snapshot["m"], m) < 1e-3 and relative(snapshot["v"], v) < 1e-3
    assert relative(snapshot["delta"], delta) < 0.01
    assert work.read_metadata("tuning.safetensors")["step"] == 3


def test_windows_side_by_side(llama, tmp_path):
    """Three threads, each with its windows: the gradient of one thread, and the same bits every time."""
    teacher, new = llama
    threads, options = torch.get_num_threads(), {"lr": 0.05, "seed": 3, "tokens": 4 * STEP}
    found = []
    try:
        for i, n in enumerate((1, 3, 3)):
            torch.set_num_threads(n)
            work = WorkFolder.create(tmp_path / str(i))
            distill(new(), teacher, WINDOWS, work, **options)
            found.append(work.read_tensors("tuning.safetensors"))
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(threads)
    assert_same(found[1], found[2])
    assert relative(found[1]["m"], found[0]["m"]) < 1e-3
    assert not found[1]["m"].equal(found[0]["m"]), "it was not split"


def test_the_best_state_is_kept(llama, work, monkeypatch):
    """Down for 12 steps, then up again: what comes back is the state at the lowest held-out KL, to the bit."""
    teacher, new = llama
    monkeypatch.setattr(distill_module, "EVALUATE_EVERY", 4)
    monkeypatch.setattr(distill_module, "learning_rate", lambda step, steps, peak: peak if step < 12 else -peak)
    student, states, held_out, best = new(), [], [], []

    def report(p):
        best.append(p.best)
        if p.held_out is not None:
            states.append(state(student))
            held_out.append(p.held_out)
        assert p.best == min(held_out)

    found = distill(student, teacher, WINDOWS, work, lr=0.02, seed=3, tokens=22 * STEP, report=report)
    assert len(held_out) == 7  # 0, 4, 8, …, 20, 22
    lowest = int(np.argmin(held_out))
    assert 0 < lowest < 5 and held_out[-1] > held_out[lowest]
    assert_same(found, {name: value.to(found[name].dtype) for name, value in states[lowest].items()})
    assert kl64(put(new(), found), teacher, WINDOWS[:HELD_OUT]) == pytest.approx(min(held_out), rel=0.01)


def test_a_start_that_nothing_beats_is_given_back(llama, work):
    teacher, new = llama
    start = state(new())
    found = distill(new(), teacher, WINDOWS, work, lr=50.0, seed=3, tokens=3 * STEP)
    assert_same(found, {name: value.to(found[name].dtype) for name, value in start.items()})


def steps_run(llama, work, seed: int, steps: int) -> tuple[list[list], torch.Tensor]:
    """Numbers of the windows of each training step, and what was evaluated."""
    teacher, new = llama
    number = {tuple(window.tolist()): i for i, window in enumerate(WINDOWS)}
    student, trained, evaluated = new(), [], set()

    def look(module, args, output):
        rows = [number[tuple(row.tolist())] for row in args[0]]
        trained.append(rows) if torch.is_grad_enabled() else evaluated.update(rows)

    student.get_input_embeddings().register_forward_hook(look)
    distill(student, teacher, WINDOWS, work, lr=0.01, seed=seed, tokens=steps * STEP)
    return trained, evaluated


def test_windows_of_a_step(llama, tmp_path):
    trained, evaluated = steps_run(llama, WorkFolder.create(tmp_path / "one"), 3, 12)
    assert evaluated == set(range(HELD_OUT))
    assert [len(rows) for rows in trained] == [BATCH] * 12
    per_epoch = (N_WINDOWS - HELD_OUT) // BATCH
    epochs = [sum(trained[i : i + per_epoch], []) for i in range(0, 12, per_epoch)]
    for epoch in epochs:  # each window at most once, none of those held out
        assert len(set(epoch)) == len(epoch) and min(epoch) >= HELD_OUT
    assert epochs[0] != epochs[1] and set(sum(epochs, [])) == set(range(HELD_OUT, N_WINDOWS))
    assert steps_run(llama, WorkFolder.create(tmp_path / "two"), 3, 3)[0] == trained[:3]
    assert steps_run(llama, WorkFolder.create(tmp_path / "three"), 4, 3)[0] != trained[:3]


class Interrupted(Exception):
    pass


def interrupt_at(step: int, seen: list):
    def report(p):
        seen.append(p)
        if p.step == step:
            raise Interrupted

    return report


@pytest.mark.parametrize(("kind", "stop"), [("llama-tied", 3), ("llama-tied", 8), ("qwen3", 11)])
def test_an_interrupted_run_ends_in_the_same_bits(kind, stop, tmp_path, monkeypatch):
    teacher, new = make_pair(kind)
    monkeypatch.setattr(distill_module, "EVALUATE_EVERY", 4)
    options = {"lr": 0.05, "seed": 3, "tokens": 14 * STEP}
    whole, first, second = [], [], []
    work = WorkFolder.create(tmp_path / "whole")
    wanted = distill(new(), teacher, WINDOWS, work, report=whole.append, **options)
    cut = WorkFolder.create(tmp_path / "cut")
    with pytest.raises(Interrupted):
        distill(new(), teacher, WINDOWS, cut, report=interrupt_at(stop, first), **options)
    found = distill(new(), teacher, WINDOWS, WorkFolder.open(cut.path), report=second.append, **options)
    kept = stop // 4 * 4  # the last snapshot
    assert [p.step for p in second] == list(range(kept + 1 if kept else 0, 15))
    assert first == whole[: stop + 1] and second == whole[-len(second) :]
    assert_same(found, wanted)
    assert_same(cut.read_tensors("tuning.safetensors"), work.read_tensors("tuning.safetensors"))


def test_trained_signs_are_kept_and_resumed(tmp_path, monkeypatch):
    """With signs: a resumed run ends in the same bits, flips some signs, and the work folder gives them back."""
    teacher, new = make_pair("llama-tied")
    monkeypatch.setattr(distill_module, "EVALUATE_EVERY", 8)
    monkeypatch.setattr(distill_module, "SIGN_CHANCE", 0.3)
    options = {"lr": 0.02, "sign_lr": 0.5, "seed": 3, "tokens": 24 * STEP}
    work, cut = (WorkFolder.create(tmp_path / name) for name in ("whole", "cut"))
    wanted = distill(new(), teacher, WINDOWS, work, **options)
    with pytest.raises(Interrupted):
        distill(new(), teacher, WINDOWS, cut, report=interrupt_at(19, []), **options)
    assert_same(distill(new(), teacher, WINDOWS, WorkFolder.open(cut.path), **options), wanted)
    packed = {name: value for name, value in wanted.items() if value.dtype == torch.uint8}
    linears = {name.rpartition(".")[0] for name in packed}
    assert 0 < len(linears) < len(block_linears(teacher)) and len(packed) == 2 * len(linears)
    student = new()
    flips = [
        (unpack_signs(value.numpy()) != student.get_buffer(name).to(torch.int8)).sum().item()
        for name, value in packed.items()
    ]
    assert sum(flips) > 20
    work.write_tensors("final.safetensors", wanted)
    for name in linears:
        a, b = work.packed_signs(name)
        assert (a == packed[f"{name}.signs_a"].numpy()).all() and (b == packed[f"{name}.signs_b"].numpy()).all()


def test_signs_lower_the_loss(llama, tmp_path, monkeypatch):
    """Scales frozen (their rate is all but zero), signs of all linears trained: the held-out KL falls."""
    teacher, new = llama
    monkeypatch.setattr(distill_module, "SIGN_CHANCE", 1.0)
    reports = []
    options = {"lr": 1e-9, "sign_lr": 0.3, "seed": 3, "tokens": 40 * STEP, "report": reports.append}
    distill(new(), teacher, WINDOWS, WorkFolder.create(tmp_path / "w"), **options)
    assert reports[-1].best < 0.97 * reports[0].best


@pytest.mark.parametrize(("turns", "ends"), [(4, 26), (24, 30)])
def test_it_ends_when_nothing_is_gained_any_more(llama, work, monkeypatch, turns, ends):
    """Three evaluations after the best one, or after the first half."""
    teacher, new = llama
    monkeypatch.setattr(distill_module, "EVALUATE_EVERY", 2)
    monkeypatch.setattr(distill_module, "PATIENCE", 3)
    good = 0.1 if turns > 20 else 1
    monkeypatch.setattr(distill_module, "learning_rate", lambda step, _, peak: (good if step < turns else -5) * peak)
    reports = []
    distill(new(), teacher, WINDOWS, work, lr=0.02, seed=3, tokens=40 * STEP, report=reports.append)
    values = {p.step: p.held_out for p in reports if p.held_out is not None}
    assert min(values, key=values.get) == turns and reports[-1].step == max(values) == ends


def test_the_best_state_outlives_an_interruption(llama, work, monkeypatch):
    """The best state lies before the snapshot, and nothing after it is as good."""
    teacher, new = llama
    monkeypatch.setattr(distill_module, "EVALUATE_EVERY", 4)
    monkeypatch.setattr(distill_module, "learning_rate", lambda step, steps, peak: peak if step < 4 else -5 * peak)
    options = {"lr": 0.02, "seed": 3, "tokens": 12 * STEP}
    student, states, seen = new(), {}, []

    def report(p):
        states[p.step] = state(student)
        if p.step == 9:
            raise Interrupted

    with pytest.raises(Interrupted):
        distill(student, teacher, WINDOWS, work, report=report, **options)
    found = distill(new(), teacher, WINDOWS, work, report=seen.append, **options)
    assert seen[0].step == 9 and all(p.best < p.held_out for p in seen if p.held_out is not None)
    assert_same(found, {name: value.to(found[name].dtype) for name, value in states[4].items()})


def test_recomputing_activations_changes_nothing(llama, tmp_path, monkeypatch):
    teacher, new = llama

    def run(name: str):
        student, calls, modes = new(), [], []
        student.model.layers[0].self_attn.register_forward_hook(
            lambda module, args, output: calls.append(1) if torch.is_grad_enabled() else None
        )
        work = WorkFolder.create(tmp_path / name)
        found = distill(
            student,
            teacher,
            WINDOWS,
            work,
            lr=0.05,
            seed=3,
            tokens=4 * STEP,
            report=lambda p: modes.append(student.training),
        )
        assert not student.training
        return found, len(calls), set(modes)

    plain, calls, modes = run("plain")
    assert (calls, modes) == (4, {False})
    monkeypatch.setattr(distill_module, "CHECKPOINT_ABOVE", 0)
    recomputed, calls, modes = run("recomputed")
    assert (calls, modes) == (8, {True})
    for name, value in plain.items():
        assert relative(recomputed[name], value) < 1e-3, name


# --- minutes


class Clock:
    """A clock that only training steps move: step i takes seconds(i). Evaluations cost an hour, and must not count."""

    def __init__(self, monkeypatch, student, seconds, first: int = 0):
        self.now, self.step, self.seconds = 1e6, first, seconds
        monkeypatch.setattr(distill_module, "time", SimpleNamespace(monotonic=lambda: self.now))
        student.model.register_forward_hook(self._tick)

    def _tick(self, *_):
        if not torch.is_grad_enabled():
            self.now += 3600
            return
        self.now += self.seconds(self.step)
        self.step += 1
        assert self.step < 100, "it never ends"


SHORT_STEP = 64  # tokens, for many steps in little time
SMALL = ids(9, SHORT_STEP, seed=5)  # one held out, eight to train on: one is a step


def timed_run(llama, work, monkeypatch, seconds, minutes, tokens=None, report=None, first=0):
    teacher, new = llama
    monkeypatch.setattr(distill_module, "STEP_TOKENS", SHORT_STEP)
    reports = []
    student = new()
    Clock(monkeypatch, student, seconds, first)
    options = {"lr": 0.02, "seed": 3, "minutes": minutes, "tokens": tokens}
    found = distill(student, teacher, SMALL, work, report=report or reports.append, **options)
    return found, reports


@pytest.mark.parametrize(
    ("seconds", "minutes", "tokens", "steps"),
    [
        (lambda i: 500.0 if i < 3 else 90.0 if i < 5 else 2.0, 1.0, None, 30),  # the first steps include one-time costs
        (lambda i: 90.0 if i in (4, 7) else 2.5, 1.0, None, 24),  # so may a few later ones
        (lambda i: 2.0 if i < 9 else 50.0, 0.5, None, 15),  # what comes after the timing changes nothing any more
        (lambda i: 100.0, 1.0, None, 9),  # not even those that were timed are affordable
        (lambda i: 2.0, 1.0, 12 * SHORT_STEP, 12),  # tokens end it first
        (lambda i: 3.0, 1.0, 50 * SHORT_STEP, 20),  # minutes do
        (lambda i: 3.0, 1.0, 5 * SHORT_STEP, 5),  # over before anything is timed
    ],
)
def test_minutes_become_steps(llama, work, monkeypatch, seconds, minutes, tokens, steps):
    _, reports = timed_run(llama, work, monkeypatch, seconds, minutes, tokens)
    assert [p.step for p in reports] == list(range(steps + 1))
    told = None if tokens is None else tokens // SHORT_STEP
    assert [p.steps for p in reports[:9]] == [told] * len(reports[:9])  # unknown until step 8 has been timed
    assert {p.steps for p in reports[9:]} <= {steps}
    if steps >= 9:
        assert WorkFolder.open(work.path).manifest["tuning"] == {"steps": steps}
    assert reports[-1].held_out is not None


@pytest.mark.parametrize("every, first", [(10, 10), (40, 0)])
def test_a_resumed_run_keeps_the_number_of_steps(every, first, llama, tmp_path, monkeypatch):
    """Also when it was interrupted before there was a snapshot."""
    monkeypatch.setattr(distill_module, "EVALUATE_EVERY", every)
    whole, _ = timed_run(llama, WorkFolder.create(tmp_path / "whole"), monkeypatch, lambda i: 3.0, 1.0)
    cut = WorkFolder.create(tmp_path / "cut")
    with pytest.raises(Interrupted):
        timed_run(llama, cut, monkeypatch, lambda i: 3.0, 1.0, report=interrupt_at(13, []))
    assert WorkFolder.open(cut.path).manifest["tuning"] == {"steps": 20}
    # the machine has become ten times as fast
    found, reports = timed_run(llama, WorkFolder.open(cut.path), monkeypatch, lambda i: 0.3, 1.0, first=first)
    assert [p.step for p in reports if p.step] == list(range(first + 1, 21)) and {p.steps for p in reports} == {20}
    assert WorkFolder.open(cut.path).manifest["tuning"] == {"steps": 20}
    assert_same(found, whole)


def test_slow_steps_are_saved_between_evaluations(llama, tmp_path, monkeypatch):
    """At 400 s a step every second one is a snapshot's; the resumed run repeats the one after the last of them."""
    tokens = 16 * SHORT_STEP
    whole, _ = timed_run(llama, WorkFolder.create(tmp_path / "whole"), monkeypatch, lambda i: 1.0, None, tokens)
    cut = WorkFolder.create(tmp_path / "cut")
    with pytest.raises(Interrupted):
        timed_run(llama, cut, monkeypatch, lambda i: 400.0, None, tokens, report=interrupt_at(13, []))
    found, reports = timed_run(llama, WorkFolder.open(cut.path), monkeypatch, lambda i: 1.0, None, tokens, first=12)
    assert [p.step for p in reports] == [13, 14, 15, 16]
    assert_same(found, whole)


# --- what cannot be tuned


@pytest.mark.parametrize(
    "length",
    [512, 100, LENGTH, 16],
)
def test_too_short_a_text_is_refused(llama, tmp_path, length):
    """The message says what is left to train on and what a step takes; the first count that is enough runs."""
    teacher, new = llama

    def run(count: int):
        work = WorkFolder.create(tmp_path / f"{len(list(tmp_path.iterdir()))}")
        return distill(new(), teacher, ids(count, length), work, lr=0.01, seed=0, tokens=1)

    for count in range(1, 64):
        try:
            result = run(count)
        except DBFError as error:
            left, takes = map(int, re.search(r"leave (\d+) beside .* takes (\d+)", str(error)).groups())
            assert f": {count} windows of {length} tokens" in str(error)
            assert left < takes
        else:
            break
    assert count > takes == max(1, 512 // length)
    assert result.keys() == trained_names(teacher)


@pytest.mark.parametrize("minutes", [None, 1.0])
def test_a_loss_that_is_not_finite_is_refused(llama, work, minutes):
    teacher, new = llama
    student = new()
    student.model.layers[1].mlp.up_proj.scale_m.data[5] = math.nan
    with pytest.raises(DBFError) as error:
        distill(student, teacher, WINDOWS, work, lr=0.01, seed=0, tokens=STEP, minutes=minutes)
    assert "not finite" in one_line(error) and "step 1" in one_line(error)
    assert not work.has("tuning.safetensors")


def test_a_run_that_diverges_is_refused(llama, work):
    """Infinite steps give a loss that is not finite one step later."""
    teacher, new = llama
    with pytest.raises(DBFError, match="not finite at step 2"):
        distill(new(), teacher, WINDOWS, work, lr=math.inf, seed=0, tokens=5 * STEP)


# --- effects of single linears


def importance_of(model, windows) -> dict[str, torch.Tensor]:
    """`importance.measure` of a model that is in memory."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return importance.measure(BlockModel(folder), windows, Path(folder))


def measured(
    model, windows, workers: int = 1, metric: bool = False, tensors: dict | None = None, work: Path | None = None
) -> dict:
    shapes = {name: tuple(linear.weight.shape) for name, linear in block_linears(model).items()}
    tensors = importance_of(model, windows) if tensors is None else tensors or None
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        options = {"metric": metric, "workers": workers, "seed": 0}
        work = work or Path(folder) / "effects"
        return sensitivity.measure(BlockModel(folder), shapes, windows, tensors, work, **options)


def second_moment(model, name: str, windows) -> torch.Tensor:
    """Mean of x xᵀ over the inputs x of a linear; none of a random model's tokens is so large that it counted less."""
    seen = []
    handle = block_linears(model)[name].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(windows)
    handle.remove()
    x = seen[0].flatten(0, 1)
    return x.T @ x / len(x)


@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_effect_is_the_kl_of_one_compressed_linear(kind, metric, tmp_path):
    model, windows = tiny(kind), ids(20, 50)
    curves = measured(model, windows, metric=metric, work=tmp_path)
    assert curves.keys() == block_linears(model).keys()
    tensors, kept = importance_of(model, windows), WorkFolder.open(tmp_path)
    for name in list(curves)[::5]:
        weight, moment = block_linears(model)[name].weight, second_moment(model, name, windows)
        options = {"importance_in": tensors[f"{name}.input"][None], "importance_out": tensors[f"{name}.output"][None]}
        if metric:
            options["moment"] = InputMoment(moment.clone())
        (k_0, effect_0), (k_1, effect_1) = curves[name]
        assert 32 <= k_0 < k_1
        student = copy.deepcopy(model)
        replace_linear(student, name, kept.factors(name), torch.float32)
        assert effect_1 == pytest.approx(kl64(student, model, windows), rel=1e-3)  # 1000 tokens: all windows
        assert effect_1 == pytest.approx(sensitivity.FALL * effect_0)
        # the sums of the moment in another order turn some of the signs: as good, not the same
        (again,), _ = factorize(weight[None], k_1, iterations=sensitivity.ITERATIONS, **options)
        by_row = tensors[f"{name}.output"][:, None]
        errors = [(weight - found.dense()) * by_row for found in (kept.factors(name), again)]
        first, second = (((error @ moment) * error).sum().item() for error in errors)
        assert first == pytest.approx(second, rel=0.05 if metric else 1e-3)


def test_effects_without_importance(tmp_path):
    """The factors are those of all rows and columns counting alike."""
    model, windows = tiny("llama-tied"), ids(4, 50)
    curves = measured(model, windows, tensors={}, work=tmp_path)
    assert curves != measured(model, windows)
    name = "model.layers.1.mlp.up_proj"
    weight = block_linears(model)[name].weight
    (wanted,), _ = factorize(weight[None], curves[name][1][0], iterations=sensitivity.ITERATIONS)
    assert torch.allclose(WorkFolder.open(tmp_path).factors(name).dense(), wanted.dense(), atol=1e-5)


def test_effects_that_are_not_finite(monkeypatch):
    model, windows = tiny("llama-tied"), ids(4, 50)
    monkeypatch.setattr(sensitivity, "kl_of_logs", lambda *given, **more: math.nan)
    with pytest.raises(DBFError, match="output is not finite") as error:
        measured(model, windows)
    one_line(error)


def test_effects_of_several_workers_and_of_an_interrupted_run(tmp_path, monkeypatch):
    model, windows = tiny("llama-tied"), ids(4, 50)
    curves = measured(model, windows, metric=True)
    assert list(curves) == list(block_linears(model))
    assert measured(model, windows, workers=3, metric=True) == curves

    made, work = [], tmp_path / "effects"

    def stop_at_ninth(*given, **more):
        made.append(given)
        if len(made) == 9:
            raise KeyboardInterrupt
        return factorize(*given, **more)

    monkeypatch.setattr(sensitivity, "factorize", stop_at_ninth)
    with pytest.raises(KeyboardInterrupt):
        measured(model, windows, metric=True, work=work)
    assert measured(model, windows, metric=True, work=work) == curves
    assert len(made) == len(curves) + 1  # twice only the ninth: what was made before and beside it is stored
    assert work.exists()
    sensitivity.clean(work)
    assert not work.exists()


def test_states_beyond_memory_are_kept_in_a_file(monkeypatch):
    model, windows = tiny("llama-tied"), ids(4, 50)
    curves = measured(model, windows)
    monkeypatch.setattr(sensitivity, "STATE_BYTES", 0)
    assert measured(model, windows) == curves


def test_a_linear_without_effect_has_a_curve():
    """Zero weights: the compressed linear is the linear. The curve still falls, as the allocation needs."""
    model = tiny("llama-tied")
    name = "model.layers.1.mlp.up_proj"
    block_linears(model)[name].weight.data.zero_()
    (_, effect_0), (_, effect_1) = measured(model, ids(4, 50))[name]
    assert 0 < effect_1 < effect_0 < 1e-6


def test_weights_that_cannot_be_factorized_are_named():
    model, windows = tiny("llama-tied"), ids(4, 50)
    tensors = importance_of(model, windows)
    block_linears(model)["model.layers.0.mlp.up_proj"].weight.data[3, 5] = math.nan
    with pytest.raises(DBFError, match="layers.0.mlp.up_proj") as error:
        measured(model, windows, tensors=tensors)
    one_line(error)


def test_stored_curves(tmp_path):
    path = tmp_path / "budget.json"
    curves = {"a": ((32, 1 / 3), (96, 0.25)), "b": ((64, 1e-9), (128, 1e-12))}
    sensitivity.write(path, "weights", "with moments", curves, bits=2.0)
    assert sensitivity.read(path, "weights", "with moments") == curves
    with pytest.raises(DBFError, match="another model") as error:
        sensitivity.read(path, "others", "with moments")
    one_line(error)
    for how, message in (("with importance", "compressed alone"), ("plainly", "compressed with --no-importance")):
        with pytest.raises(DBFError, match=f"compressed block by block, here they are {message}") as error:
            sensitivity.read(path, "weights", how)
        one_line(error)


@pytest.mark.parametrize("ks", [(64, 32), (32, 32), (0, 64), (32, 64)])
@pytest.mark.parametrize("effects", [(0.5, 0.5), (1.0, 0.0), (math.nan, 0.5), (math.inf, 0.5), (1.0, 0.5)])
def test_curves_that_do_not_fall_are_refused(ks, effects, tmp_path):
    path = tmp_path / "budget.json"
    sensitivity.write(path, "w", "plainly", {"a": ((32, 0.5), (64, 0.25)), "b": tuple(zip(ks, effects, strict=True))})
    if (ks, effects) == ((32, 64), (1.0, 0.5)):
        assert sensitivity.read(path, "w", "plainly")["b"] == ((32, 1.0), (64, 0.5))
        return
    with pytest.raises(DBFError, match="is no budget") as error:
        sensitivity.read(path, "w", "plainly")
    one_line(error)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", "7", '{"format": 3}', '{"format": 2, "weights": "w", "metric": true, "curves": {}}'),
        '{"format": 3, "weights": "w", "compressed": "plainly", "curves": {"a": 3}}',
        '{"format": 3, "weights": "w", "compressed": "plainly", "curves": {"a": [[Infinity, 2], [64, 1]]}}',
        '{"format": 3, "weights": "w", "compressed": "otherwise", "curves": {}}',
    ],
)
def test_what_is_no_stored_budget(text, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    for place, message in ((path, "is no budget"), (tmp_path, "cannot be read"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(DBFError, match=message) as error:
            sensitivity.read(place, "w", "plainly")
        one_line(error)

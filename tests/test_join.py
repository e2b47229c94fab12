"""Linears joined into one: the model computes what it did, and every stage of convert sees the joint linear.

Run alone: pytest tests/test_join.py     (llama.cpp on joined files: test_families.py, test_llama_cpp.py)
"""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers

from dbf_gguf import importance
from dbf_gguf.blocks import BlockModel
from dbf_gguf.errors import DBFError
from dbf_gguf.factors import Factors
from dbf_gguf.join import effective, stored_names
from dbf_gguf.model import block_linears, checkpointing, linear_shapes, load_dense, replace_linear, weight_files

COMMON = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.2,
    pad_token_id=None,
)
KINDS = {
    "Llama": dict(attention_bias=True, mlp_bias=True),
    "Mistral": dict(head_dim=16, sliding_window=16),
    "Qwen2": dict(),
    "Qwen3": dict(head_dim=16),
}
BOTH = "qkv,gate_up"
JOINT = [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.qkv_proj", "mlp.gate_up_proj")]


@pytest.fixture(autouse=True)
def few_threads(one_thread):
    pass


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return save(request.param, tmp_path_factory.mktemp(request.param))


def save(kind: str, path):
    """A random model in shards, so that the parts of a joint linear lie in several files."""
    torch.manual_seed(list(KINDS).index(kind) if kind in KINDS else 9)
    config = getattr(transformers, f"{kind}Config")(**COMMON | KINDS.get(kind, {}))
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_()
    model.save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def ids(*shape) -> torch.Tensor:
    return torch.randint(96, shape, generator=torch.Generator().manual_seed(1))


def close(a, b) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_joined_model_computes_the_same(folder):
    """Whole, block by block, and in one joint linear for each input."""
    plain, joined, blocks = load_dense(folder), load_dense(folder, join=BOTH), BlockModel(folder, join=BOTH)
    wanted = plain(ids(2, 24)).logits
    calls = []
    for name, linear in block_linears(joined).items():
        linear.register_forward_hook(lambda *_, name=name: calls.append(name.removeprefix("model.layers.")))
    assert close(joined(ids(2, 24)).logits, wanted)
    kinds = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert calls == [f"{block}.{kind}" for block in (0, 1) for kind in kinds]
    assert linear_shapes(folder, BOTH) == {name: tuple(m.weight.shape) for name, m in block_linears(joined).items()}

    hidden = blocks.embed(ids(2, 24))
    for index in range(len(blocks)):
        hidden = blocks.run(index, blocks.block(index), hidden)
    assert close(blocks.norm(hidden) @ blocks.head.T, wanted)


@pytest.mark.parametrize("setting", ["qkv", "gate_up"])
def test_one_kind_alone(setting, folder):
    shapes = linear_shapes(folder, setting)
    assert {name.rpartition(".")[2] for name in shapes} == {
        "qkv": {"qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        "gate_up": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"},
    }[setting]
    assert close(load_dense(folder, join=setting)(ids(1, 9)).logits, load_dense(folder)(ids(1, 9)).logits)


def test_importance_is_that_of_the_parts(folder, tmp_path, monkeypatch):
    """Inputs are the same, outputs those of the parts in their order; but the bound is on a joint token's energy."""
    monkeypatch.setattr(importance, "TOKEN_CAP", 1e9)
    windows = ids(3, 20)
    plain = importance.measure(BlockModel(folder), windows, tmp_path)
    joined = importance.measure(BlockModel(folder, join=BOTH), windows, tmp_path)
    files = [f"{key.rpartition('.')[0]}.weight" for key in plain]
    for name in JOINT:
        parts = [part.removesuffix(".weight") for part in stored_names(f"{name}.weight", files)]
        assert len(parts) == (3 if "qkv" in name else 2)
        assert all(torch.allclose(joined[f"{name}.input"], plain[f"{part}.input"], rtol=1e-3) for part in parts)
        assert torch.allclose(joined[f"{name}.output"], torch.cat([plain[f"{p}.output"] for p in parts]), rtol=1e-3)


def test_gradients_with_checkpointing(folder):
    def gradient(model) -> torch.Tensor:
        x = model.get_input_embeddings()(ids(2, 12)).detach().requires_grad_()
        model(inputs_embeds=x).logits.square().sum().backward()
        return x.grad

    wanted, model = gradient(load_dense(folder)), load_dense(folder, join=BOTH)
    assert close(gradient(model) / wanted.norm(), wanted / wanted.norm())
    with checkpointing(model):
        assert close(gradient(model) / wanted.norm(), wanted / wanted.norm())


def factors_of(n_out: int, n_in: int, seed: int) -> Factors:
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(2, s, generator=g, dtype=torch.int8) * 2 - 1 for s in ((n_out, 32), (32, n_in)))
    return Factors(a, b, *(torch.rand(n, generator=g) + 0.5 for n in (n_out, 32, n_in)))


def test_replacing_reaches_the_parts_and_copies_stay_apart(folder):
    model = load_dense(folder, join=BOTH)
    other = copy.deepcopy(model)
    before = model(ids(1, 9)).logits
    name = "model.layers.1.self_attn.qkv_proj"
    replace_linear(model, name, factors_of(*block_linears(model)[name].weight.shape, 0), torch.float32)
    attention = model.model.layers[1].self_attn
    x = torch.randn(1, 3, 32)
    whole = attention.qkv_proj(x)
    parts = [getattr(attention, part)(x) for part in ("q_proj", "k_proj", "v_proj")]
    assert torch.equal(torch.cat(parts, -1), whole)
    assert not close(model(ids(1, 9)).logits, before)
    assert torch.equal(other(ids(1, 9)).logits, before)


def test_what_one_passage_computed_is_not_taken_for_another(folder):
    """Parts called alone, out of their order, with other inputs, or with changed weights between two passages."""
    model = load_dense(folder, join=BOTH)
    mlp, plain = model.model.layers[0].mlp, load_dense(folder).model.layers[0].mlp
    x, y = torch.randn(2, 3, 32)
    mlp.gate_proj(x)
    assert close(mlp.up_proj(y), plain.up_proj(y))
    assert close(mlp.up_proj(x), plain.up_proj(x))
    mlp.gate_proj(x)
    mlp.gate_up_proj.weight.data.mul_(2)
    wanted = mlp.gate_up_proj(x).split(64, -1)
    assert torch.equal(mlp.gate_proj(x), wanted[0])
    assert torch.equal(mlp.up_proj(x), wanted[1])


def test_windows_side_by_side(folder):
    model = load_dense(folder, join=BOTH)
    windows = ids(16, 30)
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        wanted = [model(window[None]).logits for window in windows]
        found = list(pool.map(lambda window: torch.no_grad()(model)(window[None]).logits, windows))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_threads_keep_what_they_computed(folder):
    """Two threads, each between the parts of one block: the joint linear is computed once for each, not again."""
    mlp, calls, both = load_dense(folder, join=BOTH).model.layers[0].mlp, [], threading.Barrier(2)
    mlp.gate_up_proj.register_forward_hook(lambda *_: calls.append(threading.get_ident()))

    def one(x: torch.Tensor) -> torch.Tensor:
        gate = mlp.gate_proj(x)
        both.wait(timeout=60)
        return torch.cat([gate, mlp.up_proj(x)], -1)

    inputs = torch.randn(2, 3, 32)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(one, inputs))
    assert len(calls) == 2
    assert all(torch.equal(y, mlp.gate_up_proj(x)) for x, y in zip(inputs, found, strict=True))


def test_what_there_is_to_join(folder, tmp_path):
    files = weight_files(folder)
    for setting in ("none", "qkv", "gate_up", BOTH):
        assert effective(setting, linear_shapes(folder, setting), files) == setting
    phi = save("Phi3", tmp_path / "phi")
    assert linear_shapes(phi, BOTH) == linear_shapes(phi)
    assert effective(BOTH, linear_shapes(phi, BOTH), weight_files(phi)) == "none"


def test_a_missing_part_is_named(tmp_path):
    save("Qwen3", tmp_path)
    model = BlockModel(tmp_path, join=BOTH)
    model.files.pop("model.layers.1.self_attn.k_proj.weight")
    model.block(0)
    with pytest.raises(DBFError, match=r"has no weight model\.layers\.1\.self_attn\.k_proj\.weight"):
        model.block(1)

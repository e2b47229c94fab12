"""Running a model one block at a time, against the whole model of transformers.

Run alone: pytest tests/test_blocks.py     (seconds; the models are tiny and random)
"""

import json

import pytest
import torch
import transformers

from dbf_gguf import blocks
from dbf_gguf.blocks import Activations, BlockModel
from dbf_gguf.checkpoint import WorkFolder
from dbf_gguf.errors import DBFError
from dbf_gguf.factors import Factors
from dbf_gguf.model import DBFLinear, block_linears, load_dense
from dbf_gguf.model import apply_work as apply_to_whole

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, HIDDEN, BLOCKS, LENGTH = 200, 64, 3, 40
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
}
ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS = {
    "llama-tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama3": transformers.LlamaConfig(
        **SIZES,
        tie_word_embeddings=False,
        attention_bias=True,
        attention_dropout=0.5,
        rope_parameters=ROPE | {"original_max_position_embeddings": 32},
    ),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=9),  # a quarter of the windows below
    "qwen2": transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=7, max_window_layers=1, tie_word_embeddings=True
    ),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=False),
    "phi3": transformers.Phi3Config(**SIZES, sliding_window=9, pad_token_id=0),  # one linear for q, k, v
}


def save(kind: str, folder, **options):
    """A random model in `folder`; norms and biases random as well (fresh ones are all 1 and all 0)."""
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.2 * torch.randn_like(parameter) + (0 if name.endswith("bias") else 1))
    model.save_pretrained(folder, **options)


def ids(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def through(model: BlockModel, windows: torch.Tensor, change=lambda index, block: None) -> list[torch.Tensor]:
    """Hidden states before every block, after the last one, and the logits."""
    hidden = [model.embed(windows)]
    for index in range(len(model)):
        block = model.block(index)
        change(index, block)
        with torch.no_grad():
            hidden.append(model.run(index, block, hidden[-1]))
    return [*hidden, model.norm(hidden[-1]) @ model.head.T]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shard", ["10GB", "40KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_block_by_block_is_the_whole_model(kind, shard, dtype, tmp_path):
    save(kind, tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > BLOCKS) == (shard == "40KB")
    whole, model = load_dense(tmp_path, dtype), BlockModel(tmp_path, dtype)
    assert len(model) == BLOCKS
    for shape in [(2, LENGTH), (1, LENGTH), (2, 5)]:  # the arguments of a block depend on the shape
        seen = []
        handles = [block.register_forward_pre_hook(lambda _, x, s=seen: s.append(x[0])) for block in whole.model.layers]
        handles.append(whole.model.norm.register_forward_pre_hook(lambda _, x, s=seen: s.append(x[0])))
        with torch.no_grad():
            seen.append(whole(ids(*shape)).logits)
        for handle in handles:
            handle.remove()
        found = through(model, ids(*shape))
        assert len(found) == len(seen) == BLOCKS + 2
        for index, (mine, wanted) in enumerate(zip(found, seen, strict=True)):
            assert mine.dtype == dtype and mine.equal(wanted), (shape, index)


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_windows_slide(kind, tmp_path):
    """The masks of these two matter at this length: the comparison above would notice a block without its own."""
    save(kind, tmp_path)
    wide = BlockModel(tmp_path)
    arguments = wide._block_arguments(1, LENGTH)
    masks = [a["attention_mask"] for a in arguments]
    assert [m is not None for m in masks] == ([True] * 3 if kind == "mistral" else [False, True, True])
    found = through(wide, ids(1, LENGTH))[-1]
    for a in arguments:
        a["attention_mask"] = None
    assert (through(wide, ids(1, LENGTH))[-1] - found).abs().max() > 0.1


def test_gradients_are_those_of_the_whole_model(tmp_path):
    save("mistral", tmp_path)
    whole, model = load_dense(tmp_path), BlockModel(tmp_path)
    embedded = whole.model.embed_tokens(ids(2, LENGTH)).requires_grad_()
    whole.model(inputs_embeds=embedded).last_hidden_state.square().sum().backward()
    inputs = [hidden.requires_grad_() for hidden in through(model, ids(2, LENGTH))[: BLOCKS + 1]]
    (gradient,) = torch.autograd.grad(model.norm(inputs[-1]).square().sum(), inputs[-1])
    for index in reversed(range(BLOCKS)):
        out = model.run(index, model.block(index), inputs[index])
        (gradient,) = torch.autograd.grad(out, inputs[index], gradient)
    assert torch.allclose(gradient, embedded.grad, rtol=1e-5, atol=1e-6 * embedded.grad.abs().max())


def test_a_block_is_frozen_and_without_dropout(tmp_path):
    save("llama3", tmp_path)
    model = BlockModel(tmp_path)
    block = model.block(1)
    assert not any(p.requires_grad or p.is_meta for p in block.parameters()) and not block.training
    hidden = model.embed(ids(1, LENGTH))
    quiet = model.run(1, block, hidden)
    assert model.run(1, block.train(), hidden).equal(quiet)
    assert model.block(1).self_attn.q_proj.weight.data_ptr() != block.self_attn.q_proj.weight.data_ptr()


def test_nothing_but_the_block_is_read(tmp_path, monkeypatch):
    save("llama-tied", tmp_path, max_shard_size="40KB")
    model = BlockModel(tmp_path)
    read = []
    original = BlockModel._read
    monkeypatch.setattr(BlockModel, "_read", lambda self, name, shape: read.append(name) or original(self, name, shape))
    block = model.block(2)
    assert sorted(read) == sorted("model.layers.2." + name for name in block.state_dict())
    read.clear()
    model.embed(ids(1, 3))
    assert model.head.shape == (VOCABULARY, HIDDEN)
    model.embed(ids(1, 4))
    assert read == [blocks.EMBEDDING]  # tied, and kept
    model.release()
    assert model.head.shape == (VOCABULARY, HIDDEN)
    assert read == [blocks.EMBEDDING] * 2


def test_names_of_linears(tmp_path):
    save("qwen2", tmp_path)
    model = BlockModel(tmp_path)
    found = {name: m.weight for i in range(BLOCKS) for name, m in blocks.linears(i, model.block(i)).items()}
    wanted = {name: m.weight for name, m in block_linears(load_dense(tmp_path)).items()}
    assert list(found) == list(wanted) and all(found[name].equal(wanted[name]) for name in wanted)


def work_for(model: BlockModel, folder, norms: dict) -> WorkFolder:
    """Random factors of the linears of all blocks but the last, and tuned norms, as `convert` leaves them."""
    work, g = WorkFolder.create(folder), torch.Generator().manual_seed(3)
    for index in range(len(model) - 1):
        for name, linear in blocks.linears(index, model.block(index)).items():
            n_out, n_in = linear.weight.shape
            a, b = (torch.randint(2, s, generator=g, dtype=torch.int8) * 2 - 1 for s in ((n_out, 32), (32, n_in)))
            scales = (0.1 + torch.rand(n, generator=g) / 10 for n in (n_out, 32, n_in))
            work.write_linear(name, Factors(a, b, *scales), {})
    final = {f"{name}.{scale}": value for name in work.linears() for scale, value in work.scales(name).items()}
    work.write_tensors("final.safetensors", final | norms)
    return work


def test_compressed_blocks_are_those_of_the_whole_model(tmp_path):
    save("qwen2", tmp_path / "model")
    model = BlockModel(tmp_path / "model")
    names = ["model.layers.1.input_layernorm.weight", "model.norm.weight"]
    norms = {name: torch.rand(HIDDEN, generator=torch.Generator().manual_seed(1)) + 0.5 for name in names}
    work = work_for(model, tmp_path / "work", norms)
    whole = load_dense(tmp_path / "model")
    apply_to_whole(whole, work, torch.float32)
    kinds = []

    def change(index, block):
        blocks.apply_work(index, block, work, torch.float32)
        kinds.append(sum(isinstance(module, DBFLinear) for module in block.modules()))

    blocks.apply_norms(model.norm, "model.norm.", work.final_norms())
    found = through(model, ids(2, LENGTH), change)[-1]
    assert kinds == [7, 7, 0]
    with torch.no_grad():
        assert found.equal(whole(ids(2, LENGTH)).logits)


def test_incomplete_and_unfitting_folders(tmp_path):
    save("llama-tied", tmp_path, max_shard_size="40KB")
    lost = BlockModel(tmp_path).files["model.layers.1.mlp.up_proj.weight"]
    data = lost.read_bytes()
    model = BlockModel(tmp_path)
    lost.write_bytes(data[:-10])
    with pytest.raises(DBFError, match="is damaged"):
        model.block(1)
    with pytest.raises(DBFError, match="is damaged"):
        BlockModel(tmp_path)
    lost.unlink()
    model = BlockModel(tmp_path)
    with pytest.raises(DBFError, match=r"no weight model\.layers\.1\.\S+: it is incomplete"):
        model.block(1)
    model.block(0)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 64}))
    with pytest.raises(DBFError, match=r"has shape \[96, 64\], by config.json it is \[64, 64\]"):
        BlockModel(tmp_path).block(0)
    config.write_text("{")
    with pytest.raises(DBFError, match="cannot be loaded as a model"):
        BlockModel(tmp_path)


# --- activations


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("budget", [0, 1 << 30], ids=["file", "memory"])
def test_activations_give_back_what_was_written(budget, dtype, tmp_path):
    values = torch.randn(5, 30, 700, generator=torch.Generator().manual_seed(0)).to(dtype)
    kept = Activations(*values.shape, dtype, tmp_path, budget)
    assert kept.in_memory == (budget > 0) and len(kept) == 5 and kept.bytes == values.nbytes
    kept.write(slice(0, 2), values[:2])
    kept.write(torch.tensor([4, 2]), values[[4, 2]].float())
    kept.write(3, values[3].requires_grad_())
    assert list(tmp_path.iterdir()) == []  # nothing that a killed process would leave behind
    assert kept.read(slice(0, 5)).equal(values) and kept.read(slice(0, 5)).dtype == dtype
    assert kept.read(torch.tensor([3, 0])).equal(values[[3, 0]])
    copy = kept.read(1)
    copy.zero_()
    assert kept.read(1).equal(values[1])


def test_the_budget_is_a_limit(tmp_path):
    assert Activations(2, 3, 4, torch.float16, tmp_path, 48).in_memory
    assert not Activations(2, 3, 4, torch.float16, tmp_path, 47).in_memory


def resident() -> int:
    with open("/proc/self/smaps_rollup") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("Rss:")) << 10


@pytest.mark.skipif(not hasattr(blocks.mmap, "MADV_DONTNEED"), reason="pages cannot be given back here")
def test_a_file_of_activations_does_not_fill_the_memory(tmp_path):
    window = torch.ones(1024, 1024)
    kept = Activations(64, 1024, 1024, torch.float32, tmp_path, 0)  # 256 MiB
    before = resident()
    for index in range(64):
        kept.write(index, window)
    for index in range(64):
        assert kept.read(index)[-1, -1] == 1
    assert resident() - before < 64 << 20


def test_a_full_disk_is_refused(tmp_path, monkeypatch):
    real = blocks.shutil.disk_usage

    def usage(path):
        return type(real(path))(1 << 30, 0, 100 << 20)

    monkeypatch.setattr(blocks.shutil, "disk_usage", usage)
    with pytest.raises(DBFError, match=r"too full: activations take 40 MiB, 100 MiB are free"):
        Activations(10, 1024, 1024, torch.float32, tmp_path, 0)
    assert Activations(10, 1024, 1024, torch.float32, tmp_path, 40 << 20).in_memory  # no disk is needed

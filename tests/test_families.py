"""Every supported architecture through the whole of `convert`: llama.cpp on the GGUF, PyTorch on the work folder.

Run alone: pytest tests/test_families.py

The models are tiny and random, but nothing in them is trivial: biases and norms are random and large, attention is far
from uniform. llama-perplexity writes the log-probabilities of whole vocabularies for the second half of each window;
with embeddings, head and KV cache in float32 they differ from PyTorch's by what the kernels' rounding of inputs
explains, mostly less than a thousandth.
"""

import copy
import itertools
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import activations
import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from click.testing import CliRunner

import dbf_gguf
from dbf_gguf import source
from dbf_gguf.checkpoint import WorkFolder
from dbf_gguf.cli import cli
from dbf_gguf.errors import DBFError
from dbf_gguf.gguf_file import GGUFFile
from dbf_gguf.gguf_writer import write_gguf
from dbf_gguf.model import DBFLinear, load_dense
from dbf_gguf.source import context_length
from dbf_gguf.verify import check_format, check_work

N_CTX = 64  # tokens in a window
WINDOWS = 3
TEXT = "the quick brown fox jumps over lazy dogs while seven wizards quietly brew magic potions "
COMMON = dict(
    vocab_size=288,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
}
# llama.cpp rounds a context up to a multiple of 256; beyond the original one it takes the other factors
LONG = dict(max_position_embeddings=512, original_max_position_embeddings=256)
FAMILIES = {
    "llama": ("Llama", dict(tie_word_embeddings=False, attention_bias=True, mlp_bias=True)),
    "llama-tied": ("Llama", dict(tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "mistral": ("Mistral", dict(tie_word_embeddings=False, head_dim=32, sliding_window=N_CTX)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2-yarn": ("Qwen2", dict(tie_word_embeddings=False, rope_parameters=YARN)),
    "qwen3": ("Qwen3", dict(tie_word_embeddings=False, head_dim=32)),
    "phi3": ("Phi3", dict(tie_word_embeddings=True, rope_parameters=LONGROPE) | LONG),
    "llama-joined": ("Llama", dict(tie_word_embeddings=False, attention_bias=True, mlp_bias=True)),
    "qwen3-joined": ("Qwen3", dict(tie_word_embeddings=False, head_dim=32)),
}
JOINED = {  # --join; phi3 has nothing that could be joined
    "phi3": "qkv,gate_up",
    "llama-joined": "qkv,gate_up",
    "qwen2-yarn": "qkv,gate_up",
    "qwen3-joined": "qkv,gate_up",
    "llama-tied": "qkv",
}
N_LINEARS = {"phi3": 4, "llama-joined": 4, "qwen2-yarn": 4, "qwen3-joined": 4, "llama-tied": 5}
TUNED = ("qwen2", "qwen3")
TUNE = ["--tune", "scales", "--tune-tokens", "10240"]
BOUND, BOUND_RMS_NATS = 1e-2, 2e-3  # nats; the RMS of all differences is 1.1e-3 at most
# Of differences in units of what rounding does at their position (`rounding_error`): the largest of the 26,784 of a
# model, and their RMS. Measured are 5.0 to 8.0 and 0.96 to 1.10.
BOUND_SINGLE, BOUND_RMS = 10, 1.25
FILES = "--embedding-type f32 --output-type f32"
OPTIONS = "--bits 3 --calib-sequences 4 --seq-len 64 --iterations 20 --threads 1 --device cpu --eval-windows 0"
OPTIONS += " --budget uniform"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A folder with a tiny SentencePiece tokenizer, which every architecture's converter reads."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([TEXT[i:] + TEXT[:i] for i in range(0, len(TEXT), 5)]),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=COMMON["vocab_size"],
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(np.random.default_rng(1).choice(TEXT.split(), size=12000)))
    return path


def make_model(family: str):
    """A random model of the family, float32; norms and biases as far from the identity as the weights."""
    kind, options = FAMILIES[family]
    torch.manual_seed(list(FAMILIES).index(family))
    config = getattr(transformers, f"{kind}Config")(**COMMON | options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith(".bias"):
                parameter.normal_()
    return model.eval()


def save(model, folder: Path, tokenizer: Path, max_shard_size: str) -> Path:
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    for path in tokenizer.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def convert(model: Path, output: Path, text: Path, *more: str) -> Path:
    """The work folder."""
    arguments = ["convert", model, "-o", output, "--calib", text, *OPTIONS.split(), *FILES.split(), *more]
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return output.with_name(f"{output.stem}-work")


def llama_cpp_log_probs(llama_bin: Path, model: Path, text: Path, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens [WINDOWS, N_CTX], log-probabilities [WINDOWS, N_CTX / 2 - 1, n_vocab]) of the windows' second halves.

    The file: "_logits_", n_ctx, n_vocab, n_chunk, the tokens; then, for each position, two float32 (step and least
    log-probability) and n_vocab 16-bit steps, padded to an even number.
    """
    logits = folder / "logits"
    options = f"-c {N_CTX} -b {N_CTX} --chunks {WINDOWS} -t 1 -fa off -ctk f32 -ctv f32 --no-warmup"
    command = [llama_bin / "llama-perplexity", "-m", model, "-f", text, "--save-all-logits", logits, *options.split()]
    command += ["--override-kv", "tokenizer.ggml.add_bos_token=bool:false"]
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    data = logits.read_bytes()
    assert data[:8] == b"_logits_"
    n_ctx, n_vocab, n_chunk = np.frombuffer(data, "<i4", 3, 8)
    assert (n_ctx, n_chunk) == (N_CTX, WINDOWS)
    tokens = np.frombuffer(data, "<i4", n_chunk * n_ctx, 20)
    rows = np.frombuffer(data, "<u2", -1, 20 + 4 * n_chunk * n_ctx).reshape(n_chunk * (n_ctx // 2 - 1), -1)
    step, least = np.ascontiguousarray(rows[:, :4]).view("<f4").T[:, :, None]
    log_probs = least + step * rows[:, 4 : 4 + n_vocab].astype(np.float32)
    tokens = torch.from_numpy(tokens.reshape(n_chunk, n_ctx).astype(np.int64))
    return tokens, torch.from_numpy(log_probs).view(n_chunk, -1, n_vocab)


@torch.no_grad()
def torch_log_probs(model, tokens: torch.Tensor) -> torch.Tensor:
    """What llama-perplexity writes, in PyTorch: positions N_CTX / 2 to N_CTX - 2, 16 nats below the best at least."""
    logits = model(tokens).logits[:, tokens.shape[1] // 2 : -1].float()
    log_probs = logits.log_softmax(-1)
    return log_probs.maximum(log_probs.amax(-1, keepdim=True) - 16)


def rounding_error(model, tokens: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """How far llama.cpp may be off at each position [windows, positions, 1], in nats: an RMS over the vocabulary.

    Its CPU kernels round the inputs of sign products. How much of that arrives at the logits differs by the position,
    up to fivefold: here it is measured with roundings of that size, but other ones, in PyTorch.
    """
    steps = [activations.SUM_OF_FOUR - 100 * draw for draw in range(6)]
    squares = torch.zeros(*exact.shape[:2], 1)
    for number in steps:
        with activations.rounded_products(model, activations.sums_of_four(number)):
            squares += (torch_log_probs(model, tokens) - exact).square().mean(-1, keepdim=True)
    return (squares / len(steps)).sqrt()


def agree(model, tokens: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether `theirs` are the log-probabilities of the model, but for roundings."""
    ours = torch_log_probs(model, tokens)
    difference = (ours - theirs).abs()
    ratio = difference / rounding_error(model, tokens, ours)
    rms, rms_nats = (x.square().mean().sqrt() for x in (ratio, difference))
    return bool(ratio.max() < BOUND_SINGLE and rms < BOUND_RMS and rms_nats < BOUND_RMS_NATS)


@pytest.fixture(scope="module", autouse=True)
def float32():
    """Every CPU factorizes and tunes in float32, so that all compare much the same models.

    By factors made in bfloat16 the random Mistral comes out such that two of 26,784 log-probabilities differ by 1.1e-2.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def compressed(request, tokenizer, text, tmp_path_factory, llama_bin, one_thread):
    """One family's random model, its file and work folder, and what llama.cpp makes of the file."""
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    made = SimpleNamespace(family=family, model=make_model(family), output=folder / "model.gguf")
    made.folder = save(made.model, folder / "model", tokenizer, "50KB")
    assert len(list(made.folder.glob("*.safetensors"))) > 2
    options = [*(TUNE if family in TUNED else ["--tune", "none"]), "--join", JOINED.get(family, "none")]
    made.work = convert(made.folder, made.output, text, *options)
    made.tokens, made.log_probs = llama_cpp_log_probs(llama_bin, made.output, text, folder)
    return made


def test_file_is_sound(compressed):
    """Also by the verifier, which works out names and the order of Q's and K's rows by itself."""
    work = WorkFolder.open(compressed.work)
    n_linears = N_LINEARS.get(compressed.family, 7)
    tuned_norms = {"qwen2": 5, "qwen3": 9}.get(compressed.family, 0)
    assert work.join == ("none" if compressed.family == "phi3" else JOINED.get(compressed.family, "none"))
    with GGUFFile(compressed.output) as file:
        assert check_format(file) == []
        assert check_work(file, work) == []
        assert len(file.linears()) == 2 * n_linears
        assert len(work.final_norms()) == tuned_norms
        assert ("output.weight" in file.tensors) is not compressed.model.config.tie_word_embeddings
        architecture = compressed.family.partition("-")[0].replace("mistral", "llama")
        assert file.get("general.architecture") == architecture
        context = {"mistral": N_CTX, "phi3": 256}.get(compressed.family, 128)
        assert file.get(f"{architecture}.context_length") == context == context_length(compressed.folder)


def test_llama_cpp_agrees_with_pytorch(compressed):
    model = dbf_gguf.load(compressed.work)
    assert compressed.log_probs.std() > 1  # no even distribution, which everything would agree with
    assert agree(model, compressed.tokens, compressed.log_probs)
    dense = torch_log_probs(compressed.model, compressed.tokens)
    assert (dense - compressed.log_probs).abs().mean() > 10 * BOUND  # it is the compressed model that was compared


def defects(model):
    """(name, the model with the defect): a kind of bias or norm left out, rows in another order, the wrong head."""
    half = model.model.layers[0].self_attn.head_dim // 2
    kinds = dict.fromkeys(".".join(name.split(".")[-2:]) for name, _ in model.named_parameters())
    for kind in kinds:
        if kind.endswith(".bias") or "norm" in kind:
            wrong = copy.deepcopy(model)
            for name, parameter in wrong.named_parameters():
                if name.endswith(f".{kind}"):
                    parameter.data.fill_(0 if kind.endswith(".bias") else 1)
            yield f"no {kind}", wrong
    for kind in ("q_proj", "k_proj", "qkv_proj"):
        wrong = copy.deepcopy(model)
        named = [module for name, module in wrong.named_modules() if name.endswith(f".{kind}")]
        linears = [module for module in named if isinstance(module, DBFLinear)]
        for linear in linears:
            halves = torch.arange(len(linear.scale_a)).view(-1, 2, half)
            order = halves.transpose(1, 2).flatten()  # interleaved
            linear.signs_a, linear.scale_a.data = linear.signs_a[order], linear.scale_a[order]
            if linear.bias is not None:
                linear.bias.data = linear.bias[order]
        if linears:
            yield f"rows of {kind}", wrong
    if not model.config.tie_word_embeddings:
        wrong = copy.deepcopy(model)
        wrong.lm_head.weight = wrong.model.embed_tokens.weight
        yield "tied head", wrong


def test_defects_would_be_seen(compressed):
    """What the comparison can tell: with any of these in PyTorch, llama.cpp would be far off."""
    found = {}
    for name, wrong in defects(dbf_gguf.load(compressed.work)):
        found[name] = (torch_log_probs(wrong, compressed.tokens) - compressed.log_probs).abs().max().item()
    assert len(found) >= 4
    assert {name: change for name, change in found.items() if change < 20 * BOUND} == {}


@pytest.mark.parametrize("compressed", ["llama-tied"], indirect=True)
def test_one_file_or_shards(compressed, tokenizer, text, tmp_path):
    """The same metadata and tensors; their order is that of the safetensors files."""
    folder = save(compressed.model, tmp_path / "model", tokenizer, "1GB")
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]
    convert(folder, tmp_path / "model.gguf", text, "--tune", "none", "--join", JOINED[compressed.family])
    with GGUFFile(tmp_path / "model.gguf") as one, GGUFFile(compressed.output) as shards:
        assert {key: one.get(key) for key in one.metadata} == {key: shards.get(key) for key in shards.metadata}
        tensors = [{name: file.raw(name).tobytes() for name in file.tensors} for file in (one, shards)]
        assert tensors[0] == tensors[1]


# --- from GGUF


def write_tokenizer(path: Path) -> Path:
    """A GGUF file with nothing but a byte-level BPE tokenizer of COMMON's vocabulary."""
    pairs = {pair for word in TEXT.split() for pair in itertools.pairwise(word)}
    merges = sorted(pairs)[: COMMON["vocab_size"] - 3 - 256]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "<bos>", "<eos>", *alphabet, *map("".join, merges)]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("family", "join"), [("mistral", "qkv,gate_up"), ("qwen2", "none"), ("qwen3", "none")])
def test_from_gguf(family, join, tokenizer, text, tmp_path, patched_tree, llama_bin, one_thread, monkeypatch):
    """A GGUF made by llama.cpp's converter, compressed: its folder is the model, and again llama.cpp agrees."""
    model = make_model(family)
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    folder = save(model, tmp_path / "hf", tokenizer, "1GB")
    dense, output = tmp_path / "dense.gguf", tmp_path / "model.gguf"
    options = dict(embedding_type="f16", output_type="f16", llama_cpp=patched_tree)
    write_gguf(dense, folder, work=None, tokenizer_gguf=write_tokenizer(tmp_path / "tokenizer.gguf"), **options)
    monkeypatch.setattr(source, "cache_dir", lambda: tmp_path)
    work = convert(dense, output, text, "--tune", "none", "--join", join)
    tokens, theirs = llama_cpp_log_probs(llama_bin, output, text, tmp_path)
    read = load_dense(source.resolve(str(dense)).folder)
    assert (torch_log_probs(read, tokens) - torch_log_probs(model, tokens)).abs().max() < BOUND
    assert agree(dbf_gguf.load(work), tokens, theirs)


# --- refused by name


def config_of(kind: str, **changes) -> dict:
    config = getattr(transformers, f"{kind}Config")(**COMMON).to_dict()
    return config | {"architectures": [f"{kind}ForCausalLM"]} | changes


def write_config(folder: Path, config: dict | None, *files: str) -> Path:
    """A folder that is whole as far as file names tell."""
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", *files):
        (folder / name).write_text("{}")
    return folder


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("Mixtral", {}, " is a mixture of experts (mixtral), which is not supported"),
        ("Qwen3Moe", {}, " is a mixture of experts (qwen3_moe)"),
        ("DeepseekV3", {}, " is a mixture of experts (deepseek_v3)"),
        ("Gemma3Text", {}, ": architecture gemma3_text is not supported (supported: llama, "),
        ("GPT2", {}, ": architecture gpt2 is not supported"),
        ("Mamba", {}, ": architecture mamba is not supported"),
        ("Granite", {}, ": architecture granite is not supported"),
        ("Llama", {"model_type": "llava"}, ": architecture llava is not supported"),
        ("Llama", {"model_type": "mistral3"}, ": architecture mistral3 is not supported"),
        ("Qwen2", {"model_type": "qwen2_5_vl"}, ": architecture qwen2_5_vl is not supported"),
        ("Llama", {"quantization_config": {"quant_method": "awq"}}, " is already quantized (awq)"),
        ("Llama", {"quantization": {"bits": 4}}, " is already quantized (unknown method)"),
        ("Qwen2", {"architectures": ["Qwen2ForRewardModel"]}, ": Qwen2ForRewardModel of qwen2 is not supported"),
        ("Mistral", {"architectures": ["MistralModel"]}, ": MistralModel of mistral is not supported"),
        ("Llama", {"architectures": None}, ": no class of llama is not supported"),
        ("Llama", {"hidden_act": "gelu"}, ": activation gelu is not supported in llama"),
        ("Qwen3", {"attention_bias": True}, ": qwen3 with attention_bias is not supported"),
        ("Llama", {"rope_parameters": DYNAMIC}, ": rotary scaling dynamic is not supported in llama (supported: "),
        ("Qwen2", {"rope_parameters": YARN | {"beta_slow": 2.0}}, ": yarn with beta_slow 2.0 is not supported"),
        ("Qwen3", {"rope_parameters": YARN | {"attention_factor": 1.3}}, ": yarn with attention_factor 1.3 is not"),
        ("Qwen2", {"rope_parameters": LLAMA3}, ": rotary scaling llama3 is not supported in qwen2"),
        ("Mistral", {"rope_parameters": None, "rope_scaling": {"type": "longrope"}}, ": rotary scaling longrope"),
    ],
)  # fmt: skip
def test_refused_config(tmp_path, kind, changes, message):
    folder = write_config(tmp_path / "m", config_of(kind, **changes), "model.safetensors")
    with pytest.raises(DBFError) as error:
        source.resolve(str(folder))
    assert str(error.value).startswith(f"{folder}{message}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        (None, ["adapter_config.json", "adapter_model.safetensors"], "is an adapter (adapter_config.json), no whole"),
        ({}, ["adapter_config.json", "model.safetensors"], "is an adapter (adapter_config.json), no whole model"),
        ({}, ["model.safetensors", "quantize_config.json"], "is already quantized (quantize_config.json)"),
        ({}, ["model-1-of-2.safetensors", "model-2-of-2.safetensors"], "is incomplete: it has neither model.safetens"),
    ],
)
def test_refused_folder(tmp_path, config, files, message):
    folder = write_config(tmp_path / "m", config if config is None else config_of("Llama"), *files)
    with pytest.raises(DBFError) as error:
        source.resolve(str(folder))
    assert str(error.value).startswith(f"{folder} {message}")


def test_phi3_from_gguf_is_refused(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "p.gguf"), "phi3")
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(DBFError, match=r"p.gguf: architecture phi3 is not supported \(supported: llama, .*give"):
        source.resolve(str(tmp_path / "p.gguf"))


@pytest.mark.parametrize(
    ("kind", "changes", "length"),
    [
        ("Llama", {"sliding_window": 32}, 128),  # none of its layers has one
        ("Mistral", {"sliding_window": 32}, 32),
        ("Mistral", {"sliding_window": None}, 128),
        ("Qwen2", {"sliding_window": 32}, 128),  # named, but not used
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1, "layer_types": None}, 32),
        ("Qwen3", {"use_sliding_window": True, "sliding_window": 32, "layer_types": ["full_attention"] * 2}, 128),
        ("Phi3", {"sliding_window": 100}, 100),
    ],
)
def test_context_ends_with_the_sliding_window(tmp_path, kind, changes, length):
    folder = write_config(tmp_path / "m", config_of(kind, **changes))
    assert context_length(folder) == length

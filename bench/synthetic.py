"""Models of a real model's shape, with random weights, for timing: no download, no compression.

    python bench/synthetic.py llama2-7b --bits 1.5 -o llama2-7b-1.5.gguf
    python bench/synthetic.py llama3-8b --type IQ2_XXS -o llama3-8b-iq2_xxs.gguf
    python bench/synthetic.py path/to/config.json --bits 2 --layers 2 -o small.gguf

How fast a model runs depends on shapes and types, not on what the weights are. So this writes a GGUF file whose
linears are DBF factors of the widths that `convert --budget uniform` gives them, or some type of llama.cpp for
comparison, filled with random bits. The scales are such that activations keep their size from layer to layer: nothing
overflows, and the logits of two programs that run the file can be compared. Every bit pattern is a valid weight in
nearly all of these types, hence a block is random bytes (BYTES) with a scale at the right place (BLOCKS). The
tokenizer is of SentencePiece's kind and knows single characters and pairs of letters, enough for any text to be read.

The file is written front to back from one pool of random blocks, so memory does not grow with the model.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import string
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dbf_gguf import __version__
from dbf_gguf.budget import bits_per_weight, uniform_budget
from dbf_gguf.errors import DBFError
from dbf_gguf.gguf_file import ARRAY, F32, FORMAT_VERSION, STRING, TENSOR_TYPES, TYPE_IDS, U32

ALIGNMENT = 32
POOL = 1 << 24  # random bytes that the tensors of a type are cut from
LOGITS = 2.0  # their standard deviation: a distribution with a few likely tokens
I32 = 5
BYTES_AT = 3  # the first token behind <unk>, <s> and </s>

# What a block of random bytes needs to be a sane weight: where its F16 scales lie, in bytes, each with the factor that
# it is of the block's main scale; and the standard deviation of the weights where the main scale is 1.
BLOCKS = {
    "Q8_0": ({0: 1.0}, 74.0),
    "Q4_0": ({0: 1.0}, 4.6),
    "Q6_K": ({208: 1.0}, 1370.0),
    "Q2_K": ({80: 1.0, 82: 1.5}, 13.9),  # a minimum of 1.5 scales puts the mean at zero
    "IQ2_XXS": ({0: 1.0}, 53.4),
    "IQ1_S": ({0: 1.0}, 7.4),
    "Q1_0": ({0: 1.0}, 1.0),
    "TQ1_0": ({52: 1.0}, math.sqrt(2 / 3)),
    "TQ2_0": ({64: 1.0}, math.sqrt(2 / 3)),
}
# The bytes that may occur where not all may: a weight of TQ2_0 is one of three, in two bits
BYTES = {"TQ2_0": np.array([x for x in range(256) if all(x >> at & 3 != 3 for at in (0, 2, 4, 6))], np.uint8)}
TYPES = ("DBF", "F16", *BLOCKS)


@dataclass(frozen=True)
class Shape:
    """Of a model of the Llama kind."""

    name: str
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_layer: int
    n_vocab: int
    n_ctx: int = 4096
    rope_theta: float = 10000.0
    rms_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def table_type(self) -> str:
        """Of the embeddings and the output head, where none is named."""
        return "Q8_0" if self.n_embd % TENSOR_TYPES[TYPE_IDS["Q6_K"]][1] else "Q6_K"

    def linears(self, join: bool = False) -> dict[str, tuple[int, int]]:
        """Of one block: name -> (n_out, n_in), in the order in which `convert` goes through them.

        join  those that read the same input are one linear, as convert makes them
        """
        n_kv = self.n_head_kv * self.head_dim
        if join:
            return {
                "attn_qkv": (self.n_embd + 2 * n_kv, self.n_embd),
                "attn_output": (self.n_embd, self.n_embd),
                "ffn_gate_up": (2 * self.n_ff, self.n_embd),
                "ffn_down": (self.n_embd, self.n_ff),
            }
        return {
            "attn_q": (self.n_embd, self.n_embd),
            "attn_k": (n_kv, self.n_embd),
            "attn_v": (n_kv, self.n_embd),
            "attn_output": (self.n_embd, self.n_embd),
            "ffn_gate": (self.n_ff, self.n_embd),
            "ffn_up": (self.n_ff, self.n_embd),
            "ffn_down": (self.n_embd, self.n_ff),
        }

    def all_linears(self, join: bool = False) -> dict[str, tuple[int, int]]:
        return {f"blk.{i}.{name}": shape for i in range(self.n_layer) for name, shape in self.linears(join).items()}


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama2-7b", 4096, 11008, 32, 32, 32, 32000),
        Shape("llama2-13b", 5120, 13824, 40, 40, 40, 32000),
        Shape("llama2-70b", 8192, 28672, 64, 8, 80, 32000),
        Shape("llama3-8b", 4096, 14336, 32, 8, 32, 128256, 8192, 500000.0),
        Shape("mistral-7b", 4096, 14336, 32, 8, 32, 32768, 4096, 1000000.0),
        Shape("tinyllama-1.1b", 2048, 5632, 32, 4, 22, 32000, 2048),
        Shape("smollm2-135m", 576, 1536, 9, 3, 30, 49152, 8192, 100000.0),
    )
}


def find_shape(model: str) -> Shape:
    """A shape by its name, or that of a local config.json (or of the folder that holds one)."""
    if model in SHAPES:
        return SHAPES[model]
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise DBFError(f"no shape and no file {model}: give one of {', '.join(SHAPES)}, or a config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config["model_type"] not in ("llama", "mistral"):
            raise DBFError(f"{path} is of a {config['model_type']}: only a llama's or mistral's shape can be written")
        keys = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        sizes = [config[key] for key in (*keys, "num_hidden_layers", "vocab_size")]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"sizes {sizes}")
        shape = Shape(
            path.resolve().parent.name,
            *sizes,
            config.get("max_position_embeddings", 4096),
            config.get("rope_theta") or 10000.0,
            config.get("rms_norm_eps", 1e-5),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DBFError(f"{path} is no config.json of a Llama model ({error!r})") from None
    if config.get("head_dim", shape.head_dim) != shape.head_dim:
        raise DBFError(f"{path}: heads that are not {shape.head_dim} wide (hidden_size / heads) are not supported")
    return shape


def tokens(n_vocab: int) -> list[tuple[bytes, float, int]]:
    """(text, score, type) of every token: special ones, bytes, characters, pairs of letters, and words to fill up."""
    space = "\u2581"
    letters = string.ascii_lowercase
    pieces = [space, *string.ascii_letters, *string.digits, *string.punctuation]
    pieces += [a + b for a in (space, *letters) for b in letters]
    pieces = pieces[: n_vocab - 256 - BYTES_AT]
    if n_vocab < 256 + BYTES_AT:
        raise DBFError(f"a vocabulary of {n_vocab} is too small: the tokenizer needs {256 + BYTES_AT}")
    pieces += [f"{space}word{i}" for i in range(n_vocab - 256 - BYTES_AT - len(pieces))]
    unknown, control, byte, normal = 2, 3, 6, 1
    result = [(b"<unk>", 0.0, unknown), (b"<s>", 0.0, control), (b"</s>", 0.0, control)]
    result += [(f"<0x{i:02X}>".encode(), 0.0, byte) for i in range(256)]
    return result + [(piece.encode(), -float(i), normal) for i, piece in enumerate(pieces)]


# --- tensors


@dataclass(frozen=True)
class Plan:
    """A tensor to be written. `size` is the standard deviation of its values, `spread` that of a scale's logarithm."""

    name: str
    type: str
    ne: tuple[int, ...]  # fastest dimension first
    size: float
    spread: float = 0.0

    @property
    def nbytes(self) -> int:
        _, block, block_bytes = TENSOR_TYPES[TYPE_IDS[self.type]]
        return math.prod(self.ne) // block * block_bytes


def plans(
    shape: Shape,
    kind: str,
    bits: float | None = None,
    *,
    join: bool = False,
    embedding_type: str | None = None,
    output_type: str | None = None,
) -> list[Plan]:
    """All tensors of a model in the order of the file; `write` says what the arguments are."""
    n_embd = shape.n_embd
    join = join and kind == "DBF"
    embedding_type, output_type = embedding_type or shape.table_type, output_type or shape.table_type
    result = [Plan("token_embd.weight", embedding_type, (n_embd, shape.n_vocab), 1.0)]
    result.append(Plan("output_norm.weight", "F32", (n_embd,), 1.0))
    result.append(Plan("output.weight", output_type, (n_embd, shape.n_vocab), LOGITS / math.sqrt(n_embd)))
    ks = uniform_budget(shape.all_linears(join), bits) if kind == "DBF" else {}
    for i in range(shape.n_layer):
        for name in ("attn_norm", "ffn_norm"):
            result.append(Plan(f"blk.{i}.{name}.weight", "F32", (n_embd,), 1.0))
        for name, (n_out, n_in) in shape.linears(join).items():
            base = f"blk.{i}.{name}"
            if kind != "DBF":
                result.append(Plan(f"{base}.weight", kind, (n_in, n_out), 1 / math.sqrt(n_in)))
                continue
            k = ks[base]
            result += [
                Plan(f"{base}.dbf_b", "DBF", (n_in, k), 1.0),
                Plan(f"{base}.dbf_a", "DBF", (k, n_out), 1.0),
                Plan(f"{base}.dbf_sb", "F16", (n_in,), 1.0, 0.3),
                Plan(f"{base}.dbf_sm", "F16", (k,), 1 / math.sqrt(n_in), 0.3),
                Plan(f"{base}.dbf_sa", "F16", (n_out,), 1 / math.sqrt(k), 0.3),
            ]
    for plan in result:
        block = TENSOR_TYPES[TYPE_IDS[plan.type]][1]
        if plan.ne[0] % block:
            raise DBFError(f"{plan.name} has rows of {plan.ne[0]}, no multiple of {block}: {plan.type} cannot hold it")
    return result


class Pools:
    """Random tensors, cut from one pool for each type and size: as random as timing needs, and fast to make."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.pools: dict[tuple[str, float], np.ndarray] = {}

    def _pool(self, kind: str, size: float) -> np.ndarray:
        """uint8 [blocks, bytes of a block]"""
        if kind in ("F16", "F32"):
            dtype = {"F16": np.float16, "F32": np.float32}[kind]
            values = self.rng.standard_normal(POOL // 8, dtype=np.float32) * np.float32(size)
            return values.astype(dtype).view(np.uint8).reshape(len(values), -1)
        block_bytes = TENSOR_TYPES[TYPE_IDS[kind]][2]
        allowed = BYTES.get(kind, np.arange(256, dtype=np.uint8))
        pool = allowed[self.rng.integers(0, len(allowed), (POOL // block_bytes, block_bytes), np.uint8)]
        scales, deviation = BLOCKS.get(kind, ({}, 1.0))
        for at, factor in scales.items():
            scale = np.float16(factor * size / deviation)
            pool[:, at : at + 2] = np.frombuffer(scale.tobytes(), np.uint8)
        return pool

    def blocks(self, plan: Plan) -> Iterator[np.ndarray]:
        """The bytes of a tensor, in pieces."""
        if len(plan.ne) == 1:  # a norm, or a vector of scales, which are positive
            values = plan.size * np.exp(plan.spread * self.rng.standard_normal(plan.ne[0]))
            yield values.astype({"F16": "<f2", "F32": "<f4"}[plan.type]).view(np.uint8)
            return
        key = (plan.type, plan.size)
        if key not in self.pools:
            self.pools = {k: pool for k, pool in self.pools.items() if k[0] == "DBF"} | {key: self._pool(*key)}
        pool = self.pools[key]
        left = plan.nbytes // pool.shape[1]
        while left:
            start = int(self.rng.integers(len(pool) // 2))
            piece = pool[start : start + left]
            yield piece
            left -= len(piece)


# --- the file


def _string(text: bytes | str) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def _value(kind: int, value) -> bytes:
    if kind == STRING:
        return struct.pack("<I", kind) + _string(value)
    return struct.pack("<I" + {U32: "I", F32: "f"}[kind], kind, value)


def _array(item: int, values: list) -> bytes:
    head = struct.pack("<IIQ", ARRAY, item, len(values))
    if item == STRING:
        return head + b"".join(map(_string, values))
    return head + np.array(values, {F32: "<f4", I32: "<i4"}[item]).tobytes()


def metadata(shape: Shape, kind: str, bits: float | None, join: bool) -> dict[str, bytes]:
    vocabulary = tokens(shape.n_vocab)
    numbers = {
        "context_length": shape.n_ctx,
        "embedding_length": shape.n_embd,
        "block_count": shape.n_layer,
        "feed_forward_length": shape.n_ff,
        "attention.head_count": shape.n_head,
        "attention.head_count_kv": shape.n_head_kv,
        "rope.dimension_count": shape.head_dim,
        "vocab_size": shape.n_vocab,
    }
    result = {
        "general.architecture": _value(STRING, "llama"),
        "general.name": _value(STRING, f"synthetic {shape.name} {kind}"),
        **{f"llama.{key}": _value(U32, value) for key, value in numbers.items()},
        "llama.attention.layer_norm_rms_epsilon": _value(F32, shape.rms_eps),
        "llama.rope.freq_base": _value(F32, shape.rope_theta),
        "tokenizer.ggml.model": _value(STRING, "llama"),
        "tokenizer.ggml.tokens": _array(STRING, [text for text, _, _ in vocabulary]),
        "tokenizer.ggml.scores": _array(F32, [score for _, score, _ in vocabulary]),
        "tokenizer.ggml.token_type": _array(I32, [kind for _, _, kind in vocabulary]),
    }
    if kind == "DBF":
        shapes = shape.all_linears(join)
        achieved = bits_per_weight(shapes, uniform_budget(shapes, bits))
        result |= {
            "dbf.version": _value(U32, FORMAT_VERSION),
            "dbf.bits_per_weight": _value(F32, achieved),
            "dbf.tensor_count": _value(U32, len(shapes)),
            "dbf.tool_version": _value(STRING, __version__),
            "dbf.source": _value(STRING, f"random weights of the shape of {shape.name}"),
            "dbf.settings": _value(STRING, json.dumps({"bits": bits, "budget": "uniform"})),
        }
    return result


def _pad(file: BinaryIO, size: int) -> None:
    file.write(bytes(-size % ALIGNMENT))


def write(
    path: Path,
    shape: Shape,
    kind: str,
    bits: float | None = None,
    *,
    join: bool = False,
    embedding_type: str | None = None,
    output_type: str | None = None,
    seed: int = 0,
) -> int:
    """Writes a model whose linears are of type `kind`, DBF with `bits` a weight; returns the bytes of the file.

    join  DBF linears that read the same input share their factors
    embedding_type, output_type  None: the shape's `table_type`

    The file has its name when it is complete. Raises DBFError when a type does not fit the shape or the disk is full.
    """
    others = {"embedding_type": embedding_type, "output_type": output_type}
    everything = plans(shape, kind, bits, join=join, **others)
    entries = metadata(shape, kind, bits, join)
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(everything), len(entries))
    head += b"".join(_string(key) + value for key, value in entries.items())
    offset = 0
    for plan in everything:
        head += _string(plan.name) + struct.pack("<I", len(plan.ne)) + struct.pack(f"<{len(plan.ne)}Q", *plan.ne)
        head += struct.pack("<IQ", TYPE_IDS[plan.type], offset)
        offset += plan.nbytes + -plan.nbytes % ALIGNMENT
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if len(head) + offset > free:
            raise DBFError(f"{path} needs {(len(head) + offset) / 1e9:.1f} GB, {free / 1e9:.1f} are free")
        pools = Pools(seed)
        with open(part, "wb") as file:
            file.write(head)
            _pad(file, len(head))
            for plan in everything:
                for piece in pools.blocks(plan):
                    file.write(piece)
                _pad(file, plan.nbytes)
        os.replace(part, path)
    except OSError as error:
        raise DBFError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return path.stat().st_size


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python bench/synthetic.py llama2-7b --bits 1.5 -o llama2-7b-1.5.gguf",
    )
    parser.add_argument("model", help=f"{', '.join(SHAPES)}, or a config.json")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the GGUF file")
    parser.add_argument("--type", type=str.upper, choices=TYPES, default="DBF", help="of the linears (default: DBF)")
    parser.add_argument("--bits", type=float, default=2.0, help="of DBF, a weight (default: %(default)s)")
    parser.add_argument(
        "--join",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="of DBF: those that read the same input as one linear, as convert makes them (default: yes)",
    )
    parser.add_argument("--layers", type=int, help="blocks (default: all)")
    others = [name for name in TYPES if name != "DBF"]
    for part in ("embedding", "output"):
        about = "default: Q6_K, or Q8_0 where rows do not fit it"
        parser.add_argument(f"--{part}-type", type=str.upper, choices=others, help=about)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    try:
        shape = find_shape(arguments.model)
        if arguments.layers is not None:
            if arguments.layers < 1:
                raise DBFError(f"a model of {arguments.layers} layers cannot be written")
            shape = replace(shape, n_layer=arguments.layers)
        types = {"embedding_type": arguments.embedding_type, "output_type": arguments.output_type}
        types |= {"join": arguments.join, "seed": arguments.seed}
        size = write(arguments.output, shape, arguments.type, arguments.bits, **types)
    except DBFError as error:
        print(f"bench/synthetic.py: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.output}: {size / 1e6:,.0f} MB, {shape.n_layer} layers")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

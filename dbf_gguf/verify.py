"""Checks a DBF GGUF against the rules of the format, and against the work folder it was made from.

The rules (docs of the format, version 1). The first is the reader's (`gguf_file`): a file that breaks it cannot be
looked at further. All violations of the others are collected.

 1. the file is sound GGUF 3: known types, rows of whole blocks, every tensor's bytes inside the file
 2. `dbf.version` is u32 and 1; `dbf.tensor_count` (u32) counts the linears; `dbf.bits_per_weight` (f32) is what they
    take, scales included; `dbf.tool_version`, `dbf.source`, `dbf.settings` are strings, the last one JSON
 3. each linear has all five of dbf_a, dbf_b, dbf_sa, dbf_sm, dbf_sb, and no dense `<base>.weight` beside them; a joint
    one (`attn_qkv`, `ffn_gate_up`) has none of its parts beside it either
 4. dbf_a and dbf_b are matrices of type DBF, the scales vectors of type F16 or F32; type DBF is used for nothing else
 5. the shapes chain: dbf_b [n_in, k], dbf_a [k, n_out], dbf_sb [n_in], dbf_sm [k], dbf_sa [n_out]; n_in and k are
    multiples of 32
 6. every scale is finite

With the work folder: the same linears, signs and scales equal bit for bit, tuned norms equal. Names and the rotary
permutation of Q and K are worked out here from the file's metadata, independently of the converter that wrote it.
"""

import json

import numpy as np

from .checkpoint import WorkFolder
from .errors import DBFError
from .factors import BLOCK
from .gguf_file import BOOL, DBF_TYPE, F32, FORMAT_VERSION, PARTS, SCALES, SIGNS, STRING, TYPE_IDS, U32, GGUFFile
from .join import JOINS, joint_base

# Architectures whose converter interleaves the two rotary halves of each head of Q and K; a Mistral's file is a llama's
ROTARY_INTERLEAVED = ("llama", "granite")
VALUE_TYPES = {U32: "u32", F32: "f32", STRING: "string", BOOL: "bool"}


def bits_per_weight(file: GGUFFile) -> float:
    """What the complete DBF linears take per weight they stand for, scales included; 0 when there are none."""
    stored = weights = 0
    for parts in file.linears().values():
        if set(parts) == set(PARTS):
            stored += 8 * sum(part.nbytes for part in parts.values())
            weights += parts["dbf_b"].ne[0] * parts["dbf_a"].ne[-1]
    return stored / weights if weights else 0.0


def check_format(file: GGUFFile) -> list[str]:
    """All violations of rules 2 to 6, each naming tensor or key and reason; an empty list for a sound file."""
    linears = file.linears()
    found = _check_metadata(file, len(linears))
    for base, parts in linears.items():
        found += _check_linear(file, base, parts)
    for tensor in file.tensors.values():
        if tensor.type == DBF_TYPE and tensor.name.rpartition(".")[2] not in PARTS:
            found.append(f"{tensor.name}: of type DBF, but not a part of a linear")
    return found


def _check_metadata(file: GGUFFile, n_linears: int) -> list[str]:
    found = []

    def value(key: str, kind: int):
        stored = file.metadata.get(key)
        if stored is None:
            found.append(f"{key}: missing")
        elif stored.type != kind:
            found.append(f"{key}: not of type {VALUE_TYPES[kind]}")
        else:
            return stored.decoded()
        return None

    version = value("dbf.version", U32)
    if version not in (None, FORMAT_VERSION):
        found.append(f"dbf.version: {version}, only {FORMAT_VERSION} is known")
    count = value("dbf.tensor_count", U32)
    if count not in (None, n_linears):
        found.append(f"dbf.tensor_count: {count}, the file has {n_linears} linears")
    if n_linears == 0:
        found.append("the file has no DBF linear")
    bits = value("dbf.bits_per_weight", F32)
    if bits is not None and n_linears and not abs(bits - bits_per_weight(file)) <= 1e-5 * bits_per_weight(file):
        found.append(f"dbf.bits_per_weight: {bits:.6f}, the linears take {bits_per_weight(file):.6f}")
    value("dbf.tool_version", STRING)
    value("dbf.source", STRING)
    settings = value("dbf.settings", STRING)
    if settings is not None:
        try:
            json.loads(settings)
        except ValueError:
            found.append("dbf.settings: not JSON")
    return found


def _check_linear(file: GGUFFile, base: str, parts: dict) -> list[str]:
    found = [f"{base}.{part}: missing" for part in PARTS if part not in parts]
    if f"{base}.weight" in file.tensors:
        found.append(f"{base}.weight: a dense weight beside its factors")
    block, _, kind = base.rpartition(".")
    for join in JOINS.values():
        for part in (f"{block}.{other}" for other in join.bases if kind == join.base):
            if f"{part}.weight" in file.tensors or part in file.linears():
                found.append(f"{base}: {part}, whose rows are in it, is in the file too")
    for name in SIGNS:
        if name in parts and (parts[name].type != DBF_TYPE or len(parts[name].ne) != 2):
            found.append(f"{base}.{name}: {parts[name].type_name} {list(parts[name].ne)}, must be a DBF matrix")
    for name in SCALES:
        if name in parts and (parts[name].type_name not in ("F16", "F32") or len(parts[name].ne) != 1):
            found.append(f"{base}.{name}: {parts[name].type_name} {list(parts[name].ne)}, must be a F16 or F32 vector")
        elif name in parts:
            wrong = np.flatnonzero(~np.isfinite(file.floats(f"{base}.{name}")))
            if len(wrong):
                found.append(f"{base}.{name}: {len(wrong)} values are not finite, the first at {wrong[0]}")
    if found:
        return found  # shapes are compared only between parts that are what they should be

    (n_in, k), n_out = parts["dbf_b"].ne, parts["dbf_a"].ne[1]
    expected = {"dbf_a": (k, n_out), "dbf_sb": (n_in,), "dbf_sm": (k,), "dbf_sa": (n_out,)}
    for name, ne in expected.items():
        if parts[name].ne != ne:
            found.append(f"{base}.{name}: shape {list(parts[name].ne)}, does not chain, expected {list(ne)}")
    found += [f"{base}: {what} = {n} is no multiple of {BLOCK}" for what, n in (("n_in", n_in), ("k", k)) if n % BLOCK]
    return found


def check_work(file: GGUFFile, work: WorkFolder) -> list[str]:
    """Every difference between the file and the work folder: linears, signs, scales (bit for bit), tuned norms.

    Call it on a file that `check_format` finds sound. Raises DBFError when the file's architecture is unknown.
    """
    names = _gguf_names(file)
    linears = file.linears()
    found, expected = [], set()
    for name in work.linears():
        base = joint_base(name, work.join) or names(name)
        if base not in linears:
            found.append(f"{base or name}: in the work folder, but not in the file")
            continue
        expected.add(base)
        found += _compare_linear(file, base, work, name)
    found += [f"{base}: in the file, but not in the work folder" for base in linears if base not in expected]
    for name, norm in work.final_norms().items():
        tensor = f"{names(name.removesuffix('.weight'))}.weight"
        if tensor not in file.tensors:
            found.append(f"{tensor}: a tuned norm of the work folder, but not in the file")
        elif file.tensors[tensor].type != TYPE_IDS["F32"] or not _same_bits(file.floats(tensor), norm.float().numpy()):
            found.append(f"{tensor}: differs from the work folder's {name}")
    return found


def _compare_linear(file: GGUFFile, base: str, work: WorkFolder, name: str) -> list[str]:
    try:
        signs = dict(zip(SIGNS, work.packed_signs(name), strict=True))
        scales = work.scales(name)
    except Exception as error:  # of Python or of the safetensors library: a missing or broken file
        raise DBFError(f"{work.path}: linear {name} cannot be read: {str(error).splitlines()[0]}") from None
    stored = {part: scales["scale_" + part[-1]].numpy() for part in SCALES} | signs
    order = rotary_rows(file, base)
    found = []
    for part in PARTS:
        theirs = stored[part]
        if order is not None and part in ("dbf_a", "dbf_sa") and len(theirs) == len(order):
            theirs = theirs[order]
        tensor = f"{base}.{part}"
        ours = file.packed_signs(tensor) if part in SIGNS else file.floats(tensor)
        if not _same_bits(ours, theirs):
            found.append(f"{tensor}: differs from the work folder's {name}")
    return found


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a.view(np.uint8), b.view(np.uint8))


def rotary_rows(file: GGUFFile, base: str) -> np.ndarray | None:
    """The model's row for each row of the file, int `[n_out]`; None where the rows are not permuted.

    A head of the model holds its rotary pairs as two halves (x0 x1 … y0 y1 …), a head of the file interleaved
    (x0 y0 x1 y1 …).
    """
    architecture = file.get("general.architecture")
    kind = base.rpartition(".")[2]
    if architecture not in ROTARY_INTERLEAVED or kind not in ("attn_q", "attn_k", "attn_qkv"):
        return None
    n_q = file.get(f"{architecture}.attention.head_count")
    n_kv = file.get(f"{architecture}.attention.head_count_kv", n_q)
    n_out = file.tensors[f"{base}.dbf_a"].ne[1]
    q, k, v = {"attn_q": (1, 0, 0), "attn_k": (0, 1, 0), "attn_qkv": (1, 1, 1)}[kind]
    known = isinstance(n_q, int) and isinstance(n_kv, int)
    turned = q * n_q + k * n_kv if known else None  # heads
    n_heads = turned + v * n_kv if known else None
    if not known or n_heads < 1 or n_out % (2 * n_heads):
        raise DBFError(f"{file.path}: {base} has {n_out} rows, which {n_heads} heads do not divide")
    half = n_out // n_heads // 2
    head, pair, which = np.meshgrid(np.arange(turned), np.arange(half), np.arange(2), indexing="ij")
    return np.concatenate([(head * 2 * half + which * half + pair).reshape(-1), np.arange(turned * 2 * half, n_out)])


def _gguf_names(file: GGUFFile):
    """A function from a Hugging Face module name to its GGUF base name, None when there is none."""
    import gguf

    architecture = file.get("general.architecture")
    ids = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    n_blocks = file.get(f"{architecture}.block_count")
    if architecture not in ids or not isinstance(n_blocks, int):
        raise DBFError(f"{file.path}: architecture {architecture} is unknown to the gguf package, cannot compare names")
    return gguf.get_tensor_name_map(ids[architecture], n_blocks).get_name

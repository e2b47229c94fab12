"""A small, strict reader for GGUF version 3, which knows the DBF tensor type.

Stock gguf-py raises ValueError for a tensor type it does not know, so our own files need a reader of their own. A GGUF
file is, in this order and all little-endian:

    magic "GGUF" | u32 version = 3 | u64 number of tensors | u64 number of key-values
    each key-value:  string key | u32 value type | value
                     (a string is u64 length + bytes, an array u32 item type + u64 count + items)
    each tensor:     string name | u32 number of dimensions | u64 ne[] | u32 type | u64 offset within the data part
    padding to `general.alignment` (32 unless the file says otherwise), then the data part

`ne` counts from the fastest dimension, so a matrix that numpy calls `[rows, columns]` has ne = [columns, rows].

The file is mapped, not read: opening costs the metadata only, and a tensor's bytes are touched when asked for. Every
number from the file is checked against the bytes that are really there before it is used, so that a truncated or
hostile file ends in one DBFError with file, tensor and reason, and never in a huge allocation.
"""

import contextlib
import mmap
import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from .errors import DBFError
from .factors import BLOCK, Factors, unpack_signs

DBF_TYPE = 90  # the id of the DBF tensor type
FORMAT_VERSION = 1  # dbf.version
MAX_DIMS = 4

# ggml tensor types: id -> (name, elements in a block, bytes of a block)
TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
    DBF_TYPE: ("DBF", BLOCK, BLOCK // 8),
}
TYPE_IDS = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}

# GGUF value types: the simple ones, id -> letter (the same for struct and numpy); STRING and ARRAY are read by rule
_SIMPLE = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
U32, F32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9

PARTS = ("dbf_a", "dbf_b", "dbf_sa", "dbf_sm", "dbf_sb")  # the five tensors of one linear
SIGNS, SCALES = PARTS[:2], PARTS[2:]


@dataclass
class Value:
    """One metadata value as stored. Strings are bytes (some files hold invalid UTF-8), arrays lists or numpy."""

    type: int
    stored: object
    item_type: int | None = None  # of an array

    def decoded(self):
        """The value as plain Python: str, int, float, bool, or a list of them."""
        if self.type == STRING:
            return self.stored.decode("utf-8", "replace")
        if self.item_type == STRING:
            return [item.decode("utf-8", "replace") for item in self.stored]
        if self.item_type == BOOL:
            return [bool(item) for item in self.stored]
        return self.stored.tolist() if isinstance(self.stored, np.ndarray) else self.stored


@dataclass
class Tensor:
    """One tensor's description; `offset` counts from the start of the file."""

    name: str
    type: int
    ne: tuple[int, ...]  # fastest dimension first
    offset: int
    nbytes: int

    @property
    def type_name(self) -> str:
        return TENSOR_TYPES[self.type][0]

    @property
    def shape(self) -> tuple[int, ...]:
        """numpy's order: rows before columns."""
        return self.ne[::-1]

    @property
    def n_elements(self) -> int:
        return prod(self.ne)


class _Cursor:
    """Reads forward through the mapped file; every read is checked against its end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at, self.size = path, data, 0, len(data)

    def fail(self, reason: str):
        raise DBFError(f"{self.path} is no usable GGUF file: {reason}")

    def need(self, n_bytes: int, what: str) -> None:
        if n_bytes > self.size - self.at:
            self.fail(f"it ends at byte {self.size}, within {what}")

    def number(self, fmt: str, what: str):
        size = struct.calcsize(fmt)
        self.need(size, what)
        (value,) = struct.unpack_from(fmt, self.data, self.at)
        self.at += size
        return value

    def string(self, what: str) -> bytes:
        length = self.number("<Q", what)
        self.need(length, what)
        text = self.data[self.at : self.at + length]
        self.at += length
        return text

    def strings(self, count: int, what: str) -> list[bytes]:
        """`count` strings; the loop of `string`, unrolled because vocabularies have more than 100,000 of them."""
        data, at, size, unpack = self.data, self.at, self.size, struct.Struct("<Q").unpack_from
        result = []
        for _ in range(count):
            if at + 8 > size or (end := at + 8 + unpack(data, at)[0]) > size:
                self.fail(f"it ends at byte {size}, within {what}")
            result.append(data[at + 8 : end])
            at = end
        self.at = at
        return result

    def value(self, what: str) -> Value:
        kind = self.number("<I", what)
        if kind == STRING:
            return Value(kind, self.string(what))
        if kind == ARRAY:
            item = self.number("<I", what)
            count = self.number("<Q", what)
            if item == STRING:
                self.need(8 * count, what)
                return Value(kind, self.strings(count, what), item)
            if item not in _SIMPLE:
                self.fail(f"{what} is an array of unsupported type {item}")
            dtype = np.dtype("<" + _SIMPLE[item])
            self.need(dtype.itemsize * count, what)
            array = np.frombuffer(self.data, dtype, count, self.at).copy()  # a copy: a view would keep the map open
            self.at += array.nbytes
            return Value(kind, array, item)
        if kind not in _SIMPLE:
            self.fail(f"{what} has the unknown value type {kind}")
        number = self.number("<" + _SIMPLE[kind], what)
        return Value(kind, bool(number) if kind == BOOL else number)


class GGUFFile:
    """An open GGUF file: `metadata` (key -> Value), `tensors` (name -> Tensor, in the file's order), mapped data.

    Raises DBFError when the file is missing, truncated or malformed. Usable as a context manager.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as f:
                self.size = os.fstat(f.fileno()).st_size
                if self.size < 24:
                    raise DBFError(f"{self.path} is no GGUF file: it has only {self.size} bytes")
                self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DBFError(f"cannot read {self.path}: {error.strerror or error}") from None
        try:
            self._parse()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "GGUFFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Closes the map, unless an array from `raw` is still in use: then the last such array closes it."""
        with contextlib.suppress(BufferError):
            self._map.close()

    # --- parsing

    def _parse(self) -> None:
        cursor = _Cursor(self.path, self._map)
        if self._map[:4] != b"GGUF":
            raise DBFError(f"{self.path} is no GGUF file: it begins with {self._map[:4]!r}")
        cursor.at = 4
        version = cursor.number("<I", "the header")
        if version != 3:
            hint = " (a big-endian file)" if version == 3 << 24 else ""
            cursor.fail(f"GGUF version {version}{hint}, only version 3 can be read")
        n_tensors = cursor.number("<Q", "the header")
        n_values = cursor.number("<Q", "the header")

        self.metadata: dict[str, Value] = {}
        for i in range(n_values):
            key = cursor.string(f"the key of metadata entry {i + 1} of {n_values}").decode("utf-8", "replace")
            if key in self.metadata:
                cursor.fail(f"metadata key {key} appears twice")
            self.metadata[key] = cursor.value(f"metadata {key}")

        self.alignment = self._read_alignment(cursor)
        self.tensors: dict[str, Tensor] = {}
        expected = 0  # tensors follow one another without gaps other than padding, as llama.cpp demands
        for i in range(n_tensors):
            tensor = self._read_tensor(cursor, f"the description of tensor {i + 1} of {n_tensors}")
            if tensor.name in self.tensors:
                cursor.fail(f"tensor {tensor.name} appears twice")
            if tensor.offset != expected:
                cursor.fail(f"tensor {tensor.name} has offset {tensor.offset}, expected {expected}")
            expected += _padded(tensor.nbytes, self.alignment)
            self.tensors[tensor.name] = tensor

        self.data_start = _padded(cursor.at, self.alignment)
        for tensor in self.tensors.values():
            tensor.offset += self.data_start
            if tensor.offset + tensor.nbytes > self.size:
                cursor.fail(
                    f"tensor {tensor.name} takes bytes {tensor.offset} to {tensor.offset + tensor.nbytes}, "
                    f"but the file ends at {self.size}"
                )

    def _read_alignment(self, cursor: _Cursor) -> int:
        value = self.metadata.get("general.alignment")
        if value is None:
            return 32
        n = value.stored
        if value.type != U32 or n < 1 or n & (n - 1):
            cursor.fail(f"general.alignment is {value.decoded()!r}, must be a u32 power of two")
        return n

    @staticmethod
    def _read_tensor(cursor: _Cursor, what: str) -> Tensor:
        name = cursor.string(what).decode("utf-8", "replace")
        what = f"the description of tensor {name}"
        n_dims = cursor.number("<I", what)
        if not 1 <= n_dims <= MAX_DIMS:
            cursor.fail(f"tensor {name} has {n_dims} dimensions, 1 to {MAX_DIMS} are possible")
        ne = tuple(cursor.number("<Q", what) for _ in range(n_dims))
        kind = cursor.number("<I", what)
        offset = cursor.number("<Q", what)
        if kind not in TENSOR_TYPES:
            cursor.fail(f"tensor {name} has the unknown type {kind}")
        type_name, block, block_bytes = TENSOR_TYPES[kind]
        if min(ne) < 1 or prod(ne) >= 2**63:
            cursor.fail(f"tensor {name} has the impossible shape {list(ne)}")
        if ne[0] % block:
            cursor.fail(f"tensor {name} of type {type_name} has rows of {ne[0]} elements, not a multiple of {block}")
        return Tensor(name, kind, ne, offset, prod(ne) // block * block_bytes)

    # --- reading

    def get(self, key: str, default=None):
        """A metadata value as plain Python, `default` when the key is missing."""
        value = self.metadata.get(key)
        return default if value is None else value.decoded()

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor, uint8 `[nbytes]`, a read-only view of the mapped file."""
        tensor = self.tensors[name]
        return np.frombuffer(self._map, np.uint8, tensor.nbytes, tensor.offset)

    def floats(self, name: str) -> np.ndarray:
        """An F32 or F16 tensor, float32 or float16, in numpy's order of dimensions."""
        tensor = self.tensors[name]
        dtypes = {TYPE_IDS["F32"]: "<f4", TYPE_IDS["F16"]: "<f2"}
        if tensor.type not in dtypes:
            raise DBFError(f"{self.path}: tensor {name} is {tensor.type_name}, expected F16 or F32")
        return self.raw(name).view(dtypes[tensor.type]).reshape(tensor.shape)

    def packed_signs(self, name: str) -> np.ndarray:
        """A DBF tensor as packed rows, uint8 `[rows, columns / 8]`: what the checkpoint holds."""
        tensor = self.tensors[name]
        if tensor.type != DBF_TYPE or len(tensor.ne) != 2:
            raise DBFError(f"{self.path}: tensor {name} is {tensor.type_name} {list(tensor.ne)}, expected a DBF matrix")
        return self.raw(name).reshape(tensor.ne[1], tensor.ne[0] // 8)

    # --- DBF linears

    def linears(self) -> dict[str, dict[str, Tensor]]:
        """Base name ("blk.3.attn_q") -> the parts found of it ("dbf_a" -> Tensor), complete or not, in file order."""
        result: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            base, _, part = name.rpartition(".")
            if part in PARTS:
                result.setdefault(base, {})[part] = tensor
        return result

    def factors(self, base: str) -> Factors:
        """One linear, decoded, with its rows in the file's order. Raises DBFError when it is not complete and sound."""
        import torch

        missing = [part for part in PARTS if f"{base}.{part}" not in self.tensors]
        if missing:
            raise DBFError(f"{self.path}: {base} lacks {', '.join(missing)}")
        signs = (unpack_signs(self.packed_signs(f"{base}.{part}")) for part in SIGNS)
        scales = (torch.from_numpy(self.floats(f"{base}.{part}").copy()) for part in SCALES)
        try:
            return Factors(*signs, *scales)
        except ValueError as error:
            raise DBFError(f"{self.path}: {base}: {error}") from None


def _padded(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment

"""The half of the GGUF writer that runs inside llama.cpp's own converter, as a process of its own.

    python -m dbf_gguf.gguf_child      a job (one line of JSON) on stdin, the result (JSON) on stdout, the log on stderr

The pinned tree's `conversion/` package needs the tree's own gguf-py, while transformers may long have imported PyPI's
`gguf` of another state; one process cannot hold both. `gguf_writer` starts this module with the tree first on
PYTHONPATH. When the parent dies, stdin ends, and so does this process.

How the DBF tensors get in: the converter's class for the architecture is subclassed on the spot. It walks over the
model's tensors, renames and permutes them, and hands them to gguf-py's writer, which keeps only lazy objects until the
end. Where a tensor is a compressed linear, the subclass sends *row numbers* `[n_out, 1]` through the class's own
`modify_tensors` instead of the weight: what comes out is the GGUF name and the row permutation that this architecture
wants (Llama interleaves the two rotary halves of Q and K, Qwen leaves them), without knowing about either here.
Permuting the rows of W = diag(a) A diag(m) B diag(b) permutes the rows of A and the entries of a, nothing else.
For a joint linear (`join`) each part is sent, and the permutations that come out are put one behind the other.
"""

import ctypes
import json
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from conversion import LazyTorchTensor, ModelBase, ModelType, get_model_architecture, get_model_class

from . import __version__
from .checkpoint import WorkFolder
from .errors import DBFError
from .factors import BLOCK
from .gguf_file import DBF_TYPE, FORMAT_VERSION, SCALES, GGUFFile
from .join import joint_of
from .source import context_length

CHUNK_BYTES = 32 << 20  # of float32 rows, when an embedding is quantized piece by piece
ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
# general.* keys that describe the written file, not the model: never taken from a source GGUF
FILE_KEYS = ("architecture", "type", "file_type", "quantization_version", "alignment", "quantized_by", "sampling.")
SIGN_BYTES = np.dtype("<u4")  # one block of a DBF tensor
writing = threading.Event()  # set once the unfinished file is this process's
FILE_TYPE = 90  # LLAMA_FTYPE_MOSTLY_DBF of the patched llama.cpp, which prints it


class OnWrite:
    """What gguf-py's writer takes for an array: shape, dtype and size now, the bytes when the file is written."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, load: Callable[[], np.ndarray]):
        self.shape, self.dtype, self.load = shape, np.dtype(dtype), load
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize

    def tofile(self, f) -> None:
        data = self.load()
        assert data.nbytes == self.nbytes, f"{data.nbytes} bytes instead of {self.nbytes}"
        f.write(np.ascontiguousarray(data).data)


class QuantizedRows:
    """An embedding or output matrix, quantized some rows at a time while it is written: bounded memory."""

    def __init__(self, load: Callable[[], torch.Tensor], shape: tuple[int, int], quantize: Callable, byte_shape):
        self.load, self.rows, self.quantize = load, shape, quantize
        self.shape, self.dtype = byte_shape, np.dtype(np.uint8)
        self.nbytes = byte_shape[0] * byte_shape[1]

    def tofile(self, f) -> None:
        data = self.load()  # [rows, columns], a view of the mapped safetensors file
        step = max(1, CHUNK_BYTES // (4 * self.rows[1]))
        for start in range(0, self.rows[0], step):
            chunk = data[start : start + step].float().contiguous().numpy()
            f.write(np.ascontiguousarray(self.quantize(chunk)).data)


def quantizer(type_name: str, library: str | None) -> tuple[gguf.GGMLQuantizationType, Callable]:
    """(type, function from float32 `[rows, columns]` to its bytes): gguf-py's numpy code, ggml's own C for K-quants."""
    qtype = gguf.GGMLQuantizationType[type_name.upper()]
    if library is None or not type_name.lower().endswith("_k"):
        return qtype, lambda rows: gguf.quants.quantize(rows, qtype).view(np.uint8)
    ggml = ctypes.CDLL(library)
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p
    ]  # fmt: skip

    def quantize(rows: np.ndarray) -> np.ndarray:
        result = np.empty(gguf.quant_shape_to_byte_shape(rows.shape, qtype), np.uint8)
        n = ggml.ggml_quantize_chunk(qtype, rows.ctypes.data, result.ctypes.data, 0, *rows.shape, None)
        assert n == result.nbytes
        return result

    return qtype, quantize


class Linears:
    """The compressed linears of a work folder as the exporter needs them; without a work folder there are none."""

    def __init__(self, work: WorkFolder | None):
        self.work = work
        self.pending = dict.fromkeys(work.linears()) if work else {}
        self.norms = work.final_norms() if work else {}
        self.count = self.stored_bits = self.weights = 0
        self._last: tuple[str, tuple] | None = None

    def scales(self, name: str) -> dict[str, np.ndarray]:
        """scale_a, scale_m, scale_b; F16 or F32 as the work folder has them."""
        result = {key: value.numpy() for key, value in self._read(self.work.scales, name).items()}
        for key, value in result.items():
            if value.dtype not in (np.float16, np.float32) or value.ndim != 1 or not np.isfinite(value).all():
                raise DBFError(f"{self.work.path}: {key} of {name} is not finite F16 or F32")
        return result

    def signs(self, name: str, which: int) -> np.ndarray:
        """Packed A (0) or B (1); the file holds both, so the last one read is kept."""
        if self._last is None or self._last[0] != name:
            self._last = (name, self._read(self.work.packed_signs, name))
        return self._last[1][which]

    def _read(self, read: Callable, name: str):
        try:
            return read(name)
        except Exception as error:
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DBFError(f"{self.work.path}: linear {name} cannot be read: {text}") from None

    def tensors(self, name: str, shape: tuple[int, ...], rows: np.ndarray) -> dict[str, OnWrite]:
        """The five companions: suffix -> what to write, in the file's order; `rows` permutes the outputs."""
        scales = self.scales(name)
        n_out, k, n_in = (len(scales[key]) for key in ("scale_a", "scale_m", "scale_b"))
        if (n_out, n_in) != shape:
            raise DBFError(f"{name}: the work folder has {n_out}x{n_in}, the model {'x'.join(map(str, shape))}")
        if n_in % BLOCK or k % BLOCK:
            raise DBFError(f"{name}: n_in={n_in} and k={k} must be multiples of {BLOCK}")
        dtypes = {key: value.dtype for key, value in scales.items()}
        self.count += 1
        self.weights += n_out * n_in
        self.stored_bits += k * (n_out + n_in) + 8 * sum(value.nbytes for value in scales.values())
        del scales  # read again when written: nothing is kept that grows with the model

        def part(which: int, n_rows: int, n_columns: int, order=slice(None)) -> OnWrite:
            def load():
                return self.signs(name, which)[order]

            result = OnWrite((n_rows, n_columns // BLOCK), SIGN_BYTES, load)
            result.raw_shape = (n_rows, n_columns)
            return result

        def scale(key: str, n: int, order=slice(None)) -> OnWrite:
            return OnWrite((n,), dtypes[key], lambda: self.scales(name)[key][order])

        return {
            "dbf_b": part(1, k, n_in),
            "dbf_a": part(0, n_out, k, rows),
            "dbf_sb": scale("scale_b", n_in),
            "dbf_sm": scale("scale_m", k),
            "dbf_sa": scale("scale_a", n_out, rows),
        }


class PlannedLinears(Linears):
    """Linears of which only the shapes are known, for the size of a file that cannot be written yet.

    shapes  linear -> (n_out, k, n_in)
    """

    def __init__(self, shapes: dict[str, tuple[int, int, int]]):
        super().__init__(None)
        self.shapes = shapes
        self.pending = dict.fromkeys(shapes)

    def scales(self, name: str) -> dict[str, np.ndarray]:
        sizes = zip(("scale_a", "scale_m", "scale_b"), self.shapes[name], strict=True)
        return {key: np.zeros(n, np.float16) for key, n in sizes}


def exporter_class(model_class: type, linears: Linears, job: dict) -> type:
    """The converter's class for this architecture, with the compressed linears and the options of `job` put in."""
    wanted = {"token_embd.weight": job["embedding_type"], "output.weight": job["output_type"]}
    parts: dict[str, dict[str, np.ndarray]] = {}  # joint linear -> part -> its rows, until all are there

    class Exporter(model_class):
        model_arch = model_class.model_arch  # __init_subclass__ wants it in every class

        def get_tensors(self):
            tied = self.hparams.get("tie_word_embeddings")
            for name, tensor in super().get_tensors():
                if tied and name == "lm_head.weight":
                    continue  # some folders carry a copy of the embedding
                yield name, linears.norms.pop(name, tensor)

        def modify_tensors(self, data_torch, name, bid):
            linear = name.removesuffix(".weight")
            joint, join = joint_of(linear) or (None, None)
            if linear != name and linear in linears.pending:
                self._add_linear(linear, *self._sent(name, bid, data_torch.shape[0]), data_torch.shape[1])
                return
            if linear != name and joint in linears.pending:
                self._add_part(joint, join, linear, *self._sent(name, bid, data_torch.shape[0]), data_torch.shape[1])
                return
            for new_name, data in super().modify_tensors(data_torch, name, bid):
                if new_name in wanted:
                    # Untouched by the class (the usual case): read it from the file in pieces, not as a whole.
                    source = self.model_tensors[name] if data is data_torch else lambda data=data: data
                    self._add_matrix(new_name, source, tuple(data.shape))
                else:
                    yield new_name, data

        def _sent(self, name, bid, n_rows):
            """The name in the file and the order of the rows that this architecture's converter gives a linear."""
            numbers = torch.arange(n_rows, dtype=torch.float32)[:, None]  # exact below 2^24
            mapped = list(super().modify_tensors(numbers, name, bid))
            rows = mapped[0][1].reshape(-1).to(torch.int64).numpy() if len(mapped) == 1 else np.empty(0, np.int64)
            if not np.array_equal(np.sort(rows), np.arange(n_rows)) or not mapped[0][0].endswith(".weight"):
                raise DBFError(f"{name}: llama.cpp splits, merges or rescales this linear, DBF cannot stand in for it")
            return mapped[0][0].removesuffix(".weight"), rows

        def _add_part(self, joint, join, linear, base, rows, n_in):
            """Notes a part; with the last one, wherever in the folder it lies, the joint linear is complete."""
            expected = join.bases[join.parts.index(linear.rpartition(".")[2])]
            if not base.endswith(f".{expected}"):
                raise DBFError(f"{linear}: llama.cpp calls it {base}, its rows cannot be joined as {join.base}")
            found = parts.setdefault(joint, {})
            found[linear.rpartition(".")[2]] = rows
            if len(found) == len(join.parts):
                order = [found[part] for part in join.parts]
                starts = np.cumsum([0, *map(len, order)])
                order = np.concatenate([rows + start for rows, start in zip(order, starts, strict=False)])
                self._add_linear(joint, f"{base.rpartition('.')[0]}.{join.base}", order, n_in)

        def _add_linear(self, linear, base, rows, n_in):
            del linears.pending[linear]
            for suffix, data in linears.tensors(linear, (len(rows), n_in), rows).items():
                is_signs = suffix not in SCALES
                self.gguf_writer.add_tensor(
                    f"{base}.{suffix}",
                    data,
                    raw_shape=data.raw_shape if is_signs else None,
                    raw_dtype=DBF_TYPE if is_signs else None,
                )

        def _add_matrix(self, new_name, source, shape):
            qtype, quantize = quantizer(wanted[new_name], job["library"])
            byte_shape = gguf.quant_shape_to_byte_shape(shape, qtype)
            data = QuantizedRows(lambda: LazyTorchTensor.to_eager(source()), shape, quantize, byte_shape)
            self.gguf_writer.add_tensor(new_name, data, raw_dtype=qtype)

        def set_vocab(self):
            if job["tokenizer_gguf"]:
                copy_tokenizer(self.gguf_writer, Path(job["tokenizer_gguf"]), self.hparams.get("vocab_size"))
                return
            try:
                super().set_vocab()
            except (FileNotFoundError, TypeError) as error:
                raise DBFError(f"{job['model_dir']} has no tokenizer that llama.cpp can read ({error})") from None
            except NotImplementedError:
                raise DBFError(
                    f"{job['model_dir']}: llama.cpp's converter does not know this tokenizer's pre-tokenizer"
                ) from None

        def set_gguf_parameters(self):
            super().set_gguf_parameters()
            # no further than llama.cpp and PyTorch agree, see there
            key = gguf.Keys.LLM.CONTEXT_LENGTH.format(arch=self.gguf_writer.arch)
            context, written = context_length(Path(job["model_dir"])), self.gguf_writer.kv_data[0].get(key)
            if written is not None and context < written.value:
                self.gguf_writer.remove_key(key)
                self.gguf_writer.add_context_length(context)

        def prepare_metadata(self, vocab_only):
            # The size label counts the weights that the factors stand for, not the factors.
            dense = sum(
                int(np.prod(info.shape, dtype=np.int64))
                for name, info in self.gguf_writer.tensors[0].items()
                if ".dbf_" not in name
            )
            total = dense + linears.weights
            self.gguf_writer.get_total_parameter_count = lambda: (total, total, 0, 0)
            super().prepare_metadata(vocab_only=vocab_only)
            if job["tokenizer_gguf"]:
                copy_general(self.gguf_writer, Path(job["tokenizer_gguf"]), job["name"])
            if linears.count:
                add_dbf_keys(self.gguf_writer, linears, job)

    return Exporter


def copy_key(writer: gguf.GGUFWriter, key: str, value) -> None:
    """One metadata value (gguf_file.Value) as it is; gguf-py cannot write empty arrays, which say nothing."""
    stored = value.stored.tolist() if isinstance(value.stored, np.ndarray) else value.stored
    if value.item_type is not None and len(stored) == 0:
        return
    writer.remove_key(key)
    sub_type = None if value.item_type is None else gguf.GGUFValueType(value.item_type)
    writer.add_key_value(key, stored, gguf.GGUFValueType(value.type), sub_type)


def copy_tokenizer(writer: gguf.GGUFWriter, source: Path, vocab_size: int | None) -> None:
    """All `tokenizer.*` keys of a source GGUF, chat template included."""
    with GGUFFile(source) as file:
        tokens = file.metadata.get("tokenizer.ggml.tokens")
        if tokens is None:
            raise DBFError(f"{source} holds no tokenizer")
        if vocab_size is not None and len(tokens.stored) != vocab_size:
            raise DBFError(f"{source} has {len(tokens.stored)} tokens, the model has {vocab_size}")
        for key, value in file.metadata.items():
            if key.startswith("tokenizer."):
                copy_key(writer, key, value)


def copy_general(writer: gguf.GGUFWriter, source: Path, name: str | None) -> None:
    """What the source GGUF says about the model (name, licence …) replaces what was guessed from the folder."""

    def describes_model(key: str) -> bool:
        return key.startswith("general.") and not key.removeprefix("general.").startswith(FILE_KEYS)

    for key in [key for key in writer.kv_data[0] if describes_model(key)]:
        writer.remove_key(key)
    with GGUFFile(source) as file:
        for key, value in file.metadata.items():
            if describes_model(key):
                copy_key(writer, key, value)
    if name:
        writer.remove_key("general.name")
        writer.add_string("general.name", name)


def add_dbf_keys(writer: gguf.GGUFWriter, linears: Linears, job: dict) -> None:
    """The `dbf.*` metadata of FORMAT.md."""
    writer.remove_key("general.file_type")
    writer.add_file_type(FILE_TYPE)
    writer.add_uint32("dbf.version", FORMAT_VERSION)
    writer.add_float32("dbf.bits_per_weight", linears.stored_bits / linears.weights)
    writer.add_uint32("dbf.tensor_count", linears.count)
    # add_string would leave an empty one out
    writer.add_key_value("dbf.tool_version", __version__, gguf.GGUFValueType.STRING)
    writer.add_key_value("dbf.source", job["source"], gguf.GGUFValueType.STRING)
    writer.add_key_value("dbf.settings", job["settings"], gguf.GGUFValueType.STRING)


def export(job: dict) -> dict:
    """Does one job of `gguf_writer`; returns the sizes of what it wrote. Raises DBFError.

    With `only_check` nothing is written: is there a converter for this architecture, does it know the tokenizer, and
    does it find what it needs in the config?
    With `planned`, shapes of linears, nothing is written either: `bytes` is the size that the file would have.
    """
    model_dir, part = Path(job["model_dir"]), Path(job["part"])
    planned = job.get("planned")
    if planned:
        linears = PlannedLinears({name: tuple(shape) for name, shape in planned.items()})
    else:
        linears = Linears(WorkFolder.open(Path(job["work"])) if job["work"] else None)
    if linears.work is not None and not linears.pending:
        raise DBFError(f"{linears.work.path} holds no finished linear")

    with torch.inference_mode():
        hparams = ModelBase.load_hparams(model_dir, False)
        try:
            architecture = get_model_architecture(hparams, ModelType.TEXT)
            model_class = get_model_class(architecture)
        except (NotImplementedError, ValueError):
            raise DBFError(f"{model_dir}: llama.cpp does not know this architecture") from None
        model = exporter_class(model_class, linears, job)(
            model_dir, gguf.LlamaFileType.MOSTLY_F16, Path("model.gguf"), model_name=job["name"]
        )
        if job.get("only_check"):
            model.set_vocab()
            model.set_gguf_parameters()
            return {}
        model.prepare_tensors()
        for what, names in (("linear", linears.pending), ("norm", linears.norms)):
            if names:
                raise DBFError(f"{model_dir} has no {what} {next(iter(names))}, which {linears.work.path} holds")
        model.prepare_metadata(vocab_only=False)

        writer = model.gguf_writer
        n_bytes = sum(writer.ggml_pad(info.nbytes, ALIGNMENT) for info in writer.tensors[0].values())
        if planned:
            return {"bytes": header_bytes(writer) + n_bytes}
        if n_bytes > job["free"]:
            raise DBFError(
                f"{job['out']} needs {n_bytes / 2**20:,.0f} MiB, the disk has only {job['free'] / 2**20:,.0f} MiB free"
            )
        writing.set()
        try:
            writer.write_header_to_file(path=part)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            with open(part, "rb+") as f:
                os.fsync(f.fileno())
        except OSError as error:  # numpy reports a full disk as "4096 requested and 1024 written", without errno
            text = error.strerror or f"is the disk full? ({error})"
            raise DBFError(f"cannot write {job['out']}: {text}") from None
    return {"bytes": part.stat().st_size, "linears": linears.count}


def header_bytes(writer: gguf.GGUFWriter) -> int:
    """Size of everything before the tensors' data: header, metadata with tokenizer, tensor list, padding."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header"
        writer.write_header_to_file(path=path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return writer.ggml_pad(path.stat().st_size, ALIGNMENT)


def _end_with_parent(stdin, part: Path) -> None:
    stdin.read()
    if writing.is_set():
        part.unlink(missing_ok=True)
    os._exit(1)


def main() -> None:
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the converter prints goes to the log
    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, args=(sys.stdin.buffer, Path(job["part"])), daemon=True).start()
    try:
        result = export(job)
    except DBFError as error:
        result = {"error": str(error)}
    except Exception as error:
        traceback.print_exc()
        text = (str(error).splitlines() or [""])[0]
        result = {"error": f"llama.cpp's converter failed: {type(error).__name__}: {text}", "unexpected": True}
    answer.write(json.dumps(result))
    answer.flush()
    os._exit(0)  # not sys.exit: the thread blocks on stdin, and its lock would make the interpreter's end a crash


if __name__ == "__main__":
    main()

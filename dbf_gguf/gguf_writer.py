"""Writes a model as GGUF: metadata, tokenizer, norms and embeddings by llama.cpp's own converter, the linears as DBF.

The converter of the pinned llama.cpp tree runs in a process of its own (`gguf_child`, which says why and how). This
half checks what can be checked beforehand, starts it, and gives the file its name when it is complete:

    write_gguf -> .<name>.part beside the output -> fsync -> rename

so that under the output's name there is either nothing (or what was there before) or a whole file. The same work folder
and options give the same bytes, whenever and wherever they are written.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .checkpoint import WorkFolder
from .errors import DBFError
from .gguf_file import TENSOR_TYPES, TYPE_IDS
from .source import check_model_dir

# Types for embedding and output head. gguf-py quantizes the first in numpy; K-quants need the patched build's ggml.
NUMPY_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
LIBRARY_TYPES = ("q6_k", "q5_k", "q4_k")
LOG_LINES = 15  # of the converter's log, shown when it fails unexpectedly


def quantize_library() -> Path | None:
    """The ggml-base library of the patched build, which quantizes K types; None when nothing has been built."""
    from .llama_cpp import bin_dir

    folder = bin_dir()
    if folder is None:
        return None
    for place in (Path(folder), Path(folder).parent / "lib"):
        for name in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll"):
            if (place / name).exists():
                return place / name
    return None


def check_types(embedding_type: str, output_type: str, n_embd: int, tied: bool) -> None:
    """Refuses, before any work, types that the embedding (`[vocabulary, n_embd]`) or the output head cannot have.

    Raises DBFError naming the types that can be had.
    """
    wanted = {"embedding type": embedding_type} | ({} if tied else {"output type": output_type})
    for what, name in wanted.items():
        if name not in NUMPY_TYPES + LIBRARY_TYPES:
            raise DBFError(f"{what} {name} is unknown: choose one of {', '.join(NUMPY_TYPES + LIBRARY_TYPES)}")
        block = TENSOR_TYPES[TYPE_IDS[name.upper()]][1]
        if n_embd % block:
            fitting = [t for t in NUMPY_TYPES + LIBRARY_TYPES if n_embd % TENSOR_TYPES[TYPE_IDS[t.upper()]][1] == 0]
            raise DBFError(
                f"{what} {name} needs rows that are a multiple of {block}, this model's have {n_embd}: "
                f"choose one of {', '.join(fitting)}"
            )
        if name in LIBRARY_TYPES and quantize_library() is None:
            raise DBFError(f"{what} {name} needs the patched build: run `dbf-gguf build` first, or choose q8_0")


def check_output(out: Path, source_gguf: Path | None = None) -> None:
    """Raises DBFError when `out` is a folder, the GGUF file that the model is read from, or a file of another kind."""
    if out.is_dir():
        raise DBFError(f"cannot write {out}: it is a folder")
    if source_gguf is not None and out.exists() and out.samefile(source_gguf):
        raise DBFError(f"cannot write {out}: the model is read from it; name another file with -o")
    if out.is_file() and out.stat().st_size:
        with open(out, "rb") as f:
            if f.read(4) != b"GGUF":
                raise DBFError(f"cannot write {out}: what is there is no GGUF file; name another with -o")


def check_convertible(model_dir: Path, llama_cpp: Path) -> None:
    """Raises DBFError when llama.cpp's converter does not know the architecture or the tokenizer of a folder.

    Both are known only to the converter, which takes some seconds to start.
    """
    job = {"only_check": True, "part": "", "work": None, "tokenizer_gguf": None, "name": None, "library": None}
    job |= {"model_dir": str(model_dir.absolute()), "embedding_type": "f16", "output_type": "f16"}
    _run_child(job, llama_cpp.absolute())


def write_gguf(
    out: Path,
    model_dir: Path,
    *,
    work: WorkFolder | None,
    embedding_type: str,
    output_type: str,
    llama_cpp: Path,
    tokenizer_gguf: Path | None = None,
    name: str | None = None,
    source: str = "",
    settings: dict | None = None,
) -> None:
    """Writes `model_dir` (config.json, safetensors, tokenizer) as `out`, the linears of `work` as DBF tensors.

    work            the compressed linears and tuned norms; None writes the plain F16 model
    embedding_type  type of the embedding, and of the output head where the two are tied
    output_type     type of the output head of an untied model
    llama_cpp       the pinned llama.cpp tree, with conversion/ and gguf-py/
    tokenizer_gguf  GGUF file whose tokenizer and general.* keys are copied as they are, instead of converting the
                    folder's tokenizer (a round trip through Hugging Face loses the pre-tokenizer's name)
    name            general.name
    source          dbf.source: where the model came from
    settings        dbf.settings: what reproduces the file

    Memory: the largest single dense tensor in float32, whatever the size of the model.
    Raises DBFError, leaving nothing behind, when the model is not supported, the types do not fit it, a linear of the
    work folder is not the model's, or the disk is too small.
    """
    out, model_dir = Path(out).absolute(), Path(model_dir).absolute()
    check_output(out, tokenizer_gguf)
    config = check_model_dir(model_dir, tokenizer_gguf)
    n_embd = config.get("hidden_size")
    if n_embd:
        check_types(embedding_type, output_type, n_embd, bool(config.get("tie_word_embeddings")))
    if not (llama_cpp / "conversion").is_dir():
        raise DBFError(f"{llama_cpp} is no llama.cpp tree of the pinned version: it has no folder conversion")
    needs_library = {embedding_type, output_type} & set(LIBRARY_TYPES)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
    except OSError as error:
        raise DBFError(f"cannot write {out}: {error.strerror}") from None
    part = out.with_name(f".{out.name}.part")
    job = {
        "out": str(out),
        "part": str(part),
        "free": free,
        "model_dir": str(model_dir),
        "work": str(work.path.absolute()) if work else None,
        "embedding_type": embedding_type,
        "output_type": output_type,
        "library": str(quantize_library()) if needs_library else None,
        "tokenizer_gguf": str(Path(tokenizer_gguf).absolute()) if tokenizer_gguf else None,
        "name": name,
        "source": source,
        "settings": json.dumps(settings or {}, sort_keys=True),
    }
    try:
        _run_child(job, llama_cpp.absolute())
        os.replace(part, out)
    except OSError as error:
        raise DBFError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)


def planned_size(
    model_dir: Path,
    linears: dict[str, tuple[int, int, int]],
    *,
    embedding_type: str,
    output_type: str,
    llama_cpp: Path,
    tokenizer_gguf: Path | None = None,
    name: str | None = None,
    source: str = "",
    settings: dict | None = None,
) -> int:
    """Bytes of the file that `write_gguf` would write with linears of these (n_out, k, n_in).

    The other arguments are those of `write_gguf`. llama.cpp's converter counts, so metadata, tokenizer and padding are
    in it; some seconds. Raises DBFError as `write_gguf` does.
    """
    job = {"planned": linears, "part": "", "work": None, "name": name, "source": source}
    job |= {"model_dir": str(model_dir.absolute()), "embedding_type": embedding_type, "output_type": output_type}
    job |= {"tokenizer_gguf": str(tokenizer_gguf.absolute()) if tokenizer_gguf else None, "library": None}
    job |= {"settings": json.dumps(settings or {}, sort_keys=True)}
    return _run_child(job, llama_cpp.absolute())["bytes"]


def _run_child(job: dict, llama_cpp: Path) -> dict:
    """Runs `gguf_child` on one job; its log is shown only when it fails in a way it has no sentence for."""
    package_root = Path(__file__).resolve().parent.parent
    path = [str(llama_cpp / "gguf-py"), str(llama_cpp), str(package_root), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "HF_HUB_OFFLINE": "1",  # everything needed is in the folder
        "TRANSFORMERS_VERBOSITY": "error",
    }
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "dbf_gguf.gguf_child"],
            cwd=llama_cpp / "gguf-py",  # `-m` puts it first on the path; a user's folder might hold a gguf.py
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
        try:
            # stdin stays open until the answer is there: its end tells the child that this process has died
            child.stdin.write(json.dumps(job).encode() + b"\n")
            child.stdin.flush()
            answer = child.stdout.read()
        except BrokenPipeError:
            answer = b""
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
        try:
            result = json.loads(answer)
        except ValueError:
            result = {"error": "llama.cpp's converter ended without a result (out of memory?)", "unexpected": True}
        if "error" in result:
            if result.get("unexpected"):
                log.seek(0)
                lines = log.read().decode("utf-8", "replace").splitlines()
                print("\n".join(lines[-LOG_LINES:]), file=sys.stderr)
            raise DBFError(result["error"])
        return result

"""The work folder: everything a convert has finished so far, so that it can be killed at any moment and go on.

    manifest.json                the settings of each stage and what is done (JSON, replaced atomically)
    windows.safetensors          calibration and tuning text as token ids, int32 [count, length]
    importance.safetensors       <linear>.input [n_in], <linear>.output [n_out]: RMS of activations and output gradients
    linears/<linear>.safetensors one factorized linear: signs_a, signs_b (packed, uint8), scale_{a,m,b} (float32)
    tuning.safetensors           the last tuning snapshot (parameters, optimizer, best state)
    blocks/<n>.safetensors       a block tuned by itself: <linear>.scale_{a,m,b}, norms (float32), perhaps signs
    final.safetensors            what is exported: <linear>.scale_{a,m,b} (float16) and the tuned norms (float32)

`<linear>` is the Hugging Face module name ("model.layers.3.mlp.up_proj"). A file is written beside its target, flushed
to the disk and renamed. A linear counts as finished once the manifest names it, the other files once they exist.
What is read of a linear comes from the last of the files that has it: final, its block's, its own.

Of several processes (`parallel`) the first alone writes; from the others only the files of linears come.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from . import __version__, parallel
from .errors import DBFError
from .factors import Factors, pack_signs, unpack_signs
from .join import NONE

FORMAT = 1
FINAL = "final.safetensors"
SCALES = ("scale_a", "scale_m", "scale_b")
SIGNS = ("signs_a", "signs_b")
UNRECORDED = {"importance": True, "join": NONE, "budget": "uniform", "processes": 1}  # settings that a manifest lacks


def block_file(index: int | str) -> str:
    """Where the work folder keeps a block that was tuned by itself."""
    return f"blocks/{index}.safetensors"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a temporary file beside `path`, flushes it to the disk, then renames it.

    Raises DBFError with one line when the disk is full or not writable; the temporary file is removed.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(part, path)
    except Exception as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if is_disk_error(error):
            raise DBFError(f"cannot write {path}: {disk_error_text(error)}") from None
        raise


@contextlib.contextmanager
def opened(path: Path):
    """A safetensors file of the work folder. Raises DBFError when it is damaged."""
    advice = "delete it, and it is computed again"
    if path.parent.name in ("linears", "blocks"):  # all that comes after was computed from it
        advice = "start anew with another --work"
    try:
        with safe_open(str(path), "pt") as file:
            yield file
    except SafetensorError as error:
        raise DBFError(f"{path} is damaged ({error}): {advice}") from None


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file of the work folder. Raises as `opened`."""
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping


def read_metadata(path: Path) -> dict:
    """What `write_tensors` got as `metadata`, {} without. Raises as `opened`."""
    with opened(path) as file:
        return json.loads((file.metadata() or {}).get("dbf", "{}"))


def is_disk_error(error: Exception) -> bool:
    """Whether an exception, of Python or of the safetensors library, says that writing failed."""
    return isinstance(error, OSError) or "No space left" in str(error) or "I/O error" in str(error)


def disk_error_text(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]


class WorkFolder:
    """A work folder on disk. `manifest` is its JSON; `save()` writes it back."""

    def __init__(self, path: Path, manifest: dict):
        self.path = path
        self.manifest = manifest

    # --- opening

    @staticmethod
    def check_free(path: Path) -> None:
        """Raises DBFError when something else than a work folder lies at `path`."""
        if not path.exists() or (path / "manifest.json").exists():
            return
        # a run killed before its first manifest leaves only hidden files
        if not path.is_dir() or any(not p.name.startswith(".") for p in path.iterdir()):
            raise DBFError(f"{path} exists and is no work folder: name another with --work")

    @classmethod
    def create(cls, path: Path) -> "WorkFolder":
        """A new, empty work folder at `path`. Raises DBFError when something else lies there."""
        cls.check_free(path)
        work = cls(path, {"format": FORMAT, "tool_version": __version__, "settings": {}, "linears": {}})
        work.save()
        return work

    @classmethod
    def open(cls, path: Path) -> "WorkFolder":
        """The existing work folder at `path`. Raises DBFError when there is none or it is of another version."""
        try:
            manifest = json.loads((path / "manifest.json").read_text())
        except FileNotFoundError:
            raise DBFError(f"{path} is no work folder (it has no manifest.json)") from None
        except (OSError, ValueError) as error:
            raise DBFError(f"{path}/manifest.json cannot be read: {error}") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise DBFError(f"{path} was made by another version of dbf-gguf: start anew with another --work")
        return cls(path, manifest)

    def save(self) -> None:
        if not parallel.is_main():
            return
        text = json.dumps(self.manifest, indent=1)
        write_atomically(self.path / "manifest.json", lambda part: part.write_text(text))

    # --- settings

    @property
    def join(self) -> str:
        """Which linears of the model are joined (`join.CHOICES`): the names in this folder are those after that."""
        return self.manifest["settings"].get("convert", {}).get("join", NONE)

    def claim(self, stages: dict[str, dict], otherwise: dict[str, str | None] | None = None) -> None:
        """Records the settings that each of `stages` runs under, or checks them against those it was begun under.

        otherwise: of some stages, what the refusal names beside the two ways out that there always are, where nothing
        but settings of these has changed. Raises DBFError that names every setting that changed.
        """
        stages = json.loads(json.dumps(stages))  # tuples become lists, as after reading back
        changed, more = {}, set()
        for stage, settings in stages.items():
            old = self.manifest["settings"].setdefault(stage, settings)
            for name in old.keys() | settings.keys():
                before, now = (each.get(name, UNRECORDED.get(name)) for each in (old, settings))
                if before != now:
                    changed[name] = f"{name.replace('_', '-')} was {before}, now {now}"
                    more.add((otherwise or {}).get(stage))
        if changed:
            (only,) = more if len(more) == 1 else (None,)
            raise DBFError(
                f"{self.path} was begun with other settings ({'; '.join(changed[name] for name in sorted(changed))}): "
                f"give the same settings to go on, or another --work to start anew{f'; {only}' if only else ''}"
            )
        self.save()

    # --- tensors

    def write_tensors(self, name: str, tensors: dict[str, torch.Tensor], metadata: dict | None = None) -> None:
        """Writes `name` ("final.safetensors") atomically. For another process to read it, both must `parallel.wait`."""
        if parallel.is_main():
            self._write(name, tensors, metadata)

    def _write(self, name: str, tensors: dict[str, torch.Tensor], metadata: dict | None = None) -> None:
        tensors = {key: value.detach().contiguous().cpu() for key, value in tensors.items()}
        meta = {"dbf": json.dumps(metadata)} if metadata is not None else None
        write_atomically(self.path / name, lambda part: save_file(tensors, str(part), metadata=meta))

    def read_tensors(self, name: str) -> dict[str, torch.Tensor]:
        return read_tensors(self.path / name)

    def read_metadata(self, name: str) -> dict:
        return read_metadata(self.path / name)

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    # --- factorized linears

    def write_linear(self, name: str, factors: Factors, record: dict) -> None:
        """Stores one factorized linear; `record` (k, error, seconds …) goes into the manifest."""
        tensors = {
            "signs_a": torch.from_numpy(pack_signs(factors.signs_a)),
            "signs_b": torch.from_numpy(pack_signs(factors.signs_b)),
            **{scale: getattr(factors, scale).float() for scale in SCALES},
        }
        self._write(self._linear_file(name), tensors)
        self.manifest["linears"][name] = record
        self.save()

    @staticmethod
    def _linear_file(name: str) -> str:
        return f"linears/{name}.safetensors"

    def linears(self) -> list[str]:
        """Names of the finished linears, in the model's order where the manifest's budget tells it."""
        finished = self.manifest["linears"]
        return [name for name in self.manifest.get("budget", finished) if name in finished]

    def packed_signs(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(A, B) packed: uint8 `[n_out, k / 8]` and `[k, n_in / 8]`, the bytes of the GGUF tensors."""
        found = self._newest(name, SIGNS)
        return found["signs_a"].numpy(), found["signs_b"].numpy()

    def scales(self, name: str) -> dict[str, torch.Tensor]:
        """scale_a, scale_m, scale_b: the final ones (float16) when they exist, else those so far (float32)."""
        return self._newest(name, SCALES)

    def _newest(self, name: str, parts: tuple[str, ...]) -> dict[str, torch.Tensor]:
        own_block = re.search(r"\.layers\.(\d+)\.", name)
        files = [(FINAL, f"{name}.")]
        files += [(block_file(own_block[1]), f"{name}.")] if own_block else []
        for file, prefix in [*files, (self._linear_file(name), "")]:
            if self.has(file):
                with opened(self.path / file) as f:
                    if {prefix + part for part in parts} & set(f.keys()):  # a file with one of them must have all
                        return {part: f.get_tensor(prefix + part) for part in parts}
        raise DBFError(f"{self.path} has no factors of {name}: it is damaged, start anew with another --work")

    def factors(self, name: str) -> Factors:
        """One linear, decoded."""
        signs_a, signs_b = self.packed_signs(name)
        return Factors(unpack_signs(signs_a), unpack_signs(signs_b), **self.scales(name))

    def final_norms(self) -> dict[str, torch.Tensor]:
        """Tuned norm weights so far, by parameter name ("model.norm.weight"), float32; empty when none were tuned."""
        files = [FINAL] if self.has(FINAL) else []
        norms = {}
        for path in [self.path / file for file in files] or sorted(self.path.glob(block_file("*"))):
            with opened(path) as f:
                norms |= {key: f.get_tensor(key) for key in f.keys() if not key.endswith(SCALES + SIGNS)}  # noqa: SIM118
        return norms

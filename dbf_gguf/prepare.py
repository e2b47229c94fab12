"""What a convert works with, found out and checked before anything large is computed: settings, shapes, text, tree.

All that can be refused without computing is refused here, by one line that says what to do. What is found is small
enough for the first process to hand to the others.
"""

import hashlib
import math
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from . import blockwise, calibration, distill, parallel, sensitivity
from .blocks import EMBEDDING, HEAD
from .budget import MAX_BITS, MIN_BITS, bits_for_size, linear_bits, uniform_budget
from .checkpoint import read_metadata, read_tensors
from .errors import DBFError
from .fetch import sha256_of
from .gguf_writer import check_convertible, check_types, planned_size
from .join import NONE, effective
from .llama_cpp import source_tree
from .model import check_weights, linear_shapes, training_dtype, weight_files
from .screen import Screen
from .source import ModelSource, check_model_dir, context_length

WINDOWS = "windows.safetensors"  # in the work folder: the text that was cut
BUDGET = "budget.json"  # and what the widths come from
EVALUATION_LENGTH = 512  # tokens in an evaluation window
CHARACTERS_PER_TOKEN = 6  # an upper bound on English text, for how much of a hub dataset is streamed
MINUTES_POOL = 2_000_000  # tokens to tune on, when the bound is minutes
FINGERPRINT_SAMPLES, FINGERPRINT_BYTES = 64, 1 << 16


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result, resolved: options over recipe over defaults."""

    bits: float | None  # None: what `size` comes to
    size: int | None  # wanted bytes of the GGUF file
    join: str  # linears that share factors, one of `join.CHOICES`
    budget: str  # "uniform", "adaptive", or a file with what was measured for an adaptive one
    calib: str
    calib_sequences: int
    seq_len: int
    importance: bool
    iterations: int
    blocks: str  # "none": every linear by itself; "fit", "scales", "signs": block by block, and what is tuned then
    block_tokens: int | None
    block_lr: float | None
    block_sign_lr: float | None
    tune: str  # "none", "scales" or "signs"
    tune_tokens: int | None
    tune_minutes: float | None
    tune_seq_len: int
    tune_lr: float
    tune_sign_lr: float | None
    embedding_type: str
    output_type: str
    seed: int
    threads: int
    device: str
    eval_windows: int

    @property
    def metric(self) -> bool:
        """Whether a linear is factorized with the second moment of its inputs."""
        return self.blocks != "none" and self.importance

    @property
    def compressed(self) -> str:
        """How a linear is factorized, as `sensitivity` tells it."""
        return "with moments" if self.metric else "with importance" if self.importance else "plainly"


@dataclass(frozen=True)
class Prepared:
    """What `prepare` has found."""

    source: ModelSource
    settings: Settings  # `bits` is a number by now, `join` names only what this model has
    shapes: dict[str, tuple[int, int]]  # (n_out, n_in) of each linear
    files: dict[str, Path]  # safetensors file of each tensor
    weights: str  # digest of these
    curves: dict | None  # `sensitivity.read` of the file that `--budget` names
    recorded_budget: str  # `settings.budget`, a file by its name and digest
    calib: str  # `settings.calib`, likewise
    windows: dict[str, torch.Tensor]  # int32 [count, length]: "calibration", "blocks", "tuning"; what is used of them
    amounts: dict[str, tuple[int, int]]  # (length, count) that were wanted of each
    evaluation: torch.Tensor | None  # LongTensor [eval_windows, EVALUATION_LENGTH]
    bos: int | None  # token that llama.cpp puts before a text for this model
    tree: Path  # llama.cpp's sources

    def claims(self) -> dict:
        """The settings that decide the linears in a work folder; what only the file depends on is none of them."""
        s = self.settings
        claimed = {"bits": s.bits, "iterations": s.iterations, "seed": s.seed}
        claimed |= {"calib": self.calib, "calib_sequences": s.calib_sequences, "seq_len": s.seq_len}
        if not s.importance:
            claimed |= {"importance": False}
        if s.join != NONE:
            claimed |= {"join": s.join}
        claimed |= {"blocks": s.blocks, "block_tokens": s.block_tokens}
        claimed |= {"block_lr": s.block_lr, "block_sign_lr": s.block_sign_lr}
        if s.budget != "uniform":
            claimed |= {"budget": self.recorded_budget}
        return claimed

    def tuning_claims(self) -> dict:
        """The settings that decide what tuning makes of these linears."""
        s = self.settings
        if s.tune == "none":
            return {"tune": s.tune}
        names = ("tune", "tune_tokens", "tune_minutes", "tune_seq_len", "tune_lr", "tune_sign_lr")
        return {name: getattr(s, name) for name in names}

    def machine_claims(self) -> dict:
        """What the last bits of a result depend on beside the settings: sums are split among threads and processes."""
        s = self.settings
        claimed = {"device": s.device, "threads": s.threads}
        return claimed | ({"processes": parallel.count()} if parallel.count() > 1 else {})

    def file_options(self, recorded: dict) -> dict:
        """What the file has beside its tensors, and in which types: arguments of `write_gguf`."""
        return _file_options(self.source, self.settings, self.tree, recorded)


def prepare(source: ModelSource, settings: Settings, output: Path, work_dir: Path, screen: Screen) -> Prepared:
    """Raises DBFError for all that is wrong with model, settings, text, or the disks of `output` and `work_dir`.

    Nothing is written. A begun work folder has its windows: no text is read again for it, unless it is tuned on more.
    """
    s, folder = settings, source.folder
    config = check_model_dir(folder, source.gguf)
    shapes, files = linear_shapes(folder, s.join), weight_files(folder)
    parameters = check_weights(folder, files, source.name)
    check_types(s.embedding_type, s.output_type, parameters[EMBEDDING][1], HEAD not in parameters)
    joined = effective(s.join, shapes, files)
    if joined != s.join:
        screen.line(f"join             {joined}: {config.get('model_type')} has the rest as one linear already")
        s = replace(s, join=joined)
    context = context_length(folder)
    for option, length in (("--seq-len", s.seq_len), ("--tune-seq-len", s.tune_seq_len)):
        if length > context:
            raise DBFError(f"{option} {length} is more than the model's context of {context} tokens")
    weights = _fingerprint(files)
    curves, recorded_budget = None, s.budget
    if s.budget not in ("uniform", "adaptive"):
        path = Path(s.budget).expanduser()
        curves, recorded_budget = _read_curves(path, weights, s.compressed, shapes), _named_by_content(path)
    tree = source_tree()
    if s.size is not None:
        s = replace(s, bits=_bits_for_size(source, s, shapes, tree))
        screen.line(f"bits             {s.bits:.4f}, for a file of {s.size:,} bytes")
    _check_disk(shapes, parameters, s, output, work_dir)
    tokenizer = _load_tokenizer(source)
    path = Path(s.calib).expanduser()
    calib = _named_by_content(path) if path.is_file() else s.calib
    begun, amounts = (work_dir / WINDOWS).exists(), _amounts(s)
    windows = _kept_windows(work_dir / WINDOWS, amounts) if begun else {}
    windows |= _cut_windows(tokenizer, s, {name: each for name, each in amounts.items() if name not in windows})
    least = min(len(windows[name]) for name in ("calibration", "blocks") if name in windows)
    if least < parallel.count():
        raise DBFError(f"{parallel.count()} processes cannot share {least} windows of text: start fewer")
    bos = calibration.leading_bos(tokenizer)
    evaluation = _evaluation_windows(tokenizer, s.eval_windows, bos) if s.eval_windows else None
    if source.gguf is None and not begun:
        check_convertible(folder, tree)
    return Prepared(
        source=source,
        settings=s,
        shapes=shapes,
        files=files,
        weights=weights,
        curves=curves,
        recorded_budget=recorded_budget,
        calib=calib,
        windows=windows,
        amounts=amounts,
        evaluation=evaluation,
        bos=bos,
        tree=tree,
    )


def _read_curves(path: Path, weights: str, compressed: str, shapes: dict) -> dict:
    curves = sensitivity.read(path, weights, compressed)
    if curves.keys() != shapes.keys():
        raise DBFError(f"{path} was measured with another --join: --budget adaptive measures with this one")
    return curves


def _named_by_content(path: Path) -> str:
    return f"{path.name} {sha256_of(path)[:12]}"


def _file_options(source: ModelSource, settings: Settings, tree: Path, recorded: dict) -> dict:
    return {
        "embedding_type": settings.embedding_type,
        "output_type": settings.output_type,
        "llama_cpp": tree,
        "tokenizer_gguf": source.gguf,
        "name": source.name,
        "source": source.origin,
        "settings": recorded,
    }


def _bits_for_size(source: ModelSource, settings: Settings, shapes: dict, tree: Path) -> float:
    """Bits a weight with which the file has `settings.size` bytes. Raises DBFError where none do."""
    s = settings
    least = uniform_budget(shapes, MIN_BITS)
    smallest = planned_size(
        source.folder,
        {name: (n_out, least[name], n_in) for name, (n_out, n_in) in shapes.items()},
        **_file_options(source, s, tree, asdict(s)),
    )
    wanted = f"--size: {source.name} with {s.embedding_type} embeddings"
    if s.size < smallest:
        raise DBFError(
            f"{wanted} has at least {smallest:,} bytes ({smallest / 2**20:.2f} MiB): give that much, "
            "or an --embedding-type, and where it is a matrix of its own an --output-type, of fewer bits (q4_0)"
        )
    bits = bits_for_size(shapes, s.size, smallest, least)
    if bits > MAX_BITS:
        raise DBFError(f"{wanted} has fewer than {s.size:,} bytes even at {MAX_BITS:g} bits a weight: give less")
    return bits


def _check_disk(shapes: dict, parameters: dict, settings: Settings, output: Path, work_dir: Path) -> None:
    """Raises DBFError where results and what is kept on the way would not fit, or the places cannot be written."""
    s, budget = settings, uniform_budget(shapes, settings.bits)
    linears = sum(linear_bits(*shapes[name], k) // 8 for name, k in budget.items())
    dense = 2 * (sum(map(math.prod, parameters.values())) - sum(a * b for a, b in shapes.values()))
    done = sum(path.stat().st_size for path in work_dir.rglob("*") if path.is_file()) if work_dir.is_dir() else 0
    needs: dict[int, list] = {}  # by disk
    scales = sum(n_out + n_in + budget[name] for name, (n_out, n_in) in shapes.items())
    d, dtype, amounts = parameters[EMBEDDING][1], training_dtype(s.device), _amounts(s)
    effects = blocks = 0
    if s.budget == "adaptive" and not (work_dir / BUDGET).exists():
        length, count = amounts["calibration"]
        effects = sensitivity.disk_bytes(shapes, count, length, d, dtype, s.metric)
    copies = 2 if s.blocks == "signs" else 1  # of the signs: a linear's and its block's
    if "blocks" in amounts:
        length, count = amounts["blocks"]
        blocks = copies * linears + blockwise.disk_bytes(count, length, d, dtype)
    # a snapshot has the signs of now and of the best state, and stands until the next one is complete
    tuning = (copies + (4 if s.tune == "signs" else 0)) * linears + 40 * scales
    for folder, size in ((output.parent, linears + dense), (work_dir, max(effects, blocks, tuning) - done)):
        place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise DBFError(f"cannot write to {folder}: {place} is {'not writable' if place.is_dir() else 'a file'}")
        entry = needs.setdefault(place.stat().st_dev, [folder, 0, shutil.disk_usage(place).free])
        entry[1] += max(0, size)
    for place, size, free in needs.values():
        if size > free:
            raise DBFError(
                f"the disk of {place} is too full: about {size / 2**20:,.0f} MiB are needed, "
                f"{free / 2**20:,.0f} MiB are free"
            )


def _load_tokenizer(source: ModelSource):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.folder, local_files_only=True)
    except Exception as error:  # transformers, tokenizers and sentencepiece each have their own
        reason = (str(error).splitlines() or [""])[0]
        raise DBFError(f"the tokenizer of {source.name} cannot be loaded: {reason}") from None


def _amounts(settings: Settings) -> dict[str, tuple[int, int]]:
    """(length, count) of the windows that are needed: `calibration`, perhaps `blocks` and `tuning`."""
    s = settings
    amounts = {"calibration": (s.seq_len, s.calib_sequences)}
    if s.blocks != "none":
        amounts["blocks"] = (s.seq_len, math.ceil(s.block_tokens / s.seq_len))
    if s.tune != "none":
        tokens = distill.HELD_OUT_TOKENS + (MINUTES_POOL if s.tune_tokens is None else s.tune_tokens)
        amounts["tuning"] = (s.tune_seq_len, math.ceil(tokens / s.tune_seq_len))
    return amounts


def _kept_windows(path: Path, amounts: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """The windows in a work folder's file, without those to tune on where other amounts of these were wanted."""
    windows = read_tensors(path)
    if read_metadata(path).get("tuning") != list(amounts.get("tuning", ())):
        windows.pop("tuning", None)
    return windows


def _cut_windows(tokenizer, settings: Settings, amounts: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """int32 [count, length] of each of `amounts`, out of the calibration text; fewer where it has no more."""
    if not amounts:
        return {}
    needed = max(length * count for length, count in amounts.values())
    text = calibration.read_text(settings.calib, CHARACTERS_PER_TOKEN * needed)
    cut = {
        name: calibration.windows(tokenizer, text, length, count, settings.seed).int()
        for name, (length, count) in amounts.items()
    }
    if "tuning" in cut:
        distill.split(cut["tuning"])  # refuses a text that is too short
    if settings.blocks in ("scales", "signs") and "blocks" in cut and len(cut["blocks"]) < 2 * parallel.count():
        raise DBFError(
            f"--block-tokens {settings.block_tokens} or the calibration text is too little to tune blocks on: "
            f"{len(cut['blocks'])} windows of {settings.seq_len} tokens; "
            "give more, a smaller --seq-len, or --blocks fit"
        )
    return cut


def _evaluation_windows(tokenizer, count: int, bos: int | None) -> torch.Tensor:
    try:
        text = calibration.wiki_text("evaluation")
    except DBFError as error:
        raise DBFError(f"{error}; --eval-windows 0 does without the evaluation text") from None
    return calibration.evaluation_windows(tokenizer, text, EVALUATION_LENGTH, count, bos)


def _fingerprint(files: dict[str, Path]) -> str:
    """Short digest of the weights: names, shapes, and a sample of every file's bytes rather than all of them."""
    digest = hashlib.sha256()
    for path in sorted(set(files.values())):
        size = path.stat().st_size
        with open(path, "rb") as f:
            for part in range(FINGERPRINT_SAMPLES):
                f.seek(size * part // FINGERPRINT_SAMPLES)
                digest.update(f.read(FINGERPRINT_BYTES))
        digest.update(f"{path.name} {size}".encode())
    return digest.hexdigest()[:16]

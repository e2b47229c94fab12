"""`dbf-gguf convert`: the stages in their order, each of them skipped where the work folder has its result.

    check -> importance -> budget -> factorization -> tuning -> GGUF -> evaluation

The file is written and evaluated anew every time. All that can be refused is refused before anything large is computed.
The settings are recorded in the work folder, and a folder is never continued under other ones.

Several processes (`parallel`) do the stages up to the tuning together; the first alone does all before and after them.
"""

import fcntl
import hashlib
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import gguf
import torch
from safetensors import safe_open

from . import blockwise, calibration, distill, importance, lookup, parallel, sensitivity
from .blocks import BlockModel
from .budget import (
    MAX_BITS,
    MIN_BITS,
    adaptive_budget,
    bits_for_size,
    bits_per_weight,
    linear_bits,
    uniform_budget,
    weighted,
)
from .checkpoint import WorkFolder, block_file, read_tensors
from .errors import DBFError
from .evaluate import dense_and_compressed
from .factorize import InputMoment, factorize, product_dtype
from .fetch import sha256_of
from .gguf_file import PARTS, GGUFFile
from .gguf_writer import check_convertible, check_types, planned_size, write_gguf
from .join import NONE, effective, joint_base, stored_names
from .llama_cpp import source_tree
from .machine import available_memory
from .model import apply_work, is_out_of_memory, linear_shapes, load_dense, training_dtype, weight_files
from .screen import Screen
from .source import ModelSource, check_model_dir, context_length
from .threads import side_by_side

EVALUATION_LENGTH = 512  # tokens in an evaluation window
CHARACTERS_PER_TOKEN = 6  # an upper bound on English text, for how much of a hub dataset is streamed
WINDOWS = "windows.safetensors"
BUDGET, EFFECTS = "budget.json", "effects"
MINUTES_POOL = 2_000_000  # tokens to tune on, when the bound is minutes
FINGERPRINT_SAMPLES, FINGERPRINT_BYTES = 64, 1 << 16
SIDE_BY_SIDE_BYTES = 3 << 30  # for all linears that are factorized at a time on a CPU
GROUPED = ("cuda", "mps")  # devices on which equal-shaped linears of a block are factorized in one batch


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


def convert(source: ModelSource, model: str, output: Path, work_dir: Path, settings: Settings, screen: Screen) -> None:
    """Compresses `source` and writes `output`; `model` is what the user called it, for `dbf_gguf.load`.

    Raises DBFError, one line, for all that is wrong with input, settings, folder or disk.
    """
    begin = time.monotonic()
    torch.set_num_threads(settings.threads)
    job = Job(source, settings, screen)
    if parallel.is_main():
        job.check(output, work_dir)
    try:
        with _work_folder(work_dir) as work:
            job.work = work
            if parallel.is_main():
                job.claim(model)
            job.agree()
            job.measure_importance()
            job.allocate()
            job.factorize()
            job.tune()
            parallel.leave()
            if not parallel.is_main():
                return
            job.export(output)
            job.evaluate()
            job.summary(output, time.monotonic() - begin)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise DBFError(
            f"out of memory on {settings.device}: try fewer --threads, a smaller --seq-len, or --device cpu"
        ) from None


@contextmanager
def _work_folder(path: Path):
    """The work folder at `path`, new or begun, held for this process alone; one to read for those beside the first."""
    if not parallel.is_main():
        yield WorkFolder(path, {})
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / ".lock", "w")  # noqa: SIM115, closed below
    except OSError as error:
        raise DBFError(f"cannot write to {path}: {error.strerror or error}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DBFError(f"another convert is at work in {path}: wait for it, or name another --work") from None
        begun = (path / "manifest.json").exists()
        yield WorkFolder.open(path) if begun else WorkFolder.create(path)


def workers_for(threads: int, n_out: int, n_in: int, k: int, memory: int, metric: bool = False) -> int:
    """How many linears of this size are factorized at a time on a CPU: one a thread, as far as memory goes.

    `metric`: with the inputs' second moment. `memory` in bytes; half of it is used, and no more than
    SIDE_BY_SIDE_BYTES: the products of linears that exceed these are long enough for many threads.
    """
    item = product_dtype(torch.device("cpu")).itemsize
    # target in two precisions; five work arrays, signs and their float32 products at the end; k x k matrices
    each = 12 * n_out * n_in + (6 * item + 13) * k * (n_out + n_in) + (3 * item + 12) * k * k
    if metric:  # H and its eigenvectors in two precisions, LAPACK's work; the solver's arrays
        each += (16 + 2 * item) * n_in * n_in + item * n_in * (n_out + 2 * k)
    return max(1, min(threads, min(memory // 2, SIDE_BY_SIDE_BYTES) // each))


class Job:
    """One convert: its inputs, and one method a stage."""

    def __init__(self, source: ModelSource, settings: Settings, screen: Screen):
        self.source, self.settings, self.screen = source, settings, screen
        self.dtype = training_dtype(settings.device)
        self.kind = torch.device(settings.device).type
        self.work: WorkFolder  # set once `check` has passed

    # --- before anything is computed

    def check(self, output: Path, work_dir: Path) -> None:
        from transformers import AutoTokenizer

        s, folder = self.settings, self.source.folder
        config = check_model_dir(folder, self.source.gguf)
        tied = bool(config.get("tie_word_embeddings"))
        check_types(s.embedding_type, s.output_type, config.get("hidden_size", 0), tied)
        self.shapes = linear_shapes(folder, s.join)
        self.files = weight_files(folder)
        joined = effective(s.join, self.shapes, self.files)
        if joined != s.join:
            kind = config.get("model_type")
            self.screen.line(f"join             {joined}: {kind} has the rest as one linear already")
            s = self.settings = replace(s, join=joined)
        parts = [part for name in self.shapes for part in stored_names(f"{name}.weight", self.files)]
        missing = [part for part in parts if part not in self.files]
        if missing:
            raise DBFError(f"{self.source.name} has no weight {missing[0]}: its safetensors are incomplete")
        context = context_length(folder)
        if s.seq_len > context:
            raise DBFError(f"--seq-len {s.seq_len} is more than the model's context of {context} tokens")
        self.weights = _fingerprint(self.files)
        self.recorded_budget, path = s.budget, Path(s.budget).expanduser()
        if s.budget not in ("uniform", "adaptive"):
            self.curves = self._read_curves(path)
            self.recorded_budget = f"{path.name} {sha256_of(path)[:12]}"
        self.tree = source_tree()
        if s.size is not None:
            self.settings = replace(s, bits=self._bits_for_size())
        self.budget = uniform_budget(self.shapes, self.settings.bits)
        self._check_disk(output, work_dir)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers, tokenizers and sentencepiece each have their own
            reason = (str(error).splitlines() or [""])[0]
            raise DBFError(f"the tokenizer of {self.source.name} cannot be loaded: {reason}") from None
        self._read_texts(work_dir)
        if self.source.gguf is None and not (work_dir / WINDOWS).exists():
            check_convertible(folder, self.tree)

    def _bits_for_size(self) -> float:
        """Bits a weight with which the file has `settings.size` bytes. Raises DBFError where none do."""
        s = self.settings
        least = uniform_budget(self.shapes, MIN_BITS)
        smallest = planned_size(
            self.source.folder,
            {name: (n_out, least[name], n_in) for name, (n_out, n_in) in self.shapes.items()},
            **self._file_options(asdict(s)),
        )
        wanted = f"--size: {self.source.name} with {s.embedding_type} embeddings"
        if s.size < smallest:
            raise DBFError(
                f"{wanted} has at least {smallest:,} bytes ({smallest / 2**20:.2f} MiB): give that much, "
                "or an --embedding-type of fewer bits (q4_0)"
            )
        bits = bits_for_size(self.shapes, s.size, smallest, least)
        if bits > MAX_BITS:
            raise DBFError(f"{wanted} has fewer than {s.size:,} bytes even at {MAX_BITS:g} bits a weight: give less")
        self.screen.line(f"bits             {bits:.4f}, for a file of {s.size:,} bytes")
        return bits

    def _check_disk(self, output: Path, work_dir: Path) -> None:
        """Raises DBFError where the results would not fit, or the places cannot be written."""
        linears = sum(linear_bits(*self.shapes[name], k) // 8 for name, k in self.budget.items())
        dense = 2 * (sum(map(_elements, set(self.files.values()))) - sum(a * b for a, b in self.shapes.values()))
        done = sum(path.stat().st_size for path in work_dir.rglob("*") if path.is_file()) if work_dir.is_dir() else 0
        needs: dict[int, list] = {}  # by disk
        scales = sum(n_out + n_in + self.budget[name] for name, (n_out, n_in) in self.shapes.items())
        for folder, size in ((output.parent, linears + dense), (work_dir, linears + 40 * scales - done)):
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

    def _read_texts(self, work_dir: Path) -> None:
        """Calibration, tuning and evaluation windows. A begun work folder has the first two: no text is read again."""
        s = self.settings
        self.calib, path = s.calib, Path(s.calib).expanduser()
        if path.is_file():
            self.calib = f"{path.name} {sha256_of(path)[:12]}"
        if (work_dir / WINDOWS).exists():
            self.windows = read_tensors(work_dir / WINDOWS)
        else:
            self.windows = self._cut_windows()
        least = min(len(self.windows[name]) for name in ("calibration", "blocks") if name in self.windows)
        if least < parallel.count():
            raise DBFError(f"{parallel.count()} processes cannot share {least} windows of text: start fewer")
        if s.eval_windows:
            try:
                text = calibration.wiki_text("evaluation")
            except DBFError as error:
                raise DBFError(f"{error}; --eval-windows 0 does without the evaluation text") from None
            self.evaluation_windows = calibration.evaluation_windows(
                self.tokenizer, text, EVALUATION_LENGTH, s.eval_windows, calibration.leading_bos(self.tokenizer)
            )

    def _cut_windows(self) -> dict[str, torch.Tensor]:
        """int32 `calibration` and `blocks` [count, seq_len], `tuning` [count, tune_seq_len]; what is used of them."""
        s = self.settings
        tokens = 0
        if s.tune != "none":
            tokens = distill.HELD_OUT_TOKENS + (MINUTES_POOL if s.tune_tokens is None else s.tune_tokens)
        needed = max(s.calib_sequences * s.seq_len, s.block_tokens or 0, tokens)
        text = calibration.read_text(s.calib, CHARACTERS_PER_TOKEN * needed)
        windows = {"calibration": (s.seq_len, s.calib_sequences)}
        if s.blocks != "none":
            windows["blocks"] = (s.seq_len, math.ceil(s.block_tokens / s.seq_len))
        if tokens:
            windows["tuning"] = (s.tune_seq_len, math.ceil(tokens / s.tune_seq_len))
        cut = {
            name: calibration.windows(self.tokenizer, text, length, count, s.seed).int()
            for name, (length, count) in windows.items()
        }
        if tokens:
            distill.split(cut["tuning"])  # refuses a text that is too short
        if s.blocks in ("scales", "signs") and len(cut["blocks"]) < 2 * parallel.count():
            raise DBFError(
                f"--block-tokens {s.block_tokens} or the calibration text is too little to tune blocks on: "
                f"{len(cut['blocks'])} windows of {s.seq_len} tokens; give more, a smaller --seq-len, or --blocks fit"
            )
        return cut

    def claim(self, model: str) -> None:
        """Refuses a work folder that was begun under other settings. What only the export uses may change."""
        s, work = self.settings, self.work
        self.claimed = {"bits": s.bits, "iterations": s.iterations, "seed": s.seed, "device": s.device}
        self.claimed |= {"threads": s.threads}  # sums are split by them, so the last bits depend on their number
        self.claimed |= {"calib": self.calib, "calib_sequences": s.calib_sequences, "seq_len": s.seq_len}
        if not s.importance:
            self.claimed |= {"importance": False}
        if s.join != NONE:
            self.claimed |= {"join": s.join}
        self.claimed |= {"blocks": s.blocks, "block_tokens": s.block_tokens}
        self.claimed |= {"block_lr": s.block_lr, "block_sign_lr": s.block_sign_lr, "tune": s.tune}
        if s.tune != "none":
            self.claimed |= {"tune_tokens": s.tune_tokens, "tune_minutes": s.tune_minutes}
            self.claimed |= {"tune_seq_len": s.tune_seq_len, "tune_lr": s.tune_lr}
            self.claimed |= {"tune_sign_lr": s.tune_sign_lr}
        if s.budget != "uniform":
            self.claimed |= {"budget": self.recorded_budget}
        if parallel.count() > 1:  # for the last bits, and the windows of a step
            self.claimed |= {"processes": parallel.count()}
        work.claim("convert", self.claimed | {"model": self.source.origin, "weights": self.weights})
        path = Path(model).expanduser()
        local = self.source.recipe is None and path.exists()
        work.manifest["model"] = str(path.absolute()) if local else model
        work.manifest["budget"] = self.budget
        work.save()
        if not work.has(WINDOWS):
            work.write_tensors(WINDOWS, self.windows)

    def agree(self) -> None:
        """Tells the other processes what the first has found out in `check` and `claim`."""
        names = ("settings", "shapes", "files", "weights", "budget", "curves", "windows")
        found = parallel.from_main(lambda: {name: getattr(self, name, None) for name in names})
        found["settings"] = replace(found["settings"], device=self.settings.device)
        vars(self).update(found)
        self.work.manifest = parallel.from_main(lambda: self.work.manifest)

    # --- stages

    def load_dense(self):
        return load_dense(self.source.folder, self.dtype, self.settings.device, self.settings.join)

    def block_model(self) -> BlockModel:
        return BlockModel(self.source.folder, self.dtype, self.settings.device, self.settings.join)

    def measure_importance(self) -> None:
        if self.work.has("importance.safetensors"):
            self.screen.line("importance: done before")
            return
        begin = time.monotonic()
        windows = self.windows["calibration"].long()
        with self.screen.progress("importance", None) as update:
            tensors = importance.measure(self.block_model(), windows, self.work.path, update)
        self.work.write_tensors("importance.safetensors", tensors)
        parallel.wait()
        seconds = time.monotonic() - begin
        self.screen.line(f"importance: {len(windows)} windows of {windows.shape[1]} tokens, {seconds:.0f} s")

    def _read_curves(self, path: Path) -> dict:
        curves = sensitivity.read(path, self.weights)
        if curves.keys() != self.shapes.keys():
            raise DBFError(f"{path} was measured with another --join: --budget adaptive measures with this one")
        return curves

    def allocate(self) -> None:
        """The widths of an adaptive budget, from curves that are measured here, or were before."""
        s, work = self.settings, self.work
        if s.budget == "uniform":
            return
        if s.budget == "adaptive":
            self._measure_effects()
        curves = self.curves if s.blocks == "none" else weighted(self.curves)
        self.budget = adaptive_budget(self.shapes, s.bits, curves)
        if any(record["k"] != self.budget[name] for name, record in work.manifest["linears"].items()):
            raise DBFError(f"{work.path} was begun by a version that divides bits otherwise: give a new --work folder")
        if parallel.is_main():
            sensitivity.write(work.path / BUDGET, self.weights, self.curves, bits=s.bits, k=self.budget)
        sensitivity.clean(work.path / EFFECTS)
        work.manifest["budget"] = self.budget
        work.save()
        each = [bits_per_weight(self.shapes, {name: k}) for name, k in self.budget.items()]
        total = bits_per_weight(self.shapes, self.budget)
        self.screen.line(f"budget: {min(each):.2f} to {max(each):.2f} bits a linear, {total:.3f} over all")

    def _measure_effects(self) -> None:
        path = self.work.path / BUDGET
        self.curves = parallel.from_main(lambda: sensitivity.read(path, self.weights) if path.exists() else {})
        if self.curves.keys() == self.shapes.keys():
            self.screen.line("budget: measured before")
            return
        widest = uniform_budget(self.shapes, max(sensitivity.CURVE_BITS))
        begin = time.monotonic()
        with self.screen.progress("effects", len(self.shapes)) as update:
            self.curves = sensitivity.measure(
                self.block_model(),
                self.shapes,
                self.windows["calibration"].long(),
                self.work.read_tensors("importance.safetensors"),
                self.work.path / EFFECTS,
                metric=self.settings.blocks != "none" and self.settings.importance,
                workers=self._workers("measuring_workers", widest),
                seed=self.settings.seed,
                report=update,
            )
        self.screen.line(f"effects: {len(self.curves)} linears, {time.monotonic() - begin:.0f} s")

    def _workers(self, key: str = "workers", widths: dict[str, int] | None = None) -> int:
        """How many linears are at work at a time. The last bits depend on it, so the manifest keeps it under `key`."""
        if self.kind != "cpu":
            return 1
        if key not in self.work.manifest:
            memory = available_memory() // parallel.count()
            threads, widths = self.settings.threads, widths or self.budget
            metric = self.settings.blocks != "none"
            workers = min(workers_for(threads, *self.shapes[name], k, memory, metric) for name, k in widths.items())
            self.work.manifest[key] = workers
            self.work.save()
        return self.work.manifest[key]

    def factorize(self) -> None:
        work, total = self.work, len(self.budget)
        done = len(work.linears())
        if done:
            self.screen.line(f"factorization: {done} of {total} linears done before")
        if done == total and self._blocks_done():
            return
        tensors = work.read_tensors("importance.safetensors")
        with self.screen.progress("factorization", total, done) as update:
            if self.settings.blocks == "none":
                units = [u for u in self.units(self.budget) if any(name not in work.manifest["linears"] for name in u)]
                for some in parallel.rounds(units, self._workers()):
                    own = parallel.share(some)
                    self._factorize_units(own, self._read_weight, tensors, None, self._workers(), update)
                return

            def group(weights: dict[str, torch.Tensor], met: InputMoment) -> None:
                moment = met if self.settings.importance else None
                workers = max(1, min(self._workers(), len(weights)))
                self._factorize_units(self.units(weights), weights.get, tensors, moment, workers, update)

            s, tuning = self.settings, None
            if s.blocks in ("scales", "signs"):
                sign_lr = s.block_sign_lr if s.blocks == "signs" else None
                tuning = blockwise.Tuning(s.block_lr, sign_lr, s.seed, s.importance, sign_lr is None and self.lookups)
            report = self._report_block
            blockwise.compress(self.block_model(), self.windows["blocks"].long(), work, group, tuning, report)

    def _blocks_done(self) -> bool:
        if self.settings.blocks in ("none", "fit"):
            return True
        return all(self.work.has(block_file(name.split(".")[2])) for name in self.budget)

    def _report_block(self, index: int, before: float, after: float) -> None:
        self.screen.line(f"blk.{index:<14} tuned, relative error of what it adds {before:.4f} -> {after:.4f}")

    def _factorize_units(self, units: list, weight: Callable, tensors: dict, moment, workers: int, update) -> None:
        """Puts the linears of `units`, and what the other processes do meanwhile, into the work folder."""
        work, finished = self.work, {}
        with side_by_side(workers) as pool:
            # no list of the futures is kept: each holds its factors as long as it lives
            for future in as_completed([pool.submit(self._factorize_unit, u, weight, tensors, moment) for u in units]):
                for name, factors, error, seconds in future.result():
                    finished[name] = {"k": factors.k, "error": error, "seconds": round(seconds, 2)}
                    work.write_linear(name, factors, finished[name])
                    self._report_linear(name, finished[name])
                update(len(work.linears()))
        for others in parallel.gather(finished):
            for name in [name for name in others if name not in finished]:
                work.manifest["linears"][name] = others[name]
                work.save()
                self._report_linear(name, others[name])
                update(len(work.linears()))

    def _report_linear(self, name: str, record: dict) -> None:
        (n_out, n_in), k = self.shapes[name], record["k"]
        bits = linear_bits(n_out, n_in, k) / (n_out * n_in)
        error, seconds = record["error"], record["seconds"]
        base = joint_base(name, self.settings.join) or gguf_name(name)
        self.screen.line(f"{base:<18} k={k:<5} {bits:.2f} bits  err {error:.4f}  {seconds:.1f} s")

    def units(self, names: Iterable[str]) -> list[list[str]]:
        """The linears that are factorized together: one by one on a CPU, on other devices equal ones of a block.

        A unit is done again as a whole, because the arithmetic of a batch may depend on its size.
        """
        units: dict[tuple, list[str]] = {}
        for name in names:
            block = name.split(".")[2] if self.kind in GROUPED else name
            units.setdefault((block, self.shapes[name], self.budget[name]), []).append(name)
        return list(units.values())

    def _read_weight(self, name: str) -> torch.Tensor:
        parts = []
        for key in stored_names(f"{name}.weight", self.files):
            with safe_open(str(self.files[key]), "pt") as f:
                parts.append(f.get_tensor(key))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _factorize_unit(self, names: list[str], weight: Callable, tensors: dict, moment) -> list[tuple]:
        """[(name, factors, error, seconds)] of one unit; weight(name) is [n_out, n_in]."""
        begin = time.monotonic()
        device = self.settings.device
        weights = [weight(name).to(device) for name in names]
        weights = weights[0][None] if len(weights) == 1 else torch.stack(weights)  # which would copy a single one
        try:
            factors, errors = factorize(
                weights,
                self.budget[names[0]],
                **self._importance(names, tensors),
                moment=moment,
                iterations=self.settings.iterations,
                seed=self.settings.seed,
            )
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise DBFError(f"{', '.join(names)}: {error}") from None
        seconds = (time.monotonic() - begin) / len(names)
        return [(n, f, e, seconds) for n, f, e in zip(names, factors, errors.tolist(), strict=True)]

    def _importance(self, names: list[str], tensors: dict) -> dict[str, torch.Tensor]:
        """The arguments of `factorize` that say what matters."""
        if not self.settings.importance:
            return {}
        return {
            argument: torch.stack([tensors[f"{name}.{side}"] for name in names])
            for argument, side in (("importance_in", "input"), ("importance_out", "output"))
        }

    def tune(self) -> None:
        s, work = self.settings, self.work
        if work.has("final.safetensors"):
            self.screen.line("tuning: done before")
            return
        if s.tune == "none":
            scales = {name: work.scales(name) for name in work.linears()}
            flat = {f"{name}.{scale}": value.half() for name, s in scales.items() for scale, value in s.items()}
            flat |= work.final_norms()
            work.write_tensors("final.safetensors", flat)
            return
        begin = time.monotonic()
        teacher, student = self.load_dense(), self.load_dense()
        looked_up = self.lookups and s.tune == "scales"  # no product needs the signs as floating-point numbers then
        apply_work(student, work, torch.int8 if looked_up else self.dtype)
        student.set_input_embeddings(teacher.get_input_embeddings())  # one copy in memory
        student.set_output_embeddings(teacher.get_output_embeddings())
        with self.screen.progress("tuning", None) as update, lookup.lookups(student, self.lookups):

            def report(p: distill.Progress) -> None:
                if p.held_out is not None:
                    self.screen.line(
                        f"tuning {p.step}/{p.steps or '?'}  kl {p.kl:.4f}  held out {p.held_out:.4f}  "
                        f"best {p.best:.4f}  {(time.monotonic() - begin) / 60:.1f} min"
                    )
                update(p.step, p.steps)

            final = distill.distill(
                student,
                teacher,
                self.windows["tuning"].long(),
                work,
                lr=s.tune_lr,
                sign_lr=s.tune_sign_lr,
                seed=s.seed,
                tokens=s.tune_tokens,
                minutes=s.tune_minutes,
                report=report,
            )
        work.write_tensors("final.safetensors", final)

    @cached_property
    def lookups(self) -> bool:
        """Whether products with signs are looked up while scales are tuned; says so, once, where they cannot be."""
        if not lookup.faster(self.settings.device, self.dtype):
            return False
        try:
            lookup.product()
        except DBFError as problem:
            self.screen.line(f"tuning takes longer than it could: {problem}")
            return False
        return True

    def export(self, output: Path) -> None:
        """Writes the GGUF; seconds for a small model, so it is always done anew."""
        s = self.settings
        recorded = self.claimed | {"embedding_type": s.embedding_type, "output_type": s.output_type}
        recorded |= {"budget": self.recorded_budget}
        recorded |= {f"tune_{key}": value for key, value in self.work.manifest.get("tuning", {}).items()}
        self.screen.line(f"writing {output}")
        write_gguf(output, self.source.folder, work=self.work, **self._file_options(recorded))

    def _file_options(self, recorded: dict) -> dict:
        """What the file has beside its tensors, and in which types: the arguments of `write_gguf`."""
        return {
            "embedding_type": self.settings.embedding_type,
            "output_type": self.settings.output_type,
            "llama_cpp": self.tree,
            "tokenizer_gguf": self.source.gguf,
            "name": self.source.name,
            "source": self.source.origin,
            "settings": recorded,
        }

    # --- what came out

    def evaluate(self) -> None:
        """Perplexity of the dense and of the compressed model in PyTorch, into the manifest."""
        s, work = self.settings, self.work
        if not s.eval_windows:
            return
        windows = self.evaluation_windows
        bos = calibration.leading_bos(self.tokenizer)
        with self.screen.progress("perplexity", None) as update:
            dense, compressed = dense_and_compressed(self.block_model(), work, windows, bos, update)
        work.manifest["perplexity"] = {"windows": len(windows), "dense": dense, "compressed": compressed}
        work.save()

    def summary(self, output: Path, seconds: float) -> None:
        with GGUFFile(output) as file:
            linears = file.linears()
            dense = [t for t in file.tensors.values() if t.name.rpartition(".")[2] not in PARTS]
            weights = sum(self.shapes[name][0] * self.shapes[name][1] for name in self.budget)
            weights += sum(t.n_elements for t in dense)
            size = output.stat().st_size
            # the same file with the linears and the other matrices in F16: metadata, norms in F32, all else two bytes
            stored = sum(t.nbytes for t in file.tensors.values())
            norms = sum(t.n_elements for t in dense if len(t.ne) == 1)
            f16 = size - stored + 2 * (weights - norms) + 4 * norms
        assert len(linears) == len(self.budget), "the file lacks linears"
        line = self.screen.line
        bits = bits_per_weight(self.shapes, self.budget)
        line(f"bits a weight  {bits:.3f} over the linears, {8 * size / weights:.3f} over the whole file")
        line(f"size           {size / 2**20:.2f} MiB, F16 {f16 / 2**20:.2f} MiB ({f16 / size:.1f} times)")
        if self.settings.eval_windows:
            p = self.work.manifest["perplexity"]
            line(
                f"perplexity     dense {p['dense']:.2f}, compressed {p['compressed']:.2f} "
                f"({p['compressed'] / p['dense']:.2f} times), {p['windows']} windows of {EVALUATION_LENGTH} tokens"
            )
        line(f"peak memory    {_peak_memory(self.settings.device)}")
        line(f"time           {seconds / 60:.1f} min")
        line(f"written        {output}")


def gguf_name(name: str) -> str:
    """The linear's name in the GGUF file: "blk.7.ffn_up" for "model.layers.7.mlp.up_proj"."""
    mapped = _tensor_names().get_name(name)
    return mapped or name


@lru_cache(maxsize=1)
def _tensor_names():
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1000)


def _peak_memory(device: str) -> str:
    """Of this process and of its largest child, the GGUF writer; of the GPU beside it."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * unit
    text = f"{peak / 2**30:.1f} GiB"
    if device.startswith("cuda"):
        text += f", GPU {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    return text


def _elements(path: Path) -> int:
    """Weights in a safetensors file."""
    with safe_open(str(path), "pt") as f:
        return sum(math.prod(f.get_slice(name).get_shape()) for name in f.keys())  # noqa: SIM118, it is no mapping


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

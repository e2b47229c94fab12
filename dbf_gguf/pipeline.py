"""`dbf-gguf convert`: the stages in their order, each of them skipped where the work folder has its result.

    prepare -> importance -> budget -> factorization -> tuning -> GGUF -> evaluation

The file is written and evaluated anew every time. All that can be refused is refused before anything large is computed.
The settings are recorded in the work folder: what was begun under some is not continued under others.

Several processes (`parallel`) do the stages up to the tuning together; the first alone does all before and after them.
"""

import fcntl
import resource
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import as_completed
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path

import gguf
import torch
from safetensors import safe_open

from . import blockwise, distill, importance, lookup, parallel, sensitivity
from .blocks import BlockModel
from .budget import adaptive_budget, bits_per_weight, linear_bits, uniform_budget, weighted
from .checkpoint import FINAL, WorkFolder, block_file
from .errors import DBFError
from .evaluate import dense_and_compressed
from .factorize import InputMoment, factorize, product_dtype
from .gguf_file import PARTS, GGUFFile
from .gguf_writer import write_gguf
from .join import joint_base, stored_names
from .machine import available_memory
from .model import apply_work, is_out_of_memory, load_dense, training_dtype
from .prepare import BUDGET, EVALUATION_LENGTH, WINDOWS, Prepared, Settings, prepare
from .screen import Screen
from .source import ModelSource
from .threads import side_by_side

EFFECTS = "effects"  # in the work folder, while they are measured
SIDE_BY_SIDE_BYTES = 3 << 30  # for all linears that are factorized at a time on a CPU
GROUPED = ("cuda", "mps")  # devices on which equal-shaped linears of a block are factorized in one batch


def convert(source: ModelSource, model: str, output: Path, work_dir: Path, settings: Settings, screen: Screen) -> None:
    """Compresses `source` and writes `output`; `model` is what the user called it, for `dbf_gguf.load`.

    Raises DBFError, one line, for all that is wrong with input, settings, folder or disk.
    """
    begin = time.monotonic()
    torch.set_num_threads(settings.threads)
    given = parallel.from_main(lambda: prepare(source, settings, output, work_dir, screen))
    advice = "try fewer --threads, a smaller --seq-len, or --device cpu, with another --work"
    with _work_folder(work_dir) as work, _enough_memory(f"on {settings.device}: {advice}"):
        job = Job(given, settings.device, work, screen)
        if parallel.is_main():
            job.claim(model)
        work.manifest = parallel.from_main(lambda: work.manifest)
        job.measure_importance()
        job.allocate()
        job.factorize()
        advice = f"what is compressed is kept in {work_dir}, go on with --device cpu, a smaller --tune-seq-len"
        with _enough_memory(f"on {settings.device} while tuning: {advice} or --tune none"):
            job.tune()
        parallel.leave()
        if not parallel.is_main():
            return
        job.export(output)
        job.evaluate()
        job.summary(output, time.monotonic() - begin)


@contextmanager
def _enough_memory(advice: str):
    """Raises DBFError, with `advice`, instead of the many exceptions that say that memory is at its end."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise DBFError(f"out of memory {advice}") from None


@contextmanager
def _work_folder(path: Path):
    """The work folder at `path`, new or begun, held for this process alone; one to read for those beside the first."""
    if not parallel.is_main():
        yield WorkFolder(path, {})
        return
    WorkFolder.check_free(path)
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


def units(names: Iterable[str], shapes: dict, budget: dict[str, int], device: str) -> list[list[str]]:
    """The linears that are factorized together: one by one on a CPU, on other devices equal ones of a block.

    A unit is done again as a whole, because the arithmetic of a batch may depend on its size.
    """
    found: dict[tuple, list[str]] = {}
    for name in names:
        block = name.split(".")[2] if torch.device(device).type in GROUPED else name
        found.setdefault((block, shapes[name], budget[name]), []).append(name)
    return list(found.values())


class Job:
    """One convert: its inputs, and one method a stage."""

    def __init__(self, given: Prepared, device: str, work: WorkFolder, screen: Screen):
        """device: this process' own."""
        self.given, self.device, self.work, self.screen = given, device, work, screen
        self.settings, self.shapes, self.windows = given.settings, given.shapes, given.windows
        self.dtype = training_dtype(device)
        self.curves = given.curves
        self.budget = uniform_budget(self.shapes, self.settings.bits)

    def claim(self, model: str) -> None:
        """Refuses a work folder that was begun under other settings.

        What only the export uses may change; so may how to tune, as long as nothing is tuned, and the machine between
        the stages.
        """
        work, source = self.work, self.given.source
        given, begun = self.given, work.has(FINAL) or work.has(distill.SNAPSHOT)
        settings, tuning, machine = given.claims(), given.tuning_claims(), given.machine_claims()
        stages = {"convert": settings | {"model": source.origin, "weights": given.weights}, "tuning": tuning}
        if not self._compressed():
            stages["machine"] = machine
        if not work.has(FINAL):
            stages["tuning machine"] = machine
        if not begun:
            recorded = work.manifest["settings"]
            recorded.pop("tuning machine", None)
            if recorded.pop("tuning", tuning) != tuning:
                work.manifest.pop("tuning", None)  # the steps that the minutes came to
        again = f"to tune anew, delete {distill.SNAPSHOT} and {FINAL} in it" if begun else None
        work.claim(stages, {"tuning": again, "tuning machine": again})
        # of each stage the machine that it ran on, which need not be this one
        recorded = work.manifest["settings"]
        self.claimed = settings | tuning | recorded["machine"]
        if self.settings.tune != "none" and recorded["tuning machine"] != recorded["machine"]:
            self.claimed["tuning_machine"] = recorded["tuning machine"]
        amounts = {name: list(each) for name, each in self.given.amounts.items()}
        path = Path(model).expanduser()
        local = source.recipe is None and path.exists()
        work.manifest["model"] = str(path.absolute()) if local else model
        work.save()
        if not work.has(WINDOWS) or work.read_metadata(WINDOWS) != amounts:
            work.write_tensors(WINDOWS, self.windows, amounts)

    # --- stages

    def load_dense(self):
        return load_dense(self.given.source.folder, self.dtype, self.device, self.settings.join)

    def block_model(self) -> BlockModel:
        return BlockModel(self.given.source.folder, self.dtype, self.device, self.settings.join)

    def measure_importance(self) -> None:
        if not self.settings.importance:
            return
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

    def allocate(self) -> None:
        """The widths of all linears; of an adaptive budget from curves that are measured here, or were before."""
        s, work = self.settings, self.work
        if s.budget != "uniform":
            if s.budget == "adaptive":
                self._measure_effects()
            curves = self.curves if s.blocks == "none" else weighted(self.curves)
            self.budget = adaptive_budget(self.shapes, s.bits, curves)
        if any(record["k"] != self.budget[name] for name, record in work.manifest["linears"].items()):
            raise DBFError(f"{work.path} was begun by a version that divides bits otherwise: give a new --work folder")
        work.manifest["budget"] = self.budget
        work.save()
        if s.budget == "uniform":
            return
        if parallel.is_main():
            found = {"bits": s.bits, "k": self.budget}
            sensitivity.write(work.path / BUDGET, self.given.weights, s.compressed, self.curves, **found)
        sensitivity.clean(work.path / EFFECTS)
        each = [bits_per_weight(self.shapes, {name: k}) for name, k in self.budget.items()]
        total = bits_per_weight(self.shapes, self.budget)
        self.screen.line(f"budget: {min(each):.2f} to {max(each):.2f} bits a linear, {total:.3f} over all")

    def _measure_effects(self) -> None:
        path, how = self.work.path / BUDGET, self.settings.compressed
        self.curves = parallel.from_main(
            lambda: sensitivity.read(path, self.given.weights, how, own=True) if path.exists() else {}
        )
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
                self._read_importance(),
                self.work.path / EFFECTS,
                metric=self.settings.metric,
                workers=self._workers("measuring_workers", widest),
                seed=self.settings.seed,
                report=update,
            )
        self.screen.line(f"effects: {len(self.curves)} linears, {time.monotonic() - begin:.0f} s")

    def _workers(self, key: str = "workers", widths: dict[str, int] | None = None) -> int:
        """How many linears are at work at a time. The last bits depend on it, so the manifest keeps it under `key`."""
        if torch.device(self.device).type != "cpu":
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
        if self._compressed():
            return
        tensors = self._read_importance()
        with self.screen.progress("factorization", total, done) as update:
            if self.settings.blocks == "none":
                units = [u for u in self._units(self.budget) if any(name not in work.manifest["linears"] for name in u)]
                for some in parallel.rounds(units, self._workers()):
                    own = parallel.share(some)
                    self._factorize_units(own, self._read_weight, tensors, None, self._workers(), update)
                return

            def group(weights: dict[str, torch.Tensor], met: InputMoment) -> None:
                moment = met if self.settings.metric else None
                workers = max(1, min(self._workers(), len(weights)))
                self._factorize_units(self._units(weights), weights.get, tensors, moment, workers, update)

            s, tuning = self.settings, None
            if s.blocks in ("scales", "signs"):
                sign_lr = s.block_sign_lr if s.blocks == "signs" else None
                tuning = blockwise.Tuning(s.block_lr, sign_lr, s.seed, s.importance, sign_lr is None and self.lookups)
            report = self._report_block
            blockwise.compress(self.block_model(), self.windows["blocks"].long(), work, group, tuning, report)

    def _compressed(self) -> bool:
        """Whether nothing but tuning is left."""
        return len(self.work.manifest["linears"]) == len(self.shapes) and self._blocks_done()

    def _blocks_done(self) -> bool:
        if self.settings.blocks in ("none", "fit"):
            return True
        return all(self.work.has(block_file(name.split(".")[2])) for name in self.budget)

    def _report_block(self, index: int, before: float, after: float) -> None:
        self.screen.line(f"blk.{index:<14} tuned, relative error of what it adds {before:.4f} -> {after:.4f}")

    def _factorize_units(
        self, units: list, weight: Callable, tensors: dict | None, moment, workers: int, update
    ) -> None:
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

    def _units(self, names: Iterable[str]) -> list[list[str]]:
        return units(names, self.shapes, self.budget, self.device)

    def _read_weight(self, name: str) -> torch.Tensor:
        parts = []
        for key in stored_names(f"{name}.weight", self.given.files):
            with safe_open(str(self.given.files[key]), "pt") as f:
                parts.append(f.get_tensor(key))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _factorize_unit(self, names: list[str], weight: Callable, tensors: dict | None, moment) -> list[tuple]:
        """[(name, factors, error, seconds)] of one unit; weight(name) is [n_out, n_in]."""
        begin = time.monotonic()
        device = self.device
        weights = [weight(name).to(device) for name in names]
        weights = weights[0][None] if len(weights) == 1 else torch.stack(weights)  # which would copy a single one
        try:
            factors, errors = factorize(
                weights,
                self.budget[names[0]],
                **importance.arguments(names, tensors),
                moment=moment,
                iterations=self.settings.iterations,
                seed=self.settings.seed,
            )
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise DBFError(f"{', '.join(names)}: {error}") from None
        seconds = (time.monotonic() - begin) / len(names)
        return [(n, f, e, seconds) for n, f, e in zip(names, factors, errors.tolist(), strict=True)]

    def _read_importance(self) -> dict[str, torch.Tensor] | None:
        return self.work.read_tensors("importance.safetensors") if self.settings.importance else None

    def tune(self) -> None:
        s, work = self.settings, self.work
        if work.has(FINAL):
            self.screen.line("tuning: done before")
            return
        if s.tune == "none":
            scales = {name: work.scales(name) for name in work.linears()}
            flat = {f"{name}.{scale}": value.half() for name, s in scales.items() for scale, value in s.items()}
            flat |= work.final_norms()
            work.write_tensors(FINAL, flat)
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
        work.write_tensors(FINAL, final)

    @cached_property
    def lookups(self) -> bool:
        """Whether products with signs are looked up while scales are tuned; says so, once, where they cannot be."""
        if not lookup.faster(self.device, self.dtype):
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
        recorded |= {"budget": self.given.recorded_budget}
        recorded |= {f"tune_{key}": value for key, value in self.work.manifest.get("tuning", {}).items()}
        self.screen.line(f"writing {output}")
        write_gguf(output, self.given.source.folder, work=self.work, **self.given.file_options(recorded))

    # --- what came out

    def evaluate(self) -> None:
        """Perplexity of the dense and of the compressed model in PyTorch, into the manifest."""
        s, work = self.settings, self.work
        if not s.eval_windows:
            return
        windows, bos = self.given.evaluation, self.given.bos
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
        line(f"peak memory    {_peak_memory(self.device)}")
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

"""Distillation: the compressed model's scales and norms are trained to give the dense model's output distribution.

    minimize  mean over tokens of KL(dense ‖ compressed)      over a, m, b of every linear and all norm weights

This is the end-to-end stage of the paper (section 3.4): without it a 2-bit model is of little use, since no linear was
fitted to what the others make of its errors. With `sign_lr` the signs of a few linears at a time are trained along
(the paper's PV-tuning; `signs` tells how): for every EVALUATE_EVERY steps each is chosen with probability SIGN_CHANCE.

How the scales and norms are trained as one vector is in `trainables`.

What makes it fit for a long night:

- Bounded by tokens. Minutes are turned into tokens once, after the first steps have been timed, and the number is
  kept: a run that is interrupted goes on to the same end.
- The windows of step s depend on s and the seed alone, and a snapshot (δ, Adam's moments, the best state) is written at
  every evaluation and every ten minutes. A resumed run repeats the steps since then exactly.
- On a CPU the windows of a step run side by side, a share of the threads each; their gradients are added in a fixed
  order, so that the result depends on the number of threads alone. Meanwhile the dense model runs on the windows of the
  next step: a small model leaves the threads idle now and then.
- Of several processes each takes a share of a step's windows, at least one; so a step may have more of them.
- The state with the lowest KL on windows that are never trained on (blocks may have been fitted to some of their text)
  is what is returned, and once that has not fallen for PATIENCE evaluations it is over. Those of the first half do not
  count: while the rate is high its noise hides what is gained (SmolLM2 at 2 bits with a rate of 2e-3: KL 0.615 after 40
  steps of 1700, 0.642 after 160).
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import nn

from . import parallel
from .checkpoint import SIGNS, WorkFolder
from .errors import DBFError
from .factors import pack_signs, unpack_signs
from .loss import kl_divergence
from .model import DBFLinear, checkpointing
from .signs import SignTraining
from .threads import side_by_side
from .trainables import BETAS, Trainables, learning_rate

# Fewer, larger steps learn less from the same text: SmolLM2 at 2 bits, block by block from little text, held-out KL
# 1.183, after 40,960 tokens in steps of 512 tokens 1.039, in steps of 256 0.932.
STEP_TOKENS = 256
HELD_OUT_TOKENS = 2048
TIMED = range(3, 9)  # steps whose time turns minutes into tokens; the first ones include one-time costs
EVALUATE_EVERY = 40  # steps
PATIENCE = 8  # evaluations in the second half without a new lowest held-out KL
SIGN_CHANCE = 0.1  # that the signs of a linear are trained during the steps up to the next evaluation
SNAPSHOT_SECONDS = 600  # at most this much and one step are lost, or the steps since an evaluation if signs are trained
SNAPSHOT = "tuning.safetensors"
CHECKPOINT_ABOVE = 4 << 30  # bytes of activations for the backward pass, from which on they are recomputed instead


@dataclass
class Progress:
    """What a caller may show after each step."""

    step: int
    steps: int | None  # None until the minutes have been turned into steps
    kl: float  # of the last step's batch, per token
    held_out: float | None  # at an evaluation
    best: float  # held-out KL of the state that would be kept now


def distill(
    student: nn.Module,
    teacher: nn.Module,
    windows: torch.Tensor,
    work: WorkFolder,
    *,
    lr: float,
    sign_lr: float | None = None,
    seed: int,
    tokens: int | None = None,
    minutes: float | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, torch.Tensor]:
    """Trains `student` (with DBFLinears) towards `teacher` on `windows` [count, length] of token ids.

    tokens, minutes  how long; the smaller bound counts, at least one is given
    lr               peak learning rate relative to each vector's RMS
    sign_lr          that of the latent signs; None leaves all signs as they are
    work             where snapshots are kept and, once made, gone on from

    Returns the best state by parameter name: scales float16, norms float32, and the signs that were trained, packed as
    uint8 ("<linear>.signs_a"). Raises DBFError when the text is too short
    to hold windows back, or when the loss is not finite from the start.
    """
    held_out, training, batch = split(windows)
    length = windows.shape[1]
    steps = None if tokens is None else max(1, math.ceil(tokens / (batch * length)))
    run = _Run(student, teacher, work, batch, seed, sign_lr is not None)
    run.restore()
    untimed = steps  # all that the first steps can know, in a resumed run as well
    if "tuning" in work.manifest:  # the minutes were turned into steps before
        minutes, steps = None, work.manifest["tuning"]["steps"]

    timed = []
    recompute = _activation_bytes(student, batch * length) > CHECKPOINT_ABOVE
    pools = side_by_side(run.workers), side_by_side(run.workers, 2)
    with checkpointing(student, recompute), pools[0] as run.pool, pools[1] as run.ahead:
        if run.step == 0:
            run.evaluate(held_out)
            report(Progress(0, steps, run.best, run.best, run.best))
        saved = time.monotonic()
        while (steps is None or run.step < steps) and run.stale < PATIENCE:
            begin = time.monotonic()
            known = untimed if run.step <= max(TIMED) else steps
            kl = run.train(training, learning_rate(run.step, known, lr), learning_rate(run.step, known, sign_lr or 0.0))
            if minutes is not None and run.step - 1 in TIMED:
                timed.append(time.monotonic() - begin)
                if run.step - 1 == max(TIMED):
                    median = parallel.from_main(lambda: sorted(timed)[len(timed) // 2])
                    affordable = max(run.step, int(60 * minutes / median))
                    steps = affordable if steps is None else min(steps, affordable)
                    work.manifest["tuning"] = {"steps": steps}
                    work.save()
            value = None
            if run.step % EVALUATE_EVERY == 0 or run.step == steps:
                value = run.evaluate(held_out)
                if steps is not None and 2 * run.step <= steps:
                    run.stale = 0
            if value is not None or (sign_lr is None and time.monotonic() - saved > SNAPSHOT_SECONDS):
                run.snapshot()
                saved = time.monotonic()
            report(Progress(run.step, steps, kl, value, run.best))
    return run.parameters.tensors(run.best_delta) | run.best_signs


def split(windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Windows [count, length] held out, those trained on, and how many of these a step takes.

    Raises DBFError when the text is too short for both.
    """
    count, length = windows.shape
    batch = max(parallel.count(), STEP_TOKENS // length)
    n_held_out = max(1, min(HELD_OUT_TOKENS // length, count // 8))
    held_out, training = windows[:n_held_out], windows[n_held_out:]
    if len(training) < batch:
        raise DBFError(
            f"the calibration text is too short to tune on: {count} windows of {length} tokens leave "
            f"{len(training)} beside those held out, one step takes {batch}: give a longer text or --tune none"
        )
    return held_out, training, batch


class _Run:
    """The state of one distillation: what a snapshot holds, and the two things that are done with it."""

    def __init__(self, student, teacher, work: WorkFolder, batch: int, seed: int, train_signs: bool):
        self.student, self.teacher, self.work, self.batch, self.seed = student, teacher, work, batch, seed
        self.parameters = Trainables(student)
        self.delta = nn.Parameter(torch.zeros_like(self.parameters.start))
        self.adam = torch.optim.Adam([self.delta], lr=0.0, betas=BETAS, eps=1e-12)
        self.head = teacher.get_output_embeddings().weight.detach()
        self.share = math.ceil(batch / parallel.count())  # windows of a step in this process, at most
        self.on_cpu = self.head.device.type == "cpu"
        self.workers = min(self.share, torch.get_num_threads()) if self.on_cpu else 1
        self.pool: ThreadPoolExecutor  # of so many threads, for the windows of a batch
        self.ahead: ThreadPoolExecutor  # of as many, for the dense model
        self.upcoming: tuple[int, list] = (-1, [])  # a step, and of each of its pieces the windows and their target
        linears = {name: module for name, module in student.named_modules() if isinstance(module, DBFLinear)}
        self.linears = linears if train_signs else {}
        self.targets: list[torch.Tensor] | None = None  # what the teacher makes of the windows held out
        self.chosen: SignTraining | None = None
        self.touched: set[str] = set()  # linears whose signs have been trained
        self.step = 0
        self.stale = 0  # evaluations since the best
        self.best = math.inf
        self.best_delta = self.delta.detach().clone()
        self.best_signs: dict[str, torch.Tensor] = {}

    def hidden(self, model, ids: torch.Tensor) -> torch.Tensor:
        """Output of the model's body, [tokens, d]."""
        return model.model(ids.to(self.head.device), use_cache=False).last_hidden_state.flatten(0, 1)

    def train(self, windows: torch.Tensor, rate: float, sign_rate: float) -> float:
        """One step; returns the KL per token of its batch."""
        if self.linears and self.step % EVALUATE_EVERY == 0:
            self._choose_linears()
        tokens = self.batch * windows.shape[1]
        pieces = self._pieces(windows, self.step)
        if self.on_cpu:
            self.upcoming = self.step + 1, self._pieces(windows, self.step + 1)
        parts = list(self.pool.map(lambda piece: self._gradient(*piece, tokens), pieces))
        kl = parallel.total(sum(part for part, _, _ in parts)) / tokens
        self.step += 1
        if not math.isfinite(kl):
            raise DBFError(f"the tuning loss is not finite at step {self.step}: try --tune none, or more bits")
        self.delta.grad = parallel.total(sum(gradient for _, gradient, _ in parts))
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()
        self.parameters.set(self.delta.detach())
        if self.chosen is not None:
            each = zip(*(signs for _, _, signs in parts), strict=True)
            self.chosen.step((parallel.total(sum(values)) for values in each), sign_rate)
        return kl

    def _choose_linears(self) -> None:
        generator = torch.Generator().manual_seed(self.seed + self.step)
        draws = torch.rand(len(self.linears), generator=generator)
        names = [name for name, draw in zip(self.linears, draws.tolist(), strict=True) if draw < SIGN_CHANCE]
        self.touched.update(names)
        self.chosen = SignTraining(self.linears[name] for name in names)

    def _pieces(self, windows: torch.Tensor, step: int) -> list[tuple[torch.Tensor, Future]]:
        """This process' windows of a step, and the dense model's output for them, in a fixed number of pieces.

        Their gradients are summed in this order: the same result whichever is ready first.
        """
        if self.upcoming[0] == step:
            return self.upcoming[1]
        pieces = parallel.share(windows[self._choice(len(windows), step)]).chunk(self.workers)
        found = [(ids, self.ahead.submit(self._target, ids)) for ids in pieces]
        if not self.on_cpu:  # one after the other, for the sake of memory
            wait([target for _, target in found])
        return found

    def _gradient(self, ids, target: Future, tokens: int) -> tuple[float, torch.Tensor, list[torch.Tensor]]:
        """Sum of the KL over these windows, and the gradients of its `tokens`-th part for δ and the chosen signs."""
        hidden = self.hidden(self.student, ids)
        kl, gradient = kl_divergence(hidden.detach().to(self.head.dtype), target.result(), self.head)
        signs = self.chosen.signs if self.chosen else []
        return kl, *self.parameters.gradient(hidden, (gradient / tokens).to(hidden.dtype), signs)

    @torch.no_grad()
    def _target(self, ids: torch.Tensor) -> torch.Tensor:
        return self.hidden(self.teacher, ids)

    @torch.no_grad()
    def _kl(self, ids: torch.Tensor, target: torch.Tensor) -> float:
        return kl_divergence(self.hidden(self.student, ids).to(self.head.dtype), target, self.head, gradient=False)[0]

    def _choice(self, n: int, step: int) -> torch.Tensor:
        """Indices of a step's windows: every epoch goes through all of them in an order of its own."""
        per_epoch = n // self.batch
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed + epoch))
        return order[place * self.batch : (place + 1) * self.batch]

    def evaluate(self, windows: torch.Tensor) -> float:
        """KL per token on `windows`, always the same; keeps the state when it is the best so far.

        Ends the training of signs.
        """
        if self.chosen is not None:
            self.chosen.close()
            self.chosen = None
        pieces = [p for p in parallel.share(windows).split(math.ceil(self.share / self.workers)) if len(p)]
        if self.targets is None:
            self.targets = list(self.pool.map(self._target, pieces))
        kl = parallel.total(sum(self.pool.map(self._kl, pieces, self.targets))) / windows.numel()
        self.stale += 1
        if kl < self.best:
            self.best, self.stale = kl, 0
            self.best_delta = self.delta.detach().clone()
            self.best_signs = self._signs()
        return kl

    def _signs(self) -> dict[str, torch.Tensor]:
        """The signs that have been trained, packed."""
        return {
            f"{name}.{matrix}": torch.from_numpy(pack_signs(getattr(self.linears[name], matrix).detach()))
            for name in sorted(self.touched)
            for matrix in SIGNS
        }

    def snapshot(self) -> None:
        state = self.adam.state[self.delta]
        tensors = {"delta": self.delta, "best": self.best_delta, "m": state["exp_avg"], "v": state["exp_avg_sq"]}
        tensors |= {f"now.{name}": value for name, value in self._signs().items()}
        tensors |= {f"best.{name}": value for name, value in self.best_signs.items()}
        self.work.write_tensors(SNAPSHOT, tensors, {"step": self.step, "best": self.best, "stale": self.stale})

    def restore(self) -> None:
        """Goes back to the last snapshot, if there is one."""
        if not self.work.has(SNAPSHOT):
            return
        device = self.delta.device
        tensors = {name: value.to(device) for name, value in self.work.read_tensors(SNAPSHOT).items()}
        metadata = self.work.read_metadata(SNAPSHOT)
        self.step, self.best, self.best_delta = metadata["step"], metadata["best"], tensors["best"]
        self.stale = metadata["stale"]
        self.best_signs = {n.removeprefix("best."): v.cpu() for n, v in tensors.items() if n.startswith("best.")}
        for name in [n.removeprefix("now.") for n in tensors if n.startswith("now.")]:
            linear, _, matrix = name.rpartition(".")
            self.touched.add(linear)
            getattr(self.linears[linear], matrix).copy_(unpack_signs(tensors[f"now.{name}"].cpu().numpy()))
        with torch.no_grad():
            self.delta.copy_(tensors["delta"])
        self.adam.state[self.delta] = {
            "step": torch.tensor(float(self.step)),
            "exp_avg": tensors["m"],
            "exp_avg_sq": tensors["v"],
        }
        self.parameters.set(self.delta.detach())


def _activation_bytes(model: nn.Module, tokens: int) -> int:
    """About what the backward pass keeps without recomputation: inputs and outputs of both products of every linear,
    and as much again for norms, attention and activation functions."""
    width = sum(
        2 * (module.signs_b.shape[1] + module.signs_b.shape[0] + module.signs_a.shape[0])
        for module in model.modules()
        if isinstance(module, DBFLinear)
    )
    return 2 * width * tokens * next(model.parameters()).element_size()

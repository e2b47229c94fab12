"""Compression block by block: what a linear is fitted to are the inputs that it will really get.

Two streams of hidden states go through the model, over the same windows: the dense model's, and that of the model
whose blocks before this one are compressed already. Within a block, the linears that read the same input (q, k, v; o;
gate, up; down) are compressed one group after the other. From the inputs x of the dense and x̂ of the compressed
stream come, as means over all tokens,

    H = x̂ᵀ x̂    E = eᵀ x̂    e = W (x − x̂) + r − r̂        r: the residual stream that the output is added to, else 0

and the group's weights are first replaced by those that correct, as far as a linear can, what the compression before
them has done to their input and to the residual stream (the pre-tuning of the dense block, in closed form). By least
squares that would be W + E H⁻¹, but much of it is noise of the sample, of which every group would leave some to the
next. So E is taken from the even and the odd windows apart, E = E₀ + E₁, and each eigenvector of H, in units of the
inputs' RMS, counts by as much as both agree on it:

    W* = W + E Q diag(s / h) Qᵀ        H = Q diag(h) Qᵀ        s = 4 Σ (E₀ Q) ⊙ (E₁ Q) / Σ (E Q)²    within 0 … 1

where the sums are over the rows; a single window gives no correction. (From 98,304 tokens, at four blocks of SmolLM2,
this takes 1.1 to 2.3 times as much off ‖e‖² of other text as a ridge of 1, and no less than the best from 0.1 up.)

Then W* is factorized with H as the metric of its inputs, so that the factors' error is small where inputs are large.

Once a stream's attention is what it will be, the states behind it take the place of the block's input: the passages for
the later groups begin there.

One block is in memory at a time, dense and with what is compressed of it so far, and neither while a linear is
factorized, which takes as much again: the block is read anew afterwards. The streams are kept by `blocks.Activations`,
in memory or in a file. A resumed run takes the streams through the finished blocks again, which costs seconds a block.
Of several processes each has a share of the windows in its streams, and factorizes a share of each group; where linears
are joined a group is a single one.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from . import blocktune, parallel
from .blocks import MIDDLE, Activations, BlockModel, apply_work, block_prefix, linears
from .checkpoint import SIGNS, WorkFolder, block_file
from .errors import DBFError
from .factorize import InputMoment
from .factors import pack_signs
from .importance import token_weights
from .lookup import lookups
from .model import DBFLinear
from .threads import in_order, side_by_side

LEAST_EIGENVALUE = 1e-3  # of the mean one, added to h
MEMORY_BYTES = 1 << 28  # of each stream, before it is kept in a file
# the module whose input a linear's output is added to; None: the block's input
RESIDUAL = {"o_proj": None, "down_proj": MIDDLE}
TOKEN_CAP = 100.0  # times the median energy of a token's input; a token above it counts as if it had that much


def disk_bytes(count: int, length: int, d: int, dtype: torch.dtype) -> int:
    """What the streams of `count` windows of `length` tokens keep in the work folder; d, dtype: of hidden states."""
    processes = parallel.count()
    return 2 * processes * Activations.on_disk(math.ceil(count / processes), length, d, dtype, MEMORY_BYTES)


class _Reached(Exception):
    """Ends a passage through a block at the input that was asked for."""


class Streams:
    """Hidden states before the current block, of the dense model and of the one compressed so far.

    windows [count, length] of token ids; this process keeps the states of those whose numbers are in `own`. `workers`
    windows are run side by side. Within a block a stream may be `halfway`, then it has the states between attention and
    MLP; with `keep_inputs` that of the compressed model never is.
    """

    def __init__(self, model: BlockModel, windows: torch.Tensor, work: WorkFolder, keep_inputs: bool = False):
        self.model, (self.count, self.length) = model, windows.shape
        self.own = parallel.share(range(self.count))
        windows = parallel.share(windows)
        shape = (*windows.shape, model.config.hidden_size)
        self.workers = model.workers(windows.shape[1], backward=False)
        self.dense, self.compressed = (Activations(*shape, model.dtype, work.path, MEMORY_BYTES) for _ in range(2))
        self.keep_inputs = keep_inputs
        self.halfway: set[Activations] = set()
        for number, window in enumerate(windows):
            hidden = model.embed(window[None])
            for stream in (self.dense, self.compressed):
                stream.write(slice(number, number + 1), hidden)
        model.release()

    def place(self, number: int) -> slice:
        """Where the streams have window `number`, one of `own`."""
        here = self.own.index(number)
        return slice(here, here + 1)

    def advance(self, index: int, stream: Activations, block: nn.Module) -> None:
        """Takes one of the streams through block `index`, or what is left of it."""

        @torch.no_grad()
        def one(number: int) -> None:
            place = self.place(number)
            stream.write(place, self._run(index, block, stream, stream.read(place)))

        with side_by_side(self.workers) as pool:
            list(pool.map(one, self.own))
        self.halfway.discard(stream)

    def _run(self, index: int, block: nn.Module, stream: Activations, hidden: torch.Tensor) -> torch.Tensor:
        """The output of block `index` on states of the stream."""
        if stream in self.halfway:
            return self.model.run_mlp(block, hidden)
        return self.model.run(index, block, hidden)

    def moments(
        self, index: int, dense: nn.Module, compressed: nn.Module, group: list[str], advance_dense: bool = False
    ):
        """H [n_in, n_in] and (E₀, E₁) [2, n_out, n_in], float32, of a group of linears of block `index`, and True.

        Without a residual stream (x − x̂)ᵀ x̂ [2, n_in, n_in], which W has yet to be multiplied with, and False.

        The groups of a block are asked for in their order, each once; a resumed run leaves out the first ones.
        advance_dense: the dense stream, which passes most of the block for its last group, goes on to the block's end.
        """
        first = group[0].removeprefix(block_prefix(index))
        modules = dict(dense.named_modules())
        residual = RESIDUAL.get(first.rpartition(".")[2], first)
        if len(group) > 1 or residual not in (None, first) and residual not in modules:
            residual = first
        at_output = residual != first
        in_mlp = MIDDLE in modules and first.startswith("mlp.")
        last, comes_halfway = {self.dense: first, self.compressed: first}, set()
        if in_mlp:
            comes_halfway = {self.dense} if self.keep_inputs else {self.dense, self.compressed}
        elif MIDDLE in modules and residual is None:
            last[self.dense], comes_halfway = MIDDLE, {self.dense}
        if advance_dense:
            last[self.dense] = None
            comes_halfway.discard(self.dense)
        comes_halfway -= self.halfway
        taps = {MIDDLE if comes_halfway else first, residual, first} - {None}
        local = threading.local()  # .seen: the inputs that this thread's passage has met; .last: the one it ends at

        @torch.no_grad()
        def one(number: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
            found = []
            for stream, block in ((self.dense, dense), (self.compressed, compressed)):
                place = self.place(number)
                hidden = stream.read(place).to(self.model.device)
                local.seen, local.last = {}, last[stream]
                with contextlib.suppress(_Reached):
                    stream.write(place, self._run(index, block, stream, hidden))
                if stream in comes_halfway:
                    stream.write(place, local.seen[MIDDLE])
                rest = (hidden if residual is None else local.seen[residual]) if at_output else None
                found.append((local.seen[first].flatten(0, 1), None if rest is None else rest.flatten(0, 1)))
            return found

        weight = dense.get_submodule(first).weight
        n_in = weight.shape[1]
        h = torch.zeros(n_in, n_in, device=self.model.device)
        halves = torch.zeros(2, len(weight) if at_output else n_in, n_in, device=self.model.device)
        with tapped((dense, compressed), taps, local), side_by_side(self.workers) as pool:
            passages = in_order(pool, one, self.own, 2 * self.workers)
            for number, ((x, r), (x_hat, r_hat)) in zip(self.own, passages, strict=True):
                weighted = x_hat * self.token_weights(x_hat)
                missing = x - x_hat
                if at_output:
                    missing = nn.functional.linear(missing, weight).add_(r).sub_(r_hat)
                h += x_hat.T @ weighted
                halves[number % 2] += missing.T @ weighted
        self.halfway |= comes_halfway
        if advance_dense:
            self.halfway.discard(self.dense)
        tokens = self.count * self.length
        return parallel.total(h).div_(tokens), parallel.total(halves).div_(tokens), at_output

    @staticmethod
    def token_weights(x: torch.Tensor) -> torch.Tensor:
        """Weights [tokens, 1] that bound what a token of x [tokens, n] counts for, by TOKEN_CAP.

        A few tokens, the first above all, are up to a hundred thousand times as large as the rest where later blocks
        attend to them. Without a bound H would be theirs alone; with a low one the factors would not make them.
        """
        return token_weights(x, TOKEN_CAP).to(x.dtype)


def corrected(weights: dict[str, torch.Tensor], moment: InputMoment, halves: torch.Tensor, at_output: bool):
    """{name: W* [n_out, n_in]} of the weights of a group, float32; see the formula above.

    moment of the inputs x̂; halves and at_output as `Streams.moments` returns them.
    """
    units, (values, basis) = moment.importance, moment.decomposition()
    h, found = moment.undamped(values).clamp_min(0) + LEAST_EIGENVALUE, {}
    for name, weight in weights.items():
        w = weight.float()
        first, second = ((half if at_output else w @ half).div(units) @ basis for half in halves)
        both = first + second
        agreement = 4 * first.mul_(second).sum(dim=0)
        del first, second  # as large as the weight
        share = (agreement / both.square().sum(dim=0).clamp_min(1e-30)).clamp(0, 1)
        found[name] = (both.mul_(share / h) @ basis.T).div_(units).div_(moment.size).add_(w)
    return found


def groups(model: BlockModel, index: int, block: nn.Module, hidden: torch.Tensor) -> list[list[str]]:
    """The linears of a block that read the same input, by name in the model, in the order of their use.

    hidden [1, length, d] is any input of the block.
    """
    order: list[tuple[torch.Tensor, list[str]]] = []

    def note(name: str, _module, inputs) -> None:
        if order and order[-1][0] is inputs[0]:
            order[-1][1].append(name)
        else:
            order.append((inputs[0], [name]))

    handles = [m.register_forward_pre_hook(partial(note, name)) for name, m in linears(index, block).items()]
    with torch.no_grad():
        model.run(index, block, hidden)
    for handle in handles:
        handle.remove()
    return [names for _, names in order]


@dataclass(frozen=True)
class Tuning:
    """How each block is tuned once its linears are compressed, see `blocktune`."""

    lr: float
    sign_lr: float | None  # None: the signs stay
    seed: int
    importance: bool = True  # weight the outputs by their gradients
    lookups: bool = False  # look products with signs up, see `lookup`


def compress(
    model: BlockModel,
    windows: torch.Tensor,
    work: WorkFolder,
    factorize: Callable[[dict[str, torch.Tensor], InputMoment], None],
    tuning: Tuning | None = None,
    report: Callable[[int, float, float], None] = lambda index, before, after: None,
) -> None:
    """Compresses every linear of every block, in their order, over `windows` [count, length].

    factorize  gets {name: W* [n_out, n_in]} of this process' share of a group and the moment of their inputs; when it
               returns, every linear of the group is in the work folder
    tuning     None for none
    report     gets a block's number and the relative error of its output before and after tuning
    """
    streams = Streams(model, windows, work, keep_inputs=tuning is not None)
    for index in range(len(model)):
        order = groups(model, index, model.block(index), streams.dense.read(slice(0, 1)))
        done: list[str] = []
        at_end = index + 1 == len(model) and tuning is None
        advanced = False
        for group in order:
            if any(name not in work.manifest["linears"] for name in group):
                advanced = group is order[-1] and not at_end
                # all of them, so that a resumed run computes on as many threads and ends in the same bits
                factorize(*_wanted(model, streams, index, work, done, group, advanced))
            done += group
        if at_end:
            return
        if not advanced:
            streams.advance(index, streams.dense, model.block(index))
        if tuning is None:
            compressed = _partly_compressed(model, index, work, done)
        else:
            compressed = model.block(index)
            apply_work(index, compressed, work, model.dtype)
            if not work.has(block_file(index)):
                last = torch.ones(model.config.hidden_size)
                if tuning.importance:
                    last = work.read_tensors("importance.safetensors")[f"{order[-1][-1]}.output"]
                workers = model.workers(windows.shape[1], backward=True)
                with side_by_side(workers) as pool, lookups(compressed, tuning.lookups):
                    options = {"lr": tuning.lr, "sign_lr": tuning.sign_lr, "seed": tuning.seed}
                    values, before, after = blocktune.tune(model, index, compressed, streams, last, pool, **options)
                _store(work, index, compressed, values, tuning.sign_lr is not None)
                parallel.wait()
                report(index, before, after)
        if index + 1 < len(model):
            streams.advance(index, streams.compressed, compressed)
        del compressed  # else it would be kept through the next block


def _partly_compressed(model: BlockModel, index: int, work: WorkFolder, names: list[str]) -> nn.Module:
    """Block `index` in which the weights of the linears in `names` are what their compression represents.

    For passages alone: over this many tokens they take half the time of the products with two factors.
    """
    block = model.block(index)
    for name in names:
        weight = linears(index, block)[name].weight
        weight.data.copy_(work.factors(name).dense(device=weight.device))
    return block


def _wanted(
    model: BlockModel,
    streams: Streams,
    index: int,
    work: WorkFolder,
    done: list[str],
    group: list[str],
    advance_dense: bool,
):
    """{name: W*} of this process' share of a group, and the moment of its inputs.

    The linears in `done` are compressed already. advance_dense: see `Streams.moments`. Raises DBFError for a model that
    computes numbers that are not finite.
    """
    dense = model.block(index)
    compressed = _partly_compressed(model, index, work, done)
    h, halves, at_output = streams.moments(index, dense, compressed, group, advance_dense)
    del compressed  # before the weights of the group are made
    if not (h.isfinite().all() and halves.isfinite().all()):
        raise DBFError(f"{group[0]}: its inputs are not finite: the model's weights are damaged")
    weights = {name: linears(index, dense)[name].weight for name in parallel.share(group)}
    moment = InputMoment(h)
    return corrected(weights, moment, halves, at_output), moment


def _store(work: WorkFolder, index: int, block: nn.Module, values: dict[str, torch.Tensor], signs: bool) -> None:
    prefix = block_prefix(index)
    tensors = {prefix + name: value for name, value in values.items()}
    if signs:
        for name, module in block.named_modules():
            if isinstance(module, DBFLinear):
                for matrix in SIGNS:
                    packed = pack_signs(getattr(module, matrix).to(torch.int8).cpu())
                    tensors[f"{prefix}{name}.{matrix}"] = torch.from_numpy(packed)
    work.write_tensors(block_file(index), tensors)


@contextlib.contextmanager
def tapped(blocks: tuple[nn.Module, ...], names: Iterable[str], local: threading.local) -> Iterator[None]:
    """Within, inputs of the named modules are put into `local.seen`; at the one called `local.last` a passage ends."""

    def note(name: str, _module, inputs) -> None:
        local.seen[name] = inputs[0]
        if name == local.last:
            raise _Reached

    handles = [b.get_submodule(name).register_forward_pre_hook(partial(note, name)) for b in blocks for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

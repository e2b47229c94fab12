"""How much the model suffers from each linear's compression: what an adaptive budget is computed from.

Every linear is factorized by a few iterations at the width k₁ of 2 bits a weight, with the second moment of its
inputs as metric where the compression itself has it (`blockwise`). Put into the otherwise dense model, it gives the
effect

    effect(k₁) = KL(dense ‖ dense but for this linear)        mean over the tokens of a few calibration windows

At the width k₀ of 1 bit the KL is taken to be larger by the same factor for all, as the factorization errors nearly
are: of 120 linears of SmolLM2 with the metric, the error at 2 bits was 0.40 to 0.60 of that at 1 bit. Effects
themselves differ a hundredfold. The two points are the linear's curve, from which `adaptive_budget` allocates any
number of bits: the widths do not depend on the wanted size.

The KL, not the loss on the text, because it is what the tuning minimizes, and because it is 0 for the dense model: a
next-token loss may fall by chance when a linear is damaged. Against the dense model, not a compressed one, because at
few bits and before tuning the latter predicts next to nothing, in which the differences drown.

The metric matters: joint gate and up of SmolLM2's first block have an effect of 1.27 without it and 0.15 with it.
Measured without, they would take bits from all others that the block-by-block compression does not need there.

One block is in memory at a time. For each linear the hidden states behind its block, the one that it has changed, are
kept, and all of them go through the next block before it is let go; at the end they are compared with the dense ones.
The factors are stored meanwhile, so that a resumed run makes none of them twice. Of several processes each measures a
share of the linears, and takes a share of the windows through the model for the second moments.
"""

import json
import math
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import as_completed
from functools import partial
from pathlib import Path

import torch
from torch import nn

from . import parallel
from .blocks import Activations, BlockModel, block_prefix, linears, replace
from .blockwise import MEMORY_BYTES, Streams, groups, tapped
from .budget import Curve, linear_bits, uniform_budget
from .checkpoint import WorkFolder, write_atomically
from .errors import DBFError
from .factorize import InputMoment, factorize
from .factors import BLOCK
from .importance import arguments
from .loss import Pieces, kl_of_logs, log_probabilities
from .threads import in_order, side_by_side

CURVE_BITS = (1.0, 2.0)  # the effect is measured at the second
FALL = 0.45  # effect(k₁) / effect(k₀)
# Enough to compare linears: those looked at have 1.4 to 1.7 times the effect of 30 iterations. After 8 one of SmolLM2,
# q, k and v of block 18, still had ten to two hundred times.
ITERATIONS = 12
TOKENS, LENGTH = 1024, 256  # of calibration text for the KL, in windows of at most LENGTH
STATE_BYTES = 1 << 28  # of the hidden states behind all changed blocks, before they are kept in a file
LEAST_EFFECT = 1e-9  # below it the KL is rounding
COMPRESSED = {
    "with moments": "block by block",  # and with importance
    "with importance": "alone (--blocks none)",
    "plainly": "with --no-importance",
}
FORMAT = 3


def measure(
    model: BlockModel,
    shapes: dict[str, tuple[int, int]],
    windows: torch.Tensor,
    importance: dict[str, torch.Tensor] | None,
    folder: Path,
    *,
    metric: bool,
    workers: int,
    seed: int,
    report: Callable[[int], None] = lambda done: None,
) -> dict[str, Curve]:
    """The curve of every block linear of the dense `model`.

    shapes      (n_out, n_in) of the linears, in the model's order
    windows     calibration windows [count, length], token ids
    importance  that of `importance.measure`; None: all rows and columns count alike
    folder      where factors, and activations too large for memory, are kept until `clean`; a run with the same
                arguments goes on with what it finds there
    metric      factorize with the second moment of the inputs
    workers     how many linears at a time
    report      gets the number of linears that are factorized

    Memory: one block, and for each worker what factorizing one linear takes. Raises DBFError for weights that cannot be
    factorized.
    """
    done = _open(folder)
    low, high = (uniform_budget(shapes, bits) for bits in CURVE_BITS)
    widths = {name: (low[name], max(low[name] + BLOCK, high[name])) for name in shapes}
    short = windows[: math.ceil(TOKENS / min(LENGTH, windows.shape[1])), :LENGTH]
    hidden = model.embed(short)  # before the current block
    stream = _Stream(model, windows, folder) if metric else None
    model.release()
    own = parallel.share(list(shapes))
    states = Activations(len(own) * len(short), *hidden.shape[1:], model.dtype, folder, STATE_BYTES)
    places = {name: slice(i * len(short), (i + 1) * len(short)) for i, name in enumerate(own)}

    lock = threading.Lock()  # of the work folder

    def compress(index: int, name: str, moment: InputMoment | None) -> None:
        """Stores the factors of one linear, at once: what is finished when a run ends before its time is not lost."""
        weight = linears(index, model.block(index))[name].weight  # the rest of the block is let go
        try:
            (found,), _ = factorize(
                weight[None],
                widths[name][1],
                **arguments([name], importance),
                moment=moment,
                iterations=ITERATIONS,
                seed=seed,
            )
        except (ValueError, torch.linalg.LinAlgError) as problem:
            raise DBFError(f"{name}: {problem}") from None
        with lock:
            done.write_linear(name, found, {"k": widths[name][1]})
            report(len(done.manifest["linears"]))

    @torch.no_grad()
    def begin(index: int, name: str) -> None:
        block = model.block(index)
        replace(index, block, name, done.factors(name), model.dtype)
        states.write(places[name], model.run(index, block, hidden))

    @torch.no_grad()
    def advance(index: int, block: nn.Module, name: str) -> None:
        states.write(places[name], model.run(index, block, states.read(places[name])))

    passages = model.workers(short.shape[1] * len(short), backward=False)
    begun: list[str] = []
    for index in range(len(model)):
        here = [name for name in shapes if name.startswith(block_prefix(index))]
        block = model.block(index)
        new = [name for name in here if name not in done.manifest["linears"]]  # the same in all processes
        new.sort(key=lambda name: -shapes[name][1])  # a second moment is freed with its linear: the largest first
        moments = stream.advance(index, block, groups(model, index, block, hidden[:1]) if new else []) if stream else {}
        del block
        with side_by_side(workers) as pool:
            running = {pool.submit(compress, index, n, moments.get(n)) for n in new if n in places}
            del moments
            for future in as_completed(running):
                future.result()
        if new:
            for others in parallel.gather(done.manifest["linears"]):
                done.manifest["linears"] |= others
            done.save()
        block, mine = model.block(index), [name for name in here if name in places]
        with side_by_side(passages) as pool:
            list(pool.map(partial(advance, index, block), begun))
            list(pool.map(partial(begin, index), mine))
            hidden = pool.submit(torch.no_grad()(model.run), index, block, hidden).result()
        begun += mine

    effects = _effects(model, hidden, states, places, passages)
    for others in parallel.gather(effects):
        effects |= others
    return {name: ((k_0, effects[name] / FALL), (k_1, effects[name])) for name, (k_0, k_1) in widths.items()}


def disk_bytes(
    shapes: dict[str, tuple[int, int]], count: int, length: int, d: int, dtype: torch.dtype, metric: bool
) -> int:
    """What `measure` keeps in its folder at most, with `count` windows of `length` tokens.

    d, dtype    of the model's hidden states
    metric      as for `measure`
    """
    widths = uniform_budget(shapes, CURVE_BITS[1])
    factors = sum(linear_bits(*shapes[name], k) // 8 for name, k in widths.items())
    short, processes = min(LENGTH, length), parallel.count()
    linears, windows = math.ceil(len(shapes) / processes), min(count, math.ceil(TOKENS / short))
    states = Activations.on_disk(linears * windows, short, d, dtype, STATE_BYTES)
    if metric:
        states += Activations.on_disk(math.ceil(count / processes), length, d, dtype, MEMORY_BYTES)
    return factors + processes * states


def clean(folder: Path) -> None:
    """Removes what `measure` has left in `folder`, once its result is stored."""
    parallel.wait()
    if parallel.is_main():
        shutil.rmtree(folder, ignore_errors=True)


def _open(folder: Path) -> WorkFolder:
    """The folder as the first process finds it, which may have written more before another one looks."""

    def manifest() -> dict:
        begun = (folder / "manifest.json").exists()
        return (WorkFolder.open(folder) if begun else WorkFolder.create(folder)).manifest

    return WorkFolder(folder, parallel.from_main(manifest))


@torch.no_grad()
def _effects(
    model: BlockModel, hidden: torch.Tensor, states: Activations, places: dict[str, slice], workers: int
) -> dict[str, float]:
    """KL per token of the states at `places` against the dense ones [count, length, d], all behind the last block.

    Raises DBFError where it is not finite.
    """
    norm, head = model.norm, model.head

    @torch.no_grad()
    def one(number: int, log_p: Pieces, place: slice) -> float:
        log_q = log_probabilities(norm(states.read(place.start + number).to(head.device)), head)
        return kl_of_logs(log_p, log_q, gradient=False)

    totals = dict.fromkeys(places, 0.0)
    with side_by_side(workers) as pool:
        for number, window in enumerate(hidden):
            log_p = log_probabilities(norm(window), head)
            found = pool.map(partial(one, number, log_p), places.values())
            for name, kl in zip(places, found, strict=True):
                totals[name] += kl
    lost = [name for name, total in totals.items() if not math.isfinite(total)]
    if lost:
        raise DBFError(f"with {lost[0]} compressed the model's output is not finite: its weights are damaged")
    return {name: max(total / hidden[..., 0].numel(), LEAST_EFFECT) for name, total in totals.items()}


class _Stream:
    """Dense hidden states before the current block, of this process' share of windows [count, length] of token ids."""

    def __init__(self, model: BlockModel, windows: torch.Tensor, folder: Path):
        self.model, self.tokens = model, windows.numel()
        windows = parallel.share(windows)
        self.workers = model.workers(windows.shape[1], backward=False)
        self.states = Activations(*windows.shape, model.config.hidden_size, model.dtype, folder, MEMORY_BYTES)
        for number, window in enumerate(windows):
            self.states.write(slice(number, number + 1), model.embed(window[None]))

    def advance(self, index: int, block: nn.Module, order: list[list[str]]) -> dict[str, InputMoment]:
        """Takes the states through block `index`; what the linears in the groups of `order` have met on the way."""
        local, first = threading.local(), [group[0].removeprefix(block_prefix(index)) for group in order]
        widths = [block.get_submodule(name).weight.shape[1] for name in first]
        sums = [torch.zeros(n, n, device=self.model.device) for n in widths]

        @torch.no_grad()
        def one(number: int) -> list[torch.Tensor]:
            place = slice(number, number + 1)
            local.seen, local.last = {}, None
            self.states.write(place, self.model.run(index, block, self.states.read(place)))
            return [local.seen[name].flatten(0, 1) for name in first]

        with tapped((block,), first, local), side_by_side(self.workers) as pool:
            for inputs in in_order(pool, one, range(len(self.states)), 2 * self.workers):
                for total, x in zip(sums, inputs, strict=True):
                    total += x.T @ (x * Streams.token_weights(x))
        found = [InputMoment(parallel.total(total).div_(self.tokens)) for total in sums]
        return {name: moment for group, moment in zip(order, found, strict=True) for name in group}


def write(path: Path, weights: str, compressed: str, curves: dict[str, Curve], **allocation) -> None:
    """Stores the curves of the model with the fingerprint `weights` as JSON, and `allocation` beside them.

    compressed  how the linears were, a key of COMPRESSED
    """
    stored = {"format": FORMAT, "weights": weights, "compressed": compressed, "curves": curves}
    text = json.dumps(stored | allocation, indent=1)
    write_atomically(path, lambda part: part.write_text(text))


def read(path: Path, weights: str, compressed: str, own: bool = False) -> dict[str, Curve]:
    """The curves stored in `path`; `own`: in the work folder that they are read for.

    Raises DBFError when it is no such file, or was measured on a model with other weights, or on linears that were
    not `compressed` so.
    """
    advice = "delete it, and it is measured anew" if own else "give uniform, adaptive, or a work folder's budget.json"
    try:
        stored = json.loads(path.read_text())
        if stored["format"] != FORMAT:
            raise ValueError("another format")
        found, how = stored["weights"], COMPRESSED[stored["compressed"]]
        curves = {name: ((int(a), float(b)), (int(c), float(d))) for name, ((a, b), (c, d)) in stored["curves"].items()}
        if not all(0 < a < c and 0 < d < b < math.inf for (a, b), (c, d) in curves.values()):
            raise ValueError("an effect that does not fall")
    except OSError as error:
        raise DBFError(f"{path} cannot be read ({error.strerror}): {advice}") from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        raise DBFError(f"{path} is no budget: {advice}") from None
    if found != weights:
        raise DBFError(f"{path} was measured on another model: --budget adaptive measures this one")
    if how != COMPRESSED[compressed]:
        raise DBFError(
            f"{path} holds effects of linears compressed {how}, here they are compressed {COMPRESSED[compressed]}: "
            "give the same, or --budget adaptive, which measures these"
        )
    return curves

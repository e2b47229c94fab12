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
"""

import copy
import json
import math
import threading
from collections.abc import Callable, Collection
from concurrent.futures import as_completed
from pathlib import Path

import torch
from torch import nn

from .blocks import Activations, BlockModel, block_prefix, linears, replace
from .blockwise import MEMORY_BYTES, Streams, groups, tapped
from .budget import Curve, uniform_budget
from .checkpoint import write_atomically
from .errors import DBFError
from .factorize import InputMoment, factorize
from .factors import BLOCK
from .loss import kl_divergence
from .threads import in_order, side_by_side

CURVE_BITS = (1.0, 2.0)  # the effect is measured at the second
FALL = 0.45  # effect(k₁) / effect(k₀)
ITERATIONS = 8  # enough to compare linears
TOKENS, LENGTH = 1024, 256  # of calibration text for the KL, in windows of at most LENGTH
LEAST_EFFECT = 1e-9  # below it the KL is rounding
FORMAT = 1


def measure(
    model: BlockModel,
    windows: torch.Tensor,
    importance: dict[str, torch.Tensor],
    folder: Path,
    *,
    metric: bool,
    known: Collection[str],
    workers: int,
    seed: int,
    record: Callable[[str, Curve], None],
) -> None:
    """Measures every block linear of the dense `model` that is not in `known`, and tells `record` each curve.

    windows     calibration windows [count, length], token ids
    importance  that of `importance.measure`
    folder      where activations are kept, should they be too large for memory
    metric      factorize with the second moment of the inputs
    workers     how many linears at a time; `record` is called by one thread alone

    Memory: the model, and for each worker what factorizing one linear takes. Raises DBFError for weights that cannot be
    factorized.
    """
    blocks = [model.block(index) for index in range(len(model))]
    shapes = {n: tuple(m.weight.shape) for i, block in enumerate(blocks) for n, m in linears(i, block).items()}
    low, high = (uniform_budget(shapes, bits) for bits in CURVE_BITS)
    stream = _Stream(model, windows, folder) if metric else None
    short = windows[: math.ceil(TOKENS / min(LENGTH, windows.shape[1])), :LENGTH]
    hidden = model.embed(short)  # before the current block
    head = model.head

    @torch.no_grad()
    def final(index: int, hidden: torch.Tensor) -> torch.Tensor:
        """What the head is multiplied with, [tokens, d], for hidden states before dense block `index`."""
        for i, block in enumerate(blocks[index:], index):
            hidden = model.run(i, block, hidden)
        return model.norm(hidden).flatten(0, 1)

    def curve(index: int, name: str, moment: InputMoment | None) -> Curve:
        weight = linears(index, blocks[index])[name].weight.detach()
        widths = low[name], max(low[name] + BLOCK, high[name])
        try:
            (factors,), _ = factorize(
                weight[None],
                widths[1],
                importance_in=importance[f"{name}.input"][None],
                importance_out=importance[f"{name}.output"][None],
                moment=moment,
                iterations=ITERATIONS,
                seed=seed,
            )
        except (ValueError, torch.linalg.LinAlgError) as problem:
            raise DBFError(f"{name}: {problem}") from None
        changed = _copy(blocks[index])
        replace(index, changed, name, factors, model.dtype)
        with torch.no_grad():
            after = model.run(index, changed, hidden)
        total, _ = kl_divergence(final(index + 1, after), reference, head, gradient=False)
        effect = max(total / short.numel(), LEAST_EFFECT)
        return (widths[0], effect / FALL), (widths[1], effect)

    with side_by_side(workers) as pool:
        reference = pool.submit(final, 0, hidden).result()
    for index, block in enumerate(blocks):
        wanted = [name for name in linears(index, block) if name not in known]
        order = groups(model, index, block, hidden[:1]) if wanted else []
        moments = stream.advance(index, block, order) if stream else {}
        with side_by_side(workers) as pool:
            waiting = {pool.submit(curve, index, name, moments.get(name)): name for name in wanted}
            for future in as_completed(waiting):
                record(waiting[future], future.result())
        with torch.no_grad():
            hidden = model.run(index, block, hidden)


class _Stream:
    """The dense hidden states of windows [count, length] of token ids before the current block."""

    def __init__(self, model: BlockModel, windows: torch.Tensor, folder: Path):
        self.model, self.tokens = model, windows.numel()
        self.workers = model.workers(windows.shape[1], backward=False)
        self.states = Activations(*windows.shape, model.config.hidden_size, model.dtype, folder, MEMORY_BYTES)
        for number, window in enumerate(windows):
            self.states.write(slice(number, number + 1), model.embed(window[None]))

    def advance(self, index: int, block: nn.Module, order: list[list[str]]) -> dict[str, InputMoment]:
        """Takes the states through block `index`; what the linears in the groups of `order` have met on the way."""
        local, first = threading.local(), [group[0].removeprefix(block_prefix(index)) for group in order]

        @torch.no_grad()
        def one(number: int) -> list[torch.Tensor]:
            place = slice(number, number + 1)
            local.seen, local.last = {}, None
            self.states.write(place, self.model.run(index, block, self.states.read(place)))
            return [local.seen[name].flatten(0, 1) for name in first]

        sums: list[torch.Tensor] = []
        with tapped((block,), first, local), side_by_side(self.workers) as pool:
            for inputs in in_order(pool, one, range(len(self.states)), 2 * self.workers):
                sums = sums or [torch.zeros(x.shape[1], x.shape[1], device=x.device) for x in inputs]
                for total, x in zip(sums, inputs, strict=True):
                    total += x.T @ (x * Streams.token_weights(x))
        found = [InputMoment(total.div_(self.tokens)) for total in sums]
        return {name: moment for group, moment in zip(order, found, strict=True) for name in group}


def _copy(block: nn.Module) -> nn.Module:
    """A block of its own, of the same tensors."""
    return copy.deepcopy(block, {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())})


def write(path: Path, weights: str, curves: dict[str, Curve], **allocation) -> None:
    """Stores the curves of the model with the fingerprint `weights` as JSON, and `allocation` beside them."""
    text = json.dumps({"format": FORMAT, "weights": weights, "curves": curves} | allocation, indent=1)
    write_atomically(path, lambda part: part.write_text(text))


def read(path: Path, weights: str) -> dict[str, Curve]:
    """The curves stored in `path`. Raises DBFError when it is no such file, or one of a model with other weights."""
    try:
        stored = json.loads(path.read_text())
        if stored["format"] != FORMAT:
            raise ValueError("another format")
        found = stored["weights"]
        curves = {name: ((int(a), float(b)), (int(c), float(d))) for name, ((a, b), (c, d)) in stored["curves"].items()}
    except OSError as error:
        raise DBFError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DBFError(f"{path} is no budget: give uniform, adaptive, or a work folder's budget.json") from None
    if found != weights:
        raise DBFError(f"{path} was measured on another model: --budget adaptive measures this one")
    return curves

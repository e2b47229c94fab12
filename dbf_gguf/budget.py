"""How many middle channels k each linear gets for a requested number of bits.

One factorized linear costs k·(n_out + n_in) sign bits and 16·(n_out + k + n_in) bits of scales. A step of 32 in k is
coarse for small layers (0.22 bit on a 192×576 one), so the uniform budget rounds k up here and down there: the rounding
error of each linear is carried to the next, as in error diffusion, and the whole model hits the request.
k is never clamped at min(n_out, n_in): above it more bits still buy less error.

The adaptive budget spends the same bits where they lower the loss most. Of every linear it knows a curve, its effect on
the loss at two widths (`sensitivity`), taken as log-linear in k between and beyond them,

    effect(k) = exp(α − β·k)

and, from a floor on, it gives one step of 32 channels after the other to the linear whose effect falls most per bit.
The curves are convex, so up to one step no other choice of widths has a smaller Σ effect for the same bits.

Effects are those in an otherwise dense model. Where every block is fitted to what those before it give, it makes up for
a part of what is wrong in them, and for the last block none is left to do so. Hence an effect counts for the more the
further down its block is (`weighted`).
"""

import heapq
import math
from collections.abc import Mapping

from .errors import DBFError
from .factors import BLOCK

MIN_BITS, MAX_BITS = 0.3, 6.0
SCALE_BITS = 16
FLOOR = 0.6  # of the requested bits, for every linear
# see `weighted`. SmolLM2 at 2 bits, by `--effort fast` but for the budget, held-out KL before tuning, after 40 and 200
# steps: without it 0.776, 0.666, 0.632; with 0.3 0.744, 0.660, 0.608; with 0.6 0.774, 0.682
DEPTH = 0.3

Curve = tuple[tuple[int, float], tuple[int, float]]


def linear_bits(n_out: int, n_in: int, k: int) -> int:
    """Stored bits of one factorized linear: signs and F16 scales."""
    return k * (n_out + n_in) + SCALE_BITS * (n_out + k + n_in)


def uniform_budget(shapes: Mapping[str, tuple[int, int]], bits: float) -> dict[str, int]:
    """k for every linear (name -> (n_out, n_in)) so that all together cost `bits` per original weight.

    Every k is a multiple of 32 and at least 32. Raises DBFError for bits outside 0.3 to 6 and for shapes that the
    format cannot hold (n_in no multiple of 32).
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise DBFError(
            f"{bits:g} bits a weight cannot be made: choose between {MIN_BITS} and {MAX_BITS:g} "
            "(1 to 2.3 is what DBF is for)"
        )
    result = {}
    carry = 0.0  # bits still owed by (positive) or to (negative) the linears before
    for name, (n_out, n_in) in shapes.items():
        if n_in % BLOCK:
            raise DBFError(f"{name}: input width {n_in} is no multiple of {BLOCK}, which the DBF format needs")
        wanted = bits * n_out * n_in + carry
        fixed, per_channel = linear_bits(n_out, n_in, 0), n_out + n_in + SCALE_BITS
        k = max(BLOCK, BLOCK * round((wanted - fixed) / per_channel / BLOCK))
        carry = wanted - linear_bits(n_out, n_in, k)
        result[name] = k
    return result


def adaptive_budget(shapes: Mapping[str, tuple[int, int]], bits: float, curves: Mapping[str, Curve]) -> dict[str, int]:
    """k for every linear so that the sum of their effects is least at `bits` per original weight.

    curves  name -> ((k, effect), (k, effect)), two widths and the effect at them

    All together cost what `bits` come to, but for half a step of 32 channels of the cheapest linear. Every k is a
    multiple of 32, at least 32, and at least what FLOOR of the bits comes to, or the uniform budget has, rounded down
    to such a multiple. Raises as `uniform_budget`.
    """
    even = uniform_budget(shapes, bits)
    left = bits * sum(n_out * n_in for n_out, n_in in shapes.values())
    result, steps = {}, []
    for name, (n_out, n_in) in shapes.items():
        fixed, per_channel = linear_bits(n_out, n_in, 0), n_out + n_in + SCALE_BITS
        k = BLOCK * math.floor((FLOOR * bits * n_out * n_in - fixed) / per_channel / BLOCK)
        result[name] = min(even[name], max(BLOCK, k))
        left -= linear_bits(n_out, n_in, result[name])
        steps.append((-_gain(curves[name], result[name]) / per_channel, name))
    heapq.heapify(steps)
    while steps:
        _, name = heapq.heappop(steps)
        per_channel = sum(shapes[name]) + SCALE_BITS
        if BLOCK * per_channel <= left:  # else nothing is left for this linear, perhaps for a smaller one
            left -= BLOCK * per_channel
            result[name] += BLOCK
            heapq.heappush(steps, (-_gain(curves[name], result[name]) / per_channel, name))
    cheapest = min(map(sum, shapes.values()))
    if 2 * left >= BLOCK * (cheapest + SCALE_BITS):  # one step more comes nearer
        equal = [name for name, shape in shapes.items() if sum(shape) == cheapest]
        result[max(equal, key=lambda name: _gain(curves[name], result[name]))] += BLOCK
    return result


def weighted(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """Effects for the block-by-block compression: those of block i ("model.layers.i. …") of n times e^(DEPTH · t).

    t = 2 i / (n − 1) − 1 goes from −1 at the first block to 1 at the last.
    """
    numbers = {name: int(name.split(".")[2]) for name in curves}
    last = max(1, *numbers.values())
    result = {}
    for name, ((k_0, effect_0), (k_1, effect_1)) in curves.items():
        factor = math.exp(DEPTH * (2 * numbers[name] / last - 1))
        result[name] = (k_0, factor * effect_0), (k_1, factor * effect_1)
    return result


def _gain(curve: Curve, k: int) -> float:
    """By how much the effect falls with the next step of 32 channels."""
    (k_0, effect_0), (k_1, effect_1) = curve
    slope = math.log(effect_0 / effect_1) / (k_1 - k_0)  # β
    return effect_0 * math.exp(-slope * (k - k_0)) * -math.expm1(-slope * BLOCK)


def bits_per_weight(shapes: Mapping[str, tuple[int, int]], ks: Mapping[str, int]) -> float:
    """Achieved bits per original weight over the given linears, scales included."""
    stored = sum(linear_bits(*shapes[name], k) for name, k in ks.items())
    return stored / sum(shapes[name][0] * shapes[name][1] for name in ks)


def bits_for_size(shapes: Mapping[str, tuple[int, int]], size: int, smallest: int, least: Mapping[str, int]) -> float:
    """Bits a weight with which a file has `size` bytes, which has `smallest` bytes with the widths `least`.

    Rounded down to 1e-4 bit, so that it is a number that can be told and typed; no fewer than `least` comes to before
    it is rounded to whole channels.
    """
    stored = sum(linear_bits(*shapes[name], k) for name, k in least.items())
    weights = sum(n_out * n_in for n_out, n_in in shapes.values())
    return max(MIN_BITS, math.floor(1e4 * (stored + 8 * (size - smallest)) / weights) / 1e4)

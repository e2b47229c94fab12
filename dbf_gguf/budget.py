"""How many middle channels k each linear gets for a requested number of bits.

One factorized linear costs k·(n_out + n_in) sign bits and 16·(n_out + k + n_in) bits of scales. A step of 32 in k is
coarse for small layers (0.22 bit on a 192×576 one), so the uniform budget rounds k up here and down there: the rounding
error of each linear is carried to the next, as in error diffusion, and the whole model hits the request.
k is never clamped at min(n_out, n_in): above it more bits still buy less error.
"""

from collections.abc import Mapping

from .errors import DBFError
from .factors import BLOCK

MIN_BITS, MAX_BITS = 0.3, 6.0
SCALE_BITS = 16


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


def bits_per_weight(shapes: Mapping[str, tuple[int, int]], ks: Mapping[str, int]) -> float:
    """Achieved bits per original weight over the given linears, scales included."""
    stored = sum(linear_bits(*shapes[name], k) for name, k in ks.items())
    return stored / sum(shapes[name][0] * shapes[name][1] for name in ks)

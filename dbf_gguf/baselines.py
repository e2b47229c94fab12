"""The two simple quantizers that the paper compares DBF with (section 4.3, figures 2 and 3). For comparison only.

    OneBit SVID        W ≈ a ⊙ S ⊙ bᵀ             S = sign(W) [n_out, n_in],  a bᵀ the rank-1 approximation of |W|
    round to nearest   W ≈ s · Q + z               Q ∈ {0 … 2^bits − 1}, one s and one z for each group of a row

Figure 2 plots, for every weight of one matrix of Llama-3-8B, its approximation error against its importance, the
product of input and output importance: DBF and OneBit both with importance scaling (section 3.3), and 3-bit scalar
quantization. Figure 3 plots the error of two matrices against bits a weight, all without importance; OneBit is one
point, scalar quantization one for each whole number of bits. The paper does not say how it groups scalar quantization:
here the group size is an argument.

Both functions return the approximation itself, float32 `[n_out, n_in]`; scales are not rounded. Their bits a weight
count scales and offsets as float16, as those of DBF do.
"""

import torch

from .factorize import IMPORTANCE_FLOOR

SCALE_BITS = 16
POWER_ITERATIONS = 1000  # far more than a matrix of nonnegative numbers needs
CONVERGED = 1e-10


def onebit_svid(
    weight: torch.Tensor,
    importance_in: torch.Tensor | None = None,
    importance_out: torch.Tensor | None = None,
) -> torch.Tensor:
    """OneBit's sign-value-independent decomposition (paper, section 3) of a weight `[n_out, n_in]` of any float dtype.

        minimize ‖W' − a ⊙ S ⊙ bᵀ‖²,  S ∈ {±1}:    S = sign(W'), and a bᵀ is the best rank-1 approximation of |W'|

    importance_in `[n_in]`, importance_out `[n_out]`: W' = diag(o) W diag(i) is decomposed, and the result is divided by
    both (section 3.3); None is 1 everywhere. Values below a hundredth of the mean count as that, as in `factorize`.

    Raises ValueError for a weight or importances that are not finite, and for importances whose shape does not fit.
    """
    n_out, n_in = weight.shape
    if not torch.isfinite(weight).all():
        raise ValueError("the weight has values that are not finite")
    o, i = _importance(importance_out, n_out), _importance(importance_in, n_in)
    o, i = o.to(weight.device)[:, None], i.to(weight.device)
    scaled = weight.double() * o * i
    rank1 = _rank1(scaled.abs())
    return (torch.where(scaled < 0, -rank1, rank1) / (o * i)).float()


def onebit_bits(n_out: int, n_in: int) -> float:
    """Bits a weight of `onebit_svid`: one sign for each weight, one scale for each row and column."""
    return 1 + SCALE_BITS * (n_out + n_in) / (n_out * n_in)


def round_to_nearest(weight: torch.Tensor, bits: int, group_size: int | None = None) -> torch.Tensor:
    """Scalar quantization of a weight `[n_out, n_in]` of any float dtype, each group of a row by itself:

        z = min W,   s = (max W − z) / (2^bits − 1),   Q = round((W − z) / s),   Ŵ = s · Q + z

    `group_size` consecutive weights of a row share s and z; None is the whole row. Raises ValueError for a weight that
    is not finite, for bits outside 1 to 8, and for a group size that does not divide n_in.
    """
    n_out, n_in = weight.shape
    group_size = group_size or n_in
    if not torch.isfinite(weight).all():
        raise ValueError("the weight has values that are not finite")
    if not 1 <= bits <= 8:
        raise ValueError(f"{bits} bits: 1 to 8 are possible")
    if group_size < 1 or n_in % group_size:
        raise ValueError(f"groups of {group_size} do not divide rows of {n_in}")
    groups = weight.float().reshape(n_out, -1, group_size)
    low, high = groups.aminmax(dim=2, keepdim=True)
    step = (high - low) / (2**bits - 1)
    codes = torch.round((groups - low) / torch.where(step > 0, step, 1))  # constant groups: Q = 0
    return (step * codes + low).reshape(n_out, n_in)


def round_to_nearest_bits(bits: int, group_size: int) -> float:
    """Bits a weight of `round_to_nearest`: the codes, and one scale and one offset for each group."""
    return bits + 2 * SCALE_BITS / group_size


def _importance(importance: torch.Tensor | None, n: int) -> torch.Tensor:
    """[n] float64, bounded below so that dividing by it is harmless."""
    if importance is None:
        return torch.ones(n, dtype=torch.float64)
    if importance.shape != (n,):
        raise ValueError(f"importance of shape {tuple(importance.shape)}, expected {(n,)}")
    importance = importance.double()
    if not torch.isfinite(importance).all() or importance.min() < 0 or importance.max() == 0:
        raise ValueError("importances must be finite, none negative and not all 0")
    return importance.clamp_min(IMPORTANCE_FLOOR * importance.mean())


def _rank1(magnitude: torch.Tensor) -> torch.Tensor:
    """The best rank-1 approximation of a nonnegative matrix, by power iteration: its first singular value stands far
    above the second, so that a few steps do what a whole SVD would."""
    v = magnitude.sum(dim=0)
    v /= v.norm().clamp_min(torch.finfo(v.dtype).tiny)
    for _ in range(POWER_ITERATIONS):
        before, u = v, magnitude @ v
        v = magnitude.T @ u
        v /= v.norm().clamp_min(torch.finfo(v.dtype).tiny)
        if (v - before).norm() < CONVERGED:
            break
    return torch.outer(magnitude @ v, v)

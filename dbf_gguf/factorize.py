"""Double Binary Factorization of one weight matrix: ADMM inside alternating minimization (paper, section 3.2).

    minimize ‖W − A'·B'‖²   over   A' = a ⊙ A ⊙ m_aᵀ  [n_out, k],   B' = m_b ⊙ B ⊙ bᵀ  [k, n_in],   A, B ∈ {±1}

One half step fixes one factor, its middle channels scaled to unit length (the free factor absorbs the lengths), and
moves the free one. With F [k, d] the fixed factor, X [k, n] the free one and V = W or Wᵀ [d, n]:

    S = (F Fᵀ + (λ + ρ) I)⁻¹ (F V + ρ (X − U))        least squares with ridge λ
    X = SVID(S + U)                                    signs times the rank-1 approximation of |S + U|
    U = S + U − X                                      scaled dual variable

The pair (X, U) of each factor is kept for its next turn, so nothing is started anew. Annealing buys the quality: with
every iteration ρ grows and λ shrinks by a constant factor. Early on X follows S freely, while the ridge keeps S from
being fitted to the noise of an opposite factor whose signs still change.

How this differs from the plain method (`bench/factorize.py` has it, as reference):

- λ is annealed from 0.5 to 0.02, not fixed at 0.03, and ρ geometrically from 0.3, not as (t / T)³: the error ends
  lower after fewer iterations, 180 instead of 260.
- One inner step a half step instead of three: each factor meets the other's newest state, and one Cholesky serves it.
- One power iteration instead of five: the rank-1 vectors are warm-started.
- Products, and the arrays between them, in bfloat16 with float32 accumulation, where the machine multiplies it faster
  than float32. Signs are exact in it, and the roundings of the rest hardly move the error (tests/test_factorize.py).
- Any number of equal-shaped matrices at once (a leading batch dimension), on any torch device.

Importance (section 3.3): W' = diag(o) W diag(i) is factorized and the scales divided by o and i afterwards.
"""

import torch

from .factors import Factors

OUTER_ITERATIONS = 180
RHO = (0.3, 1.0)  # of the Gram matrix' diagonal, which is 1; from the first iteration to the last
RIDGE = (0.5, 0.02)
TINY = 1e-20
IMPORTANCE_FLOOR = 1e-2  # of the mean: channels that the calibration text left silent still get a finite scale


def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware with float32 accumulation, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        fast = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return torch.bfloat16 if fast.get("avx512_bf16") or fast.get("amx_bf16") or fast.get("bf16") else torch.float32
    return torch.float32


class _Side:
    """One factor during the iteration: the dual U and D = X − U, [batch, k, n], and X = row · vᵀ with the signs `unit`.

    The large arrays are made once and written in place: fresh ones would cost more in page faults than the arithmetic.
    """

    def __init__(self, start: torch.Tensor, target: torch.Tensor):
        self.target = target  # [batch, d, n], what Fᵀ S has to match
        self.d = start.contiguous().clone()
        self.u = torch.zeros_like(self.d)
        self.s, self.right = torch.empty_like(self.d), torch.empty_like(self.d)
        self.unit = torch.empty_like(self.d)  # X with rows of unit length: v with the signs of X
        self.gram = start.new_empty(*start.shape[:2], start.shape[1])
        self.row = start.new_ones(*start.shape[:2], 1, dtype=torch.float32)  # [batch, k, 1]
        self.v = start.new_ones(start.shape[0], start.shape[2], 1, dtype=torch.float32)  # [batch, n, 1], norm 1

    def half_step(self, fixed: torch.Tensor, rho: float, ridge: float) -> None:
        """Moves this factor against `fixed` [batch, k, d], whose rows have unit length."""
        gram = torch.bmm(fixed, fixed.transpose(1, 2), out=self.gram)
        torch.bmm(fixed, self.target, out=self.right)
        # λ + ρ is never below 0.6, more than what rounding G to bfloat16 can take from its least eigenvalue.
        gram = gram.to(torch.float32, copy=True)
        gram.diagonal(dim1=1, dim2=2).add_(ridge + rho)
        root, _ = torch.linalg.cholesky_ex(gram)
        inverse = torch.cholesky_inverse(root).to(fixed.dtype)
        self.right.add_(self.d, alpha=rho)
        torch.bmm(inverse, self.right, out=self.s)
        self._project()

    def _project(self) -> None:
        """X = SVID(S + U), U = S + U − X (paper, section 3.2), by one power iteration from the last rank-1 vectors."""
        self.u.add_(self.s)
        magnitude = torch.abs(self.u, out=self.s)
        row = (magnitude @ self.v.to(magnitude.dtype)).float()
        row /= row.norm(dim=1, keepdim=True).clamp_min(TINY)
        v = (row.to(magnitude.dtype).transpose(1, 2) @ magnitude).float().transpose(1, 2)
        norm = v.norm(dim=1, keepdim=True).clamp_min(TINY)
        self.v, row = v / norm, row * norm
        self.row = row
        low_row = row.to(self.u.dtype)
        torch.copysign(self.v.to(self.u.dtype).transpose(1, 2).expand_as(self.u), self.u, out=self.unit)
        torch.addcmul(self.u, self.unit, low_row, value=-1, out=self.u)
        torch.mul(self.unit, low_row, out=self.d).sub_(self.u)


def factorize(
    weight: torch.Tensor,
    k: int,
    *,
    importance_in: torch.Tensor | None = None,
    importance_out: torch.Tensor | None = None,
    iterations: int = OUTER_ITERATIONS,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> tuple[list[Factors], torch.Tensor]:
    """Factorizes a batch of weights `[batch, n_out, n_in]` (any float dtype) with `k` middle channels each.

    importance_in `[batch, n_in]` and importance_out `[batch, n_out]`: RMS of input activations and output gradients;
    None is 1 everywhere. `dtype` is that of the products (see `product_dtype`). The result depends on the weights, k,
    the seed, the device and its thread count only.

    Returns the factors (scales float32, on the weights' device) and the relative squared error ‖W'−Ŵ'‖² / ‖W'‖² of
    each, `[batch]`, under the importances. Raises ValueError for weights that are not finite or make it diverge.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("the weight has values that are not finite")
    batch, n_out, n_in = weight.shape
    device = weight.device
    dtype = dtype or product_dtype(device)
    o, i = _finite_importance(importance_out, weight, n_out), _finite_importance(importance_in, weight, n_in)
    target = weight.float() * o[:, :, None] * i[:, None, :]
    target = target / target.square().mean(dim=(1, 2), keepdim=True).sqrt().clamp_min(TINY)

    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same start on every device
    start_a, start_b = (torch.randn(k, n, generator=generator).to(device, dtype) for n in (n_out, n_in))
    low = target.to(dtype)
    side_a = _Side(start_a.expand(batch, -1, -1), low.transpose(1, 2).contiguous())
    side_b = _Side(start_b.expand(batch, -1, -1), low)
    fixed = (start_b.float() / start_b.float().norm(dim=1, keepdim=True)).to(dtype).expand(batch, -1, -1)
    for t in range(iterations):
        done = min(1.0, t / max(1, iterations - 3))
        rho, ridge = _anneal(RHO, done), _anneal(RIDGE, done)
        side_a.half_step(fixed, rho, ridge)
        side_b.half_step(side_a.unit, rho, ridge)
        fixed = side_b.unit

    if not all(torch.isfinite(side.row).all() for side in (side_a, side_b)):
        if dtype == torch.float32:
            raise ValueError("the factorization does not converge on this weight")
        options = {"importance_in": importance_in, "importance_out": importance_out, "seed": seed}
        return factorize(weight, k, **options, iterations=iterations, dtype=torch.float32)

    signs_a = torch.where(side_a.unit < 0, -1, 1).to(torch.int8).transpose(1, 2)  # [batch, n_out, k]
    signs_b = torch.where(side_b.unit < 0, -1, 1).to(torch.int8)  # [batch, k, n_in]
    factors, errors = [], []
    for j in range(batch):
        scales = _refit(target[j], signs_a[j].float(), signs_b[j].float(), side_a.v[j, :, 0], side_b.v[j, :, 0])
        found = Factors(signs_a[j].contiguous(), signs_b[j].contiguous(), *scales)
        errors.append((target[j] - found.dense()).square().sum() / target[j].square().sum().clamp_min(TINY))
        size = (weight[j].float() * o[j][:, None] * i[j]).square().mean().sqrt()
        found.scale_a, found.scale_m, found.scale_b = _balance(scales[0] / o[j], scales[1] * size, scales[2] / i[j])
        factors.append(found)
    return factors, torch.stack(errors)


def _anneal(ends: tuple[float, float], done: float) -> float:
    """Geometric interpolation: the start at done = 0, the end at done = 1."""
    return ends[0] ** (1 - done) * ends[1] ** done


def _finite_importance(importance: torch.Tensor | None, weight: torch.Tensor, n: int) -> torch.Tensor:
    """[batch, n], mean 1, bounded below so that dividing by it is harmless; 1 where there is none."""
    if importance is None:
        return torch.ones(weight.shape[0], n, device=weight.device)
    importance = torch.nan_to_num(importance.to(weight.device).float(), nan=0.0, posinf=0.0).clamp_min(0)
    mean = importance.mean(dim=1, keepdim=True)
    scaled = importance / mean.clamp_min(TINY)
    return torch.where(mean > TINY, scaled, torch.ones_like(scaled)).clamp_min(IMPORTANCE_FLOOR)


def _refit(w: torch.Tensor, a_signs: torch.Tensor, b_signs: torch.Tensor, a: torch.Tensor, b: torch.Tensor):
    """Least-squares scales for fixed signs: m given (a, b) by one k×k system, then a given (m, b), then b given (a, m).

    w [n_out, n_in]; returns a [n_out], m [k], b [n_in], float32.
    """
    left, right = a_signs * a[:, None], b_signs * b  # [n_out, k], [k, n_in]
    system = (left.T @ left) * (right @ right.T)
    diagonal = system.diagonal().mean().clamp_min(TINY)
    system.diagonal().add_(1e-5 * diagonal)
    wanted = ((left.T @ w) * right).sum(dim=1)
    root, broken = torch.linalg.cholesky_ex(system)
    if broken:  # many equal channels: a ridge above the rounding
        system.diagonal().add_(1e-2 * diagonal)
        root = torch.linalg.cholesky(system)
    m = torch.cholesky_solve(wanted[:, None], root)[:, 0]
    image = (a_signs * m) @ right  # [n_out, n_in], without a
    a = (w * image).sum(dim=1) / image.square().sum(dim=1).clamp_min(TINY)
    image = a[:, None] * ((a_signs * m) @ b_signs)  # without b
    b = (w * image).sum(dim=0) / image.square().sum(dim=0).clamp_min(TINY)
    return a, m, b


def _balance(a: torch.Tensor, m: torch.Tensor, b: torch.Tensor):
    """Fixes the gauge: the same product with equal RMS of all three, so that each survives float16."""
    rms = [t.square().mean().sqrt().clamp_min(TINY) for t in (a, m, b)]
    common = (rms[0] * rms[1] * rms[2]) ** (1 / 3)
    return tuple(t * (common / r) for t, r in zip((a, m, b), rms, strict=True))

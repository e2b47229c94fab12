"""Double Binary Factorization of one weight matrix: ADMM inside alternating minimization (paper, section 3.2).

    minimize ‖W − A'·B'‖²   over   A' = a ⊙ A ⊙ m_aᵀ  [n_out, k],   B' = m_b ⊙ B ⊙ bᵀ  [k, n_in],   A, B ∈ {±1}

One half step fixes one factor, its middle channels scaled to unit length (the free factor absorbs the lengths), and
moves the free one. With F [k, d] the fixed factor, X [k, n] the free one and V = W or Wᵀ [d, n]:

    S = (F Fᵀ + (λ + ρ) I)⁻¹ (F V + ρ (X − U))        least squares, ridge λ = 0.08
    X = SVID(S + U)                                    signs times the rank-1 approximation of |S + U|
    U = S + U − X                                      scaled dual variable

The pair (X, U) of each factor is kept for its next turn, so nothing is started anew. Annealing buys the quality: in the
first of the two inner steps ρ grows as (t / T)² from 0 to 1, so that early on X follows the least-squares solution
freely; in the second ρ = 1.

How this differs from the plain method (`bench/factorize.py` has it, as reference):

- 180 outer iterations instead of 260, with a larger ridge and an earlier anneal: together they also end lower.
- Two inner steps instead of three, one power iteration instead of five: the rank-1 vectors are warm-started.
- One Cholesky a half step, for the first inner step. The second one's matrix has eigenvalues between 1.08 and a few, so
  three Chebyshev steps from the first one's solution do, and they are products.
- Products, and the arrays between them, in bfloat16 with float32 accumulation, where the machine multiplies it faster
  than float32. Signs are exact in it, and the roundings of the rest do not move the error (tests/test_factorize.py).
- Any number of equal-shaped matrices at once (a leading batch dimension), on any torch device.

Importance (section 3.3): W' = diag(o) W diag(i) is factorized and the scales divided by o and i afterwards.
"""

import torch

from .factors import Factors

OUTER_ITERATIONS = 180
RIDGE = 8e-2  # of the Gram matrix' diagonal, which is 1
CHEBYSHEV_STEPS = 3
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
    """One factor during the iteration: `x` and the dual `u`, [batch, k, n], and x = row · vᵀ with the signs of x.

    The large arrays are made once and written in place: fresh ones would cost more in page faults than the arithmetic.
    """

    def __init__(self, start: torch.Tensor, target: torch.Tensor):
        self.target = target  # [batch, d, n], what Fᵀ S has to match
        self.x = start.contiguous().clone()
        self.u = torch.zeros_like(self.x)
        self.s, self.right, self.step, self.work = (torch.empty_like(self.x) for _ in range(4))
        self.row = start.new_ones(*start.shape[:2], 1, dtype=torch.float32)  # [batch, k, 1]
        self.v = start.new_ones(start.shape[0], start.shape[2], 1, dtype=torch.float32)  # [batch, n, 1], norm 1
        self.top_vector = torch.ones_like(self.row)  # of the largest eigenvalue of the Gram matrix met last

    def half_step(self, fixed: torch.Tensor, rho: float) -> None:
        """Moves this factor against `fixed` [batch, k, d], whose rows have unit length."""
        gram = fixed @ fixed.transpose(1, 2)  # [batch, k, k]
        torch.bmm(fixed, self.target, out=self.right)
        shifted = gram.to(torch.float32, copy=True)
        shifted.diagonal(dim1=1, dim2=2).add_(RIDGE + rho)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(shifted)[0]).to(fixed.dtype)
        torch.add(self.right, self.x, alpha=rho, out=self.work).sub_(self.u, alpha=rho)
        torch.bmm(inverse, self.work, out=self.s)
        self._project()
        self.right.add_(self.x).sub_(self.u)
        self._damped_solve(gram)
        self._project()

    def _project(self) -> None:
        """X = SVID(S + U), U = S + U − X (paper, section 3.2), by one power iteration from the last rank-1 vectors."""
        self.u.add_(self.s)
        magnitude = torch.abs(self.u, out=self.work)
        row = (magnitude @ self.v.to(magnitude.dtype)).float()
        row = row / row.norm(dim=1, keepdim=True).clamp_min(TINY)
        v = (magnitude.transpose(1, 2) @ row.to(magnitude.dtype)).float()
        norm = v.norm(dim=1, keepdim=True).clamp_min(TINY)
        self.v, self.row = v / norm, row * norm
        torch.mul(self.row.to(self.x.dtype), self.v.to(self.x.dtype).transpose(1, 2), out=self.x)
        self.x.copysign_(self.u)
        self.u.sub_(self.x)

    def _damped_solve(self, gram: torch.Tensor) -> None:
        """Moves `s` towards the solution of (G + (λ + 1) I) S = `right` by Chebyshev iteration; G's spectrum lies in
        [0, top]. `right` becomes the residual."""
        low = RIDGE + 1.0
        half_width = 1.05 * self._largest_eigenvalue(gram) / 2
        center = low + half_width
        s, step, residual = self.s, self.step, self.right
        residual.baddbmm_(gram, s, alpha=-1).sub_(s, alpha=low)
        torch.div(residual, center, out=step)
        sigma = center / half_width
        rate = 1 / sigma
        for _ in range(CHEBYSHEV_STEPS - 1):
            s.add_(step)
            residual.baddbmm_(gram, step, alpha=-1).sub_(step, alpha=low)
            next_rate = 1 / (2 * sigma - rate)
            step.mul_(next_rate * rate).add_(residual, alpha=2 * next_rate / half_width)
            rate = next_rate
        s.add_(step)

    def _largest_eigenvalue(self, gram: torch.Tensor) -> float:
        """The largest over the batch, by two power iterations from the vector of the last visit."""
        vector = self.top_vector.to(gram.dtype)
        for _ in range(2):
            image = (gram @ vector).float()
            norm = image.norm(dim=1, keepdim=True)
            vector = (image / norm.clamp_min(TINY)).to(gram.dtype)
        self.top_vector = vector.float()
        return norm.max().item()

    def unit(self) -> torch.Tensor:
        """The factor with rows of unit length: `row` is their length, so what remains is v with the signs of x."""
        return torch.copysign(self.v.to(self.x.dtype).transpose(1, 2).expand_as(self.x), self.x)


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
    each, `[batch]`, under the importances. Raises ValueError for non-finite weights.
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
        rho = min(1.0, t / max(1, iterations - 3)) ** 2
        side_a.half_step(fixed, rho)
        side_b.half_step(side_a.unit(), rho)
        fixed = side_b.unit()

    signs_a = torch.where(side_a.x < 0, -1, 1).to(torch.int8).transpose(1, 2)  # [batch, n_out, k]
    signs_b = torch.where(side_b.x < 0, -1, 1).to(torch.int8)  # [batch, k, n_in]
    factors, errors = [], []
    for j in range(batch):
        scales = _refit(target[j], signs_a[j].float(), signs_b[j].float(), side_a.v[j, :, 0], side_b.v[j, :, 0])
        found = Factors(signs_a[j].contiguous(), signs_b[j].contiguous(), *scales)
        errors.append((target[j] - found.dense()).square().sum() / target[j].square().sum().clamp_min(TINY))
        size = (weight[j].float() * o[j][:, None] * i[j]).square().mean().sqrt()
        found.scale_a, found.scale_m, found.scale_b = _balance(scales[0] / o[j], scales[1] * size, scales[2] / i[j])
        factors.append(found)
    return factors, torch.stack(errors)


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
    m = torch.cholesky_solve(wanted[:, None], torch.linalg.cholesky(system))[:, 0]
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

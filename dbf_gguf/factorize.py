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

- λ is annealed from 0.5 to 0.02, not fixed at 0.03, and ρ geometrically up to 1, not as (t / T)³: the error ends
  lower after fewer iterations, 180 instead of 260.
- One inner step a half step instead of three: each factor meets the other's newest state, and one Cholesky serves it.
- One power iteration instead of five: the rank-1 vectors are warm-started.
- Products, and the arrays between them, in bfloat16 with float32 accumulation, where the machine multiplies it faster
  than float32. Signs are exact in it, and the roundings of the rest hardly move the error (tests/test_factorize.py).
- Any number of equal-shaped matrices at once (a leading batch dimension), on any torch device.

Importance (section 3.3): W' = diag(o) W diag(i) is factorized and the scales divided by o and i afterwards.

Inputs are not only uneven, they are correlated: what counts is the error of the outputs, ‖(W' − A'·B')·H^½‖², where
H is the second moment of the inputs in units of their RMS i (unit diagonal; H = I is the case above). With it, the
half step for A' takes F H Fᵀ and F H V in the place of F Fᵀ and F V. The one for B' becomes, with H = Q diag(h) Qᵀ,

    (F Fᵀ) S̃ diag(h) + (λ + ρ) S̃ = F V H Q + ρ (X − U) Q            S̃ = S Q,

a system of its own for every column of S̃, of which the last solution is a good guess: a few steps of conjugate
gradients on all columns at once, products again, cost no more than the inverse that they save.
"""

import torch

from .factors import Factors
from .machine import cpu_features

OUTER_ITERATIONS = 180
RHO = (0.3, 1.0)  # of the Gram matrix' diagonal, which is 1; from the first iteration to the last
RIDGE = (0.5, 0.02)
# With a metric, which itself keeps S from fitting noise where inputs are small, both begin lower. Three linears of
# SmolLM2 after 30, 80 and 160 iterations: the error is 0.8 to 2.4 % lower than with the ρ above.
METRIC_RHO, METRIC_RIDGE = (0.2, 1.0), (0.2, 0.02)
CG_STEPS = 3  # the exact solution gives no lower error
DAMPING = 0.2  # of H's mean eigenvalue: without it the noise of H's small eigenvalues, a sample's, is fitted
TINY = 1e-20
IMPORTANCE_FLOOR = 1e-2  # of the mean: channels that the calibration text left silent still get a finite scale


def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware with float32 accumulation, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        fast = cpu_features()
        return torch.bfloat16 if fast.get("avx512_bf16") or fast.get("amx_bf16") or fast.get("bf16") else torch.float32
    return torch.float32


class _Side:
    """One factor during the iteration: the dual U [batch, k, n], and X = row ⊙ `unit`, which is v with the signs of X.

    The large arrays are made once and written in place: fresh ones would cost more in page faults than the arithmetic.
    At first `unit` is the start itself, and `row` 1.
    """

    def __init__(self, start: torch.Tensor, target: torch.Tensor):
        self.target = target  # [batch, d, n], what Fᵀ S has to match
        self.unit = start.clone(memory_format=torch.contiguous_format)
        self.u = torch.zeros_like(self.unit)
        self.s, self.right = torch.empty_like(self.unit), torch.empty_like(self.unit)
        self.gram = start.new_empty(*start.shape[:2], start.shape[1])
        self.row = start.new_ones(*start.shape[:2], 1, dtype=torch.float32)  # [batch, k, 1]
        self.v = start.new_ones(start.shape[0], start.shape[2], 1, dtype=torch.float32)  # [batch, n, 1], norm 1

    def half_step(self, fixed: torch.Tensor, image: torch.Tensor, rho: float, ridge: float) -> None:
        """Moves this factor against `fixed` [batch, k, d], where `image` is F H, or F itself without a metric.

        The rows of F have unit length, in the metric.
        """
        gram = torch.bmm(image, fixed.transpose(1, 2), out=self.gram)
        torch.bmm(image, self.target, out=self.right)
        # λ + ρ is never below 0.39, more than what rounding G to bfloat16 can take from its least eigenvalue.
        gram = gram.to(torch.float32, copy=True)
        gram.diagonal(dim1=1, dim2=2).add_(ridge + rho)
        root, _ = torch.linalg.cholesky_ex(gram)
        inverse = torch.cholesky_inverse(root).to(fixed.dtype)
        self.right.addcmul_(self.unit, self.row.to(self.unit.dtype), value=rho).sub_(self.u, alpha=rho)
        torch.bmm(inverse, self.right, out=self.s)
        self._project()

    def metric_step(self, fixed: torch.Tensor, metric: "_Metric", rho: float, ridge: float) -> None:
        """Moves this factor, whose columns the metric couples, against `fixed` [batch, k, d], rows of unit length."""
        gram, shift = torch.bmm(fixed, fixed.transpose(1, 2), out=self.gram), rho + ridge
        right = torch.bmm(fixed, metric.rotated, out=self.right)
        difference = torch.mul(self.unit, self.row.to(self.unit.dtype), out=metric.direction).sub_(self.u)  # X − U
        right.add_(torch.matmul(difference, metric.basis, out=self.s), alpha=rho)
        metric.solve(gram, right, shift, self.s)
        torch.matmul(metric.solution, metric.basis.T, out=self.s)
        self._project()

    def _project(self) -> None:
        """X = SVID(S + U), U = S + U − X (paper, section 3.2), by one power iteration from the last rank-1 vectors."""
        self.u.add_(self.s)
        magnitude = torch.abs(self.u, out=self.s)
        row = (magnitude @ self.v.to(magnitude.dtype)).float()
        row /= row.norm(dim=1, keepdim=True).clamp_min(TINY)
        v = (row.to(magnitude.dtype).transpose(1, 2) @ magnitude).float().transpose(1, 2)
        norm = v.norm(dim=1, keepdim=True).clamp_min(TINY)
        self.v, self.row = v / norm, row * norm
        torch.copysign(self.v.to(self.u.dtype).transpose(1, 2).expand_as(self.u), self.u, out=self.unit)
        self.u.addcmul_(self.unit, self.row.to(self.u.dtype), value=-1)


class InputMoment:
    """What a factorization knows of the inputs x of linears that all read the same ones: float32, on their device.

    importance  [n_in], their RMS i, in units of its mean
    size        that H, the mean of x xᵀ in units of i iᵀ, is divided by: its mean eigenvalue becomes 1
    metric      [n_in, n_in], of H so, with DAMPING times the identity mixed in
    """

    def __init__(self, moment: torch.Tensor):
        """moment [n_in, n_in]: the mean of x xᵀ, float32. It is overwritten: a second one would be 0.5 GB in a 7B."""
        self.importance = _finite_importance(moment.diagonal().clamp_min(0).sqrt())
        self.metric = moment.div_(self.importance[:, None]).div_(self.importance)
        self.size = self.metric.diagonal().mean().clamp_min(TINY)
        self.metric.div_(self.size).diagonal().add_(DAMPING)
        self.metric.div_(1 + DAMPING)
        self._decomposition: tuple[torch.Tensor, torch.Tensor] | None = None

    def decomposition(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvalues of the metric [n_in], ascending, and its eigenvectors Q [n_in, n_in] in columns, which are H's.

        Computed at the first call: it takes longer than an inverse. Without the lock of a cached_property, which the
        moments of all groups would share.
        """
        if self._decomposition is None:
            self._decomposition = torch.linalg.eigh(self.metric)
        return self._decomposition

    @staticmethod
    def undamped(values: torch.Tensor) -> torch.Tensor:
        """The eigenvalues of H from those of the metric; rounding may make the least ones negative."""
        return values * (1 + DAMPING) - DAMPING


class _Metric:
    """H = Q diag(h) Qᵀ in the forms that the half steps multiply with, and the solver of the one for B'."""

    def __init__(self, moment: InputMoment, target: torch.Tensor, k: int, dtype: torch.dtype):
        """target V [batch, n_out, n_in], float32."""
        values, basis = moment.decomposition()
        self.values = values.clamp_min(0).to(dtype)  # h
        self.metric = moment.metric.to(dtype)
        self.basis = basis.to(dtype)
        self.rotated = (target @ moment.metric @ basis).to(dtype)  # V H Q [batch, n_out, n_in]
        self.solution = torch.zeros(len(target), k, len(self.metric), dtype=dtype, device=target.device)
        self.direction = torch.empty_like(self.solution)

    def normalised(self, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """F [batch, k, n_in] with rows of unit length in this metric, and F H."""
        image = factor @ self.metric
        size = (image * factor).sum(dim=2, keepdim=True, dtype=torch.float32).clamp_min(TINY).rsqrt().to(factor.dtype)
        return factor * size, image.mul_(size)

    def solve(self, gram: torch.Tensor, right: torch.Tensor, shift: float, product: torch.Tensor) -> None:
        """Brings `solution` [batch, k, n_in] closer to that of gram · S̃ · diag(h) + shift · S̃ = right.

        Conjugate gradients for every column, preconditioned with the diagonal h + shift (that of `gram` is 1). `right`
        and `product`, of the same shape, are overwritten.
        """
        diagonal = self.values + shift
        residual = right.sub_(self._apply(gram, self.solution, shift, product))
        direction = torch.div(residual, diagonal, out=self.direction)
        size = _dot(residual, direction)
        for step in range(CG_STEPS):
            self._apply(gram, direction, shift, product)
            length = (size / _dot(direction, product).clamp_min(TINY)).to(right.dtype)
            self.solution.addcmul_(direction, length)
            if step + 1 == CG_STEPS:
                return
            residual.addcmul_(product, length, value=-1)
            scaled = torch.div(residual, diagonal, out=product)
            last, size = size, _dot(residual, scaled)
            direction.mul_((size / last.clamp_min(TINY)).to(right.dtype)).add_(scaled)

    def _apply(self, gram: torch.Tensor, x: torch.Tensor, shift: float, out: torch.Tensor) -> torch.Tensor:
        return torch.bmm(gram, x, out=out).mul_(self.values).add_(x, alpha=shift)


def _dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Scalar products of the columns of [batch, k, n], float32 [batch, 1, n]."""
    return (x * y).sum(dim=1, keepdim=True, dtype=torch.float32)


def factorize(
    weight: torch.Tensor,
    k: int,
    *,
    importance_in: torch.Tensor | None = None,
    importance_out: torch.Tensor | None = None,
    moment: InputMoment | None = None,
    iterations: int = OUTER_ITERATIONS,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> tuple[list[Factors], torch.Tensor]:
    """Factorizes a batch of weights `[batch, n_out, n_in]` (any float dtype) with `k` middle channels each.

    importance_in `[batch, n_in]` and importance_out `[batch, n_out]`: RMS of input activations and output gradients;
    None is 1 everywhere. moment: that of the inputs which all of them read, in the place of importance_in. `dtype` is
    that of the products (see `product_dtype`). The result depends on the weights, the importances, the moment, k, the
    seed, the device and its thread count only.

    Returns the factors (scales float32, on the weights' device) and the relative squared error ‖W'−Ŵ'‖² / ‖W'‖² of
    each, `[batch]`, under the importances or, with a moment, of the outputs. Raises ValueError for weights that are not
    finite or make it diverge.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("the weight has values that are not finite")
    batch, n_out, n_in = weight.shape
    device = weight.device
    dtype = dtype or product_dtype(device)
    o = torch.ones(batch, n_out) if importance_out is None else _finite_importance(importance_out)
    i = torch.ones(batch, n_in) if importance_in is None else _finite_importance(importance_in)
    if moment is not None:
        i = moment.importance.expand(batch, -1)
    o, i = o.to(device), i.to(device)
    target = weight.float() * o[:, :, None] * i[:, None, :]
    target = target / target.square().mean(dim=(1, 2), keepdim=True).sqrt().clamp_min(TINY)

    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same start on every device
    start_a, start_b = (torch.randn(k, n, generator=generator).to(device, dtype) for n in (n_out, n_in))
    # first: it takes most memory on its way
    metric = None if moment is None else _Metric(moment, target, k, dtype)
    low = target.to(dtype)
    side_a = _Side(start_a.expand(batch, -1, -1), low.transpose(1, 2).contiguous())
    side_b = _Side(start_b.expand(batch, -1, -1), low)
    fixed = (start_b.float() / start_b.float().norm(dim=1, keepdim=True)).to(dtype).expand(batch, -1, -1)
    del start_a, start_b  # large
    ends = (RHO, RIDGE) if metric is None else (METRIC_RHO, METRIC_RIDGE)
    for t in range(iterations):
        done = min(1.0, t / max(1, iterations - 3))
        rho, ridge = (_anneal(pair, done) for pair in ends)
        if metric is None:
            side_a.half_step(fixed, fixed, rho, ridge)
            side_b.half_step(side_a.unit, side_a.unit, rho, ridge)
        else:
            side_a.half_step(*metric.normalised(fixed), rho, ridge)
            side_b.metric_step(side_a.unit, metric, rho, ridge)
        fixed = side_b.unit

    if not all(torch.isfinite(side.row).all() for side in (side_a, side_b)):
        if dtype == torch.float32:
            raise ValueError("the factorization does not converge on this weight")
        options = {"importance_in": importance_in, "importance_out": importance_out, "moment": moment, "seed": seed}
        return factorize(weight, k, **options, iterations=iterations, dtype=torch.float32)

    signs_a = _signs(side_a.unit).transpose(1, 2)  # [batch, n_out, k]
    signs_b = _signs(side_b.unit)  # [batch, k, n_in]
    vectors = side_a.v[..., 0], side_b.v[..., 0]  # [batch, n_out], [batch, n_in]
    del side_a, side_b, metric, low, fixed
    factors, errors = [], []
    metric = None if moment is None else moment.metric
    for j in range(batch):
        start = [vector[j] for vector in vectors]
        scales = _refit(target[j], signs_a[j].float(), signs_b[j].float(), *start, metric)
        found = Factors(signs_a[j].contiguous(), signs_b[j].contiguous(), *scales)
        errors.append(_energy(target[j] - found.dense(), metric) / _energy(target[j], metric).clamp_min(TINY))
        size = (weight[j].float() * o[j][:, None] * i[j]).square().mean().sqrt()
        found.scale_a, found.scale_m, found.scale_b = _balance(scales[0] / o[j], scales[1] * size, scales[2] / i[j])
        factors.append(found)
    return factors, torch.stack(errors)


def _signs(x: torch.Tensor) -> torch.Tensor:
    """-1 where x < 0, else 1; int8, and nothing wider on the way."""
    return (x < 0).to(torch.int8).mul_(-2).add_(1)


def _anneal(ends: tuple[float, float], done: float) -> float:
    """Geometric interpolation: the start at done = 0, the end at done = 1."""
    return ends[0] ** (1 - done) * ends[1] ** done


def _finite_importance(importance: torch.Tensor) -> torch.Tensor:
    """[..., n] in float32, mean 1, bounded below so that dividing by it is harmless; 1 where nothing is known."""
    importance = torch.nan_to_num(importance.float(), nan=0.0, posinf=0.0).clamp_min(0)
    mean = importance.mean(dim=-1, keepdim=True)
    scaled = importance / mean.clamp_min(TINY)
    return torch.where(mean > TINY, scaled, torch.ones_like(scaled)).clamp_min(IMPORTANCE_FLOOR)


def _energy(w: torch.Tensor, metric: torch.Tensor | None) -> torch.Tensor:
    """‖W H^½‖², a scalar; H = I where it is None."""
    return (w.square() if metric is None else (w @ metric) * w).sum()


def _refit(
    w: torch.Tensor,
    a_signs: torch.Tensor,
    b_signs: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    metric: torch.Tensor | None = None,
):
    """Least-squares scales for fixed signs: m given (a, b) by one k×k system, then a given (m, b), then b given (a, m).

    w [n_out, n_in], metric [n_in, n_in] (None is the identity); returns a [n_out], m [k], b [n_in], float32.
    """
    left, right = a_signs * a[:, None], b_signs * b  # [n_out, k], [k, n_in]
    seen, right_seen = (w, right) if metric is None else (w @ metric, right @ metric)
    m = _solve((left.T @ left) * (right_seen @ right.T), ((left.T @ seen) * right).sum(dim=1))
    image = (a_signs * m) @ right  # [n_out, n_in], without a
    image_seen = image if metric is None else image @ metric
    a = (seen * image).sum(dim=1) / (image * image_seen).sum(dim=1).clamp_min(TINY)
    image = a[:, None] * ((a_signs * m) @ b_signs)  # without b
    wanted = (seen * image).sum(dim=0)
    if metric is None:
        b = wanted / image.square().sum(dim=0).clamp_min(TINY)
    else:
        b = _solve((image.T @ image).mul_(metric), wanted)
    return a, m, b


def _solve(system: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The solution [n] of a positive semidefinite system [n, n], which is changed."""
    diagonal = system.diagonal().mean().clamp_min(TINY)
    system.diagonal().add_(1e-5 * diagonal)
    root, broken = torch.linalg.cholesky_ex(system)
    if broken:  # many equal channels: a ridge above the rounding
        system.diagonal().add_(1e-2 * diagonal)
        root = torch.linalg.cholesky(system)
    return torch.cholesky_solve(wanted[:, None], root)[:, 0]


def _balance(a: torch.Tensor, m: torch.Tensor, b: torch.Tensor):
    """Fixes the gauge: the same product with equal RMS of all three, so that each survives float16."""
    rms = [t.square().mean().sqrt().clamp_min(TINY) for t in (a, m, b)]
    common = (rms[0] * rms[1] * rms[2]) ** (1 / 3)
    return tuple(t * (common / r) for t, r in zip((a, m, b), rms, strict=True))

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
- Where k exceeds d, the half step solves d equations in the place of k; of Gram matrices, a CPU computes one half.
- Any number of equal-shaped matrices at once (a leading batch dimension), on any torch device.

Importance (section 3.3): W' = diag(o) W diag(i) is factorized and the scales divided by o and i afterwards.

Inputs are not only uneven, they are correlated: what counts is the error of the outputs, ‖(W' − A'·B')·H^½‖², where
H is the second moment of the inputs in units of their RMS i (unit diagonal; H = I is the case above). With
H = Q diag(h) Qᵀ, the half step for A' takes F Q √h and V Q √h in the place of F and V. The one for B' becomes

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
        """start [batch, k, n]; target [batch, d, n], what Fᵀ S has to match."""
        self.target = target
        self.unit = start.clone(memory_format=torch.contiguous_format)
        self.u = torch.zeros_like(self.unit)
        self.s, self.right = torch.empty_like(self.unit), torch.empty_like(self.unit)
        batch, k, n = start.shape
        self.row = start.new_ones(batch, k, 1, dtype=torch.float32)
        self.v = start.new_ones(batch, n, 1, dtype=torch.float32)  # norm 1

    def half_step(self, fixed: torch.Tensor, rho: float, ridge: float) -> None:
        """Moves this factor against `fixed` [batch, k, d], the rows of which have unit length.

        With more channels than d, the system of k × k is replaced by one of d × d: for c = λ + ρ and E = ρ (X − U) / c

            S = E + F (Fᵀ F + c I)⁻¹ (V − Fᵀ E)
        """
        shift, across = ridge + rho, fixed.transpose(1, 2)
        if few_equations(*fixed.shape[1:], self.s.shape[2]):
            self._pull(self.unit, self.s).mul_(rho / shift)
            missing = torch.baddbmm(self.target, across, self.s, alpha=-1)
            self.s.baddbmm_(fixed, torch.bmm(_inverse(_gram(across), shift), missing))
        else:
            self._pull(self.unit, self.right).mul_(rho).baddbmm_(fixed, self.target)
            torch.bmm(_inverse(_gram(fixed), shift), self.right, out=self.s)
        self.u.add_(self.s)
        self._project(self.u, self.s)
        self.u.addcmul_(self.unit, self.row.to(self.u.dtype), value=-1)

    def _pull(self, unit: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """X − U, where X = row ⊙ unit in the basis that U is kept in."""
        return torch.mul(unit, self.row.to(out.dtype), out=out).sub_(self.u)

    def _project(self, total: torch.Tensor, magnitude: torch.Tensor) -> None:
        """X = SVID(S + U) (paper, section 3.2), by one power iteration from the last rank-1 vectors.

        total is S + U; magnitude, of the same shape, is overwritten.
        """
        torch.abs(total, out=magnitude)
        row = (magnitude @ self.v.to(magnitude.dtype)).float()
        row /= row.norm(dim=1, keepdim=True).clamp_min(TINY)
        v = (row.to(magnitude.dtype).transpose(1, 2) @ magnitude).float().transpose(1, 2)
        norm = v.norm(dim=1, keepdim=True).clamp_min(TINY)
        self.v, self.row = v / norm, row * norm
        torch.copysign(self.v.to(total.dtype).transpose(1, 2).expand_as(total), total, out=self.unit)


def few_equations(k: int, d: int, n: int) -> bool:
    """Whether a half step costs less by the system of d × d than by that of k × k (F [k, d], X [k, n]).

    In multiplications: half a Gram matrix, an inverse, which takes as long as two products of its size, and products.
    """
    return k * d * d / 2 + 2 * d**3 + d * d * n + 2 * k * d * n < k * k * d / 2 + 2 * k**3 + k * k * n + k * d * n


def _gram(factor: torch.Tensor) -> torch.Tensor:
    """F Fᵀ [batch, k, k] of F [batch, k, d]. On a CPU what lies above its diagonal blocks is copied from below."""
    if factor.device.type != "cpu":
        return torch.bmm(factor, factor.transpose(1, 2))
    k = factor.shape[1]
    size = max(256, -(-k // 128) * 32)  # four blocks: of more, the products would be slower
    gram = factor.new_empty(len(factor), k, k)
    for f, g in zip(factor, gram, strict=True):  # one by one: bmm takes twice as long on parts
        for start in range(0, k, size):
            end = min(k, start + size)
            torch.mm(f[start:end], f[:end].T, out=g[start:end, :end])
            g[:start, start:end] = g[start:end, :start].T
    return gram


def _inverse(gram: torch.Tensor, shift: float) -> torch.Tensor:
    """(G + shift · I)⁻¹ in G's dtype, computed in float32.

    λ + ρ is never below 0.39, more than what rounding G to bfloat16 can take from its least eigenvalue.
    """
    system = gram.to(torch.float32, copy=True)
    system.diagonal(dim1=1, dim2=2).add_(shift)
    root, _ = torch.linalg.cholesky_ex(system)
    return torch.cholesky_inverse(root).to(gram.dtype)


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


class _MetricSide(_Side):
    """The factor whose columns the metric H = Q diag(h) Qᵀ couples: its half step takes place in H's eigenvectors.

    There it keeps the dual, as U Q, and `turned`, which is `unit` times Q: two changes of basis an iteration.
    """

    def __init__(self, start: torch.Tensor, target: torch.Tensor, moment: InputMoment):
        """target V [batch, n_out, n_in], float32."""
        values, basis = moment.decomposition()
        values, dtype = values.clamp_min(0), start.dtype
        root = values.sqrt()
        scaled = target @ (basis * root)  # V Q √h
        self.opposite_target = scaled.transpose(1, 2).to(dtype).contiguous()
        super().__init__(start, scaled.mul_(root).to(dtype))  # V H Q
        self.values, self.root, self.basis = values.to(dtype), root.to(dtype), basis.to(dtype)
        self.turned = self.unit @ self.basis
        self.solution, self.direction = torch.zeros_like(self.unit), torch.empty_like(self.unit)

    def seen(self) -> torch.Tensor:
        """What the other factor's half step is fixed to: F Q √h [batch, k, n_in] with rows of unit length."""
        image = self.turned * self.root
        return image.div_(image.float().norm(dim=2, keepdim=True).clamp_min(TINY).to(image.dtype))

    def half_step(self, fixed: torch.Tensor, rho: float, ridge: float) -> None:
        """Moves this factor against `fixed` [batch, k, n_out], rows of unit length."""
        right = torch.bmm(fixed, self.target, out=self.right)
        right.add_(self._pull(self.turned, self.s), alpha=rho)
        self._conjugate_gradients(_gram(fixed), right, rho + ridge)
        self.u.add_(self.solution)
        self._project(torch.matmul(self.u, self.basis.T, out=self.s), self.right)
        torch.matmul(self.unit, self.basis, out=self.turned)
        self.u.addcmul_(self.turned, self.row.to(self.u.dtype), value=-1)

    def _conjugate_gradients(self, gram: torch.Tensor, right: torch.Tensor, shift: float) -> None:
        """Brings `solution` [batch, k, n_in] closer to that of gram · S̃ · diag(h) + shift · S̃ = right.

        Conjugate gradients for every column, preconditioned with the diagonal h + shift (that of `gram` is 1). `right`,
        of the same shape, is overwritten.
        """
        diagonal, product = self.values + shift, self.s

        def apply(x: torch.Tensor) -> torch.Tensor:
            return torch.bmm(gram, x, out=product).mul_(self.values).add_(x, alpha=shift)

        residual = right.sub_(apply(self.solution))
        direction = torch.div(residual, diagonal, out=self.direction)
        size = _dot(residual, direction)
        for step in range(CG_STEPS):
            apply(direction)
            length = (size / _dot(direction, product).clamp_min(TINY)).to(right.dtype)
            self.solution.addcmul_(direction, length)
            if step + 1 == CG_STEPS:
                return
            residual.addcmul_(product, length, value=-1)
            scaled = torch.div(residual, diagonal, out=product)
            last, size = size, _dot(residual, scaled)
            direction.mul_((size / last.clamp_min(TINY)).to(right.dtype)).add_(scaled)


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
    start_a, start_b = (start.expand(batch, -1, -1) for start in (start_a, start_b))
    if moment is None:
        ends, side_b = (RHO, RIDGE), _Side(start_b, target.to(dtype))
        side_a = _Side(start_a, side_b.target.transpose(1, 2).contiguous())
        fixed = torch.nn.functional.normalize(start_b.float(), dim=2, eps=TINY).to(dtype)
    else:
        ends, side_b = (METRIC_RHO, METRIC_RIDGE), _MetricSide(start_b, target, moment)
        side_a = _Side(start_a, side_b.opposite_target)
        fixed = side_b.seen()
    del start_a, start_b  # large
    for t in range(iterations):
        done = min(1.0, t / max(1, iterations - 3))
        rho, ridge = (_anneal(pair, done) for pair in ends)
        side_a.half_step(fixed, rho, ridge)
        side_b.half_step(side_a.unit, rho, ridge)
        fixed = side_b.unit if moment is None else side_b.seen()

    if not all(torch.isfinite(side.row).all() for side in (side_a, side_b)):
        if dtype == torch.float32:
            raise ValueError("the factorization does not converge on this weight")
        options = {"importance_in": importance_in, "importance_out": importance_out, "moment": moment, "seed": seed}
        return factorize(weight, k, **options, iterations=iterations, dtype=torch.float32)

    signs_a = _signs(side_a.unit).transpose(1, 2)  # [batch, n_out, k]
    signs_b = _signs(side_b.unit)  # [batch, k, n_in]
    vectors = side_a.v[..., 0], side_b.v[..., 0]  # [batch, n_out], [batch, n_in]
    del side_a, side_b, fixed
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

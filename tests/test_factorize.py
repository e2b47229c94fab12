"""The factorization against the plain reference of bench/factorize.py, and what it must bear.

Run alone: pytest tests/test_factorize.py     (under a minute, nothing is downloaded)
The comparison on real matrices, with times: python bench/factorize.py
"""

import functools
import math
from concurrent.futures import ThreadPoolExecutor

import factorize as bench
import pytest
import torch

from dbf_gguf.factorize import (
    METRIC_RHO,
    METRIC_RIDGE,
    RHO,
    RIDGE,
    InputMoment,
    _anneal,
    _gram,
    _MetricSide,
    _refit,
    _Side,
    factorize,
    few_equations,
)
from dbf_gguf.factors import Factors

SCALES = ("scale_a", "scale_m", "scale_b")
QUICK = 60  # outer iterations where the quality itself is not asked for


pytestmark = pytest.mark.usefixtures("one_thread")


def weight(n_out: int, n_in: int, seed: int = 0) -> torch.Tensor:
    """A matrix with what real ones have: a decaying spectrum, noise, and rows and columns of uneven size."""
    g = torch.Generator().manual_seed(seed)
    rank = min(n_out, n_in) // 2
    u, v = torch.randn(n_out, rank, generator=g), torch.randn(rank, n_in, generator=g)
    w = u @ (torch.arange(1, rank + 1).float().pow(-0.7)[:, None] * v) + 2.5 * torch.randn(n_out, n_in, generator=g)
    rows, columns = (torch.randn(n, generator=g).mul(0.3).exp() for n in (n_out, n_in))
    return 0.02 * rows[:, None] * w * columns


def error(w: torch.Tensor, f: Factors, o: torch.Tensor | None = None, i: torch.Tensor | None = None) -> float:
    """Relative squared error in float64, under the importances o [n_out] and i [n_in]."""
    left = torch.ones(w.shape[0]) if o is None else o
    right = torch.ones(w.shape[1]) if i is None else i
    importance = left.double()[:, None] * right.double()
    difference = (w.double() - f.dense(torch.float64)) * importance
    return (difference.square().sum() / (w.double() * importance).square().sum()).item()


def one(w: torch.Tensor, k: int, *, importance_in=None, importance_out=None, **options) -> tuple[Factors, float]:
    """`factorize` of a single matrix."""
    batch = {"importance_in": importance_in, "importance_out": importance_out}
    batch = {name: None if t is None else t[None] for name, t in batch.items()}
    (factors,), errors = factorize(w[None], k, **batch, **options)
    return factors, errors[0].item()


def assert_sound(f: Factors, n_out: int, k: int, n_in: int) -> None:
    """Signs are ±1, shapes are right, and the scales survive float16."""
    assert (f.n_out, f.k, f.n_in) == (n_out, k, n_in)
    for signs in (f.signs_a, f.signs_b):
        assert signs.dtype == torch.int8 and signs.abs().eq(1).all()
    for name in SCALES:
        scale = getattr(f, name)
        assert scale.dtype == torch.float32
        assert torch.isfinite(scale.half()).all(), name


# --- quality


SEEDS = range(3)  # of the start: results of single runs differ by about a percent


@functools.cache
def plain_error(n_out: int, n_in: int, k: int) -> float:
    """The mean error of the reference."""
    w = weight(n_out, n_in)
    return sum(bench.relative_error(w, bench.reference(w, k, seed=seed)) for seed in SEEDS) / len(SEEDS)


@pytest.mark.parametrize("n_out, n_in, k", [(160, 96, 64), (96, 192, 96), (128, 128, 160)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_worse_than_the_plain_reference(n_out, n_in, k, dtype):
    w = weight(n_out, n_in)
    errors = []
    for seed in SEEDS:
        factors, _ = one(w, k, dtype=dtype, seed=seed)
        assert_sound(factors, n_out, k, n_in)
        errors.append(error(w, factors))
    assert sum(errors) / len(SEEDS) <= 1.01 * plain_error(n_out, n_in, k)


def test_bfloat16_products_cost_nothing():
    """Mean over matrices, as single runs differ by about a percent through their signs alone."""
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        _, found = factorize(torch.stack([weight(128, 192, seed) for seed in range(4)]), 96, dtype=dtype)
        errors[dtype] = found.mean().item()
    assert errors[torch.bfloat16] == pytest.approx(errors[torch.float32], rel=0.02)


def test_more_channels_less_error_also_above_the_rank():
    """k may exceed min(n_out, n_in), and still buys something."""
    w = weight(64, 96)
    errors = [one(w, k, iterations=QUICK)[1] for k in (32, 64, 96, 128, 192)]
    assert all(more < 0.9 * less for less, more in zip(errors, errors[1:], strict=False))


def test_float16_scales_are_enough():
    w = weight(128, 96)
    factors, _ = one(w, 96, iterations=QUICK)
    full = error(w, factors)
    for name in SCALES:
        setattr(factors, name, getattr(factors, name).half())
    assert error(w, factors) == pytest.approx(full, rel=2e-3)


def test_reported_error_is_that_of_the_factors():
    w = weight(96, 64)
    g = torch.Generator().manual_seed(1)
    o, i = (torch.rand(n, generator=g) + 0.2 for n in (96, 64))
    factors, reported = one(w, 64, importance_out=o, importance_in=i, iterations=QUICK)
    assert reported == pytest.approx(error(w, factors, o, i), rel=1e-3)


def test_refit_never_worsens():
    """For given signs and whatever a, m and b, the refitted three are at least as good, m's own optimum included."""
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        w = weight(64, 96, seed)
        signs_a, signs_b = (torch.randn(shape, generator=g).sign() for shape in ((64, 48), (48, 96)))
        a, b = (torch.rand(n, generator=g) + 0.1 for n in (64, 96))
        outer = torch.einsum("ik,kj->ijk", a[:, None] * signs_a, signs_b * b).reshape(-1, 48).double()
        best_m = torch.linalg.lstsq(outer, w.double().reshape(-1, 1)).solution[:, 0]
        before = ((outer @ best_m - w.double().reshape(-1)).square().sum() / w.double().square().sum()).item()
        factors = Factors(signs_a.to(torch.int8), signs_b.to(torch.int8), *_refit(w, signs_a, signs_b, a, b))
        assert error(w, factors) <= before * (1 + 1e-4)


# --- correlated inputs


def correlated(n: int, tokens: int = 2000, seed: int = 5) -> torch.Tensor:
    """Inputs [tokens, n] with a decaying spectrum, as activations have; of one distribution whatever the seed."""
    basis = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0)))[0]
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, n, generator=g) * torch.arange(1, n + 1).float().pow(-0.7) @ basis


def test_a_moment_lowers_the_error_of_the_outputs():
    w, x = weight(96, 128), correlated(128)
    moment, new = x.T @ x / len(x), correlated(128, seed=6)

    def output_error(f: Factors) -> float:
        return ((new @ (w - f.dense()).T).square().sum() / (new @ w.T).square().sum()).item()

    found, reported = factorize(w[None], 64, moment=InputMoment(moment.clone()), iterations=QUICK)
    diagonal, _ = one(w, 64, importance_in=moment.diagonal().sqrt(), iterations=QUICK)
    assert_sound(found[0], 96, 64, 128)
    assert output_error(found[0]) < 0.5 * output_error(diagonal)
    assert output_error(found[0]) < reported[0].item() < 2 * output_error(found[0])  # what is reported is damped


def test_an_uncorrelated_moment_changes_little():
    w, i = weight(96, 128), torch.rand(128, generator=torch.Generator().manual_seed(1)) + 0.2
    _, with_moment = factorize(w[None], 64, moment=InputMoment(i.square().diag()), iterations=QUICK)
    _, plain = one(w, 64, importance_in=i, iterations=QUICK)
    assert with_moment[0].item() == pytest.approx(plain, rel=0.05)


def test_the_solver_of_the_half_step_converges():
    """Many calls with the same system end at the solution of the Kronecker system, in float64."""
    k, n, shift = 12, 9, 0.7
    moment = InputMoment(correlated(n).T.cov())
    factor = torch.nn.functional.normalize(torch.randn(k, 20, generator=torch.Generator().manual_seed(2)), dim=1)
    gram, right = (factor @ factor.T)[None], torch.randn(1, k, n, generator=torch.Generator().manual_seed(3))
    side = _MetricSide(torch.zeros(1, k, n), torch.zeros(1, 4, n), moment)
    for _ in range(40):
        side._conjugate_gradients(gram, right.clone(), shift)
    system = torch.kron(gram[0].double(), side.values.double().diag()) + shift * torch.eye(k * n)
    wanted = torch.linalg.solve(system, right.double().flatten())
    assert torch.allclose(side.solution.flatten().double(), wanted, atol=1e-4)


def half_step_in_float64(w, moment, start, fixed, rho, ridge):
    """S [k, n_out] of the first half step for A', U being 0, by the formula (k equations)."""
    h = moment.metric.double()
    inner = fixed / ((fixed @ h) * fixed).sum(dim=1, keepdim=True).sqrt()
    system = inner @ h @ inner.T + (ridge + rho) * torch.eye(len(fixed))
    return torch.linalg.solve(system, inner @ h @ w.T + rho * start)


@pytest.mark.parametrize(("k", "wide"), [(24, False), (150, True)])
def test_half_step_under_a_moment_is_the_least_squares_solution(k, wide):
    """Both ways to solve for A', with few middle channels and with more than inputs, against float64."""
    n_out, n_in, rho, ridge = 40, 32, 0.4, 0.1
    assert few_equations(k, n_in, n_out) == wide
    generator = torch.Generator().manual_seed(2)
    start_a, start_b = (torch.randn(k, n, generator=generator) for n in (n_out, n_in))
    w, moment = weight(n_out, n_in), InputMoment(correlated(n_in).T.cov())
    other = _MetricSide(start_b[None], w[None], moment)
    side = _Side(start_a[None], other.opposite_target)
    side.half_step(other.seen(), rho, ridge)
    found = side.u[0] + side.row[0] * side.unit[0]  # S + U, U having been 0
    wanted = half_step_in_float64(w.double(), moment, start_a.double(), start_b.double(), rho, ridge)
    assert torch.allclose(found.double(), wanted, atol=1e-4 * wanted.abs().max())


def test_turned_dual_is_that_of_the_signs():
    """After a half step U is S − X in the metric's eigenvectors, and X is the projection of S onto signs."""
    k, n_out, n_in = 24, 40, 32
    generator = torch.Generator().manual_seed(2)
    fixed = torch.nn.functional.normalize(torch.randn(1, k, n_out, generator=generator), dim=2)
    moment = InputMoment(correlated(n_in).T.cov())
    side = _MetricSide(torch.randn(1, k, n_in, generator=generator), weight(n_out, n_in)[None], moment)
    side.half_step(fixed, 0.4, 0.1)
    _, basis = moment.decomposition()
    s = side.solution @ basis.T
    assert torch.equal(side.unit < 0, s < 0)
    assert torch.allclose(side.turned @ basis.T, side.unit, atol=1e-5)
    assert torch.allclose(side.u @ basis.T, s - side.row * side.unit, atol=1e-4)


@pytest.mark.parametrize("k", [5, 256, 300, 1100])
def test_gram_matrix_in_blocks(k):
    factor = torch.randn(2, k, 20, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(_gram(factor), factor @ factor.transpose(1, 2), atol=1e-4)


def test_refit_under_a_moment_is_the_optimum_in_turn():
    """Nothing near each of the three is better, with the other two given, and b is the last that was fitted."""
    w, moment = weight(48, 64), correlated(64).T.cov()
    g = torch.Generator().manual_seed(3)
    signs_a, signs_b = torch.randn(48, 40, generator=g).sign(), torch.randn(40, 64, generator=g).sign()
    a, b = (torch.rand(n, generator=g) + 0.1 for n in (48, 64))

    def loss(a, m, b) -> float:
        e = w - (signs_a * a[:, None] * m) @ (signs_b * b)
        return ((e @ moment) * e).sum().item()

    found = _refit(w, signs_a, signs_b, a, b, moment)
    best = loss(*found)
    assert best < loss(a, found[1], b)
    for _ in range(20):
        assert loss(found[0], found[1], found[2] * (1 + 0.01 * torch.randn(64, generator=g))) >= best * (1 - 1e-4)


# --- the same again


def test_same_seed_same_bits():
    w = weight(96, 128)
    results = [one(w, 64, iterations=QUICK, seed=seed)[0] for seed in (7, 7, 8)]
    for name in ("signs_a", "signs_b", *SCALES):
        assert torch.equal(getattr(results[0], name), getattr(results[1], name)), name
    assert not torch.equal(results[0].signs_a, results[2].signs_a)


def test_python_threads_change_nothing():
    """`convert` factorizes several linears at once, each in its own Python thread."""
    ws = [weight(96, 128, seed) for seed in range(4)]
    serial = [one(w, 64, iterations=QUICK) for w in ws]
    with ThreadPoolExecutor(2) as pool:
        pooled = list(pool.map(lambda w: one(w, 64, iterations=QUICK), ws))
    for (expected, expected_error), (found, found_error) in zip(serial, pooled, strict=True):
        assert found_error == expected_error
        for name in ("signs_a", "signs_b", *SCALES):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_does_not_touch_its_inputs_nor_the_random_state():
    w, i = weight(64, 64), torch.rand(64)
    kept, kept_i, state = w.clone(), i.clone(), torch.get_rng_state()
    one(w, 32, importance_in=i, iterations=5)
    assert torch.equal(w, kept) and torch.equal(i, kept_i) and torch.equal(torch.get_rng_state(), state)


def test_batch_equals_single():
    """Each is factorized as if alone, whatever its size. Rounding tips signs here and there, so errors are compared:
    each within what another seed would change, and their mean closely."""
    ws = torch.stack([weight(96, 64, seed) * 10.0**seed for seed in range(5)])
    together, errors = factorize(ws, 64)
    alone = torch.tensor([one(w, 64)[1] for w in ws])
    assert torch.allclose(errors, torch.tensor([error(w, f) for w, f in zip(ws, together, strict=True)]), rtol=1e-3)
    assert torch.allclose(errors, alone, rtol=0.06)
    assert errors.mean().item() == pytest.approx(alone.mean().item(), rel=0.02)


def test_float16_and_bfloat16_weights_are_taken():
    w = weight(64, 64)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        factors, reported = one(w.to(dtype), 64, iterations=QUICK)
        assert_sound(factors, 64, 64, 64)
        assert reported < 0.3


# --- importance


@pytest.mark.parametrize("side", ["in", "out"])
def test_error_falls_where_importance_is_high(side):
    w = weight(96, 128)
    n = w.shape[0 if side == "out" else 1]
    high = torch.arange(n) % 4 == 0
    importance = torch.where(high, 4.0, 0.5)
    plain, _ = one(w, 64)
    weighted, _ = one(w, 64, **{f"importance_{side}": importance})

    def error_there(f: Factors) -> float:
        return error(w[high], rows(f, high)) if side == "out" else error(w[:, high], columns(f, high))

    assert error_there(weighted) < 0.7 * error_there(plain)
    under = {"o" if side == "out" else "i": importance}
    assert error(w, weighted, **under) < 0.9 * error(w, plain, **under)


def rows(f: Factors, mask: torch.Tensor) -> Factors:
    return Factors(f.signs_a[mask], f.signs_b, f.scale_a[mask], f.scale_m, f.scale_b)


def columns(f: Factors, mask: torch.Tensor) -> Factors:
    return Factors(f.signs_a, f.signs_b[:, mask], f.scale_a, f.scale_m, f.scale_b[mask])


def test_importance_has_no_unit():
    """Only its ratios count: gradients are tiny numbers."""
    w = weight(64, 96)
    o, i = torch.rand(64) + 0.1, torch.rand(96) + 0.1
    _, expected = one(w, 64, importance_out=o, importance_in=i, iterations=QUICK)
    factors, found = one(w, 64, importance_out=o * 1e-12, importance_in=i * 1e6, iterations=QUICK)
    assert_sound(factors, 64, 64, 96)
    assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("value", [0.0, 1e-30, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("some", [True, False], ids=["some", "all"])
def test_dead_and_broken_importances(value, some):
    """Channels that the calibration text never woke, or a gradient that overflowed, must not spoil the rest."""
    w = weight(96, 128)
    o, i = torch.ones(96), torch.ones(128)
    o[::5 if some else 1] = value
    i[::7 if some else 1] = value
    factors, reported = one(w, 96, importance_out=o, importance_in=i, iterations=QUICK)
    assert_sound(factors, 96, 96, 128)
    assert math.isfinite(reported)
    alive = torch.ones(96).bool(), torch.ones(128).bool()
    if some:
        alive[0][::5] = alive[1][::7] = False
    assert error(w[alive[0]][:, alive[1]], columns(rows(factors, alive[0]), alive[1])) < 0.3


# --- weights that are hard to bear


def test_zero_rows_and_columns():
    w = weight(96, 128)
    w[5], w[40], w[:, 7], w[:, 64] = 0, 0, 0, 0
    factors, reported = one(w, 64, iterations=QUICK)
    assert_sound(factors, 96, 64, 128)
    assert reported < 0.4
    dense = factors.dense()
    typical = dense.square().mean().sqrt()
    for zero in (dense[5], dense[40], dense[:, 7], dense[:, 64]):
        assert zero.square().mean().sqrt() < 0.05 * typical


def test_all_zero_matrix():
    factors, reported = one(torch.zeros(64, 96), 32, iterations=5)
    assert_sound(factors, 64, 32, 96)
    assert math.isfinite(reported)
    assert factors.dense().abs().max() < 1e-6


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("ends", [(RHO, RIDGE), (METRIC_RHO, METRIC_RIDGE)])
def test_nearly_parallel_rows_in_bfloat16(ends, wide, monkeypatch):
    """Rounded to bfloat16 their Gram matrix is indefinite; the damping has to outweigh that at every iteration."""
    generator = torch.Generator().manual_seed(0)
    k, n = 768, 96
    v = torch.rand(n, generator=generator) ** 4
    flips = torch.where(torch.rand(k, n, generator=generator) < 0.01, -1.0, 1.0)
    fixed = (v / v.norm() * flips).bfloat16()[None]
    gram = (fixed @ fixed.transpose(1, 2))[0].double()
    assert torch.linalg.eigvalsh(gram)[0] < -0.1, "no such case: choose another matrix"
    target = torch.randn(1, n, n, generator=generator).bfloat16()
    rho, ridge = min(([_anneal(pair, t / 99) for pair in ends] for t in range(100)), key=sum)
    side = _Side(torch.randn(1, k, n, generator=generator).bfloat16(), target)
    monkeypatch.setattr("dbf_gguf.factorize.few_equations", lambda *sizes: wide)
    side.half_step(fixed, rho, ridge)
    assert side.u.abs().max() < 100


def test_one_column_weight():
    """All middle channels become equal, and the closed-form fit of m singular."""
    weight = torch.zeros(256, 256)
    weight[:, 7] = torch.randn(256, generator=torch.Generator().manual_seed(0))
    (found,), error = factorize(weight[None], 512, iterations=8)
    assert error.item() < 0.1
    assert torch.isfinite(found.dense()).all()


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_any_size_of_weights_fits_float16(size):
    w = weight(64, 96) / weight(64, 96).square().mean().sqrt() * size
    factors, _ = one(w, 64, iterations=QUICK)
    assert_sound(factors, 64, 64, 96)
    for name in SCALES:
        setattr(factors, name, getattr(factors, name).half())
    assert error(w, factors) < 0.3
    rms = [getattr(factors, name).double().square().mean().sqrt().item() for name in SCALES]
    assert max(rms) < 1.01 * min(rms)  # the gauge: all three alike


@pytest.mark.parametrize("n_out, n_in, k", [(1, 32, 32), (7, 32, 32), (300, 32, 96), (32, 320, 32)])
def test_odd_shapes(n_out, n_in, k):
    w = weight(max(n_out, 2), n_in)[:n_out]
    factors, reported = one(w, k, iterations=20)
    assert_sound(factors, n_out, k, n_in)
    assert reported < 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(value):
    w = weight(32, 32)
    w[3, 4] = value
    with pytest.raises(ValueError, match="not finite"):
        one(w, 32)

"""Products with signs by table lookup, against float64, and tuning that uses them.

Run alone: pytest tests/test_lookup.py     (half a minute; compiles one small file, nothing is downloaded)
"""

import platform
from types import SimpleNamespace

import pytest
import torch
from test_tuning import (
    LENGTH,
    SCALES,
    STEP,
    WINDOWS,
    Interrupted,
    assert_same,
    dense_reference,
    distill_module,
    ids,
    interrupt_at,
    make_pair,
    random_factors,
    relative,
    step_of_512_tokens,  # noqa: F401, a fixture of every test
)

from dbf_gguf import lookup
from dbf_gguf.checkpoint import WorkFolder
from dbf_gguf.distill import distill
from dbf_gguf.errors import DBFError
from dbf_gguf.factors import pack_signs
from dbf_gguf.lookup import lookups, multiply
from dbf_gguf.machine import cpu_features
from dbf_gguf.model import DBFLinear
from dbf_gguf.pipeline import Job
from dbf_gguf.signs import SignTraining
from dbf_gguf.trainables import Trainables

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the compiler's flags are for x86"),
]


@pytest.fixture(params=["all", "AVX2"])
def instructions(request, monkeypatch):
    """All that this CPU has; and the code for AVX2 where that has more."""
    found = cpu_features()
    if request.param == "AVX2":
        if not all(found.get(f"avx512_{part}") for part in lookup.AVX512):
            pytest.skip("this CPU has no other code than that for AVX2")
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    lookup.product.cache_clear()
    yield
    lookup.product.cache_clear()


def operands(rows: int, n: int, tokens: int):
    g = torch.Generator().manual_seed(rows + n + tokens)
    signs = torch.randint(2, (rows, n), generator=g, dtype=torch.int8) * 2 - 1
    scale = torch.randn(n, generator=g)
    scale[::7] = 0
    x = torch.randn(tokens, n, generator=g) * torch.logspace(-6, 6, tokens)[:, None]
    x[0, 1] *= 300
    return signs, torch.from_numpy(pack_signs(signs)), scale, x


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 48])
@pytest.mark.parametrize(("rows", "n"), [(1, 32), (31, 96), (16, 160), (33, 128), (576, 2080), (1057, 64)], ids=str)
def test_product(rows, n, tokens):
    """Each sum of four inputs is at most a unit off, of which the largest sum of four has 8188; mostly much less."""
    signs, packed, scale, x = operands(rows, n, tokens)
    kept = [t.clone() for t in (packed, scale, x)]
    y = multiply(packed, scale, x)
    assert all(a.equal(b) for a, b in zip((packed, scale, x), kept, strict=True))
    scaled = x.double() * scale.double()
    error = y.double() - scaled @ signs.double().T
    unit = scaled.abs().unflatten(1, (-1, 4)).sum(-1).amax(1) / 8188
    assert (error.abs() <= 1.001 * n / 4 * unit[:, None]).all()
    assert (error.square().mean(1).sqrt() <= 0.8 * (n / 4) ** 0.5 * unit).all()


@pytest.mark.usefixtures("instructions")
def test_linear_does_not_depend_on_threads():
    layer = DBFLinear(random_factors(160, 96, 64), None, torch.int8)
    x, weight = torch.randn(100, 64, requires_grad=True), torch.randn(100, 160)

    def results():
        y = layer(x)
        inputs = [getattr(layer, scale) for scale in SCALES] + [x]
        return y, *torch.autograd.grad((y * weight).sum(), inputs)

    with lookups(layer):
        alone = results()
        torch.set_num_threads(3)
        try:
            assert all(found.equal(wanted) for found, wanted in zip(results(), alone, strict=True))
        finally:
            torch.set_num_threads(1)


def test_product_with_bad_tokens():
    """A token that is no number spoils itself alone; one of zeros gives zeros."""
    _, packed, scale, x = operands(40, 64, 18)
    good = multiply(packed, scale, x)
    x[3, 5], x[4, 6], x[17] = float("nan"), float("inf"), 0
    y = multiply(packed, scale, x)
    assert y[[3, 4]].isnan().all() and (y[17] == 0).all()
    rest = [t for t in range(17) if t not in (3, 4)]
    assert y[rest].equal(good[rest])


def test_product_of_what_does_not_fit_is_refused():
    _, packed, scale, x = operands(40, 64, 3)
    for arguments in ((packed, scale, x[:, :32]), (packed, scale[:32], x), (packed, scale, x.double())):
        with pytest.raises(ValueError, match="rows of 64 signs"):
            multiply(*arguments)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("leading", [(), (1,), (2, 37)], ids=str)
def test_linear_and_its_gradients(leading, with_bias, dtype):
    factors = random_factors(160, 96, 64)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(*leading, 64, generator=g, requires_grad=True)
    weight = torch.randn(*leading, 160, generator=g)
    bias = torch.randn(160, generator=g) if with_bias else None
    layer = DBFLinear(factors, bias, dtype)
    exact = layer(x)
    with lookups(layer):
        y = layer(x)
        (y * weight).sum().backward()
    wanted, gradients = dense_reference(factors, x, bias, weight)
    assert y.shape == exact.shape and not y.equal(exact) and relative(y, wanted) < 1e-3
    found = [getattr(layer, scale).grad for scale in SCALES] + [x.grad]
    assert max(relative(f, w) for f, w in zip(found, gradients, strict=True)) < 1e-3
    assert layer(x).equal(exact)  # by torch again


@pytest.mark.usefixtures("instructions")
def test_linear_in_bfloat16():
    """Between input and output nothing is rounded to bfloat16, and the gradients of the scales stay float32."""
    layer = DBFLinear(random_factors(160, 96, 64), None, torch.int8)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(5, 64, generator=g).bfloat16().requires_grad_(True)
    weight = torch.randn(5, 160, generator=g).bfloat16()
    with lookups(layer):
        y = layer(x)
        (y * weight).sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    wanted, gradients = dense_reference(layer, x.detach().float().requires_grad_(True), None, weight.float())
    assert relative(y.float(), wanted) < 3e-3 and relative(x.grad.float(), gradients[-1]) < 3e-3
    for scale, gradient in zip(SCALES, gradients[:-1], strict=True):
        assert relative(getattr(layer, scale).grad, gradient) < 3e-3


def test_signs_that_are_trained_have_torchs_gradients_and_are_packed_anew():
    layer = DBFLinear(random_factors(64, 96, 64))
    x = torch.randn(9, 64)
    with lookups(layer):
        before = layer(x)
        training = SignTraining([layer])
        exact = layer(x)
        gradients = torch.autograd.grad(exact.sum(), training.signs)
        assert not exact.equal(before) and all(g.abs().sum() > 0 for g in gradients)
        with torch.no_grad():
            layer.signs_b[:, 5].neg_()
        training.close()
        after = layer(x)
    assert relative(after, layer(x)) < 1e-3 < relative(before, layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_what_does_not_fit_stays_with_torch(dtype):
    factors, bias = random_factors(65, 96, 64), torch.randn(65)
    layer, x = DBFLinear(factors, bias, dtype), torch.randn(9, 64)
    with lookups(layer):
        assert layer.lookup is None
        assert layer(x).equal(DBFLinear(factors, bias)(x))
    other = DBFLinear(random_factors(64, 96, 64))
    with lookups(other, enabled=False):
        assert other.lookup is None


@pytest.mark.parametrize("kind", ["llama-tied", "qwen3"])
def test_gradient_of_a_model(kind):
    teacher, new = make_pair(kind)
    tokens, student = ids(2, LENGTH, seed=4), new()
    trained = Trainables(student)
    weight = torch.randn(2, LENGTH, teacher.config.vocab_size, generator=torch.Generator().manual_seed(3))
    wanted, _ = trained.gradient(student(tokens, use_cache=False).logits, weight)
    with lookups(student):
        found, _ = trained.gradient(student(tokens, use_cache=False).logits, weight)
    assert 0 < relative(found, wanted) < 5e-3


def test_distillation(tmp_path, monkeypatch):
    """It gains what it gains without, and an interrupted run ends in the same bits, signs included."""
    teacher, new = make_pair("llama-tied")
    monkeypatch.setattr(distill_module, "EVALUATE_EVERY", 4)
    monkeypatch.setattr(distill_module, "SIGN_CHANCE", 0.2)
    folders = iter(range(9))

    def run(student, *, work=None, sign_lr=None, report=None):
        reports = []
        work = work or WorkFolder.create(tmp_path / str(next(folders)))
        options = {"lr": 0.02, "sign_lr": sign_lr, "seed": 3, "tokens": 14 * STEP, "report": report or reports.append}
        return distill(student, teacher, WINDOWS, work, **options), reports

    _, without = run(new())
    student = new()
    with lookups(student):
        _, reports = run(student)
    fall, wanted = (r[0].best - r[-1].best for r in (reports, without))
    assert fall == pytest.approx(wanted, rel=0.02) and wanted > 0.05 * without[0].best

    cut = WorkFolder.create(tmp_path / "cut")
    whole, first, second = new(), new(), new()
    with lookups(whole):
        wanted, _ = run(whole, sign_lr=0.3)
    with lookups(first), pytest.raises(Interrupted):
        run(first, work=cut, sign_lr=0.3, report=interrupt_at(10, []))
    with lookups(second):
        found, _ = run(second, work=WorkFolder.open(cut.path), sign_lr=0.3)
    assert_same(found, wanted)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache, and nothing compiled in this process."""
    monkeypatch.setenv("DBF_GGUF_CACHE", str(tmp_path / "cache"))
    lookup.product.cache_clear()
    yield tmp_path / "cache" / "lookup"
    lookup.product.cache_clear()


def test_compiled_once(fresh, monkeypatch):
    _, packed, scale, x = operands(40, 64, 3)
    y = multiply(packed, scale, x)
    (library,) = fresh.iterdir()
    assert library.suffix == ".so"
    lookup.product.cache_clear()
    monkeypatch.setattr(lookup.subprocess, "run", only_the_version(lookup.subprocess.run))
    assert multiply(packed, scale, x).equal(y)


def only_the_version(run):
    def checked(command, **options):
        assert command[-1] == "--version"
        return run(command, **options)

    return checked


@pytest.mark.parametrize(("compiler", "reason"), [("no-such-compiler", "no C.. compiler"), ("false", "cannot compile")])
def test_without_a_compiler(fresh, monkeypatch, compiler, reason):
    monkeypatch.setenv("CXX", compiler)
    layer = DBFLinear(random_factors(64, 96, 64))
    with pytest.raises(DBFError, match=reason) as problem, lookups(layer):
        pass
    assert "\n" not in str(problem.value) and layer.lookup is None
    assert not fresh.exists() or not list(fresh.iterdir())


def test_a_conversion_says_why_it_looks_nothing_up(fresh, monkeypatch):
    monkeypatch.setattr(lookup, "faster", lambda device, dtype: True)
    lines = []
    job = SimpleNamespace(device="cpu", dtype=torch.float32)
    job.screen = SimpleNamespace(line=lines.append)
    assert Job.lookups.func(job) and not lines
    lookup.product.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not Job.lookups.func(job)
    assert len(lines) == 1 and "apt-get install g++" in lines[0]


def test_where_lookups_are_faster(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert lookup.faster("cpu", torch.float32)
    assert not lookup.faster("cpu", torch.bfloat16) and not lookup.faster("cuda", torch.float32)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False}, raising=False)
    assert lookup.faster("cpu", torch.bfloat16)
    assert not lookup.faster("cpu", torch.float32) and not lookup.faster("cuda", torch.bfloat16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert not lookup.faster("cpu", torch.bfloat16)

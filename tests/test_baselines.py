"""OneBit SVID and round to nearest against independent references in numpy float64.

Run alone: pytest tests/test_baselines.py     (a second, nothing is downloaded)
"""

import numpy as np
import pytest
import torch

from dbf_gguf.baselines import onebit_bits, onebit_svid, round_to_nearest, round_to_nearest_bits
from dbf_gguf.factorize import factorize

pytestmark = pytest.mark.usefixtures("one_thread")


def weight(n_out: int, n_in: int, seed: int = 0) -> torch.Tensor:
    """Rows and columns of uneven size, as in real layers."""
    g = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randn(n, generator=g).mul(0.4).exp() for n in (n_out, n_in))
    return 0.02 * rows[:, None] * torch.randn(n_out, n_in, generator=g) * columns


def importances(n_out: int, n_in: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(of inputs, of outputs)."""
    g = torch.Generator().manual_seed(7)
    return torch.rand(n_in, generator=g) + 0.1, torch.rand(n_out, generator=g) + 0.1


def svid_reference(w: np.ndarray, i: np.ndarray, o: np.ndarray) -> np.ndarray:
    """By a whole singular value decomposition of |diag(o) W diag(i)|."""
    scaled = np.diag(o) @ w @ np.diag(i)
    u, s, vt = np.linalg.svd(np.abs(scaled))
    signs = np.where(scaled < 0, -1.0, 1.0)
    return np.diag(1 / o) @ (signs * (s[0] * np.outer(u[:, 0], vt[0]))) @ np.diag(1 / i)


@pytest.mark.parametrize("n_out, n_in", [(48, 80), (80, 48), (33, 33), (1, 7), (7, 1)])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "importance"])
def test_onebit_is_the_svd(n_out, n_in, scaled):
    w = weight(n_out, n_in)
    i, o = importances(n_out, n_in) if scaled else (torch.ones(n_in), torch.ones(n_out))
    found = onebit_svid(w, i, o) if scaled else onebit_svid(w)
    assert found.dtype == torch.float32
    expected = svid_reference(w.double().numpy(), i.double().numpy(), o.double().numpy())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_onebit_has_one_sign_and_rank_one():
    w = weight(40, 64)
    w[3, 5] = 0.0  # takes a sign, too
    found = onebit_svid(w)
    assert (found[w != 0].sign() == w[w != 0].sign()).all() and found[3, 5] > 0
    singular = torch.linalg.svdvals(found.abs().double())
    assert singular[1] < 1e-6 * singular[0]


def test_onebit_importance_helps_under_importance():
    """It minimizes the scaled error, so it must beat the plain one there, and lose to it in the unscaled error."""
    w = weight(64, 96)
    i, o = importances(64, 96)
    plain, scaled = onebit_svid(w), onebit_svid(w, i, o)

    def error(found, importance):
        return ((w - found) * importance).square().sum().item()

    importance = o[:, None] * i
    assert error(scaled, importance) < error(plain, importance)
    assert error(plain, 1.0) < error(scaled, 1.0)


def test_onebit_bears_silent_channels_and_zeros():
    w = weight(32, 48)
    i, o = importances(32, 48)
    i[3], o[5] = 0.0, 0.0
    assert torch.isfinite(onebit_svid(w, i, o)).all()
    assert (onebit_svid(torch.zeros(8, 12)) == 0).all()


def rtn_reference(w: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Weight for weight: the nearest of the 2^bits evenly spaced levels between the group's least and largest."""
    result = np.empty_like(w)
    for row in range(w.shape[0]):
        for start in range(0, w.shape[1], group):
            piece = w[row, start : start + group]
            levels = np.linspace(piece.min(), piece.max(), 2**bits)
            result[row, start : start + group] = [levels[np.abs(levels - value).argmin()] for value in piece]
    return result


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 16, 96, 1])
def test_rtn_takes_the_nearest_level(bits, group_size):
    w = weight(24, 96)
    found = round_to_nearest(w, bits, group_size)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), rtn_reference(w.double().numpy(), bits, group_size or 96), atol=2e-8)


def test_rtn_constant_groups_are_exact():
    w = torch.full((4, 32), 0.25)
    assert torch.equal(round_to_nearest(w, 2, 16), w)


def test_half_precision_weights():
    w = weight(16, 32).half()
    assert torch.equal(onebit_svid(w), onebit_svid(w.float()))
    assert torch.equal(round_to_nearest(w, 3, 16), round_to_nearest(w.float(), 3, 16))


def test_bits():
    assert onebit_bits(4096, 4096) == 1 + 2 * 16 / 4096
    assert onebit_bits(64, 96) == pytest.approx((64 * 96 + 16 * (64 + 96)) / (64 * 96))
    assert round_to_nearest_bits(3, 64) == 3.5
    assert round_to_nearest_bits(2, 4096) == 2 + 32 / 4096


def test_dbf_is_better_at_the_same_bits():
    """The paper's figure 3 on a random matrix: DBF below OneBit at 1 bit and below rounding at 2 (section 4.3)."""
    w = weight(128, 128)

    def error(found):
        return ((w - found).square().sum() / w.square().sum()).item()

    for k, rival in ((64, onebit_svid(w)), (128, round_to_nearest(w, 2))):
        (factors,), _ = factorize(w[None], k)
        assert error(factors.dense()) < error(rival), k


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda w: round_to_nearest(w, 0), "0 bits"),
        (lambda w: round_to_nearest(w, 9), "9 bits"),
        (lambda w: round_to_nearest(w, 3, 5), "groups of 5"),
        (lambda w: round_to_nearest(w, 3, -2), "groups of -2"),
        (lambda w: round_to_nearest(w / 0, 3), "not finite"),
        (lambda w: onebit_svid(w / 0), "not finite"),
        (lambda w: onebit_svid(w, torch.ones(3)), "importance of shape"),
        (lambda w: onebit_svid(w, None, torch.full((8,), -1.0)), "none negative"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(weight(8, 12))

"""The roundings of bench/activations.py, and what it measures. Run alone: pytest tests/test_activations.py"""

import activations
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dbf_gguf.factors import Factors
from dbf_gguf.model import DBFLinear, block_linears, replace_linear


@pytest.fixture
def model():
    """Two blocks with random factors."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, linear in block_linears(model).items():
        n_out, n_in = linear.weight.shape
        signs = [torch.randint(0, 2, shape, dtype=torch.int8) * 2 - 1 for shape in ((n_out, 64), (64, n_in))]
        scales = [torch.rand(n) + 0.5 for n in (n_out, 64, n_in)]
        scales[0] /= 8 * n_in**0.5
        replace_linear(model, name, Factors(*signs, *scales), torch.float32)
    return model


@pytest.mark.parametrize("n", [32, 96, 1000])
@pytest.mark.parametrize("name", activations.FORMS)
def test_rounding_is_within_half_a_step(name, n):
    v = torch.randn(3, n, generator=torch.Generator().manual_seed(n)) * torch.tensor([[1e-3], [1.0], [1e4]])
    largest = v.abs().amax(dim=1, keepdim=True)
    steps = {"fp16": 1 << 11, "int8": activations.ONE_PLANE, "int8 x 2": activations.TWO_PLANES}
    steps["sums of 4"] = activations.SUM_OF_FOUR  # four times the largest at most, and half of that step
    bound = largest / steps[name.split(",")[0]]  # half a step, and half a step of the largest in a float's rounding
    assert ((activations.FORMS[name](v) - v).abs() <= bound).all()
    assert (activations.FORMS[name](torch.zeros(2, n)) == 0).all()


def test_a_scale_for_every_group_only_sees_its_group():
    """A large input spoils the small ones of its own group and no others."""
    v = torch.full((1, 96), 1.0)
    v[0, 0] = 1e6
    in_groups, in_one = activations.integers(127, group=32)(v), activations.integers(127)(v)
    assert (in_one[0, 1:] == 0).all() and (in_groups[0, 1:32] == 0).all() and (in_groups[0, 32:] == 1).all()
    assert (activations.integers(127, slices=3)(v) == in_groups).all()


def test_coarser_forms_diverge_more(model):
    windows = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(1))
    plain = DBFLinear.forward
    forms = activations.FORMS | {"none": lambda v: v}
    found = activations.measure(model, windows, forms)
    assert DBFLinear.forward is plain
    assert abs(found["none"][0]) < 1e-9 and abs(found["none"][1]) < 1e-6
    assert found["int8, token"][0] > 100 * abs(found["int8 x 2, token"][0])
    assert found["int8, token"][0] > found["int8, 32"][0] > abs(found["int8 x 2, 8 slices"][0])

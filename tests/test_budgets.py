"""The widths that bench/budgets.py reads off channel scores. Run alone: pytest tests/test_budgets.py"""

import sys

import budgets
import pytest
import torch

from dbf_gguf.budget import linear_bits, uniform_budget


def test_pools_keep_their_best_channels():
    """Within a pool channels go where the scores are; no pool gives to another, each keeps its sum."""
    shapes = {"a.1": (512, 512), "a.2": (512, 512), "b.1": (256, 1024), "b.2": (256, 1024)}
    even, more = uniform_budget(shapes, 2.0), uniform_budget(shapes, 2.5)
    g = torch.Generator().manual_seed(0)
    weight = {"a.1": 1.0, "a.2": 3.0, "b.1": 1000.0, "b.2": 1000.0}
    scores = {name: weight[name] * torch.rand(k, generator=g) for name, k in more.items()}
    found = budgets.widths(scores, shapes, 2.0, 0.5)
    assert found["a.1"] + found["a.2"] == even["a.1"] + even["a.2"]
    assert found["b.1"] + found["b.2"] == even["b.1"] + even["b.2"]
    threshold = torch.cat([scores["a.1"], scores["a.2"]]).sort(descending=True)[0][2 * even["a.1"] - 1]
    for name in ("a.1", "a.2"):
        assert abs(found[name] - int((scores[name] >= threshold).sum())) < 32 and found[name] % 32 == 0
    assert found["a.2"] > even["a.2"]


@pytest.mark.parametrize("floor", [0.5, 0.9])
def test_no_linear_goes_below_the_floor(floor):
    shapes = dict.fromkeys("abcd", (512, 512))
    more = uniform_budget(shapes, 3.0)
    scores = {name: torch.full((k,), 10.0**-i) for i, (name, k) in enumerate(more.items())}
    found = budgets.widths(scores, shapes, 2.0, floor)
    assert sum(found.values()) == sum(uniform_budget(shapes, 2.0).values())
    assert all(linear_bits(512, 512, k) >= floor * 2.0 * 512 * 512 for k in found.values())
    assert all(found[name] <= more[name] for name in shapes) and found["a"] > found["d"]


@pytest.mark.parametrize("arguments", [["--floor", "1.2"], ["--floor", "nan"], ["--above", "0"]])
def test_wrong_arguments(arguments, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["budgets.py", "tiny", "--out", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit) as end:
        budgets.main()
    assert end.value.code == 2 and not (tmp_path / "out").exists()


def test_given_widths_are_refused_in_one_line(monkeypatch, tmp_path, capsys):
    (tmp_path / "widths.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(SystemExit) as end:
        budgets.convert_with(tmp_path / "widths.json", [str(tmp_path / "no-model")])
    assert end.value.code == 1 and capsys.readouterr().err.count("\n") == 1

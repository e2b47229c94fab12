"""The table of bench/ablation.py. Run alone: pytest tests/test_ablation.py"""

import sys
from pathlib import Path

import ablation
import pytest


def test_an_ingredient_that_brings_nothing_is_said_to():
    ppl = {"nothing": 20.0, ablation.CHANCE: 20.02, "importance": 25.0, "any distillation": 80.0}
    ppl |= {"adaptive budget": 19.0, "signs in blocks": 20.05}
    rows = [{"missing": name, "ppl": value, "dense": 10.0} for name, value in ppl.items()]
    assert ablation.table(rows, noise=0.005).splitlines()[2:] == [
        "| nothing | 20.00 | 2.00 |  |",
        "| nothing, another seed | 20.02 | 2.00 | chance: +0.1 % |",
        "| any distillation | 80.00 | 8.00 | 300.0 % |",
        "| importance | 25.00 | 2.50 | 25.0 % |",
        "| signs in blocks | 20.05 | 2.00 | nothing |",
        "| adaptive budget | 19.00 | 1.90 | nothing |",
    ]
    rows[1]["ppl"] = 14.0  # chance makes 30 %, either way
    table = ablation.table(rows, noise=0.005)
    assert "| importance | 25.00 | 2.50 | nothing |" in table and "| any distillation | 80.00 |" in table
    assert "| 300.0 % |" in table


def test_each_arm_lacks_one_thing(monkeypatch, tmp_path):
    """The commands differ from the full one in the options of the ingredient alone; all of them are run again."""
    commands = {}

    def convert(*args):
        args = [str(a) for a in args]
        work = Path(args[args.index("--work") + 1])
        work.mkdir(exist_ok=True)
        (work / "manifest.json").write_text('{"perplexity": {"compressed": 20.0, "dense": 10.0}}')
        paths = {"-o", "--work"}
        commands[work.name] = [a for a, before in zip(args, ["", *args], strict=False) if not {a, before} & paths]

    monkeypatch.setattr(ablation, "dbf_gguf", convert)
    monkeypatch.setattr(sys, "argv", ["ablation", "tiny", "--out", str(tmp_path)])
    assert ablation.main() == 0 and len(commands) == len(ablation.ARMS)
    common = "convert tiny --bits 1.5 --iterations 60 --block-tokens 65536 --tune-tokens 98304 --eval-windows 32"
    common += " --calib wiki --blocks signs --tune signs --budget adaptive --join qkv,gate_up"
    same = common.replace("--budget adaptive", f"--budget {tmp_path / 'nothing-work' / 'budget.json'}")
    expected = {
        "nothing": common,
        "nothing-another-seed": f"{common} --seed 1",
        "importance": f"{common} --no-importance",
        "block-by-block-tuning-of-blocks": common.replace("--blocks signs", "--blocks none"),
        "tuning-of-blocks": same.replace("--blocks signs", "--blocks fit"),
        "signs-in-blocks": same.replace("--blocks signs", "--blocks scales"),
        "any-distillation": same.replace(" --tune-tokens 98304", "").replace("--tune signs", "--tune none"),
        "signs-in-distillation": same.replace("--tune signs", "--tune scales"),
        "adaptive-budget": common.replace("--budget adaptive", "--budget uniform"),
        "joint-linears": common.replace("--join qkv,gate_up", "--join none"),
    }
    assert {name.removesuffix("-work"): " ".join(command) for name, command in commands.items()} == expected
    assert (tmp_path / "ablation.json").exists()
    commands.clear()
    assert ablation.main() == 0 and len(commands) == len(expected)  # `convert` knows what is finished
    monkeypatch.setattr(sys, "argv", ["ablation", "tiny", "--out", str(tmp_path), "--eval-windows", "0"])
    with pytest.raises(SystemExit):
        ablation.main()

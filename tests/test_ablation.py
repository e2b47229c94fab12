"""The table of bench/ablation.py. Run alone: pytest tests/test_ablation.py"""

import importlib.util
import sys
from pathlib import Path

BENCH = Path(__file__).parent.parent / "bench"


def load(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location("bench_ablation", BENCH / "ablation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_ingredient_that_brings_nothing_is_said_to(monkeypatch):
    ablation = load(monkeypatch)
    ppl = {"nothing": 20.0, "importance": 25.0, "distillation": 80.0, "adaptive budget": 19.0, "signs in blocks": 20.05}
    rows = [{"missing": name, "ppl": value, "dense": 10.0} for name, value in ppl.items()]
    assert ablation.table(rows, noise=0.005).splitlines()[2:] == [
        "| nothing | 20.00 | 2.00 |  |",
        "| distillation | 80.00 | 8.00 | 300.0 % |",
        "| importance | 25.00 | 2.50 | 25.0 % |",
        "| signs in blocks | 20.05 | 2.00 | nothing |",
        "| adaptive budget | 19.00 | 1.90 | nothing |",
    ]


def test_each_arm_lacks_one_thing(monkeypatch, tmp_path):
    """The commands differ from the full one in the options of the ingredient alone; a finished arm is not run again."""
    ablation, commands = load(monkeypatch), {}

    def convert(*args):
        args = [str(a) for a in args]
        work = Path(args[args.index("--work") + 1])
        work.mkdir()
        (work / "manifest.json").write_text('{"perplexity": {"compressed": 20.0, "dense": 10.0}}')
        paths = {"-o", "--work"}
        commands[work.name] = [a for a, before in zip(args, ["", *args], strict=False) if not {a, before} & paths]

    monkeypatch.setattr(ablation, "dbf_gguf", convert)
    monkeypatch.setattr(sys, "argv", ["ablation", "tiny", "--out", str(tmp_path)])
    assert ablation.main() == 0 and len(commands) == len(ablation.ARMS)
    full = commands.pop("nothing-work")
    assert full[-8:] == ["--blocks", "signs", "--tune", "signs", "--budget", "adaptive", "--join", "qkv,gate_up"]
    for name, command in commands.items():
        assert command != full and len(set(command) ^ set(full)) <= 4, name
    assert (tmp_path / "ablation.json").exists()
    commands.clear()
    assert ablation.main() == 0 and commands == {}

"""bench/large.py on models so small that a conversion takes seconds, and its arithmetic.

Run alone: pytest tests/test_large.py     (a minute; nothing is downloaded)
"""

import json
import platform
import re
import subprocess
import sys

import large
import pytest
import torch

from dbf_gguf.factorize import OUTER_ITERATIONS

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="memory is read from /proc")

HOLD = "import time; kept = bytearray({}); {}; time.sleep(0.5)"  # bytes, what else to run


@pytest.fixture
def small(monkeypatch, patched_tree):
    """The same script for models of hidden size 64."""
    size = {4096: 64, 11008: 96}
    shapes = {name: tuple(size[n] for n in shape) for name, shape in large.SHAPES.items()}
    monkeypatch.setattr(large, "SHAPES", shapes)
    for name, value in {"HIDDEN": 64, "FEED_FORWARD": 96, "VOCABULARY": 288}.items():
        monkeypatch.setattr(large, name, value)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 288, "max_position_embeddings": 256}
    monkeypatch.setattr(large, "CONFIG", large.CONFIG | heads | sizes)


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["large.py", *map(str, arguments)])
    return large.main()


def test_both_conversions_and_the_bars(small, monkeypatch, capsys, tmp_path):
    arguments = [tmp_path, "--blocks", 1, 2, "--bits", 2, "--block-tokens", 1024]
    monkeypatch.setattr(large, "SPREAD", 1.0)  # the interpreter is all there is to measure here
    assert run(monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out
    assert "within 6 GB" in printed and "NOT" not in printed
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".gguf" or path.is_dir()] == []
    one, two = (json.loads((tmp_path / f"{blocks}-blocks.json").read_text())["result"] for blocks in (1, 2))
    assert len(one["linears"]) == 4 and len(two["linears"]) == 8
    assert all(2e8 < result["peak"] < 3e9 and 0 < result["anonymous"] < result["peak"] for result in (one, two))
    for shape in ("192x64", "64x64", "64x96"):
        assert any(line.split()[:1] == [shape] for line in printed.splitlines()), shape
    for stage in ("all linears", "effects, linears", "importance", "effects, passages", "blocks, passages", "tuning"):
        assert re.search(rf"^{stage}\b.* \d+(\.\d)? h .*predicted \d+ min", printed, re.M), stage

    # what was measured is not measured again, and the bars are bars
    monkeypatch.setattr(large.subprocess, "Popen", None)
    monkeypatch.setattr(large, "LIMIT", two["peak"] - 1)
    assert run(monkeypatch, *arguments) == 1
    assert "NOT within" in capsys.readouterr().out
    monkeypatch.setattr(large, "LIMIT", 6e9)
    stored = tmp_path / "2-blocks.json"
    content = json.loads(stored.read_text())
    content["result"]["peak"] = int(2.01 * one["peak"])
    stored.write_text(json.dumps(content))
    assert run(monkeypatch, *arguments) == 1


def test_a_conversion_that_fails_ends_it(small, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="failed"):
        run(monkeypatch, tmp_path, "--blocks", 1, 2, "--no-such-option")
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [([], "give a FOLDER"), (["x", "--iterations", 2], "at least 3"), (["--linears", "cuda"], "no CUDA device")],
)
def test_wrong_arguments(arguments, reason, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments)
    assert stop.value.code == 2 and reason in capsys.readouterr().err


def test_linears_alone(small, monkeypatch, capsys):
    monkeypatch.setattr(large, "INPUTS", 128)
    assert run(monkeypatch, "--linears", "cpu", "--bits", 2) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "x" in line.split()[0]]
    assert [row[0] for row in rows] == ["192x64", "64x64", "192x64", "64x96"]
    assert all(int(row[1]) % 32 == 0 for row in rows)


def test_memory_of_a_process_and_its_child():
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLD.format(200 << 20, 0)!r}])"
    process = subprocess.Popen([sys.executable, "-c", HOLD.format(100 << 20, child)])
    memory = large.Memory(process.pid)
    memory.line = "a stage"
    memory.start()
    memory.join()
    process.wait()
    assert 300 << 20 < memory.anonymous <= memory.peak < 400 << 20
    assert memory.stage == "a stage"


def test_counted_up():
    """Seven seconds once and three an iteration."""
    once, iteration, here, gpu = large.counted_up((64, 96), 32, (4, 19.0), (10, 37.0))
    assert (once, iteration, here) == pytest.approx((7, 3, 7 + 3 * OUTER_ITERATIONS))
    gpu_once, gpu_iteration = large.gpu_seconds(64, 96, 32)
    assert gpu == pytest.approx(gpu_once + OUTER_ITERATIONS * gpu_iteration)


def test_mean_seconds():
    linears = {"blk.0.ffn_up": 1.0, "blk.1.ffn_up": 2.0, "blk.0.ffn_down": 9.0}
    assert large.mean_seconds(linears, ["ffn_up"]) == 1.5
    assert large.mean_seconds(linears, ["ffn_up", "ffn_down"]) == 4

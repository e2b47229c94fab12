"""bench/cpu.py on a tiny model, and what it makes of figures. Run alone: pytest tests/test_cpu_bench.py"""

import copy
import json

import cpu
import pytest
import synthetic

from dbf_gguf import llama_cpp

TINY = synthetic.Shape("tiny", n_embd=256, n_ff=512, n_head=4, n_head_kv=2, n_layer=1, n_vocab=600, n_ctx=512)

RESULT = {
    "avx512": False,
    "bandwidth": [9.0, 10.0, 30.0],
    "read": {"DBF 1.0": 10**8, "DBF 1.5": 2 * 10**8, "Q4_0": 10**9, "IQ1_S": 3 * 10**8},
    "samples": {
        "decode": {"DBF 1.0": [70, 80, 90], "DBF 1.5": [40, 1, 41], "Q4_0": [8, 10, 100], "IQ1_S": [9, 9, 9]},
        "prefill": {"DBF 1.0": [5], "DBF 1.5": [4], "Q4_0": [5], "IQ1_S": [1]},
    },
}


def test_bars_are_checked_against_medians():
    lines, good = cpu.bars(RESULT)
    assert not good
    assert lines == [
        "holds  decode: DBF 1.5 ÷ the fastest type (Q4_0) 4.00, at least 1.2",
        "holds  decode: DBF 1.5 ÷ IQ1_S 4.44, at least 4.0",
        "holds  decode: DBF 1.0 ÷ the roof 0.80, at least 0.75",
        "holds  decode: DBF 1.5 ÷ the roof 0.80, at least 0.75",
        "MISSED prefill: DBF 1.5 ÷ Q4_0 0.80, at least 1.0",
    ]
    better = copy.deepcopy(RESULT)
    better["samples"]["prefill"]["DBF 1.5"] = [6]
    assert cpu.bars(better)[1]
    better["avx512"], better["samples"]["decode"]["Q4_0"] = True, [30]
    assert not cpu.bars(better)[1]  # 1.33 times would do without AVX-512


def test_table():
    rows = [line.split("|")[1:-1] for line in cpu.table(RESULT, "decode").splitlines()]
    assert [cell.strip() for cell in rows[3]] == ["DBF 1.5", "200", "40.00", "1.00 to 41.00", "0.80", "2.00", "1.00"]


def test_one_command(llama_bin, tmp_path, monkeypatch, capsys):
    """Models are written, timed and deleted; figures and picture stay."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(llama_cpp, "tool", lambda name: llama_bin / name)
    monkeypatch.setattr(synthetic, "find_shape", lambda name: TINY)
    monkeypatch.setattr(cpu, "read_bandwidth", lambda threads, measure=cpu.read_bandwidth: measure(threads, mib=8))
    options = ["--layers", "1", "--bits", "1.5", "--types", "Q4_0", "--rounds", "2", "--threads", "1"]
    status = cpu.main(["tiny", *options, "--out", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu.json", "cpu.png"]
    result = json.loads((tmp_path / "cpu.json").read_text())
    values = [v for part in cpu.PARTS for name in ("DBF 1.5", "Q4_0") for v in result["samples"][part][name]]
    assert len(values) == 12 and min(values) > 0 and min(result["bandwidth"]) > 0
    assert 0 < result["read"]["DBF 1.5"] < result["read"]["Q4_0"]
    lines, good = cpu.bars(result)
    assert len(lines) == 4 and status == (not good)
    assert capsys.readouterr().out.endswith("\n".join(lines) + "\n")

"""bench/synthetic.py, bench/gpu.py, bench/gpu_model.py, llama-dbf-matvec, with the CPU backend standing in for a card.

What programs print on a CUDA card is written down here by hand, after what they print on a CPU: there was no card.

Run alone: pytest tests/test_gpu_bench.py     (half a minute; needs the patched build)
"""

import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path

import gguf
import gpu
import gpu_model
import numpy as np
import pytest
import synthetic
from commands import StepFailed

from dbf_gguf.budget import linear_bits, uniform_budget
from dbf_gguf.errors import DBFError
from dbf_gguf.factors import unpack_signs
from dbf_gguf.gguf_file import TENSOR_TYPES, TYPE_IDS, GGUFFile
from dbf_gguf.verify import bits_per_weight, check_format

ROOT = Path(__file__).resolve().parent.parent
TINY = synthetic.Shape("tiny", n_embd=256, n_ff=512, n_head=4, n_head_kv=2, n_layer=2, n_vocab=600, n_ctx=512)
CPU = gpu.Device("CPU", "a CPU", gpu=False, memory=0)


@pytest.fixture
def built(llama_bin, monkeypatch):
    """The bench scripts take the programs of the build without CUDA, wherever there are two."""
    monkeypatch.setattr(gpu, "tool", lambda name: llama_bin / name)
    return llama_bin


# --- synthetic models


@pytest.mark.parametrize("join", [False, True])
def test_a_synthetic_model_keeps_the_rules_of_the_format(tmp_path, join):
    path = tmp_path / "tiny.gguf"
    size = synthetic.write(path, TINY, "DBF", 1.5, join=join)
    linears = TINY.all_linears(join)
    ks = uniform_budget(linears, 1.5)
    with GGUFFile(path) as file:
        assert size == file.size == path.stat().st_size
        assert check_format(file) == []
        assert len(file.linears()) == (4 if join else 7) * TINY.n_layer == file.get("dbf.tensor_count")
        for base, (n_out, n_in) in linears.items():
            assert file.tensors[f"{base}.dbf_b"].ne == (n_in, ks[base])
            assert file.tensors[f"{base}.dbf_a"].ne == (ks[base], n_out)
        assert bits_per_weight(file) == pytest.approx(1.5, abs=0.05)
        assert file.get("dbf.bits_per_weight") == pytest.approx(bits_per_weight(file))
        signs = unpack_signs(file.packed_signs("blk.0.ffn_down.dbf_b")).float()
        assert abs(signs.mean()) < 0.02  # as many of one kind as of the other
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.gguf"]


def test_narrow_rows_have_another_type_for_embeddings_and_head(tmp_path):
    shape = synthetic.Shape("narrow", n_embd=96, n_ff=64, n_head=3, n_head_kv=1, n_layer=1, n_vocab=600)
    for kind in ("DBF", "Q4_0"):
        synthetic.write(tmp_path / "narrow.gguf", shape, kind, 1.5)
        with GGUFFile(tmp_path / "narrow.gguf") as file:
            for name in ("token_embd", "output"):
                assert TENSOR_TYPES[file.tensors[f"{name}.weight"].type][0] == "Q8_0"


def test_the_same_seed_gives_the_same_file(tmp_path):
    contents = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        synthetic.write(tmp_path / name, TINY, "DBF", 1.0, seed=seed)
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1] != contents[2]


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0", "Q6_K", "Q2_K", "IQ2_XXS", "IQ1_S", "TQ1_0", "TQ2_0"])
def test_weights_of_other_types_are_as_large_as_they_should_be(tmp_path, kind):
    """By gguf-py's own decoders, which know nothing of where synthetic.py puts its scales."""
    path = tmp_path / "tiny.gguf"
    synthetic.write(path, TINY, kind, embedding_type="F16", output_type="Q8_0")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, n_in in (("blk.0.attn_q", 256), ("blk.1.ffn_down", 512)):
        tensor = tensors[f"{name}.weight"]
        assert tensor.tensor_type.name == kind
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.isfinite(values).all()
        assert values.std() * math.sqrt(n_in) == pytest.approx(1, abs=0.1)
        assert abs(values.mean()) * math.sqrt(n_in) < 0.2
    assert tensors["token_embd.weight"].tensor_type.name == "F16"
    assert tensors["output.weight"].tensor_type.name == "Q8_0"


def test_every_type_has_its_scale_inside_the_block():
    for kind, (scales, _) in synthetic.BLOCKS.items():
        assert all(0 <= at <= TENSOR_TYPES[TYPE_IDS[kind]][2] - 2 for at in scales), kind


def test_the_shape_of_a_config(tmp_path):
    config = {
        "model_type": "mistral",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 600,
        "max_position_embeddings": 512,
    }
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    assert synthetic.find_shape(str(folder)) == TINY
    for change, message in (
        ({"model_type": "qwen3"}, "of a qwen3"),
        ({"head_dim": 128}, "64 wide"),
        ({"hidden_size": None}, "no config.json of a Llama"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(DBFError, match=message):
            synthetic.find_shape(str(folder / "config.json"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["no-such-model"], "no shape and no file no-such-model"),
        (["llama2-7b", "--bits", "9"], "9 bits a weight cannot be made"),
        (["llama2-7b", "--layers", "0"], "0 layers"),
        (["llama2-7b", "--layers", "1", "-o", "/dev/null/x.gguf"], "cannot write /dev/null/x.gguf: File exists"),
    ],
)
def test_bad_input_of_synthetic_is_one_line(tmp_path, capsys, options, message):
    assert synthetic.main(["-o", str(tmp_path / "x.gguf"), *options]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_shapes_that_a_type_cannot_hold_are_refused(tmp_path):
    with pytest.raises(DBFError, match="rows of 320, no multiple of 256: Q2_K"):
        odd = replace(TINY, n_embd=320, n_head=5)
        synthetic.write(tmp_path / "x", odd, "Q2_K", embedding_type="F16", output_type="F16")
    with pytest.raises(DBFError, match="vocabulary of 200"):
        synthetic.write(tmp_path / "x", replace(TINY, n_vocab=200), "DBF", 2.0)
    assert not list(tmp_path.iterdir())


# --- llama-dbf-matvec


def matvec(built: Path, *options) -> subprocess.CompletedProcess:
    command = [built / "llama-dbf-matvec", "--rotate-mib", 1, "--ops", 4, "--reps", 2, "--threads", 1, *options]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def test_matvec_times_every_kind_of_case(built):
    cases = ["dbf:512:192:96", "f16:512:192", "cublas:512:192", "q1_0:512:192", "q2_K:512:192"]
    done = matvec(built, "--bandwidth", "--tokens", 3, *(word for case in cases for word in ("--case", case)))
    assert done.returncode == 0, done.stderr
    bandwidth, rows = gpu.parse_matvec(done.stdout)
    assert set(bandwidth) == {"read", "copy"} and all(0.1 < rate < 2000 for rate in bandwidth.values())
    assert [row["type"] for row in rows] == ["dbf", "f16", "cublas", "q1_0", "q2_k"]
    sizes = [(linear_bits(192, 512, 96) // 8), 2 * 192 * 512, 2 * 192 * 512, 18 * 4 * 192, 84 * 2 * 192]
    for row, size in zip(rows, sizes, strict=True):
        assert (row["n_in"], row["n_out"], row["tokens"], row["bytes"]) == (512, 192, 3, size)
        assert row["supported"] and 0 < row["us_least"] <= row["us"] <= row["us_most"]
        assert row["weights"] * size >= 2**20  # what was asked to be rotated
        assert row["ops"] >= 4 and row["ops"] % row["weights"] == 0
    assert rows[0]["k"] == 96


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--case", "dbf:512:192"], "'dbf:512:192' is not TYPE:N_IN:N_OUT"),
        (["--case", "dbf:512:192:40"], "multiples of 32"),
        (["--case", "q2_K:128:192"], "multiples of 256"),
        (["--case", "q9_9:512:192"], "unknown type 'q9_9'"),
        (["--case", "f16:512:x"], "n_out 'x' is no positive number"),
        (["--backend", "CUDA9", "--case", "f16:512:192"], "there is no device CUDA9"),
    ],
)
def test_bad_input_of_matvec_is_one_line(built, options, message):
    done = matvec(built, *options)
    assert done.returncode == 1 and done.stdout == ""
    assert message in done.stderr and done.stderr.count("\n") == 1


# --- what the programs say

DEVICES = """\
ggml_cuda_init: found 1 CUDA devices:
{"device": "CUDA0", "description": "NVIDIA GeForce RTX 4090", "gpu": true, "memory": 25393692672}
{"device": "CPU", "description": "some CPU", "gpu": false, "memory": 67000000000}
"""

OPS = """\
Testing 2 devices

Backend 1/2: CUDA0
  Device description: NVIDIA GeForce RTX 4090
  DBF_MUL_MAT(type_s=f16,n_in=256,k=128,n_out=256,ne=[1,1,1],view=0): \x1b[1;32mOK\x1b[0m
  DBF_MUL_MAT(type_s=f16,n_in=32,k=32,n_out=17,ne=[1,1,1],view=0): not supported [CUDA0]
  1/1 tests passed
  Backend CUDA0: \x1b[1;32mOK\x1b[0m
Backend 2/2: CPU
  Skipping
2/2 backends passed
\x1b[1;32mOK\x1b[0m
"""


def test_devices():
    found = gpu.parse_devices(DEVICES)
    assert [device.name for device in found] == ["CUDA0", "CPU"]
    assert gpu.choose_device(found, None) == gpu.choose_device(found, "CUDA0") == found[0]
    assert found[0].offload == ["-ngl", "99", "-dev", "CUDA0"]
    with pytest.raises(DBFError, match="no device CUDA1: there are CUDA0"):
        gpu.choose_device(found, "CUDA1")
    with pytest.raises(gpu.NoDevice, match="no CUDA device"):
        gpu.choose_device(found[1:], None)


def test_ops():
    assert gpu.parse_ops(OPS) == {"passed": 1, "failed": 0, "unsupported": 1}
    assert gpu.parse_ops(OPS.replace("1/1 tests", "3/5 tests"))["failed"] == 2
    for nothing in (OPS.replace("1/1 tests", "0/0 tests"), "Backend 1/1: CPU\n  Skipping\n1/1 backends passed\nOK\n"):
        with pytest.raises(StepFailed, match="compared nothing"):
            gpu.parse_ops(nothing)


def test_bench_lines():
    lines = 'load: a log\n{"n_prompt": 512, "n_gen": 0, "avg_ts": 9000.5, "stddev_ts": 12.0}\n'
    last = '{"n_prompt": 0, "n_gen": 128, "avg_ts": 350.25, "stddev_ts": 0.5}\n'
    assert gpu.parse_bench(lines + last) == {"pp": 9000.5, "pp_error": 12.0, "tg": 350.25, "tg_error": 0.5}
    with pytest.raises(StepFailed, match="no figures"):
        gpu.parse_bench(lines)
    with pytest.raises(StepFailed, match="is no JSON"):
        gpu.parse_bench('{"n_prompt": 512, "n_ge')


# --- the whole run


def small(**changes) -> gpu.Settings:
    settings = gpu.Settings(
        shapes=((512, 192),),
        bits=(2.0, 1.0),
        matvec_types=("cublas", "q1_0"),
        rotate_mib=1,
        reps=2,
        models=(TINY,),
        decode_types=("F16", "Q2_K"),
        n_prompt=8,
        n_gen=4,
        check=TINY,
        chunks=2,
        n_ctx=128,
        threads=1,
    )
    return replace(settings, **changes)


@pytest.fixture
def few_ops(monkeypatch):
    monkeypatch.setattr(gpu, "OPS", (*gpu.OPS, "-p", "n_in=(32|256),.*ne=.1,1,1."))


def test_the_whole_run_with_the_cpu_standing_in(built, few_ops, tmp_path, monkeypatch, capfd):
    drawn = []
    monkeypatch.setattr(gpu, "plot", lambda result, path: drawn.append(path))  # see test_the_picture
    gpu.measure(small(), CPU, tmp_path / "gpu")
    shown = capfd.readouterr().out
    result = json.loads((tmp_path / "gpu" / "gpu.json").read_text())
    assert result["checks"]["ops"]["passed"] >= 4 and not result["checks"]["ops"]["failed"]
    assert abs(result["checks"]["logits"]["check.gguf"]["kld"]) < 1e-5  # the CPU against itself
    assert set(result["bandwidth"]) == {"read", "copy"}
    assert [(row["type"], row["k"]) for row in result["matvec"]] == [
        ("cublas", 0),
        ("q1_0", 0),
        ("dbf", gpu_model.width(512, 192, 2.0)),
        ("dbf", gpu_model.width(512, 192, 1.0)),
    ]
    decoded = [(row["type"], row["bits"], row["join"]) for row in result["decode"]]
    dbf = [("DBF", bits, join) for bits in (2.0, 1.0) for join in (False, True)]
    assert decoded == [("F16", None, False), ("Q2_K", None, False), *dbf]
    assert all(row["tg"] > 0 and row["pp"] > 0 and 0 < row["read"] < row["bytes"] for row in result["decode"])
    assert "| 512×192 | DBF 2 bits " in shown and "| tiny  | DBF 1 bits, joined " in shown
    assert drawn == [tmp_path / "gpu" / "gpu.png"]
    left = [path.name for path in (tmp_path / "gpu").iterdir() if path.suffix != ".log"]
    assert left == ["gpu.json"]  # the models are gone


def test_a_failed_check_ends_the_run(built, few_ops, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "KLD_BOUND", -1.0)
    bench = gpu.Bench(small(), CPU, tmp_path)
    with pytest.raises(StepFailed, match=r"check.gguf: mean KLD .* between card and CPU"):
        bench.run()
    assert not bench.result.matvec and not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob("*.kld"))
    assert json.loads((tmp_path / "gpu.json").read_text())["checks"]["logits"]  # it says what was wrong


def test_logits_of_another_model_are_noticed(built, tmp_path, monkeypatch):
    """The check itself: a model with other signs has a KLD far above the bound."""
    one, other = tmp_path / "one.gguf", tmp_path / "other.gguf"
    synthetic.write(one, TINY, "DBF", 2.0, seed=1)
    with GGUFFile(one) as file:
        tensor = file.tensors["blk.1.attn_v.dbf_a"]
    data = bytearray(one.read_bytes())
    data[tensor.offset : tensor.offset + tensor.nbytes] = bytes(tensor.nbytes)  # one factor of 14 all minus
    other.write_bytes(data)
    real = gpu.run

    def swapped(command, **options):
        second = "--kl-divergence" in command
        return real([other if word == one and second else word for word in command], **options)

    monkeypatch.setattr(gpu, "run", swapped)
    with pytest.raises(StepFailed, match="mean KLD"):
        gpu.Bench(small(), CPU, tmp_path).check_logits(one)


def test_an_op_that_the_card_does_not_take_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "tool", lambda name: Path(name))
    monkeypatch.setattr(gpu, "run", lambda command, **_: OPS)
    with pytest.raises(StepFailed, match="not right on CUDA0"):
        gpu.Bench(small(), gpu.parse_devices(DEVICES)[0], tmp_path).run()


def test_a_model_that_does_not_fit_is_skipped(tmp_path, monkeypatch):
    device = replace(gpu.parse_devices(DEVICES)[0], memory=10**9)
    settings = small(models=(synthetic.SHAPES["llama2-7b"],), decode_types=("F16",), bits=(), parts=("decode",))
    result = gpu.Bench(settings, device, tmp_path).run()
    (row,) = result.decode
    assert row["skipped"] == "13.5 GB, the device has 1.0"
    assert "skipped: 13.5 GB" in gpu.report(result)


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ([], 2, "no CUDA device"),
        (["--bits", "9"], 1, "9 bits a weight cannot be made"),
        (["--model", "missing.gguf"], 1, "cannot read missing.gguf"),
        (["--model-types", "Q3_K"], 1, "no synthetic model of type Q3_K"),
        (["--reps", "0"], 1, "--reps must be at least 1"),
        (["--tokens", "0"], 1, "--tokens must be at least 1"),
    ],
)
def test_no_card_or_bad_input_is_one_line(built, tmp_path, monkeypatch, capsys, options, status, message):
    monkeypatch.chdir(tmp_path)
    assert gpu.main(options) == status
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and shown.out == ""
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_no_folder_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DBFError, match="cannot write into .*/file: File exists"):
        gpu.Bench(small(), CPU, tmp_path / "file")


def test_without_a_build_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "bin_dir", lambda: None)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "bench/gpu.py: llama.cpp is not built: run `dbf-gguf build --cuda` first\n"


def test_help_ends_in_an_example_that_is_understood(capsys):
    with pytest.raises(SystemExit):
        gpu.parse_arguments(["--help"])
    example = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert example.startswith("example: python bench/gpu.py ")
    arguments = gpu.parse_arguments(example.split()[3:])
    assert arguments.bits == [2.0, 1.5] and arguments.models == ["llama2-7b"]


@pytest.fixture
def result(tmp_path):
    """Made up, round figures."""
    result = gpu.Bench(small(), gpu.parse_devices(DEVICES)[0], tmp_path / "gpu").result
    result.bandwidth = {"read": 900.0, "copy": 950.0}
    row = {"n_in": 4096, "n_out": 4096, "tokens": 1, "supported": True}
    k = gpu_model.width(4096, 4096, 2.0)
    result.matvec = [
        row | {"type": "cublas", "k": 0, "bytes": 33554432, "us": 40.0, "bits": 16.0},
        row | {"type": "dbf", "k": k, "bytes": 4194304, "us": 10.0, "bits": 2.0},
        row | {"type": "iq1_s", "k": 0, "bytes": 3276800, "supported": False, "bits": 1.5625},
    ]
    figures = {"bytes": 2e9, "read": 1.9e9, "tg": 250.0, "tg_error": 1.0, "pp": 8000.0, "pp_error": 9.0}
    result.decode = [
        {"model": "llama2-7b", "type": "F16", "bits": None, "join": False} | figures | {"tg": 50.0},
        {"model": "llama2-7b", "type": "DBF", "bits": 1.5, "join": True} | figures,
        {"model": "llama3-8b", "type": "F16", "bits": None, "join": False, "skipped": "16.1 GB"},
    ]
    return result


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def test_tables_stand_beside_the_paper_and_the_prediction(result):
    card = gpu_model.CARDS["RTX 4090"]
    rows = cells(gpu.matvec_table(result))
    assert rows[2] == ["4096×4096", "cuBLAS fp16", "16.00", "40.0", "1.00", "839", "88%", "61", ""]
    predicted = f"{gpu_model.linear(card, 4096, 4096, result.matvec[1]['k']):.1f}"
    assert rows[3] == ["4096×4096", "DBF 2 bits", "2.00", "10.0", "4.00", "419", "44%", "27", predicted]
    assert rows[4][3] == "not supported"
    rows = cells(gpu.decode_table(result))
    predicted = f"{gpu_model.tokens_a_second(card, synthetic.SHAPES['llama2-7b'], 1.5, join=True):.0f}"
    assert rows[3][:4] == ["Llama-2-7B", "DBF 1.5 bits, joined", "2.00", "250.0 ± 1.0"]
    assert rows[3][4:] == ["5.00", "50%", "167", predicted, "8000 ± 9"]
    assert rows[4][:3] == ["Llama-3-8B", "F16", "skipped: 16.1 GB"]


def test_the_picture(result, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install -e '.[bench]'")
    for name in ("both", "matvec", "decode"):
        part = replace(result, **{"both": {}, "matvec": {"decode": []}, "decode": {"matvec": []}}[name])
        gpu.plot(part, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


# --- the model


def test_the_document_holds_what_the_command_prints(capsys):
    path = ROOT / "docs" / "gpu-model.md"
    text = path.read_text(encoding="utf-8")
    assert gpu_model.replaced(text) == text, "run: python bench/gpu_model.py --write docs/gpu-model.md"
    assert gpu_model.main([]) == 0
    assert capsys.readouterr().out.strip() in text


def test_a_stage_by_hand():
    """4096 inputs, 2048 rows on a 4090: one MB of signs at 92 % of 1008 GB/s, after a gap and what all launches do;
    on a larger card three tiles of two steps each, of which the first is no part of the stream."""
    card = gpu_model.CARDS["RTX 4090"]
    parts = gpu_model.stage(card, 4096, 2048, 0)
    assert parts["bound"] == "memory"
    assert parts["stream"] == pytest.approx(4096 * 2048 / 8 / (0.92 * 1008e9) * 1e6)
    start = (gpu_model.CHAIN + 4096 * (4 / 64 + 20 / 128)) / 2520
    assert gpu_model.launch(parts) == pytest.approx(card.gap + start + parts["stream"] + gpu_model.TAIL)
    peak = gpu_model.stage(card, 4096, 2048, 0)["times"]["tensor cores"]  # 660 TOPS, both planes of 8 columns
    assert peak == pytest.approx(4096 * 2048 * 8 * 2 / 660.6e12 * 1e6, rel=0.01)
    larger = gpu_model.stage(gpu_model.CARDS["H200"], 4576, 12288, 0)
    assert (larger["bound"], larger["gap"]) == ("rounds", gpu_model.EARLY)
    assert larger["stream"] == pytest.approx((2 * gpu_model.TILE + 5 * gpu_model.STEP) / 1830)


PLANS = """
#include "dbf-launch.h"
#include <cstdio>
int main() {
    long long n_sm, n_in, k, n_out, n_tokens;
    while (scanf("%lld %lld %lld %lld %lld", &n_sm, &n_in, &k, &n_out, &n_tokens) == 5) {
        const dbf_shape  shape  = { n_in, k, n_out, n_tokens, n_in, DBF_SCALE_F16, DBF_SCALE_F16, DBF_SCALE_F16 };
        const dbf_device device = { 890, (int) n_sm, 99*1024, 100*1024 };
        const dbf_plan plan = dbf_make_plan(shape, device, true, true, DBF_PATH_DEFAULT);
        for (int i = 0; i < plan.n_launches; ++i) {
            printf("%d %d %d ", plan.launches[i].block, plan.launches[i].grid.x, plan.launches[i].grid.y);
        }
        printf("\\n");
    }
}
"""


@pytest.fixture
def planned(tmp_path):
    """planned(cases of PLANS) -> for each the block, grid.x and grid.y of its launches"""
    (tmp_path / "plans.cpp").write_text(PLANS)
    include = ROOT / "cuda_patches" / "src" / "ggml" / "src" / "ggml-cuda"
    subprocess.run(["c++", "-std=c++17", "-I", include, tmp_path / "plans.cpp", "-o", tmp_path / "plans"], check=True)

    def call(cases) -> list[list[int]]:
        lines = "\n".join(" ".join(map(str, case)) for case in cases)
        done = subprocess.run([tmp_path / "plans"], input=lines, capture_output=True, text=True, check=True)
        return [[int(word) for word in line.split()] for line in done.stdout.splitlines()]

    return call


def test_the_model_launches_what_the_kernels_plan(planned):
    """Warps of a block and blocks on an SM, as dbf-launch.h plans them for one token."""
    shapes = [(n_in, gpu_model.width(n_in, n_out, b), n_out) for n_in, n_out in gpu_model.PAPER_SHAPES for b in (1, 2)]
    cases = [(card.sms, *shape, 1) for card in gpu_model.CARDS.values() for shape in shapes]
    kernel = gpu_model.KERNEL

    def expected(sms: int, n: int, rows: int) -> list[int]:
        return [32 * kernel.warps(n), min(math.ceil(rows / kernel.rows), kernel.blocks(n) * sms), 1]

    for (sms, n_in, k, n_out, _), found in zip(cases, planned(cases), strict=True):
        assert found == [*expected(sms, n_in, k), *expected(sms, k, n_out)], (sms, n_in, k, n_out)


def test_the_model_takes_the_blocks_that_the_kernels_plan(planned):
    """For several tokens: the rows and columns of a block follow from its grid."""
    linears = synthetic.SHAPES["llama2-7b"].linears(join=True).values()
    shapes = [(n_in, k, n_out) for n_out, n_in in linears for k in (gpu_model.width(n_in, n_out, b) for b in (1, 2))]
    several = (*range(2, 10), 16, 24, 25, 32, 33, 64, 96, 128, 512)
    cards = gpu_model.CARDS.values()
    cases = [(card, *shape, n) for card in cards for shape in shapes for n in several]
    kinds = set()
    for (card, _, k, n_out, n), found in zip(cases, planned([(c.sms, *rest) for c, *rest in cases]), strict=True):
        for rows, (block, x, y) in ((k, found[3:6]), (n_out, found[9:12])):
            kind = gpu_model.gemm(card, rows, n)
            grid = (math.ceil(rows / kind.rows), math.ceil(n / (kind.tiles * kind.tokens)))
            assert (block, x, y) == (32 * kind.warps, *grid), (card.name, rows, n)
            kinds.add(kind)
    assert kinds == {*gpu_model.FEW.values(), gpu_model.MANY}


def test_a_gemm_stage_by_hand():
    """4096 inputs, 2048 rows, 8 tokens on a 4090: 64 blocks of 32 rows, each of them alone on an SM."""
    card = gpu_model.CARDS["RTX 4090"]
    kind = gpu_model.gemm(card, 2048, 8)
    assert (kind.rows, kind.tiles, kind.divides) == (32, 2, True)
    parts = gpu_model.gemm_stage(card, 4096, 2048, 0, 8, kind)
    assert parts["times"]["memory"] == pytest.approx(4096 * 2048 / 8 / (0.92 * 1008e9) * 1e6)
    macs = 32 * 4096 * 8 * 2  # of an SM, both planes
    assert parts["times"]["tensor cores"] == pytest.approx(macs / (1024 * gpu_model.UTILIZATION) / card.clock / 1e3)
    clocks = 16 * 1024 * 8 * 2 / 256  # of a warp for a step, on a quarter of an SM; each warp has 2 of the 8 steps
    assert parts["times"]["steps"] == pytest.approx(2 * (gpu_model.L2_LATENCY + clocks / card.clock / 1e3))
    assert parts["gap"] == 2 * card.gap  # two launches
    large = gpu_model.gemm_stage(card, 4096, 2048, 0, 8, replace(gpu_model.MANY, tiles=2))
    for what in ("tensor cores", "steps"):  # four times the rows on an SM, and the others have none
        assert large["times"][what] == pytest.approx(4 * parts["times"][what])


def test_small_blocks_help_where_there_are_few_tokens():
    """By the model, on every card: and the plan never loses more than the error to one kind of block for all."""
    shape = synthetic.SHAPES["llama2-7b"]
    for card in gpu_model.CARDS.values():
        for join in (False, True):
            one = gpu_model.few_tokens(card, shape, 2.0, 1, join=join)
            for n in gpu_model.FEW_TOKENS[1:]:
                planned = gpu_model.few_tokens(card, shape, 2.0, n, join=join)
                large, small = (gpu_model.few_tokens(card, shape, 2.0, n, rows, join) for rows in (128, 32))
                # four tokens cost 4 % less than one on an A100 by the model, whose clocks for one are an H200's
                assert planned > one * (0.95 if card.name == "A100" else 1)
                assert planned < large or n > 32, (card.name, join, n)
                assert planned < min(small, large) * (1 + gpu_model.UNCERTAINTY / 100), (card.name, join, n)


def test_bits_and_joining_can_only_help():
    shape = synthetic.SHAPES["llama3-8b"]
    for card in gpu_model.CARDS.values():
        speeds = [gpu_model.tokens_a_second(card, shape, bits) for bits in (None, 2.3, 2.0, 1.5, 1.0)]
        assert speeds == sorted(speeds)
        assert gpu_model.tokens_a_second(card, shape, 1.5, join=True) > speeds[3]
        apart, overlapping = (gpu_model.tokens_a_second(card, shape, 1.5, early=early) for early in (False, True))
        assert apart < overlapping
        assert speeds[3] == (overlapping if card.early else apart)


def test_joined_linears():
    linears = synthetic.SHAPES["llama3-8b"].linears(join=True)
    assert linears == {
        "attn_qkv": (4096 + 2 * 1024, 4096),
        "attn_output": (4096, 4096),
        "ffn_gate_up": (2 * 14336, 4096),
        "ffn_down": (4096, 14336),
    }


@pytest.mark.parametrize(
    ("description", "name"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4080", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-PCIE-40GB", None),
    ],
)
def test_the_card_by_its_description(description, name):
    card = gpu_model.find_card(description)
    assert (card and card.name) == name

"""The parts of bench/quality.py that do not run a model: what it reads, counts, keeps and judges.

Run alone: pytest tests/test_quality.py     (seconds, nothing is downloaded)
"""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import quality
from commands import StepFailed, final_estimate

from dbf_gguf.errors import DBFError

BOTH = ["wiki", "speeches"]


# --- what llama.cpp's programs say

KLD_OUTPUT = """\
chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence              Δp RMS           Same top p
   1      57.4596 ±    9.4859       0.87487 ±    0.09569       0.97085 ±    0.04838    21.596 ±  1.796 %    42.7 ± 3.1 %

====== Perplexity statistics ======
Mean PPL(Q)                   :  60.644314 ±   7.299765
Mean PPL(base)                :  21.994262 ±   2.560730
Mean ln(PPL(Q)/PPL(base))     :   1.014244 ±   0.072298

====== KL divergence statistics ======
Mean    KLD:   1.003303 ±   0.041970
Maximum KLD:   7.563180
99.9%   KLD:   7.247320
99.0%   KLD:   5.055982
Median  KLD:   0.735641

====== Token probability statistics ======
Mean    Δp: -11.540 ± 0.919 %
99.0%   Δp: 17.280%
Same top p: 45.294 ± 2.206 %
"""


def test_figures_of_a_kld_run():
    assert quality.parse_figures(KLD_OUTPUT) == {
        "ppl": 60.644314,
        "ppl_error": 7.299765,
        "kld": 1.003303,
        "kld_error": 0.04197,
        "kld_99": 5.055982,
        "same_top": 45.294,
        "same_top_error": 2.206,
    }


def test_figures_that_are_not_finite_are_none():
    broken = KLD_OUTPUT.replace("60.644314 ±   7.299765", "nan ±   -nan").replace("   5.055982", "inf")
    figures = quality.parse_figures(broken)
    assert (figures["ppl"], figures["ppl_error"], figures["kld_99"]) == (None, None, None)
    assert figures["kld"] == 1.003303
    json.dumps(figures, allow_nan=False)


@pytest.mark.parametrize("line", ["Mean PPL(Q) ", "Mean    KLD", "99.0%   KLD", "Same top p:"])
def test_a_missing_figure_is_an_error(line):
    cut = "\n".join(text for text in KLD_OUTPUT.splitlines() if not text.startswith(line))
    with pytest.raises(StepFailed, match="gave no"):
        quality.parse_figures(cut)


def test_final_estimate():
    line = "Final estimate: PPL = 21.9943 +/- 2.56073"
    assert final_estimate(f"0.16.203.374 I {line}\n\n", Path("x.log")) == (line, 21.9943, 2.56073)
    with pytest.raises(StepFailed, match="see x.log"):
        final_estimate("Unexpected negative standard deviation of log(prob)", Path("x.log"))


USAGE = """\
       model-f32.gguf [model-quant.gguf] type [nthreads]
  --pure
                                      disable k-quant mixtures and quantize all tensors to the same type
 allowed quantization types
  40  or  Q1_0    :  1.125 bpw quantization
  38  or  MXFP4_MOE :  MXFP4 MoE
  12  or  Q3_K    : alias for Q3_K_M
  12  or  Q3_K_M  :  3.74G, +0.6569 ppl @ Llama-3-8B
   7  or  Q8_0    :  7.96G, +0.0026 ppl @ Llama-3-8B
   1  or  F16     : 14.00G, +0.0020 ppl @ Mistral-7B
   0  or  F32     : 26.00G              @ 7B
          COPY    : only copy tensors, no quantizing
"""


def test_types_are_those_that_llama_quantize_lists(llama_bin):
    assert quality.parse_types(USAGE) == ["Q1_0", "Q3_K_M", "Q8_0"]
    real = quality.llama_cpp_types()
    assert {"Q8_0", "Q4_K_M", "Q2_K", "IQ1_S", "Q1_0", "TQ1_0", "TQ2_0"} <= set(real)
    assert not {"F16", "F32", "BF16", "COPY", "Q3_K", "MXFP4_MOE"} & set(real) and len(set(real)) == len(real)


def test_refusal():
    no_type = "warning: blk.0.attn_k.weight ncols 576 not divisible by 128 (required for type q1_0) "
    no_type += "llama_model_quantize: failed to quantize: no tensor type fallback is defined for type q1_0\nmore\n"
    assert quality.refusal(no_type) == "no tensor type fallback is defined for type q1_0"
    assert quality.refusal("llama_model_quantize: failed to quantize: basic_ios::clear: iostream error\n") is None
    assert quality.refusal("killed") is None


# --- bits over the linears


def write(path: Path, dbf: bool) -> Path:
    """Two linears, 64 x 96 and 96 x 64: Q4_0 and Q8_0, or DBF (k = 32) and Q8_0. Embeddings and a norm beside them."""
    writer = gguf.GGUFWriter(path, "llama")
    embeddings, norm = np.zeros((10, 64), np.float16), np.ones(64, np.float32)
    writer.add_tensor("token_embd.weight", embeddings)
    writer.add_tensor("blk.0.attn_norm.weight", norm)
    q8 = np.zeros((96, 64 // 32 * 34), np.uint8)
    if dbf:
        # gguf-py does not know the type DBF: words of 32 signs are written as I32, and patched below
        for name, shape in (("dbf_b", (32, 96 // 32)), ("dbf_a", (64, 32 // 32))):
            writer.add_tensor(f"blk.0.ffn_up.{name}", np.zeros(shape, np.int32))
        for name, n in (("dbf_sb", 96), ("dbf_sm", 32), ("dbf_sa", 64)):
            writer.add_tensor(f"blk.0.ffn_up.{name}", np.ones(n, np.float16))
    else:
        q4 = np.zeros((64, 96 // 32 * 18), np.uint8)
        writer.add_tensor("blk.0.ffn_up.weight", q4, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("blk.1.ffn_down.weight", q8, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if dbf:
        data = bytearray(path.read_bytes())
        for name, ne in ((b"blk.0.ffn_up.dbf_b", 96), (b"blk.0.ffn_up.dbf_a", 32)):
            at = data.index(name) + len(name) + 4  # behind the number of dimensions: ne[0], ne[1], type
            data[at : at + 8] = ne.to_bytes(8, "little")
            data[at + 16 : at + 20] = (90).to_bytes(4, "little")
        path.write_bytes(data)
    return path


def test_bits_over_the_linears_of_a_plain_file(tmp_path):
    path = write(tmp_path / "plain.gguf", dbf=False)
    found = quality.describe(path)
    assert found["bytes"] == path.stat().st_size
    assert found["bits"] == (4.5 + 8.5) / 2  # neither embeddings nor norms
    assert found["types"] == {"Q4_0": 0.5, "Q8_0": 0.5}


def test_bits_over_the_linears_of_a_dbf_file(tmp_path):
    found = quality.describe(write(tmp_path / "dbf.gguf", dbf=True))
    signs, scales = 32 * (64 + 96), 16 * (96 + 32 + 64)
    assert found["bits"] == pytest.approx((signs + scales + 8.5 * 64 * 96) / (2 * 64 * 96), rel=1e-12)
    assert found["types"] == {"DBF": 0.5, "Q8_0": 0.5}


def test_a_file_without_linears_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "none.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((10, 64), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(DBFError, match="has no linears"):
        quality.describe(tmp_path / "none.gguf")


# --- resumption


def test_store_knows_a_figure_by_what_it_depends_on(tmp_path):
    path = tmp_path / "quality.json"
    quality.Store(path, "model").put("figures", "Q2_K wiki", "one", {"ppl": 2.0})
    again = quality.Store(path, "model")
    assert again.get("figures", "Q2_K wiki", "one") == {"ppl": 2.0}
    assert again.get("figures", "Q2_K wiki", "another") is None
    assert again.get("figures", "Q2_K speeches", "one") is None
    assert [p.name for p in tmp_path.iterdir()] == ["quality.json"]


def test_store_refuses_what_is_not_its_own(tmp_path):
    path = tmp_path / "quality.json"
    quality.Store(path, "model").save()
    with pytest.raises(DBFError, match="holds the figures of model: name another folder with --out"):
        quality.Store(path, "another")
    for damage in ("", "{", "[]", '{"model": "model"}'):
        path.write_text(damage)
        with pytest.raises(DBFError, match="is damaged: delete it"):
            quality.Store(path, "model")


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A Bench whose programs are played: `calls` lists what would have run. The texts, the F16 model and the DBF file
    are small files, whose bytes the test may change before the next `bench()`."""
    calls = []
    inputs = {"f16": "f16", "wiki": "wiki", "speeches": "speeches", "calibration": "calibration"}
    dbf = write(tmp_path / "small.gguf", dbf=True)

    def dbf_gguf(command, *args):
        out = Path(args[-1]) if args[-2] == "-o" else None
        name = {"reference": "f16"}.get(command) or (args[0] if "--split" not in args else "calibration")
        out.write_text(inputs[name])

    def run(command, *, log, capture):
        program, command = Path(command[0]).name, list(map(str, command))
        after = {flag: command[command.index(flag) + 1] for flag in ("-m", "-f", "-o") if flag in command}
        log.write_text("")
        if program == "llama-imatrix":
            calls.append("imatrix")
            Path(after["-o"]).write_text("imatrix")
        elif program == "llama-quantize":
            calls.append(f"make {command[-1]}")
            if command[-1] == "Q1_0":
                log.write_text(f"failed to quantize: {NO_TYPE}\n")
                raise StepFailed("llama-quantize ended with status 1")
            write(Path(command[-2]), dbf=False)
        else:
            calls.append(f"{Path(after['-m']).stem} {Path(after['-f']).stem.removeprefix('text-')}")
            if "--kl-divergence" in command:
                return KLD_OUTPUT
            Path(command[-1]).write_text("base")
            return "Final estimate: PPL = 21.9943 +/- 2.56073"
        return ""

    monkeypatch.setattr(quality, "dbf_gguf", dbf_gguf)
    monkeypatch.setattr(quality, "run", run)
    monkeypatch.setattr(quality, "tool", Path)
    monkeypatch.setattr(quality, "resolve", lambda model: SimpleNamespace(name=model, origin=model, recipe=None))
    monkeypatch.setattr(quality.Bench, "check_disk", lambda self: None)
    describe = quality.describe
    f16 = {"bytes": 9, "bits": 16.0, "types": {"F16": 1.0}}
    monkeypatch.setattr(quality, "describe", lambda path: f16 if path.stem == "f16" else describe(path))

    def once(types=("Q2_K", "Q1_0"), chunks=2, clean=True):
        calls.clear()
        arguments = argparse.Namespace(
            model="m", out=tmp_path / "out", calib=None, chunks=chunks, imatrix_chunks=3, threads=None,
            dbf=[dbf], bits=[], types=list(types), text=BOTH,
        )  # fmt: skip
        job = quality.Bench(arguments, [])
        found = job.candidates()
        for candidate in found:
            job.measure(candidate)
        if clean:
            job.clean()
        return list(calls), job.rows(found)

    return SimpleNamespace(once=once, inputs=inputs, dbf=dbf, out=tmp_path / "out")


NO_TYPE = "no tensor type fallback is defined for type q1_0"
BASES = ["f16 wiki", "f16 speeches"]
SMALL = ["small wiki", "small speeches"]
TYPES = ["imatrix", "make Q2_K", "Q2_K wiki", "Q2_K speeches", "make Q1_0"]


def test_what_is_measured_is_not_measured_again(bench):
    calls, rows = bench.once()
    assert calls == BASES + SMALL + TYPES
    again, same = bench.once()
    assert again == [] and same == rows
    assert [row["name"] for row in rows] == ["F16", "small", "Q2_K", "Q1_0"]
    assert rows[0]["figures"]["wiki"]["ppl"] == 21.9943 and rows[0]["figures"]["wiki"]["kld"] == 0
    assert rows[2]["figures"]["speeches"]["kld"] == 1.003303 and rows[2]["bits"] == 6.5
    assert rows[3] == {"name": "Q1_0", "kind": "llama.cpp", "refused": NO_TYPE}
    left = sorted(p.name.split("-")[0] for p in bench.out.iterdir() if p.suffix != ".log")
    assert left == ["calibration.txt", "f16.gguf", "imatrix", "quality.json", "text", "text"]


def test_a_changed_file_is_measured_again(bench):
    bench.once()
    with open(bench.dbf, "ab") as f:
        f.write(b"\0" * 32)
    assert bench.once()[0] == ["f16 wiki", "small wiki", "f16 speeches", "small speeches"]
    bench.inputs["speeches"] = "others"
    assert bench.once()[0] == ["f16 speeches", "small speeches", "make Q2_K", "Q2_K speeches"]
    bench.inputs["calibration"] = "other"
    calls, _ = bench.once()
    assert calls[:2] == ["imatrix", "make Q2_K"] and calls[-1] == "make Q1_0"
    assert calls[2:-1] == ["f16 wiki", "Q2_K wiki", "f16 speeches", "Q2_K speeches"]
    bench.inputs["f16"] = "another"
    assert bench.once()[0] == BASES + SMALL + TYPES
    assert bench.once()[0] == []
    assert bench.once(chunks=3)[0] == BASES + SMALL + TYPES[1:4]


def test_an_interrupted_run_goes_on(bench, monkeypatch):
    real, outputs = quality.parse_figures, []

    def interrupted(output):
        outputs.append(output)
        if len(outputs) == 2:
            raise KeyboardInterrupt
        return real(output)

    monkeypatch.setattr(quality, "parse_figures", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.once()
    calls, rows = bench.once(types=["Q2_K"])
    assert calls == ["small speeches", *TYPES[:-1]]  # the F16 model's distributions were kept, too
    assert all(row["figures"][text]["ppl"] for row in rows for text in BOTH)
    assert bench.once(types=["Q2_K", "Q1_0"])[0] == ["make Q1_0"]


# --- the verdict


def row(name, kind, mib, wiki, speeches):
    """`wiki` and `speeches`: (perplexity, KLD)."""
    figures = {
        text: {"ppl": ppl, "ppl_error": 0.1, "kld": kld, "kld_error": 0.01, "kld_99": kld, "same_top": 50.0}
        | {"same_top_error": 1.0}
        for text, (ppl, kld) in (("wiki", wiki), ("speeches", speeches))
    }
    described = {"bytes": int(mib * 2**20), "bits": 2.0, "types": {"Q2_K": 0.75, "Q4_0": 0.25}}
    return {"name": name, "kind": kind, "figures": figures} | described


MODEL = row("F16", "F16", 100, (10, 0.0), (20, 0.0))
GOOD = row("mine", "DBF", 20, (15, 0.5), (30, 0.6))


def test_verdict_better_than_all_that_are_no_larger():
    rivals = [row("A", "llama.cpp", 19, (16, 0.6), (31, 0.7)), row("B", "llama.cpp", 20, (99, 9), (99, 9))]
    lines, good = quality.verdict([MODEL, GOOD, *rivals], BOTH)
    assert good
    better = "wiki: better than all of them; speeches: better than all of them"
    assert lines == [f"mine (20.0 MiB): no larger are A, B; {better}"]


@pytest.mark.parametrize(
    "wiki, speeches, lost",
    [
        ((15, 0.6), (31, 0.7), "wiki: NOT better than A (perplexity 15 against 15)"),  # equal is not lower
        ((16, 0.4), (31, 0.7), "wiki: NOT better than A (KLD 0.5 against 0.4)"),
        ((16, 0.6), (29, 0.1), "speeches: NOT better than A (perplexity 30 against 29 and KLD 0.6 against 0.1)"),
    ],
)
def test_verdict_one_figure_on_one_text_is_enough_to_lose(wiki, speeches, lost):
    lines, good = quality.verdict([MODEL, GOOD, row("A", "llama.cpp", 19, wiki, speeches)], BOTH)
    assert not good and lost in lines[0]


def test_verdict_larger_types_do_not_count():
    best = row("best", "llama.cpp", 20.1, (10, 0.01), (20, 0.01))
    worse = row("worse", "llama.cpp", 40, (16, 0.6), (31, 0.7))
    lines, good = quality.verdict([MODEL, GOOD, worse, best], BOTH)
    assert good
    assert lines == [
        "mine (20.0 MiB): no type of llama.cpp makes a file as small (the smallest is best, 20.1 MiB); "
        "of the larger it is better than worse on every text"
    ]


def test_verdict_not_finite_is_worse_than_anything():
    nan = row("nan", "llama.cpp", 10, (None, None), (None, None))
    assert quality.verdict([GOOD, nan], BOTH)[1]
    lost = row("lost", "DBF", 20, (None, None), (30, 0.6))
    lines, good = quality.verdict([lost, nan], BOTH)
    assert not good and "wiki: NOT better than nan" in lines[0] and "speeches: better than all" in lines[0]


def test_verdict_speaks_of_every_dbf_file_and_ignores_refused_types():
    refused = {"name": "Q1_0", "kind": "llama.cpp", "refused": "no"}
    bad = row("bad", "DBF", 20, (17, 0.5), (30, 0.6))
    rival = row("A", "llama.cpp", 19, (16, 0.6), (31, 0.7))
    lines, good = quality.verdict([GOOD, bad, rival, refused], BOTH)
    assert not good and [line.split()[0] for line in lines] == ["mine", "bad"]


def test_table():
    broken = row("broken", "llama.cpp", 10, (None, None), (1234567, 1))
    refused = {"name": "Q1_0", "kind": "llama.cpp", "refused": "no"}
    lines = quality.table([GOOD, MODEL, broken, refused], "wiki").splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["F16", "mine", "broken"]  # by size
    assert [cell.strip() for cell in lines[3].split("|")[2:-1]] == [
        "20.0", "2.000", "15.00 ± 0.10", "0.5000 ± 0.0100", "0.500", "50.00 ± 1.00", "Q2_K 75%, Q4_0 25%",
    ]  # fmt: skip
    assert "not finite" in lines[4]


# --- the options


def test_options(llama_bin):
    given, rest = quality.parse_arguments(["m", "--types", "q2_k", "--", "--tune", "none", "--", "x"])
    assert given.types == ["Q2_K"] and rest == ["--tune", "none", "--", "x"]
    assert given.bits == [2.0, 1.5, 1.0] and given.dbf == [] and given.text == ["wiki", "speeches"]
    given, _ = quality.parse_arguments(["m", "--dbf", "a.gguf", "--dbf", "b.gguf", "--types"])
    assert given.dbf == [Path("a.gguf"), Path("b.gguf")] and given.bits == [] and given.types == []
    with pytest.raises(DBFError, match="llama-quantize has no type Q9: there are "):
        quality.parse_arguments(["m", "--types", "Q9"])
    with pytest.raises(DBFError, match="give --calib before the --"):
        quality.parse_arguments(["m", "--", "--calib", "wiki"])


@pytest.mark.parametrize(
    "given, name",
    [
        ({"dbf": ["small.gguf", "other/small.gguf"]}, "small"),
        ({"dbf": ["dbf-2.0.gguf"], "bits": [2.0]}, "dbf-2.0"),
        ({"types": ["Q2_K", "Q2_K"]}, "Q2_K"),
        ({"text": ["a/x.txt", "b/x.txt"]}, "x"),
    ],
)
def test_two_files_of_one_name_are_refused(bench, tmp_path, given, name):
    plain = {"model": "m", "out": tmp_path / "out", "calib": None, "chunks": 1, "imatrix_chunks": 1, "threads": None}
    lists = {"dbf": [], "bits": [], "types": [], "text": ["wiki"]} | given
    lists["dbf"] = [tmp_path / path for path in lists["dbf"]]
    with pytest.raises(DBFError, match=f"have the same name, {name}: "):
        quality.Bench(argparse.Namespace(**plain, **lists), [])

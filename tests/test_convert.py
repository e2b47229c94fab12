"""`dbf-gguf convert` from end to end on a tiny random model: what it writes and prints, kill and resume, refusals.

    python -m pytest tests/test_convert.py
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dbf_gguf
from dbf_gguf import budget, cli, machine, pipeline, prepare
from dbf_gguf.checkpoint import WorkFolder
from dbf_gguf.cli.convert import parse_size, resolve_settings
from dbf_gguf.errors import DBFError
from dbf_gguf.gguf_file import GGUFFile
from dbf_gguf.gguf_writer import check_output, write_gguf
from dbf_gguf.model import linear_shapes
from dbf_gguf.source import ModelSource, resolve
from dbf_gguf.verify import check_format, check_work

JOINED = "--bits 2 --calib-sequences 4 --seq-len 64 --iterations 12 --block-tokens 2048 --tune-tokens 15360"
JOINED += " --budget uniform --tune-lr 5e-3 --threads 2 --device cpu --eval-windows 0"
JOINED = JOINED.split()
OPTIONS = [*JOINED, "--join", "none"]  # the linears by themselves
LINEAR = re.compile(r"blk\.\d+\.\w+ +k=\d+ +\d\.\d\d bits  err 0\.\d{4}  \d+\.\d s")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Llama of two blocks with a real little SentencePiece tokenizer; tied embeddings."""
    import sentencepiece
    import transformers

    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    sentence = "the quick brown fox jumps over lazy dogs while seven wizards quietly brew magic potions "
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([sentence[i:] + sentence[:i] for i in range(0, len(sentence), 5)]),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=288,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=288,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    words = [f"{a}{b}" for a in ("brew", "jump", "quick", "fox") for b in ("ing", "s", "ly", "er")]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(random.Random(1).choices(words, k=30000)))
    return path


@pytest.fixture(scope="module")
def converted(model, text, tmp_path_factory, patched_tree):
    """(output, work folder, what was printed) of one uninterrupted run."""
    folder = tmp_path_factory.mktemp("converted")
    output = folder / "tiny.gguf"
    run = start(model, text, output)
    printed = run.communicate(timeout=300)[0]
    assert run.returncode == 0, printed
    return output, folder / "tiny-work", printed


def start(model, text, output, *more) -> subprocess.Popen:
    command = [sys.executable, "-m", "dbf_gguf", "convert", model, "--calib", text, "-o", output, *OPTIONS, *more]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def fails(monkeypatch, capsys, *arguments) -> str:
    """The one line that a command in this process ends with; asserts that there is no more, and status 1."""
    monkeypatch.setattr(sys, "argv", ["dbf-gguf", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert error.startswith("dbf-gguf: ")
    return error


# --- the whole way


def test_output_is_sound_and_equals_the_work_folder(converted):
    output, folder, _ = converted
    with GGUFFile(output) as file:
        assert check_format(file) == []
        assert check_work(file, WorkFolder.open(folder)) == []
        assert len(file.linears()) == 14
        assert file.get("dbf.source") == "tiny"
        settings = json.loads(file.get("dbf.settings"))
    assert settings["bits"] == 2.0
    assert settings["iterations"] == 12
    assert str(folder.parent) not in json.dumps(settings)
    assert [path.name for path in output.parent.iterdir() if path.name.startswith(".")] == []


def test_screen(converted):
    """Settings first, a line per linear, tuning with the held-out KL, totals at the end."""
    output, folder, printed = converted
    lines = printed.splitlines()
    assert lines[0].split() == ["model", "tiny", "(tiny)"]
    assert len([line for line in lines if LINEAR.fullmatch(line)]) == 14
    tuning = [float(kl) for kl in re.findall(r"tuning \d+/60 .* held out ([\d.]+)", printed)]
    assert len(tuning) == 3  # before, after 40 steps, at the end
    bits = float(re.search(r"bits a weight +([\d.]+) over the linears, [\d.]+ over the whole file", printed)[1])
    assert abs(bits - 2.0) < 0.05
    size, f16 = map(float, re.search(r"size +([\d.]+) MiB, F16 ([\d.]+) MiB", printed).groups())
    assert size == round(output.stat().st_size / 2**20, 2)
    assert size < f16
    assert re.search(r"peak memory +\d+\.\d GiB", printed)


def test_f16_size_is_that_of_the_reference(converted, model, tmp_path, monkeypatch):
    printed = converted[2]
    reference = tmp_path / "f16.gguf"
    monkeypatch.setattr(sys, "argv", ["dbf-gguf", "reference", str(model), "-o", str(reference)])
    cli.main()
    said = float(re.search(r"F16 ([\d.]+) MiB", printed)[1])
    assert said == pytest.approx(reference.stat().st_size / 2**20, abs=0.02)


def test_tuning_made_it_better(converted):
    kl = [float(value) for value in re.findall(r"held out ([\d.]+)", converted[2])]
    assert kl[-1] < 0.95 * kl[0]


def test_load_gives_the_compressed_model(converted, model):
    """Its logits are those of the dense model with every linear replaced by the product of its final factors."""
    _, folder, _ = converted
    compressed = dbf_gguf.load(folder)
    work = WorkFolder.open(folder)
    plain = pipeline.load_dense(model)
    for name in work.linears():
        plain.get_submodule(name).weight.data = work.factors(name).dense()
    for name, value in work.final_norms().items():
        plain.get_parameter(name).data = value
    ids = torch.arange(3, 99)[None]
    with torch.no_grad():
        expected, found = plain(ids).logits, compressed(ids).logits
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def test_llama_cpp_computes_the_same(converted, text, llama_bin):
    """llama-perplexity on the file and PyTorch on the work folder agree within 0.5 % on the same tokens."""
    from transformers import AutoTokenizer

    from dbf_gguf import calibration
    from dbf_gguf.evaluate import perplexity

    output, folder, _ = converted
    command = [llama_bin / "llama-perplexity", "-m", output, "-f", text, "-c", "128", "--chunks", "16", "-t", "2"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    found = re.search(r"PPL = ([\d.]+)", run.stdout + run.stderr)
    assert found, run.stderr[-2000:]
    model = dbf_gguf.load(folder)
    tokenizer = AutoTokenizer.from_pretrained(resolve(str(WorkFolder.open(folder).manifest["model"])).folder)
    bos = tokenizer.bos_token_id  # llama.cpp adds it for a SentencePiece tokenizer that says nothing about it
    windows = calibration.evaluation_windows(tokenizer, text.read_text(), 128, 16, bos)
    assert perplexity(model, windows, bos) == pytest.approx(float(found[1]), rel=5e-3)


# --- interrupted


def test_killed_up_to_ten_times_and_resumed_ends_in_the_same_file(converted, model, text, tmp_path):
    """Five kills right after a line of a certain kind, five after any number of lines; each run but the last goes on.

    Lines, not seconds: what is done by then must not depend on how fast or busy the machine is.
    """
    output = tmp_path / "tiny.gguf"
    dice = random.Random(5)
    settings = next(i for i, line in enumerate(converted[2].splitlines()) if line.startswith("importance:"))
    killed = 0
    for moment in ["importance:", "blk.0.ffn_down", "blk.1.ffn_up", "tuning 40/", "writing"]:
        for after in (moment, None):
            run = start(model, text, output, "--resume")
            lines = dice.randint(settings // 2, settings + 6)  # what the run before has done takes two
            if not any(line.startswith(after) if after else i == lines for i, line in enumerate(run.stdout)):
                assert run.wait() == 0  # another kill came after this moment already: all was done
                continue
            time.sleep(dice.uniform(0, 0.1))
            killed += run.poll() is None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
            run.communicate()
    assert killed >= 6
    assert not output.exists() or output.read_bytes() == converted[0].read_bytes()
    last = start(model, text, output, "--resume")
    printed = last.communicate(timeout=300)[0]
    assert last.returncode == 0, printed
    assert "tuning: done before" in printed
    assert not any(LINEAR.fullmatch(line) for line in printed.splitlines())
    assert output.read_bytes() == converted[0].read_bytes()


def test_the_file_tells_the_machine_that_it_was_made_on(converted, model, text, tmp_path, monkeypatch, capsys):
    """Written anew by other threads it is the same file."""
    arguments = ["--calib", text, "-o", tmp_path / "again.gguf", "--work", converted[1], *OPTIONS, "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["dbf-gguf", "convert", *map(str, [model, *arguments])])
    cli.main()
    assert (tmp_path / "again.gguf").read_bytes() == converted[0].read_bytes()


def test_a_begun_folder_is_not_overwritten_unasked(converted, model, text, monkeypatch, capsys):
    output, folder, _ = converted
    before = output.read_bytes()
    error = fails(monkeypatch, capsys, "convert", model, "--calib", text, "-o", output, *OPTIONS)
    assert f"{folder} holds an earlier convert: --resume" in error
    assert output.read_bytes() == before


def test_changed_settings_are_named(converted, model, text, monkeypatch, capsys):
    output, folder, _ = converted
    before = output.read_bytes(), (folder / "manifest.json").read_bytes()
    more = ["--work", folder, "--bits", "1.5", "--tune-tokens", "9999"]
    error = fails(monkeypatch, capsys, "convert", model, "--calib", text, "-o", output, *OPTIONS, *more)
    assert "bits was 2.0, now 1.5; tune-tokens was 15360, now 9999" in error
    assert (output.read_bytes(), (folder / "manifest.json").read_bytes()) == before


def test_how_to_tune_may_change_until_something_is_tuned(converted, model, text, tmp_path, monkeypatch, capsys):
    """Other options, threads and text to tune on; what was tuned must be deleted first. Then the old ones make the old
    file again."""
    work, output = tmp_path / "work", tmp_path / "out.gguf"
    shutil.copytree(converted[1], work)
    arguments = [model, "--calib", text, "-o", output, "--work", work]
    other = ["--tune-tokens", "2048", "--tune-seq-len", "32", "--tune-lr", "1e-3", "--threads", "1"]
    final, snapshot = work / "final.safetensors", work / "tuning.safetensors"

    error = fails(monkeypatch, capsys, "convert", *arguments, *OPTIONS, *other)
    assert "tune-seq-len was 64, now 32" in error and "threads" not in error  # nothing would be computed by them
    assert f"delete {snapshot.name} and {final.name}" in error
    final.unlink()
    assert "threads was 2, now 1" in fails(monkeypatch, capsys, "convert", *arguments, *OPTIONS, *other)
    snapshot.unlink()

    def too_large(*given, **more):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.distill, "distill", too_large)
        error = fails(patch, capsys, "convert", *arguments, *OPTIONS)
    assert "out of memory on cpu while tuning" in error and "--tune-seq-len" in error

    def printed(*more) -> str:
        monkeypatch.setattr(sys, "argv", ["dbf-gguf", "convert", *map(str, arguments), *OPTIONS, *more])
        cli.main()
        return capsys.readouterr().out

    assert "held out" not in printed("--tune", "none")
    untuned = output.read_bytes()
    assert "tune was none, now scales" in fails(monkeypatch, capsys, "convert", *arguments, *OPTIONS)
    final.unlink()
    assert "tuning 8/8" in printed(*other)
    assert load_file(work / "windows.safetensors")["tuning"].shape[1] == 32
    assert output.read_bytes() not in (untuned, converted[0].read_bytes())
    final.unlink()
    snapshot.unlink()
    printed()
    assert output.read_bytes() == converted[0].read_bytes()


def test_changed_text_is_noticed(converted, model, tmp_path, monkeypatch, capsys):
    output, folder, _ = converted
    other = tmp_path / "text.txt"
    other.write_text("the quick brown fox " * 9000)
    more = ["--work", folder, "--calib", other]
    assert "calib was text.txt " in fails(monkeypatch, capsys, "convert", model, "-o", output, *OPTIONS, *more)


def test_two_converts_in_one_folder(converted, model, text, monkeypatch, capsys):
    import fcntl

    output, folder, _ = converted
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        error = fails(monkeypatch, capsys, "convert", model, "--calib", text, "-o", output, "--work", folder, *OPTIONS)
    assert "another convert is at work" in error


# --- refusals


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop(*names: str):
    return lambda folder: [(folder / name).unlink() for name in names]


def other_width(folder: Path, width: int) -> None:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    config.hidden_size = width
    config.head_dim = 16
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def drop_tensor(folder: Path, name: str) -> None:
    path = folder / "model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(path).items() if key != name}
    save_file(tensors, path, {"format": "pt"})


BAD_MODELS = {
    "tokenizer": (drop("tokenizer.model", "tokenizer_config.json"), "no tokenizer"),
    "experts": (lambda folder: change_config(folder, model_type="mixtral", num_local_experts=8), "mixture of experts"),
    "architecture": (lambda folder: change_config(folder, model_type="gpt_neox"), "gpt_neox is not supported"),
    "weights": (drop("model.safetensors"), "no weights in safetensors"),
    "config": (drop("config.json"), "no config.json"),
    "width": (lambda folder: other_width(folder, 80), "multiple of 32"),
    "shapes": (lambda folder: change_config(folder, hidden_size=96), "config.json makes it [288, 96]"),
    "norm": (lambda folder: drop_tensor(folder, "model.norm.weight"), "has no weight model.norm.weight"),
    "cut": (lambda f: os.truncate(f / "model.safetensors", 5000), "safetensors"),
}


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_bad_models(kind, model, text, tmp_path, monkeypatch, capsys):
    spoil, message = BAD_MODELS[kind]
    folder = tmp_path / "bad"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    spoil(folder)
    error = fails(monkeypatch, capsys, "convert", folder, "--calib", text, "-o", tmp_path / "out.gguf", *OPTIONS)
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--bits", "0"], "0 bits a weight cannot be made"),
        (["--bits", "17"], "17 bits a weight cannot be made"),
        (["--bits", "nan"], "cannot be made"),
        (["--seq-len", "4096"], "model's context of 512"),
        (["--calib", "nothing-here"], "unknown calibration text"),
        (["--embedding-type", "q9"], "embedding type q9 is unknown"),
        (["--embedding-type", "q6_k"], "multiple of 256"),
        (["--device", "abacus"], "torch finds no device abacus"),
        (["--tune-tokens", "999999", "--seq-len", "500", "--calib", "SHORT"], "too short"),
        (["--tune-tokens", "999999", "--calib", "FEW"], "too short to tune on"),
        (["--blocks", "signs", "--block-tokens", "64"], "too little to tune blocks on: 1 windows of 64 tokens"),
        (["--tune-minutes", "nan"], "must be finite"),
        (["--block-lr", "nan"], "--block-lr must be finite"),
        (["--size", "1MiB"], "--bits and --size"),
        (["--budget", "none.json"], "none.json cannot be read"),
        (["--budget", "SHORT"], "is no budget"),
    ],
)
def test_bad_options(options, message, model, text, tmp_path, monkeypatch, capsys):
    texts = {"SHORT": tmp_path / "short.txt", "FEW": tmp_path / "few.txt"}
    texts["SHORT"].write_text("the quick brown fox")
    texts["FEW"].write_text(text.read_text()[:280])
    options = [texts.get(option, option) for option in options]
    output = tmp_path / "out.gguf"
    error = fails(monkeypatch, capsys, "convert", model, "--calib", text, "-o", output, *OPTIONS, *options)
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few.txt", "short.txt"]


@pytest.mark.parametrize("name", ["no-such-model", "./nowhere", "missing.gguf"])
def test_unknown_models(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert name in fails(monkeypatch, capsys, "convert", name)
    assert list(tmp_path.iterdir()) == []


def test_output_that_is_a_folder(model, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "it is a folder" in fails(monkeypatch, capsys, "convert", model, "--calib", text, "-o", ".", *OPTIONS)
    assert "it is a folder" in fails(monkeypatch, capsys, "convert", model, "--calib", text, "-o", tmp_path, *OPTIONS)


def test_output_that_is_the_source(tmp_path):
    """Also by another path to it, and whatever the file holds."""
    source, other = tmp_path / "model.gguf", tmp_path / "link.gguf"
    source.write_bytes(b"model")
    other.symlink_to(source)
    check = pytest.raises(DBFError, match="the model is read from it")
    with check:
        check_output(other, source)
    with check:
        write_gguf(source, tmp_path, work=None, embedding_type="f16", output_type="f16", llama_cpp=tmp_path,
                   tokenizer_gguf=source)  # fmt: skip
    check_output(tmp_path / "new.gguf", source)
    assert source.read_bytes() == b"model"


def test_output_that_is_another_file(model, text, tmp_path, monkeypatch, capsys):
    """The model's own weights are not written over, nor anything else that is no GGUF."""
    folder = shutil.copytree(model, tmp_path / "model")
    weights = folder / "model.safetensors"
    before = weights.read_bytes()
    for command in (["convert", folder, "--calib", text, *OPTIONS], ["reference", folder]):
        error = fails(monkeypatch, capsys, *command, "-o", weights)
        assert "is no GGUF file; name another with -o" in error and weights.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_work_folder_that_is_another_folder(model, text, tmp_path, monkeypatch, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    more = ["-o", tmp_path / "out.gguf", "--work", tmp_path / "other", *OPTIONS]
    error = fails(monkeypatch, capsys, "convert", model, "--calib", text, *more)
    assert "is no work folder" in error
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_without_importance_none_is_measured(model, text, tmp_path, monkeypatch, capsys, patched_tree):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "check_convertible", lambda folder, tree: None)  # seconds, and tested above
    monkeypatch.setattr(pipeline.importance, "measure", None)
    more = ["--no-importance", "--budget", "adaptive", "--blocks", "signs", "--bits", "3", "-o", "x.gguf"]
    printed = convert_here(monkeypatch, capsys, model, "--calib", text, *more)
    assert "importance:" not in printed and "written" in printed
    work = WorkFolder.open(tmp_path / "x-work")
    assert json.loads((work.path / "budget.json").read_text())["compressed"] == "plainly"
    more = ["--calib", text, *OPTIONS, "--budget", work.path / "budget.json"]
    error = fails(monkeypatch, capsys, "convert", model, *more)
    assert "linears compressed with --no-importance, here they are compressed block by block: give the same" in error


def test_cache_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DBF_GGUF_CACHE", "/dev/null/cache")
    error = fails(monkeypatch, capsys, "convert", "smollm2-135m", "-o", tmp_path / "out.gguf")
    assert "/dev/null/cache" in error and "DBF_GGUF_CACHE names another place" in error
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_of_a_work_folder(converted, model, text, tmp_path, monkeypatch, capsys):
    """One line names the file; without it, it is computed again."""
    work = tmp_path / "work"
    shutil.copytree(converted[1], work)
    arguments = ["convert", model, "--calib", text, "-o", tmp_path / "out.gguf", "--work", work, *OPTIONS]
    damaged = work / "windows.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    error = fails(monkeypatch, capsys, *arguments)
    assert f"{damaged} is damaged" in error and "delete it" in error
    damaged.unlink()
    monkeypatch.setattr(sys, "argv", ["dbf-gguf", *map(str, arguments)])
    cli.main()
    assert (tmp_path / "out.gguf").read_bytes() == converted[0].read_bytes()

    for name, advice in (("final", "delete it"), ("linears/model.layers.1.mlp.up_proj", "another --work")):
        damaged = work / f"{name}.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:100])
        error = fails(monkeypatch, capsys, *arguments)
        assert f"{damaged} is damaged" in error and advice in error
        damaged.unlink()


def test_a_tokenizer_that_the_converter_does_not_know(model, text, tmp_path, monkeypatch, capsys, patched_tree):
    """transformers reads it, llama.cpp has no name for how it splits text: refused before anything is computed."""
    import tokenizers
    import transformers

    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "tokenizer.model").unlink()
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(use_regex=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([], tokenizers.trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet))
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(folder)
    monkeypatch.setattr(pipeline.importance, "measure", None)
    error = fails(monkeypatch, capsys, "convert", folder, "--calib", text, "-o", tmp_path / "out.gguf", *OPTIONS)
    assert "does not know this tokenizer's pre-tokenizer" in error
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_too_small_is_refused_beforehand(model, text, tmp_path, monkeypatch, capsys):
    real = prepare.shutil.disk_usage

    def usage(path):
        return type(real(path))(1 << 30, (1 << 30) - 4096, 4096)

    monkeypatch.setattr(prepare.shutil, "disk_usage", usage)
    output = tmp_path / "out.gguf"
    error = fails(monkeypatch, capsys, "convert", model, "--calib", text, "-o", output, *OPTIONS)
    assert "is too full" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("more", [["--blocks", "signs"], ["--tune", "signs"], ["--budget", "adaptive"], ["STREAMS"]])
def test_what_is_kept_on_the_way_is_counted(more, model, text, tmp_path, monkeypatch, capsys):
    """A disk on which the plain way would just fit is too small for these."""
    real, free = prepare.shutil.disk_usage, 0
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: type(real(path))(1 << 30, (1 << 30) - free, free))
    arguments = ["convert", model, "--calib", text, "-o", tmp_path / "out.gguf", *OPTIONS, "--bits", "4"]

    class Passed(Exception):
        pass

    def passed(*given):
        raise Passed

    def fits(*options) -> bool:
        monkeypatch.setattr(sys, "argv", ["dbf-gguf", *map(str, arguments), *options])
        with pytest.raises((Passed, SystemExit)) as end:
            cli.main()
        assert end.type is Passed or "is too full" in capsys.readouterr().err
        return end.type is Passed

    monkeypatch.setattr(prepare, "_load_tokenizer", passed)  # what comes next
    low, free = 0, 1 << 30
    while free - low > 1000:
        middle = (low + free) // 2
        free, kept = middle, free
        if not fits():
            low, free = middle, kept
    assert fits()
    if more == ["STREAMS"]:
        for module in (prepare.blockwise, prepare.sensitivity):
            monkeypatch.setattr(module, "MEMORY_BYTES", 0)
        more = []
    elif more == ["--budget", "adaptive"]:
        monkeypatch.setattr(prepare.sensitivity, "STATE_BYTES", 0)
    assert not fits(*more)


def test_weights_that_are_not_finite(model, text, tmp_path, monkeypatch, capsys):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "bad"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    output = tmp_path / "out.gguf"
    error = fails(monkeypatch, capsys, "convert", folder, "--calib", text, "-o", output, *OPTIONS)
    assert "not finite" in error
    assert not output.exists()


# --- settings and division of the work


def options(**given) -> dict:
    names = "bits calib calib_sequences seq_len iterations tune tune_tokens tune_minutes embedding_type output_type"
    names += " size budget blocks block_tokens block_lr block_sign_lr tune_seq_len tune_lr tune_sign_lr threads"
    others = {"effort": "normal", "importance": True, "join": "none", "threads": None, "seed": 0, "eval_windows": 32}
    return dict.fromkeys(names.split()) | others | given


def test_recipe_comes_before_defaults_and_options_before_the_recipe(model):
    from dbf_gguf import recipes

    recipe = recipes.load("smollm2-135m")
    source = ModelSource("x", model, None, recipe, "x")
    found = resolve_settings(source, "cpu", options(bits=1.25))
    assert (found.bits, found.calib, found.iterations) == (1.25, recipe.calib, recipe.iterations)
    assert found.tune_lr == recipe.tune["lr"]
    plain = resolve_settings(ModelSource("x", model, None, None, "x"), "cpu", options())
    assert plain.seq_len == 512  # the model's context is smaller than the default
    assert plain.tune == "scales"


def test_one_tuning_bound_replaces_the_recipes_other_one(model):
    from dbf_gguf import recipes

    source = ModelSource("x", model, None, recipes.load("llama2-7b"), "x")
    assert resolve_settings(source, "cpu", options()).tune_tokens is not None
    found = resolve_settings(source, "cpu", options(tune_minutes=3.0))
    assert (found.tune_minutes, found.tune_tokens) == (3.0, None)
    none = resolve_settings(source, "cpu", options(tune="none"))
    assert (none.tune_minutes, none.tune_tokens) == (None, None)


def test_workers_fit_into_memory():
    small = dict(n_out=576, n_in=576, k=576)
    assert pipeline.workers_for(8, **small, memory=16 << 30) == 8
    large = dict(n_out=11008, n_in=4096, k=5971)
    assert 1 <= pipeline.workers_for(16, **large, memory=16 << 30) < 8
    assert pipeline.workers_for(16, **large, memory=1 << 20) == 1
    assert pipeline.workers_for(16, **large, memory=1 << 40) == 1  # a 7B takes no more on a larger machine


@pytest.mark.parametrize("text, limited", [("1000000\n", True), ("max\n", False), (None, False)])
def test_memory_of_a_container(tmp_path, monkeypatch, text, limited):
    """A cgroup's limit counts where it is below the machine's memory; "max" or no such file is no limit."""
    limit = tmp_path / "memory.max"
    if text:
        limit.write_text(text)
    monkeypatch.setattr(machine, "CGROUP_LIMIT", limit)
    assert (machine.available_memory() == 1_000_000) is limited
    assert machine.available_memory() >= (1_000_000 if limited else 1 << 30)


def test_equal_linears_of_a_block_go_together_on_a_gpu():
    names = [f"model.layers.{i}.mlp.{kind}" for i in (0, 1) for kind in ("gate_proj", "up_proj", "down_proj")]
    shapes = {name: (96, 64) if "down" not in name else (64, 96) for name in names}
    widths = dict.fromkeys(names, 64)
    together = [names[0:2], names[2:3], names[3:5], names[5:6]]
    assert pipeline.units(names, shapes, widths, "cuda:0") == together
    assert pipeline.units(names, shapes, widths, "cpu") == [[name] for name in names]


def test_the_result_does_not_depend_on_the_order_of_the_linears(model, text, tmp_path, patched_tree):
    """What a pool of threads wrote equals the linears factorized one after the other."""
    from dbf_gguf.factorize import factorize
    from dbf_gguf.factors import pack_signs

    run = start(model, text, tmp_path / "alone.gguf", "--blocks", "none", "--tune", "none")
    assert run.wait(timeout=300) == 0, run.communicate()[0]
    work = WorkFolder.open(tmp_path / "alone-work")
    tensors = work.read_tensors("importance.safetensors")
    dense = pipeline.load_dense(model)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in work.linears()[::4]:
            (found,), error = factorize(
                dense.get_submodule(name).weight.detach()[None],
                work.manifest["budget"][name],
                importance_in=tensors[f"{name}.input"][None],
                importance_out=tensors[f"{name}.output"][None],
                iterations=12,
            )
            assert work.manifest["linears"][name]["error"] == error.item()
            signs_a, signs_b = work.packed_signs(name)
            assert (pack_signs(found.signs_a) == signs_a).all()
            assert (pack_signs(found.signs_b) == signs_b).all()
    finally:
        torch.set_num_threads(threads)


def test_without_tuning_and_with_perplexities(model, text, tmp_path, monkeypatch, capsys):
    """The scales are those of the factorization, rounded to float16."""
    output = tmp_path / "plain.gguf"
    arguments = ["convert", model, "--calib", text, "-o", output, *OPTIONS, "--tune", "none", "--eval-windows", "2"]
    monkeypatch.setattr(prepare.calibration, "wiki_text", lambda split: text.read_text())
    monkeypatch.setattr(sys, "argv", ["dbf-gguf", *map(str, arguments)])
    cli.main()
    printed = capsys.readouterr().out
    assert "held out" not in printed
    with GGUFFile(output) as file:
        assert check_format(file) == []
        assert check_work(file, WorkFolder.open(tmp_path / "plain-work")) == []
        assert file.get("dbf.bits_per_weight") == pytest.approx(2.0, abs=0.05)
    work = WorkFolder.open(tmp_path / "plain-work")
    for name in work.linears():
        with safe_open(work.path / "linears" / f"{name}.safetensors", "pt") as f:
            for scale, value in work.scales(name).items():
                assert torch.equal(value, f.get_tensor(scale).half())
    found = re.search(r"perplexity +dense ([\d.]+), compressed ([\d.]+) .* 2 windows", printed)
    perplexities = work.manifest["perplexity"]
    assert [f"{perplexities['dense']:.2f}", f"{perplexities['compressed']:.2f}"] == list(found.groups())
    assert perplexities["dense"] != perplexities["compressed"]


# --- a wanted size


def convert_here(monkeypatch, capsys, *arguments) -> str:
    """Runs `convert` in this process, quickly and without tuning; what it prints."""
    quick = "--calib-sequences 4 --seq-len 64 --iterations 3 --block-tokens 2048 --tune none --threads 1 --device cpu"
    quick += " --eval-windows 0"
    monkeypatch.setattr(sys, "argv", ["dbf-gguf", "convert", *map(str, arguments), *quick.split()])
    cli.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("embedding_type, size", [("q8_0", 50_000), ("q8_0", 64_321), ("f16", 75_000)])
def test_size_is_hit(embedding_type, size, model, text, tmp_path, monkeypatch, capsys):
    arguments = ["--calib", text, "--size", size, "--embedding-type", embedding_type]
    monkeypatch.chdir(tmp_path)
    printed = convert_here(monkeypatch, capsys, model, *arguments)
    output = tmp_path / f"tiny-dbf-{size}.gguf"
    assert abs(output.stat().st_size / size - 1) < 0.01
    assert f"for a file of {size:,} bytes" in printed
    resumed = convert_here(monkeypatch, capsys, model, *arguments, "--resume")
    assert "factorization: 8 of 8 linears done before" in resumed


@pytest.mark.parametrize(
    "size, message",
    [
        *[("10KB", "at least"), ("1GiB", "even at 6 bits a weight"), ("much", "like 1.9GiB"), ("0MB", "like 1.9GiB")],
        ("1" * 400, "like 1.9GiB"),
    ],
)
def test_sizes_that_cannot_be(size, message, model, text, tmp_path, monkeypatch, capsys):
    without_bits = OPTIONS[2:]
    output = tmp_path / "out.gguf"
    error = fails(monkeypatch, capsys, "convert", model, "--calib", text, "-o", output, *without_bits, "--size", size)
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_the_smallest_size_that_is_named_can_be_had(model, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    error = fails(monkeypatch, capsys, "convert", model, "--calib", text, *OPTIONS[2:], "--size", "1KB")
    assert "--embedding-type" in error
    smallest = int(re.search(r"at least ([\d,]+) bytes", error)[1].replace(",", ""))
    convert_here(monkeypatch, capsys, model, "--calib", text, "--size", smallest)
    assert abs((tmp_path / f"tiny-dbf-{smallest}.gguf").stat().st_size / smallest - 1) < 0.01


@pytest.mark.parametrize(
    "text, size",
    [("1.9GiB", 2040109466), ("700 MB", 700_000_000), ("2mib", 2 << 20), ("1.5kB", 1500), ("123456", 123456)],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


# --- budgets


def test_adaptive_budget(model, text, tmp_path, monkeypatch, capsys, patched_tree):
    """Measured, interrupted and gone on with; shown; used again at other bits without a measurement; refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "check_convertible", lambda folder, tree: None)  # seconds, and tested above
    arguments = [model, "--calib", text, "--bits", "3", "--budget", "adaptive", "-o"]
    printed = convert_here(monkeypatch, capsys, *arguments, "whole.gguf")
    assert re.search(r"budget: \d\.\d\d to \d\.\d\d bits a linear, \d\.\d{3} over all", printed)
    whole = WorkFolder.open(tmp_path / "whole-work")
    ks = {name: whole.scales(name)["scale_m"].numel() for name in whole.linears()}
    shapes = linear_shapes(model, "qkv,gate_up")
    stored = json.loads((whole.path / "budget.json").read_text())
    assert ks == whole.manifest["budget"] == stored["k"]
    curves = {name: tuple(map(tuple, curve)) for name, curve in stored["curves"].items()}
    assert ks == budget.adaptive_budget(shapes, 3.0, budget.weighted(curves))
    assert ks != budget.uniform_budget(shapes, 3.0)

    assert not (whole.path / "effects").exists()
    (whole.path / "budget.json").write_text("{}")
    with pytest.raises(SystemExit):
        convert_here(monkeypatch, capsys, *arguments, "whole.gguf", "--resume")
    assert "budget.json is no budget: delete it, and it is measured anew" in capsys.readouterr().err
    (whole.path / "budget.json").write_text(json.dumps(stored))
    with monkeypatch.context() as patch:  # gone on with by a version that comes to other widths
        patch.setattr(budget, "DEPTH", 3.0)
        with pytest.raises(SystemExit):
            convert_here(patch, capsys, *arguments, "whole.gguf", "--resume")
        assert "give a new --work folder" in capsys.readouterr().err
    assert WorkFolder.open(whole.path).manifest == whole.manifest

    # interrupted while it measures
    with monkeypatch.context() as patch:
        calls, factorize = [], pipeline.sensitivity.factorize

        def stop_at_fifth(*given, **more):
            calls.append(given)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return factorize(*given, **more)

        patch.setattr(pipeline.sensitivity, "factorize", stop_at_fifth)
        with pytest.raises(SystemExit):
            convert_here(patch, capsys, *arguments, "killed.gguf")
        assert "interrupted" in capsys.readouterr().err
    assert WorkFolder.open(tmp_path / "killed-work" / "effects").linears()
    assert not (tmp_path / "killed-work" / "budget.json").exists()
    convert_here(monkeypatch, capsys, *arguments, "killed.gguf", "--resume")
    with GGUFFile(tmp_path / "whole.gguf") as one, GGUFFile(tmp_path / "killed.gguf") as two:
        assert all(bytes(one.raw(name)) == bytes(two.raw(name)) for name in one.tensors)

    monkeypatch.setattr(sys, "argv", ["dbf-gguf", "inspect", "whole.gguf"])
    cli.main()
    shown = capsys.readouterr().out
    each = [budget.bits_per_weight(shapes, {name: k}) for name, k in ks.items()]
    assert f"({min(each):.3f} to {max(each):.3f}, budget adaptive)" in shown

    # used again
    def nothing_to_measure(*given, **more):
        raise AssertionError("measured again")

    monkeypatch.setattr(pipeline.sensitivity, "measure", nothing_to_measure)
    shutil.copy(whole.path / "budget.json", "mine.json")
    arguments = ["--calib", text, "--bits", "3.5", "--budget", "mine.json", "-o", "more.gguf"]
    convert_here(monkeypatch, capsys, model, *arguments)
    again = WorkFolder.open(tmp_path / "more-work").manifest["budget"]
    assert again == budget.adaptive_budget(shapes, 3.5, budget.weighted(curves))
    with GGUFFile(tmp_path / "more.gguf") as file:
        assert check_format(file) == []
        assert json.loads(file.get("dbf.settings"))["budget"].startswith("mine.json ")

    stranger = shutil.copytree(model, tmp_path / "stranger")
    weights = load_file(stranger / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, stranger / "model.safetensors", {"format": "pt"})
    arguments = ["convert", stranger, "--calib", text, "--bits", "3", "--budget", "mine.json", "-o", "x.gguf"]
    assert "another model" in fails(monkeypatch, capsys, *arguments)
    assert not (tmp_path / "x-work").exists()


# --- joined linears


def test_joined_linears_with_everything_else(model, text, tmp_path, monkeypatch, capsys):
    """As they are by default, with a size, an adaptive budget, signs trained in blocks and in the whole; another --join
    is refused afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "check_convertible", lambda folder, tree: None)  # seconds, and tested above
    more = "--budget adaptive --blocks signs --tune signs --iterations 3 --size 55000 -o joined.gguf"
    more += " --tune-tokens 4096 --threads 1"
    arguments = ["convert", model, "--calib", text, *JOINED[2:], *more.split()]
    monkeypatch.setattr(sys, "argv", ["dbf-gguf", *map(str, arguments)])
    cli.main()
    printed = capsys.readouterr().out
    assert re.search(r"blk\.0\.attn_qkv +k=", printed) and re.search(r"blk\.1\.ffn_gate_up +k=", printed)
    work = WorkFolder.open(tmp_path / "joined-work")
    shapes = linear_shapes(model, "qkv,gate_up")
    assert shapes["model.layers.0.self_attn.qkv_proj"] == (128, 64)
    assert list(shapes) == list(work.manifest["budget"])
    assert work.manifest["budget"] != budget.uniform_budget(shapes, work.manifest["settings"]["convert"]["bits"])
    with GGUFFile(tmp_path / "joined.gguf") as file:
        assert abs(file.size / 55_000 - 1) < 0.01
        assert check_format(file) == []
        assert check_work(file, work) == []
        assert json.loads(file.get("dbf.settings"))["join"] == "qkv,gate_up"
    loaded = dbf_gguf.load(work.path)
    compressed = {name for name, module in loaded.named_modules() if hasattr(module, "signs_a")}
    assert compressed == set(shapes)

    error = fails(monkeypatch, capsys, *arguments, "--resume", "--join", "qkv")
    assert "join was qkv,gate_up, now qkv" in error
    measured = ["--budget", work.path / "budget.json", "-o", "other.gguf"]
    assert "another --join" in fails(monkeypatch, capsys, *arguments, *measured, "--join", "none")


def test_help_names_every_option_in_a_group():
    from dbf_gguf.cli.convert import GROUPS, command

    grouped = [name for names in GROUPS.values() for name in names]
    declared = [p.name for p in command.params if p.name != "model"]
    assert sorted(grouped) == sorted(declared)

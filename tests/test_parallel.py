"""Two processes on the CPU (gloo) do what one does: stage by stage, the whole convert, errors, kill and resume.

    python -m pytest tests/test_parallel.py

As a program, which a launcher starts twice, this file runs the stages, or a convert that fails: its second process in
the factorization, or both at Python's own end.
"""

import atexit
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import OPTIONS, model, text  # noqa: F401, the last two are fixtures

from dbf_gguf import blocktune, cli, distill, factorize, importance, parallel, pipeline, sensitivity
from dbf_gguf.blocks import BlockModel, linears, replace
from dbf_gguf.blockwise import Streams
from dbf_gguf.checkpoint import WorkFolder
from dbf_gguf.errors import DBFError
from dbf_gguf.gguf_file import GGUFFile
from dbf_gguf.model import DBFLinear, block_linears, linear_shapes, load_dense, replace_linear
from dbf_gguf.threads import side_by_side
from dbf_gguf.verify import check_format, check_work

OPTIONS = [*OPTIONS, "--threads", "1", "--tune-tokens", "12288"]
STEPS = 12


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]  # else it starts one


def launch(*arguments, launcher=TORCHRUN) -> subprocess.Popen:
    """Two processes that run a module ("-m", name) or a file, with these arguments."""
    command = [sys.executable, "-m", *launcher, *arguments]
    paths = [str(Path(cli.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )


def converts(model, text, output, *more) -> list:  # noqa: F811
    return ["convert", model, "--calib", text, "-o", output, *OPTIONS, *more]


def ended(run: subprocess.Popen) -> str:
    printed = run.communicate(timeout=300)[0]
    assert run.returncode == 0, printed
    return printed


# --- stage by stage


def stages(folder: Path, out: Path) -> None:
    """Everything that is split, from the same start: no stage gets what one before it made slightly different.

    Products are in float32 on every CPU: where factorization rounds them to bfloat16, a sum taken in another order
    makes as many other signs as another seed does.
    """
    factorize.product_dtype = lambda device: torch.float32
    g = torch.Generator().manual_seed(0)
    windows = torch.randint(3, 288, (27, 32), generator=g)  # neither these nor the steps divide evenly
    dense = BlockModel(folder)
    tensors = importance.measure(dense, windows, out)
    found = {f"importance.{name}": value for name, value in tensors.items()}
    options = {"metric": True, "workers": 1, "seed": 0}
    curves = sensitivity.measure(dense, linear_shapes(folder), windows, tensors, out / "effects", **options)
    found["effects"] = torch.tensor([effect for _, (_, effect) in curves.values()])

    work = WorkFolder(out, {"format": 1, "settings": {}, "linears": {}})
    streams = Streams(dense, windows, work)
    block = dense.block(0)
    factors = {
        name: factorize.factorize(linear.weight.detach()[None], 64, iterations=5)[0][0]
        for name, linear in block_linears(load_dense(folder)).items()
    }
    for name in linears(0, dense.block(0)):
        if "down_proj" not in name:
            replace(0, block, name, factors[name], torch.float32)
    moments = streams.moments(0, dense.block(0), block, ["model.layers.0.mlp.down_proj"])
    found |= {f"moments.{name}": value for name, value in zip("HE", moments[:2], strict=True)}
    replace(0, block, "model.layers.0.mlp.down_proj", factors["model.layers.0.mlp.down_proj"], torch.float32)

    blocktune.STEP_TOKENS = 96
    streams.advance(0, streams.dense, dense.block(0))
    with side_by_side(1) as pool:
        options = {"lr": 1e-3, "sign_lr": 0.1, "seed": 0}
        values, *errors = blocktune.tune(dense, 0, block, streams, torch.ones(64), pool, **options)
    found |= {f"block.{name}": value for name, value in values.items()} | {"block errors": torch.tensor(errors)}
    found |= {f"block signs.{n}": m.signs_a.clone() for n, m in block.named_modules() if isinstance(m, DBFLinear)}

    student, kl = load_dense(folder), []
    for name, each in factors.items():
        replace_linear(student, name, each, torch.float32)
    distill.SIGN_CHANCE, distill.STEP_TOKENS = 0.5, 96
    tuned = distill.distill(
        student,
        load_dense(folder),
        windows,
        work,
        lr=3e-3,
        sign_lr=0.1,
        seed=0,
        tokens=96 * STEPS,
        report=lambda p: kl.append([p.kl, p.best]),
    )
    found |= {f"tuned.{name}": value for name, value in tuned.items() if ".signs_" not in name}
    found["tuning kl"] = torch.tensor(kl)
    digest = hashlib.sha256(b"".join(found[name].detach().numpy().tobytes() for name in sorted(found))).hexdigest()
    assert len(set(parallel.gather(digest))) == 1, "the processes came to different results"
    if parallel.is_main():
        save_file({name: value.contiguous() for name, value in found.items()}, out / "found.safetensors")


def test_stages(model, tmp_path, one_thread, monkeypatch):  # noqa: F811
    """All of both processes is the same, and within 1e-4 of what one process comes to.

    1e-3 of its signs may differ, and the effects of single linears by 2 %.
    """
    steps = ((blocktune, "STEP_TOKENS"), (distill, "STEP_TOKENS"), (distill, "SIGN_CHANCE"))
    for module, name in (*steps, (factorize, "product_dtype")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back at the end
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    run = launch(__file__, "stages", model, two)
    stages(model, one)
    ended(run)
    expected, found = (load_file(folder / "found.safetensors") for folder in (one, two))
    assert found.keys() == expected.keys()
    assert len(found["tuning kl"]) == STEPS + 1 and found["tuning kl"][-1, 0] < found["tuning kl"][0, 0]
    for name, value in expected.items():
        value, other = value.float(), found[name].float()
        if name.startswith("block signs"):
            assert (value != other).float().mean() <= 1e-3, name
        elif name == "effects":  # of factors with a few other signs
            assert torch.allclose(value, other, rtol=2e-2), name
        else:
            assert (value - other).abs().max() <= 1e-4 * value.abs().max(), name


# --- the whole way


@pytest.fixture(scope="module")
def pair(model, text, tmp_path_factory, patched_tree):  # noqa: F811
    """(output, work folder, what was printed) of one uninterrupted run of two processes."""
    output = tmp_path_factory.mktemp("pair") / "tiny.gguf"
    printed = ended(launch("-m", "dbf_gguf", *converts(model, text, output)))
    return output, output.with_name("tiny-work"), printed


def test_whole_convert(pair, model, text, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Sound, said once, and as good as that of one process.

    Importance is the same but for rounding. Factorization makes much of such a difference: what it comes to are other
    signs, as another seed would give. Their errors are within 10 %, and the whole model's held-out KL within 5 %:
    another seed moves that by 3 %, and so does rounding where products are in float32.
    """
    output, folder, printed = pair
    with GGUFFile(output) as file:
        assert check_format(file) == []
        assert check_work(file, WorkFolder.open(folder)) == []
        assert json.loads(file.get("dbf.settings"))["processes"] == 2
    assert len(re.findall(r"blk\.\d+\.\w+ +k=", printed)) == 14
    assert printed.count("importance:") == printed.count("written ") == 1

    alone = tmp_path / "tiny.gguf"
    monkeypatch.setattr(sys, "argv", ["dbf-gguf", *map(str, converts(model, text, alone))])
    threads = torch.get_num_threads()
    cli.main()
    torch.set_num_threads(threads)
    held_out = [[float(kl) for kl in re.findall(r"held out ([\d.]+)", p)] for p in (printed, capsys.readouterr().out)]
    assert len(held_out[0]) == len(held_out[1]) > 1
    assert held_out[0] == pytest.approx(held_out[1], rel=0.05)
    two, one = WorkFolder.open(folder), WorkFolder.open(alone.with_name("tiny-work"))
    assert one.linears() == two.linears()
    expected, found = (work.read_tensors("importance.safetensors") for work in (one, two))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-5), name
    for name, record in one.manifest["linears"].items():
        assert two.manifest["linears"][name]["error"] == pytest.approx(record["error"], rel=0.1), name


def test_joined_linears(model, text, tmp_path, patched_tree):  # noqa: F811
    """As by default: every group of a block is a single linear then, which the first process factorizes."""
    output = tmp_path / "tiny.gguf"
    ended(launch("-m", "dbf_gguf", *converts(model, text, output, "--join", "qkv,gate_up", "--tune", "none")))
    work = WorkFolder.open(tmp_path / "tiny-work")
    assert len(work.linears()) == 8
    with GGUFFile(output) as file:
        assert check_format(file) == []
        assert check_work(file, work) == []


def unfinished(pair, output: Path) -> None:
    """The work folder for `output` as one of the pair's that was killed between two linears of a group."""
    folder = output.with_name("tiny-work")
    shutil.copytree(pair[1], folder)
    for name in ("final.safetensors", "tuning.safetensors"):
        (folder / name).unlink()
    work = WorkFolder.open(folder)
    for name in work.linears()[-6:]:
        assert name.startswith("model.layers.1")
        del work.manifest["linears"][name]
        (folder / "linears" / f"{name}.safetensors").unlink()
    work.save()


def test_killed_and_resumed_ends_in_the_same_file(pair, model, text, tmp_path):  # noqa: F811
    output = tmp_path / "tiny.gguf"
    unfinished(pair, output)
    command = ["-m", "dbf_gguf", *converts(model, text, output, "--resume")]
    run = launch(*command)
    assert any(line.startswith("tuning 40/") for line in run.stdout)
    for process in [*psutil.Process(run.pid).children(recursive=True), psutil.Process(run.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    run.communicate()
    assert not output.exists()
    assert "14 of 14 linears done before" in ended(launch(*command))
    assert output.read_bytes() == pair[0].read_bytes()


def test_launched_by_accelerate(pair, model, text, tmp_path):  # noqa: F811
    """Two processes that know of each other, and go on where torchrun's have been."""
    output = tmp_path / "tiny.gguf"
    unfinished(pair, output)
    run = launch("-m", "dbf_gguf", *converts(model, text, output, "--resume"), launcher=ACCELERATE)
    assert re.search(r"^processes +2$", ended(run), re.M)
    assert output.read_bytes() == pair[0].read_bytes()


def test_another_number_of_processes_is_refused(pair, model, text, tmp_path, monkeypatch, capsys):  # noqa: F811
    unfinished(pair, tmp_path / "tiny.gguf")
    arguments = converts(model, text, tmp_path / "tiny.gguf", "--resume")
    monkeypatch.setattr(sys, "argv", ["dbf-gguf", *map(str, arguments)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "processes was 2, now 1" in capsys.readouterr().err


# --- errors


def fails(run: subprocess.Popen) -> str:
    """The one line that both processes together have said."""
    printed = run.communicate(timeout=300)[0]
    assert run.returncode != 0
    said = [line for line in printed.splitlines() if line.startswith("dbf-gguf:")]
    assert len(said) == 1, printed
    assert printed.count("Traceback") <= 1, printed  # the launcher's own
    return said[0]


def test_an_error_of_the_second_ends_both_with_one_line(pair, model, text, tmp_path):  # noqa: F811
    unfinished(pair, tmp_path / "tiny.gguf")
    arguments = converts(model, text, tmp_path / "tiny.gguf", "--resume")
    assert fails(launch(__file__, "fail", *arguments)).endswith("a fault of the test")
    assert not (tmp_path / "tiny.gguf").exists()


def test_none_ends_with_pythons_own_end(pair, model, text, tmp_path):  # noqa: F811
    """There they may abort for want of the interpreter: one did so, while the other made the file."""
    output = tmp_path / "tiny.gguf"
    shutil.copytree(pair[1], tmp_path / "tiny-work")
    assert "written " in ended(launch(__file__, "abort", *converts(model, text, output, "--resume")))
    assert output.read_bytes() == pair[0].read_bytes()


def test_an_error_of_both_is_one_line(model, text, tmp_path):  # noqa: F811
    arguments = converts(model, text, tmp_path / "tiny.gguf", "--device", "abacus")
    assert "torch finds no device abacus" in fails(launch("-m", "dbf_gguf", *arguments))


def test_more_processes_than_windows(model, text, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(parallel, "count", lambda: 5)
    monkeypatch.setattr(sys, "argv", ["dbf-gguf", *map(str, converts(model, text, tmp_path / "tiny.gguf"))])
    with pytest.raises(SystemExit):
        cli.main()
    assert "5 processes cannot share 4 windows of text" in capsys.readouterr().err


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(parallel, "_count", 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert parallel.own_device("cuda") == "cuda:1"
    assert parallel.own_device("cpu") == "cpu"
    with pytest.raises(DBFError, match="leave it out"):
        parallel.own_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(DBFError, match="start one for each"):
        parallel.own_device("cuda")


def test_several_machines_are_refused(monkeypatch):
    values = {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "x", "MASTER_PORT": 1}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(DBFError, match="on several machines"), parallel.together():
        pass


def fault(*_, **__):
    raise ValueError("a fault of the test")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "stages":
        with parallel.together():
            stages(*map(Path, sys.argv[2:]))
            parallel.leave()
    else:
        if sys.argv[1] == "abort":
            atexit.register(os.abort)
        elif os.environ["RANK"] == "1":
            pipeline.factorize = fault
        del sys.argv[1]
        cli.main()

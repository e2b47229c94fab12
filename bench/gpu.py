"""What an NVIDIA card makes of DBF, in one command: is it right, and how fast is it?

    dbf-gguf build --cuda
    python bench/gpu.py
    python bench/gpu.py --model mine.gguf --parts checks decode

Checks come first, and a failed one ends the run: what is wrong need not be fast.
- ops: test-backend-ops compares the fused op on the card with the CPU's.
- logits: next-token distributions of a model on the card against those on the CPU, as mean Kullback-Leibler divergence.

Then it measures
- matvec: one linear at a time in the shapes and bits of the paper's Table 3, DBF beside cuBLAS in fp16 and types of
  llama.cpp: median µs in a CUDA graph over more weights than the L2 cache holds, and which share of the card's measured
  bandwidth that is. The program is llama-dbf-matvec, whose source says how.
- decode: tokens a second over 128 tokens from an empty prompt, batch 1, as in Table 4, and prefill of 512 tokens, by
  llama-bench. The models are random weights in the shapes of Llama-2-7B and Llama-3-8B (bench/synthetic.py), written
  one after the other and deleted again, unless --model names files.

It prints tables beside the paper's figures, which come from an RTX 4090, and what docs/gpu-model.md predicts for the
card if it knows it. All figures go into gpu.json, the picture into gpu.png. Status 1 when a check or a program fails,
2 when there is no CUDA device or no build for it.
"""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import gpu_model
import synthetic
from commands import StepFailed, heading, run
from gpu_model import PAPER_BITS, PAPER_DECODE, PAPER_MATVEC, PAPER_SHAPES, markdown, shape_name, width
from quality import parse_figures

from dbf_gguf.errors import DBFError
from dbf_gguf.gguf_file import GGUFFile
from dbf_gguf.llama_cpp import bin_dir, patch_key, tool

PARTS = ("checks", "matvec", "decode")
MATVEC_TYPES = ("cublas", "f16", "q2_k", "iq2_xxs", "iq1_s", "q1_0")
DECODE_TYPES = ("F16", "Q2_K", "IQ2_XXS", "IQ1_S", "Q1_0")
PAPER_NAMES = {"llama2-7b": "Llama-2-7B", "llama3-8b": "Llama-3-8B"}
KLD_BOUND = 1e-3  # nats a token, mean: the card's logits against the CPU's
CHECK_SHAPE, CHECK_BITS = replace(synthetic.SHAPES["llama2-7b"], n_layer=2), 2.0
OPS = ("-o", "DBF_MUL_MAT")
TEXT = Path(__file__).resolve().parent.parent / "README.md"  # any text does
OUT_OF_MEMORY = re.compile(r"out of memory|failed to allocate|unable to allocate", re.IGNORECASE)


class NoDevice(DBFError):
    """Nothing to measure here."""


@dataclass(frozen=True)
class Device:
    name: str  # ggml's, "CUDA0"
    description: str
    gpu: bool
    memory: int  # bytes

    @property
    def offload(self) -> list[str]:
        """Options that make a program of llama.cpp compute on it, and on nothing else."""
        return ["-ngl", "99", "-dev", self.name] if self.gpu else ["-ngl", "0", "-dev", "none"]


@dataclass(frozen=True)
class Settings:
    parts: tuple[str, ...] = PARTS
    shapes: tuple[tuple[int, int], ...] = PAPER_SHAPES  # n_in, n_out
    bits: tuple[float, ...] = PAPER_BITS
    matvec_types: tuple[str, ...] = MATVEC_TYPES
    tokens: tuple[int, ...] = (1,)
    rotate_mib: int = 512
    reps: int = 30
    files: tuple[Path, ...] = ()  # models to decode instead of synthetic ones
    models: tuple[synthetic.Shape, ...] = tuple(synthetic.SHAPES[name] for name in PAPER_DECODE)
    decode_types: tuple[str, ...] = DECODE_TYPES
    joins: tuple[bool, ...] = (False, True)  # DBF linears as with convert --join none, and as it joins them
    n_prompt: int = 512
    n_gen: int = 128
    check: synthetic.Shape = CHECK_SHAPE
    chunks: int = 4  # windows of 512 tokens whose logits are compared
    n_ctx: int = 512
    threads: int = 0  # CPU threads; 0 is what each program takes


@dataclass
class Result:
    """All that goes into gpu.json."""

    device: dict
    patch: str
    time: str
    settings: dict
    checks: dict = field(default_factory=dict)
    bandwidth: dict = field(default_factory=dict)  # "read" and "copy", GB/s
    matvec: list[dict] = field(default_factory=list)
    decode: list[dict] = field(default_factory=list)

    @property
    def best_bandwidth(self) -> float | None:
        """GB/s: what the card's own plain kernels reach, whichever is faster."""
        return max(self.bandwidth.values(), default=None)


# --- what the programs say


def json_lines(output: str) -> list[dict]:
    """The lines of an output that are JSON objects; programs mix them with their log."""
    found = []
    for line in output.splitlines():
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except ValueError:
                raise StepFailed(f"this line is no JSON: {line[:100]}") from None
    return found


def parse_devices(output: str) -> list[Device]:
    return [
        Device(line["device"], line["description"], line["gpu"], line["memory"])
        for line in json_lines(output)
        if "device" in line
    ]


def parse_ops(output: str) -> dict[str, int]:
    """{"passed", "failed", "unsupported"} of test-backend-ops. Raises StepFailed when it tested nothing: asked for a
    backend that is not there it ends with success."""
    text = re.sub(r"\x1b\[[\d;]*m", "", output)
    found = re.search(r"(\d+)/(\d+) tests passed", text)
    unsupported = len(re.findall(r"not supported", text))
    if not found or not int(found[2]):
        raise StepFailed(f"test-backend-ops compared nothing ({unsupported} cases not supported)")
    return {"passed": int(found[1]), "failed": int(found[2]) - int(found[1]), "unsupported": unsupported}


def parse_bench(output: str) -> dict[str, float]:
    """Tokens a second out of llama-bench's JSON lines: {"tg", "tg_error", "pp", "pp_error"}."""
    result = {}
    for line in json_lines(output):
        name = "tg" if line["n_gen"] else "pp"
        result |= {name: line["avg_ts"], f"{name}_error": line["stddev_ts"]}
    if set(result) != {"tg", "tg_error", "pp", "pp_error"}:
        raise StepFailed("llama-bench gave no figures")
    return result


def parse_matvec(output: str) -> tuple[dict[str, float], list[dict]]:
    """(bandwidth in GB/s by kind, the cases in order) of llama-dbf-matvec."""
    lines = json_lines(output)
    bandwidth = {line["kind"]: line["gb_per_s"] for line in lines if line.get("case") == "bandwidth"}
    return bandwidth, [line for line in lines if line.get("case") == "matvec"]


# --- the device


def devices() -> list[Device]:
    """Those that the built programs can compute on. Raises NoDevice when nothing is built."""
    if bin_dir() is None:
        raise NoDevice("llama.cpp is not built: run `dbf-gguf build --cuda` first")
    listed = subprocess.run([tool("llama-dbf-matvec"), "--list"], capture_output=True, text=True)
    if listed.returncode != 0:
        raise StepFailed(f"llama-dbf-matvec ended with status {listed.returncode}: {listed.stderr.strip()[-200:]}")
    return parse_devices(listed.stdout)


def choose_device(found: list[Device], name: str | None) -> Device:
    """The device called `name`, else the first CUDA device. Raises NoDevice."""
    cuda = [device for device in found if device.gpu and device.name.startswith("CUDA")]
    if not cuda:
        raise NoDevice("there is no CUDA device, or the build is without CUDA (`dbf-gguf build --cuda`)")
    for device in cuda:
        if name in (None, device.name):
            return device
    raise DBFError(f"there is no device {name}: there are {', '.join(device.name for device in cuda)}")


# --- checks and measurements


class Bench:
    """One run on one device; what comes out of it stands in `result`."""

    def __init__(self, settings: Settings, device: Device, out: Path):
        self.settings, self.device, self.out = settings, device, out
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DBFError(f"cannot write into {out}: {error.strerror}") from None
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        settings_json = json.loads(json.dumps(asdict(settings), default=str))
        self.result = Result(asdict(device), patch_key(), now, settings_json)
        self.threads = ["-t", settings.threads] if settings.threads else []

    def run(self) -> Result:
        for part, work in {"checks": self.checks, "matvec": self.matvec, "decode": self.decode}.items():
            if part in self.settings.parts:
                try:
                    work()
                finally:
                    self.save()
        return self.result

    def save(self) -> None:
        (self.out / "gpu.json").write_text(json.dumps(asdict(self.result), indent=1, allow_nan=False) + "\n")

    def checks(self) -> None:
        heading(f"Is it right? The op on {self.device.name} against the CPU's")
        command = [tool("test-backend-ops"), "test", "-b", self.device.name, *OPS]
        ops = parse_ops(run(command, log=self.out / "ops.log", capture=True))
        self.result.checks["ops"] = ops
        counts = f"{ops['passed']} cases agree, {ops['failed']} do not, {ops['unsupported']} are not supported"
        print(counts, flush=True)
        if ops["failed"] or ops["unsupported"]:
            raise StepFailed(f"the op is not right on {self.device.name}: see {self.out / 'ops.log'}")

        heading(f"The logits on {self.device.name} against the CPU's")
        if self.settings.files:
            for path in self.settings.files:
                self.check_logits(path)
        else:
            # F16 where DBF is not, so that this is about DBF
            options = {"bits": CHECK_BITS, "embedding_type": "F16", "output_type": "F16"}
            self.with_model("check.gguf", self.settings.check, "DBF", options, self.check_logits)

    def check_logits(self, model: Path) -> None:
        base = self.out / "logits.kld"
        command = [tool("llama-perplexity"), "-m", model, "-f", TEXT, "-c", self.settings.n_ctx, *self.threads]
        command += ["--chunks", self.settings.chunks, "--kl-divergence-base", base]
        try:
            cpu = ["-ngl", "0", "-dev", "none"]
            run([*command, *cpu], log=self.out / "logits-cpu.log", capture=True)
            log = self.out / "logits-gpu.log"
            output = run([*command, *self.device.offload, "--kl-divergence"], log=log, capture=True)
        finally:
            base.unlink(missing_ok=True)
        figures = parse_figures(output)
        self.result.checks.setdefault("logits", {})[model.name] = figures
        kld = figures["kld"]
        print(f"{model.name}: mean KLD {kld}, same likeliest token {figures['same_top']} %", flush=True)
        if kld is None or not kld < KLD_BOUND:
            raise StepFailed(f"{model.name}: mean KLD {kld} between card and CPU, {KLD_BOUND} is allowed")

    def with_model(
        self, file: str, shape: synthetic.Shape, kind: str, options: dict, use: Callable[[Path], None]
    ) -> None:
        """Writes a synthetic model, uses it and deletes it; `options` go to synthetic.write."""
        path = self.out / file
        print(f"writing {path}: random weights in the shape of {shape.name}, {shape.n_layer} layers", flush=True)
        try:
            synthetic.write(path, shape, kind, **options)
            use(path)
        finally:
            path.unlink(missing_ok=True)

    def matvec(self) -> None:
        cases, meant = [], []
        for n_in, n_out in self.settings.shapes:
            for kind in self.settings.matvec_types:
                cases += ["--case", f"{kind}:{n_in}:{n_out}"]
                meant.append((kind, n_in, n_out, None))
            for bits in self.settings.bits:
                cases += ["--case", f"dbf:{n_in}:{n_out}:{width(n_in, n_out, bits)}"]
                meant.append(("dbf", n_in, n_out, bits))
        for tokens in self.settings.tokens:
            heading(f"One linear, {tokens} token{'s' if tokens > 1 else ''}")
            command = [tool("llama-dbf-matvec"), "--backend", self.device.name, "--bandwidth", "--tokens", tokens]
            command += ["--rotate-mib", self.settings.rotate_mib, "--reps", self.settings.reps]
            command += ["--threads", self.settings.threads] if self.settings.threads else []
            log = self.out / f"matvec-{tokens}.log"
            bandwidth, found = parse_matvec(run([*command, *cases], log=log, capture=True))
            same = [(row["type"], row["n_in"], row["n_out"]) for row in found] == [case[:3] for case in meant]
            if not same or not bandwidth:
                raise StepFailed(f"llama-dbf-matvec did not measure what it was asked: see {log}")
            self.result.bandwidth = self.result.bandwidth or bandwidth
            for row, (*_, bits) in zip(found, meant, strict=True):
                row["bits"] = bits or 8 * row["bytes"] / (row["n_in"] * row["n_out"])
                self.result.matvec.append(row)

    def decode(self) -> None:
        if self.settings.files:
            for path in self.settings.files:
                heading(f"Tokens a second: {path.name}")
                self.decode_file(path, {"model": path.stem, "type": "file", "bits": None, "join": False})
            return
        wanted = [{"type": kind, "bits": None, "join": False} for kind in self.settings.decode_types]
        wanted += [{"type": "DBF", "bits": b, "join": join} for b in self.settings.bits for join in self.settings.joins]
        for shape in self.settings.models:
            for row in ({"model": shape.name} | what for what in wanted):
                heading(f"Tokens a second: {shape.name}, {decode_name(row)}")
                options = {"bits": row["bits"], "join": row["join"]}
                if row["type"] == "F16":
                    options |= {"embedding_type": "F16", "output_type": "F16"}
                need = sum(plan.nbytes for plan in synthetic.plans(shape, row["type"], **options))
                if self.device.gpu and need > 0.93 * self.device.memory:
                    row["skipped"] = f"{need / 1e9:.1f} GB, the device has {self.device.memory / 1e9:.1f}"
                    print(row["skipped"], flush=True)
                    self.result.decode.append(row)
                    continue
                decode = partial(self.decode_file, row=row)
                self.with_model("model.gguf", shape, row["type"], options, decode)

    def decode_file(self, path: Path, row: dict) -> None:
        with GGUFFile(path) as file:
            row["bytes"] = file.size
            embedding = file.tensors.get("token_embd.weight")
            tied = "output.weight" not in file.tensors
            row["read"] = file.size - file.data_start - (embedding.nbytes if embedding and not tied else 0)
        log = self.out / "bench.log"
        command = [tool("llama-bench"), "-m", path, "-p", self.settings.n_prompt, "-n", self.settings.n_gen]
        command += ["-r", 5 if self.device.gpu else 1, *self.device.offload, *self.threads, "-o", "jsonl"]
        try:
            row |= parse_bench(run(command, log=log, capture=True))
        except StepFailed as failure:
            if not OUT_OF_MEMORY.search(log.read_text(encoding="utf-8", errors="replace")):
                raise
            row["skipped"] = f"not enough memory ({failure})"
        self.result.decode.append(row)


# --- showing


def matvec_name(row: dict) -> str:
    names = {"cublas": "cuBLAS fp16", "dbf": f"DBF {row['bits']:g} bits"}
    return names.get(row["type"], row["type"].upper())


def paper_matvec(row: dict) -> float | None:
    """µs in the paper's Table 3, where it has this linear."""
    shape = (row["n_in"], row["n_out"])
    bits = {"cublas": 16, "dbf": row["bits"]}.get(row["type"])
    if row["tokens"] != 1 or shape not in PAPER_SHAPES or bits not in PAPER_MATVEC:
        return None
    return PAPER_MATVEC[bits][PAPER_SHAPES.index(shape)]


def paper_decode(row: dict) -> float | None:
    """Tokens a second in the paper's Table 4, where it has this model."""
    bits = {"F16": 16, "DBF": row["bits"]}.get(row["type"])
    return PAPER_DECODE.get(row["model"], {}).get(bits)


def predicted_matvec(card: gpu_model.Card | None, row: dict) -> str:
    if card is None or row["type"] != "dbf" or row["tokens"] != 1:
        return ""
    return f"{gpu_model.linear(card, row['n_in'], row['n_out'], row['k']):.1f}"


def matvec_table(result: Result, tokens: int = 1) -> str:
    """One row for each shape and type; the paper's figure where there is one."""
    card = gpu_model.find_card(result.device["description"])
    best = result.best_bandwidth
    cells = [["shape", "type", "bits", "µs", "× cuBLAS", "GB/s", "of bandwidth", "paper, 4090", "predicted"]]
    rows = [row for row in result.matvec if row["tokens"] == tokens]
    for row in rows:
        shape = (row["n_in"], row["n_out"])
        cells.append([shape_name(*shape), matvec_name(row), f"{row['bits']:.2f}"])
        if not row["supported"]:
            cells[-1] += ["not supported", "", "", "", "", ""]
            continue
        base = [r for r in rows if r["type"] == "cublas" and (r["n_in"], r["n_out"]) == shape and r["supported"]]
        rate = row["bytes"] / row["us"] * 1e-3
        faster = f"{base[0]['us'] / row['us']:.2f}" if base else ""
        cells[-1] += [f"{row['us']:.1f}", faster, f"{rate:.0f}", f"{rate / best:.0%}"]
        cells[-1] += [str(paper_matvec(row) or ""), predicted_matvec(card, row)]
    return markdown(cells)


def decode_name(row: dict) -> str:
    if row["type"] != "DBF":
        return row["type"]
    return f"DBF {row['bits']:g} bits" + (", joined" if row["join"] else "")


def decode_table(result: Result) -> str:
    card = gpu_model.find_card(result.device["description"])
    best = result.best_bandwidth
    head = ["model", "type", "file, GB", f"decode {result.settings['n_gen']}, tok/s", "× F16", "of bandwidth"]
    cells = [[*head, "paper, 4090", "predicted", f"prefill {result.settings['n_prompt']}, tok/s"]]
    for row in result.decode:
        cells.append([PAPER_NAMES.get(row["model"], row["model"]), decode_name(row)])
        if "skipped" in row:
            cells[-1] += [f"skipped: {row['skipped']}", *[""] * 6]
            continue
        base = [r for r in result.decode if r["model"] == row["model"] and r["type"] == "F16" and "tg" in r]
        predicted = ""
        if card and row["type"] in ("DBF", "F16") and row["model"] in synthetic.SHAPES:
            shape = synthetic.SHAPES[row["model"]]
            predicted = f"{gpu_model.tokens_a_second(card, shape, row['bits'], row['join']):.0f}"
        share = f"{row['read'] * row['tg'] * 1e-9 / best:.0%}" if best else ""
        faster = f"{row['tg'] / base[0]['tg']:.2f}" if base else ""
        cells[-1] += [f"{row['bytes'] / 1e9:.2f}", f"{row['tg']:.1f} ± {row['tg_error']:.1f}", faster, share]
        cells[-1] += [str(paper_decode(row) or ""), predicted, f"{row['pp']:.0f} ± {row['pp_error']:.0f}"]
    return markdown(cells)


def report(result: Result) -> str:
    lines = [f"{result.device['description']}, llama.cpp {result.patch}, {result.time}"]
    if result.checks:
        lines.append(f"op: {result.checks['ops']['passed']} cases agree with the CPU")
        for name, figures in result.checks["logits"].items():
            lines.append(f"logits of {name}: mean KLD to the CPU {figures['kld']:.2g}, bound {KLD_BOUND:g}")
    if result.bandwidth:
        lines.append(", ".join(f"{kind} {rate:.0f} GB/s" for kind, rate in result.bandwidth.items()) + " measured")
    for tokens in dict.fromkeys(row["tokens"] for row in result.matvec):
        note = "; the paper's fp16 is PyTorch's" if tokens == 1 else ""
        lines.append(f"\nOne linear, {tokens} token{'s' if tokens > 1 else ''}{note}\n\n{matvec_table(result, tokens)}")
    if result.decode:
        lines.append(f"\nWhole models, batch 1\n\n{decode_table(result)}")
    return "\n".join(lines)


def plot(result: Result, path: Path) -> None:
    """Matvec times for each shape above, tokens a second for each model below; the paper's figures are diamonds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def bars(panel, names: list[str], values: list[float], marks: list[float | None], title: str, label: str) -> None:
        places = range(len(names))
        panel.barh(places, values, color=["tab:red" if name.startswith("DBF") else "tab:blue" for name in names])
        found = [(mark, place) for place, mark in zip(places, marks, strict=True) if mark]
        panel.scatter([mark for mark, _ in found], [place for _, place in found], marker="D", s=24, c="black", zorder=3)
        digits = [0 if value >= 100 else 1 for value in values]
        labels = [f"{name}  {value:.{d}f}" for name, value, d in zip(names, values, digits, strict=True)]
        panel.set_yticks(places, labels, fontsize=9)
        panel.invert_yaxis()
        panel.set(title=title, xlabel=label, xlim=(0, None))
        panel.grid(axis="x", linewidth=0.3)

    rows = [row for row in result.matvec if row["supported"] and row["tokens"] == result.settings["tokens"][0]]
    shapes = list(dict.fromkeys((row["n_in"], row["n_out"]) for row in rows))
    measured = [row for row in result.decode if "tg" in row]
    models = list(dict.fromkeys(row["model"] for row in measured))
    groups = [group for group in (shapes, models) if group]
    figure = plt.figure(figsize=(4.2 * max(map(len, groups)), 4.4 * len(groups)), layout="constrained")
    figure.suptitle(f"{result.device['description']}, {result.time[:10]}; red: DBF, diamonds: the paper on an RTX 4090")
    for group, part in zip(groups, figure.subfigures(len(groups), 1, squeeze=False)[:, 0], strict=True):
        for item, panel in zip(group, part.subplots(1, len(group), squeeze=False)[0], strict=True):
            if group is shapes:
                here = [row for row in rows if (row["n_in"], row["n_out"]) == item]
                names, marks = [matvec_name(row) for row in here], [paper_matvec(row) for row in here]
                title = f"{shape_name(*item)}, tokens: {here[0]['tokens']}"
                bars(panel, names, [row["us"] for row in here], marks, title, "µs, less is better")
            else:
                here = [row for row in measured if row["model"] == item]
                names, marks = [decode_name(row) for row in here], [paper_decode(row) for row in here]
                title = PAPER_NAMES.get(item, item)
                bars(panel, names, [row["tg"] for row in here], marks, title, "tokens a second, more is better")
    figure.savefig(path, dpi=100)
    plt.close(figure)


# --- the command


def parse_shape(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)[x×](\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text} is no shape: write N_INxN_OUT, for example 4096x14336")
    n_in, n_out = int(found[1]), int(found[2])
    if n_in % 256 or not n_in or not n_out:
        raise argparse.ArgumentTypeError(f"{text}: n_in must be a multiple of 256, which the types' blocks need")
    return n_in, n_out


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    default = Settings()
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python bench/gpu.py --bits 2.0 1.5 --models llama2-7b --out gpu",
    )

    def several(group, name: str, values: list, about: str, **options) -> None:
        """An option that takes several values."""
        shown = " ".join(map(str, values))
        group.add_argument(name, nargs="+", default=values, help=f"{about} (default: {shown})", **options)

    basic = parser.add_argument_group("basic")
    several(basic, "--parts", list(PARTS), "what to do", choices=PARTS, metavar="PART")
    basic.add_argument("--device", help="which of several cards, CUDA1 for example (default: the first)")
    basic.add_argument("--out", type=Path, default=Path("gpu"), help="folder for all files (default: %(default)s)")
    several(basic, "--bits", list(PAPER_BITS), "of DBF, a weight", type=float, metavar="BITS")
    linears = parser.add_argument_group("one linear")
    shapes = [f"{n_in}x{n_out}" for n_in, n_out in PAPER_SHAPES]
    several(linears, "--shapes", shapes, "N_INxN_OUT", type=parse_shape, metavar="SHAPE")
    about = "beside DBF: ggml's names, or cublas"
    several(linears, "--types", list(MATVEC_TYPES), about, type=str.lower, metavar="TYPE")
    several(linears, "--tokens", [1], "columns of the input", type=int, metavar="N")
    linears.add_argument(
        "--rotate-mib",
        type=int,
        default=default.rotate_mib,
        help="weights of a case together, at least four times the L2 cache (default: %(default)s)",
    )
    linears.add_argument(
        "--reps", type=int, default=default.reps, help="samples, of which the median counts (default: %(default)s)"
    )
    models = parser.add_argument_group("whole models")
    several(models, "--models", list(PAPER_DECODE), "shapes of random weights, or a config.json", metavar="SHAPE")
    several(models, "--model-types", list(DECODE_TYPES), "beside DBF", type=str.upper, metavar="TYPE")
    models.add_argument("--model", type=Path, action="append", help="a GGUF file instead; may be given repeatedly")
    arguments = parser.parse_args(argv)
    arguments.shapes = [parse_shape(shape) if isinstance(shape, str) else shape for shape in arguments.shapes]
    for kind in arguments.model_types:
        if kind not in synthetic.TYPES:
            raise DBFError(f"no synthetic model of type {kind}: there are {', '.join(synthetic.TYPES)}")
    for path in arguments.model or []:
        with GGUFFile(path):
            pass
    for name in ("rotate_mib", "reps"):
        if getattr(arguments, name) < 1:
            raise DBFError(f"--{name.replace('_', '-')} must be at least 1")
    if min(arguments.tokens) < 1:
        raise DBFError("--tokens must be at least 1")
    for n_in, n_out in arguments.shapes:
        for bits in arguments.bits:
            width(n_in, n_out, bits)  # refuses what DBF cannot be
    return arguments


def measure(settings: Settings, device: Device, out: Path) -> Result:
    """The whole run on a device: gpu.json, gpu.png, and the tables on stdout."""
    result = Bench(settings, device, out).run()
    heading("Results")
    print(report(result))
    print(f"\nfigures: {out / 'gpu.json'}", end="", flush=True)
    if any(row["supported"] for row in result.matvec) or any("tg" in row for row in result.decode):
        plot(result, out / "gpu.png")
        print(f", picture: {out / 'gpu.png'}", end="")
    print(flush=True)
    return result


def main(argv: list[str]) -> int:
    try:
        arguments = parse_arguments(argv)
        device = choose_device(devices(), arguments.device)
        if importlib.util.find_spec("matplotlib") is None:
            raise DBFError("matplotlib is missing: pip install -e '.[bench]'")
        settings = Settings(
            parts=tuple(arguments.parts),
            shapes=tuple(arguments.shapes),
            bits=tuple(arguments.bits),
            matvec_types=tuple(arguments.types),
            tokens=tuple(arguments.tokens),
            rotate_mib=arguments.rotate_mib,
            reps=arguments.reps,
            files=tuple(arguments.model or ()),
            models=tuple(synthetic.find_shape(name) for name in arguments.models),
            decode_types=tuple(arguments.model_types),
        )
        measure(settings, device, arguments.out)
    except (DBFError, StepFailed) as error:
        print(f"bench/gpu.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, NoDevice) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

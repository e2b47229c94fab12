"""How fast DBF runs on this CPU, beside the types of llama.cpp.

    python bench/cpu.py                                   # Llama-2-7B's shape, 8 of its layers, 2 threads
    python bench/cpu.py tinyllama-1.1b --layers 0 --threads 8 --types Q4_0 Q2_K
    python bench/cpu.py smollm2-135m --layers 0 --bits 1.5 --types F16 Q8_0 Q4_0 --parts decode
    python bench/cpu.py --micro                           # the kernels alone

Models with random weights (bench/synthetic.py) take turns, round after round, so that what else the machine does hits
all of them alike: decode of some tokens from an empty prompt, the same on one thread, and prefill, by llama-bench.
Every round also measures how fast the memory can be read. Tables show the medians over the rounds, DBF's ratio to each
type, and the share of the roof: bytes that a token reads, times tokens a second, by that bandwidth. Then come the bars
that the project has set itself. All figures go into cpu.json, the picture into cpu.png.

--micro compiles the kernels for each instruction set that this CPU has and prints giga sign-weights a second, one
thread, from the cache and from memory for one token, and times tokens for a block of them.

Status 1 when a bar is missed or a program fails. On a busy machine threads wait for each other: look at the load first.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import synthetic
from commands import StepFailed, heading
from gpu import json_lines
from gpu_model import markdown

from dbf_gguf import llama_cpp, machine
from dbf_gguf.errors import DBFError
from dbf_gguf.gguf_file import GGUFFile

TYPES = ("Q4_0", "Q2_K", "TQ2_0", "TQ1_0", "IQ2_XXS", "IQ1_S", "Q1_0")
BITS = (1.0, 1.5, 2.0)
PARTS = ("decode", "decode, 1 thread", "prefill")
FASTEST = "the fastest type"

# part, model, what it is divided by (a type, FASTEST or the roof), at least
BARS = (
    ("decode", "DBF 1.5", FASTEST, 1.2),
    ("decode", "DBF 1.5", "IQ1_S", 4.0),
    ("decode", "DBF 1.0", "Q1_0", 3.0),
    *(("decode", f"DBF {bits}", "roof", 0.75) for bits in BITS),
    ("prefill", "DBF 1.5", "Q4_0", 1.0),
    ("decode, 1 thread", "DBF 1.5", FASTEST, 1.6),
)
WIDE = "avx512bw"  # with AVX-512 the first bar is higher
WIDE_FASTEST = 1.8


@dataclass(frozen=True)
class InstructionSet:
    flags: tuple[str, ...]
    needs: tuple[str, ...]  # flags in /proc/cpuinfo


AVX2 = ("-mavx2", "-mfma", "-mf16c")
INSTRUCTION_SETS = {
    "generic": InstructionSet((), ()),
    "avx2": InstructionSet(AVX2, ("avx2", "fma", "f16c")),
    "avx512": InstructionSet(
        (*AVX2, "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vbmi", "-mavx512vnni"),
        ("avx512bw", "avx512dq", "avx512vl", "avx512vbmi", "avx512_vnni"),
    ),
}
N_IN, K, N_OUT = 4096, 3072, 4096  # --micro: 1.5 bits
LAYOUTS = ("tiles", "rows")  # of the signs in memory: as the loader puts them for some kernels, and as in the file
NO_TILES = 2  # status of the program for kernels that take rows
MICRO = {"one token, from cache": (1, 1), "one token, from memory": (1, 256), "512 tokens": (512, 1)}  # tokens, MiB


@dataclass(frozen=True)
class Settings:
    shape: synthetic.Shape
    bits: tuple[float, ...] = BITS
    types: tuple[str, ...] = TYPES
    parts: tuple[str, ...] = PARTS
    rounds: int = 5
    threads: int = 2
    n_gen: int = 32
    n_prompt: int = 512

    @property
    def models(self) -> dict[str, tuple[str, float | None]]:
        return {f"DBF {bits}": ("DBF", bits) for bits in self.bits} | {kind: (kind, None) for kind in self.types}


# --- this CPU


def cpu_flags() -> set[str]:
    cpuinfo = Path("/proc/cpuinfo")
    return set(re.findall(r"\w+", cpuinfo.read_text())) if cpuinfo.exists() else set()


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def available(name: str) -> bool:
    """Whether this CPU has an instruction set."""
    needs = INSTRUCTION_SETS[name].needs
    return not needs or (platform.machine() == "x86_64" and cpu_flags().issuperset(needs))


def compile_kernels(flags: tuple[str, ...], tree: Path, libraries: Path, program: Path) -> None:
    """Compiles the CPU kernels of a patched tree with these options, with the driver that tests and times them.

    flags      those of an InstructionSet, say
    libraries  the folder with libggml-base of that tree
    Raises StepFailed.
    """
    ggml = tree / "ggml"
    driver = Path(__file__).resolve().parent.parent / "tests" / "dbf_cpu_kernels.cpp"
    command = [*machine.compiler("CXX", "c++", "g++", "clang++"), "-std=c++17", "-O3", "-w"]
    command += [*flags, driver, ggml / "src/ggml-cpu/dbf.cpp", "-o", program]
    command += [f"-I{ggml / folder}" for folder in ("include", "src", "src/ggml-cpu")]
    command += [f"-L{libraries}", "-lggml-base", f"-Wl,-rpath,{libraries}", "-pthread"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode != 0:
        raise StepFailed(f"the kernels do not compile with {' '.join(flags)}: {done.stderr[-1000:]}")


def micro() -> list[dict]:
    """Giga sign-weights a second, one thread, of each instruction set that this CPU has."""
    libraries = llama_cpp.bin_dir()
    if libraries is None:
        raise DBFError("llama.cpp is not built: run `dbf-gguf build` first")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in filter(available, INSTRUCTION_SETS):
            program = Path(folder) / name
            compile_kernels(INSTRUCTION_SETS[name].flags, llama_cpp.source_tree(), libraries, program)
            for layout in LAYOUTS:
                row = {"instructions": name, "signs in": layout}
                for what, (tokens, mib) in MICRO.items():
                    command = list(map(str, [program, layout, N_IN, K, N_OUT, tokens, 1, mib]))
                    done = subprocess.run(command, capture_output=True, text=True)
                    if done.returncode == NO_TILES:
                        break
                    if done.returncode != 0:
                        raise StepFailed(f"the kernels for {name} ended with status {done.returncode}: {done.stderr}")
                    row[what] = float(done.stdout)
                else:
                    rows.append(row)
                    print(json.dumps(row), flush=True)
    return rows


# --- measuring


def read_bandwidth(threads: int, mib: int = 512) -> float:
    """GB/s at which so many threads read memory that no cache holds: they add up integers. The best of five."""
    parts = np.array_split(np.ones(mib << 17, np.uint64), threads)
    best = math.inf
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            assert sum(pool.map(np.add.reduce, parts)) == mib << 17
            best = min(best, time.perf_counter() - start)
    return (mib << 20) / best / 1e9


class Bench:
    """One run; `samples` are tokens a second by part and model, a value for each round."""

    def __init__(self, settings: Settings, out: Path):
        self.settings, self.out = settings, out
        self.samples = {part: {name: [] for name in settings.models} for part in settings.parts}
        self.bandwidth: list[float] = []  # GB/s, reading
        self.read: dict[str, int] = {}  # bytes of weights that a token reads
        out.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        return self.out / f"{name.replace(' ', '-').lower()}.gguf"

    def write_models(self) -> None:
        for name, (kind, bits) in self.settings.models.items():
            path = self.path(name)
            print(f"writing {path}", flush=True)
            synthetic.write(path, self.settings.shape, kind, bits, join=True)  # as convert does
            with GGUFFile(path) as file:  # all but the embeddings, of which a token reads one row
                embeddings = sum(t.nbytes for key, t in file.tensors.items() if key == "token_embd.weight")
                self.read[name] = file.size - file.data_start - embeddings

    def run(self) -> None:
        try:
            self.write_models()
            for i in range(self.settings.rounds):
                heading(f"round {i + 1} of {self.settings.rounds}, load {os.getloadavg()[0]:.1f}")
                self.bandwidth.append(read_bandwidth(self.settings.threads))
                print(f"memory is read with {self.bandwidth[-1]:.1f} GB/s", flush=True)
                for part in self.settings.parts:
                    for name in self.settings.models:
                        self.samples[part][name].append(self.rate(part, name))
                        print(f"{part:<18}{name:<10}{self.samples[part][name][-1]:9.2f} tokens/s", flush=True)
        finally:
            for name in self.settings.models:
                self.path(name).unlink(missing_ok=True)

    def rate(self, part: str, name: str) -> float:
        threads = 1 if part.endswith("1 thread") else self.settings.threads
        amount = ["-p", self.settings.n_prompt, "-n", 0] if part == "prefill" else ["-p", 0, "-n", self.settings.n_gen]
        command = [llama_cpp.tool("llama-bench"), "-m", self.path(name), *amount, "-t", threads]
        command += ["-r", 1, "-ngl", 0, "-dev", "none", "-o", "jsonl"]
        found = json_lines(self.quietly(command))
        if len(found) != 1:
            raise StepFailed(f"llama-bench gave no figure for {name}")
        return found[0]["avg_ts"]

    def quietly(self, command: list) -> str:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace")
        if done.returncode != 0:
            raise StepFailed(f"{Path(command[0]).name} ended with status {done.returncode}: {done.stderr[-500:]}")
        return done.stdout

    def result(self) -> dict:
        return {
            "cpu": cpu_name(),
            "avx512": WIDE in cpu_flags(),
            "patch": llama_cpp.patch_key(),
            "settings": asdict(self.settings),
            "bandwidth": self.bandwidth,
            "read": self.read,
            "samples": self.samples,
        }


# --- showing


def medians(result: dict, part: str) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in result["samples"][part].items()}


def roof(result: dict, name: str) -> float:
    """Tokens a second if nothing took time but reading the weights."""
    return statistics.median(result["bandwidth"]) * 1e9 / result["read"][name]


def table(result: dict, part: str) -> str:
    rates = medians(result, part)
    ours = [name for name in rates if name.startswith("DBF")]
    head = ["model", "MB a token reads", "tokens/s", "least to most"]
    cells = [head + ["share of the roof"] * (part == "decode") + [f"{name} ÷ it" for name in ours]]
    for name, rate in rates.items():
        values = result["samples"][part][name]
        row = [name, f"{result['read'][name] / 1e6:.0f}", f"{rate:.2f}", f"{min(values):.2f} to {max(values):.2f}"]
        row += [f"{rate / roof(result, name):.2f}"] * (part == "decode")
        cells.append(row + [f"{rates[our] / rate:.2f}" for our in ours])
    return markdown(cells)


def bars(result: dict) -> tuple[list[str], bool]:
    """A line for each bar whose figures were measured, and whether all of them hold."""
    lines, good = [], True
    for part, name, other, least in BARS:
        if part not in result["samples"] or name not in (rates := medians(result, part)):
            continue
        if other == FASTEST:
            types = {key: rate for key, rate in rates.items() if not key.startswith("DBF")}
            if not types:
                continue
            against = max(types, key=types.get)
            ratio, what = rates[name] / types[against], f"{FASTEST} ({against})"
            least = WIDE_FASTEST if result["avx512"] and part == "decode" else least
        elif other == "roof":
            ratio, what = rates[name] / roof(result, name), "the roof"
        elif other in rates:
            ratio, what = rates[name] / rates[other], other
        else:
            continue
        good &= ratio >= least
        holds = "holds " if ratio >= least else "MISSED"
        lines.append(f"{holds} {part}: {name} ÷ {what} {ratio:.2f}, at least {least}")
    return lines, good


def plot(result: dict, path: Path) -> None:
    """Bars of tokens a second, a panel for each part; a line across a bar of decode is the model's roof."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = list(result["samples"])
    figure, panels = plt.subplots(1, len(parts), figsize=(5.5 * len(parts), 5), squeeze=False, layout="constrained")
    for panel, part in zip(panels[0], parts, strict=True):
        rates = medians(result, part)
        colours = ["tab:red" if name.startswith("DBF") else "tab:blue" for name in rates]
        drawn = panel.barh(list(rates), list(rates.values()), color=colours)
        panel.bar_label(drawn, fmt="%.1f", padding=3)
        if part == "decode":
            for i, name in enumerate(rates):
                panel.plot([roof(result, name)] * 2, [i - 0.4, i + 0.4], color="black", label=None if i else "roof")
            panel.legend(loc="lower right")
        panel.set(title=part, xlabel="tokens a second (median)")
        panel.invert_yaxis()
        panel.margins(x=0.15)
    shape = result["settings"]["shape"]
    threads = result["settings"]["threads"]
    figure.suptitle(f"{result['cpu']}, {threads} threads; {shape['name']}, {shape['n_layer']} layers, random weights")
    figure.savefig(path, dpi=100)
    plt.close(figure)


# --- the command


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="example: python bench/cpu.py llama2-7b --layers 8 --threads 2"
    )
    parser.add_argument("model", nargs="?", default="llama2-7b", help="as for bench/synthetic.py (default: llama2-7b)")
    parser.add_argument("--micro", action="store_true", help="time the kernels of each instruction set, nothing else")
    parser.add_argument("--layers", type=int, default=8, help="blocks of the model (default: 8; 0 for all)")
    parser.add_argument("--bits", nargs="+", type=float, default=list(BITS), help="of DBF (default: 1.0 1.5 2.0)")
    others = [name for name in synthetic.TYPES if name != "DBF"]
    parser.add_argument(
        "--types", nargs="+", type=str.upper, choices=others, default=list(TYPES), help=f"default: {' '.join(TYPES)}"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every model (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--out", type=Path, default=Path("cpu"), help="folder for all files (default: cpu)")
    arguments = parser.parse_args(argv)
    if min(arguments.rounds, arguments.threads) < 1 or arguments.layers < 0:
        parser.error("--rounds and --threads must be at least 1, --layers 0 or more")
    return arguments


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    try:
        if arguments.micro:
            rows = micro()
            heading(f"giga sign-weights a second, one thread of {cpu_name()}")
            cells = [[row["instructions"], row["signs in"], *(f"{row[what]:.1f}" for what in MICRO)] for row in rows]
            print(markdown([["instructions", "signs in", *MICRO], *cells]))
            return 0
        if importlib.util.find_spec("matplotlib") is None:
            raise DBFError("matplotlib missing: pip install -e '.[bench]'")
        shape = synthetic.find_shape(arguments.model)
        shape = replace(shape, n_layer=arguments.layers or shape.n_layer)
        settings = Settings(
            shape,
            tuple(arguments.bits),
            tuple(arguments.types),
            tuple(arguments.parts),
            arguments.rounds,
            arguments.threads,
        )
        bench = Bench(settings, arguments.out)
        bench.run()
    except (DBFError, StepFailed) as error:
        print(f"bench/cpu.py: {error}", file=sys.stderr)
        return 1
    result = bench.result()
    (arguments.out / "cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, arguments.out / "cpu.png")
    for part in settings.parts:
        heading(f"{part}: {cpu_name()}, {shape.name}, {shape.n_layer} layers, {settings.rounds} rounds")
        print(table(result, part))
    print(f"\nmemory: {statistics.median(bench.bandwidth):.1f} GB/s; figures and picture: {arguments.out}")
    lines, good = bars(result)
    print("\n".join(lines), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

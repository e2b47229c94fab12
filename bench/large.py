"""Does memory stay where it is when a model gets more blocks? And what would a whole 7B cost?

    python bench/large.py FOLDER

Writes checkpoints of the shape of Llama-2-7B (hidden 4096, feed-forward 11008, 32 heads, vocabulary 32000, untied) with
2 and with 6 blocks of random weights into FOLDER (sharded safetensors in float16; 4.3 GB for both, and as much room for
their results), converts both with `--tune none --join none` in processes of their own, and says how much memory these
took and how long a linear took. Ends with status 1 when a conversion fails, when one takes more than 6 GB (10^9 bytes),
or when the two differ by more than 10 %. Linux only: memory is read from /proc.

Without joint linears, because their times are of the paper's matrices; with them gate and up, twice as high as either,
need more memory, which has not been measured.

Memory: resident set size of the process and its children together, twenty times a second, and their own high-water
marks; the pages of mapped files count. Time: the first checkpoint is converted with three times the iterations of the
second, so that the time of an iteration and what comes once (reading, the closed-form fit) can be told apart. Both are
then counted up to a whole Llama-2-7B at the default iterations.
"""

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from dbf_gguf.budget import uniform_budget
from dbf_gguf.factorize import OUTER_ITERATIONS

HIDDEN, FEED_FORWARD, HEADS, VOCABULARY = 4096, 11008, 32, 32000
WHOLE = 32  # blocks of Llama-2-7B
SHAPES = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"} | {
    "mlp.gate_proj": (FEED_FORWARD, HIDDEN),
    "mlp.up_proj": (FEED_FORWARD, HIDDEN),
    "mlp.down_proj": (HIDDEN, FEED_FORWARD),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": FEED_FORWARD,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float16",
}
LIMIT, SPREAD = 6e9, 0.10  # bytes; relative difference
SENTENCE = "the quick brown fox jumps over lazy dogs while seven wizards quietly brew magic potions "
LINE = re.compile(r"(blk\.\d+\.\w+) +k=\d+ .* ([\d.]+) s$")

# What a GPU of the RTX 4090's class is assumed to sustain: half of its 165 dense bfloat16 TFLOPS with float32
# accumulation on products, a quarter of its 83 float32 TFLOPS on Cholesky factors and inverses, 70 % of its 1 TB/s.
GPU_PRODUCTS, GPU_FLOAT32, GPU_BANDWIDTH = 80e12, 20e12, 0.7e12
PASSES = 16  # over an array [k, n] that one half step makes beside its products, read and written (factorize._Side)


def write_checkpoint(folder: Path, blocks: int) -> None:
    """A random model with `blocks` blocks, one shard each and one for the rest, with a real little tokenizer."""
    import sentencepiece

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": blocks}))
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([SENTENCE[i:] + SENTENCE[:i] for i in range(0, len(SENTENCE), 5)]),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=288,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    generator = torch.Generator().manual_seed(0)

    def matrix(*shape) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(0.02).half()

    index = {}
    for shard in range(blocks + 1):
        name = f"model-{shard + 1:05}-of-{blocks + 1:05}.safetensors"
        if shard < blocks:
            prefix = f"model.layers.{shard}."
            tensors = {f"{prefix}{linear}.weight": matrix(*shape) for linear, shape in SHAPES.items()}
            norms = [f"{prefix}{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")]
        else:
            tensors = {n: matrix(VOCABULARY, HIDDEN) for n in ("model.embed_tokens.weight", "lm_head.weight")}
            norms = ["model.norm.weight"]
        tensors |= {norm: torch.ones(HIDDEN, dtype=torch.float16) for norm in norms}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def status(pid: int) -> dict[str, int]:
    """Memory figures of a process in bytes (VmRSS, VmHWM, RssAnon …); empty when it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    return {key: int(kb) << 10 for key, kb in re.findall(r"^(Vm\w+|Rss\w+):\s+(\d+) kB", text, re.M)}


def family(pid: int) -> list[int]:
    """The process and all its descendants."""
    found = [pid]
    for process in found:
        for path in Path(f"/proc/{process}/task").glob("*/children"):
            try:
                found += map(int, path.read_text().split())
            except OSError:
                continue
    return found


class Memory(threading.Thread):
    """Watches a process tree until it ends: `peak` is the largest sum of resident sets, `anonymous` the part of it that
    belongs to no file, `stage` what had been printed last by then."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.peak, self.anonymous, self.line, self.stage = pid, 0, 0, "", ""

    def run(self) -> None:
        while figures := [f for f in map(status, family(self.pid)) if "VmRSS" in f]:
            now = max(sum(f["VmRSS"] for f in figures), *(f["VmHWM"] for f in figures), 0)
            if now > self.peak:
                self.peak, self.stage = now, self.line
                self.anonymous = sum(f["RssAnon"] for f in figures)
            time.sleep(0.05)


def convert(folder: Path, text: Path, bits: float, iterations: int, more: list[str]) -> dict:
    """Converts one checkpoint; {"peak", "anonymous", "stage", "seconds", "linears": {"blk.0.ffn_up": seconds}}.

    Linears may be factorized side by side: what each took is scaled so that all add up to the time that passed.
    """
    output, work = folder.with_suffix(".gguf"), folder.with_name(f"{folder.name}-work")
    shutil.rmtree(work, ignore_errors=True)
    command = [sys.executable, "-m", "dbf_gguf", "convert", folder, "-o", output, "--work", work, "--calib", text]
    command += ["--tune", "none", "--join", "none", "--bits", bits, "--iterations", iterations, "--device", "cpu"]
    command += ["--calib-sequences", 4, "--seq-len", 256, "--eval-windows", 2, *more]
    print("$", " ".join(map(str, command)), flush=True)
    begin = time.monotonic()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    memory = Memory(process.pid)
    memory.start()
    linears, first = {}, begin
    for line in process.stdout:
        print(f"  {line}", end="", flush=True)
        memory.line = line.strip()
        if found := LINE.match(line.strip()):
            linears[found[1]] = float(found[2])
            last = time.monotonic()
        elif line.startswith("importance:"):
            first = time.monotonic()
    memory.join()
    if process.wait() or not linears:
        sys.exit(f"the conversion of {folder} failed")
    side_by_side = sum(linears.values()) / (last - first)
    linears = {name: seconds / side_by_side for name, seconds in linears.items()}
    result = {"peak": memory.peak, "anonymous": memory.anonymous, "stage": memory.stage}
    return result | {"linears": linears, "seconds": time.monotonic() - begin}


def flops(n_out: int, n_in: int, k: int) -> tuple[float, float]:
    """Of one outer iteration (dbf_gguf/factorize.py), two half steps: (of products, of the k × k systems).

    A half step that moves [k, n] against [k, d]: Gram matrix 2k²d, right-hand side 2kdn, times the inverse 2k²n;
    Cholesky factor and inverse k³.
    """
    return 4 * k * n_out * n_in + 4 * k * k * (n_out + n_in), 2.0 * k**3


def gpu_seconds(n_out: int, n_in: int, k: int) -> float:
    """Predicted for one outer iteration: products, systems and passes over the arrays one after the other."""
    products, systems = flops(n_out, n_in, k)
    return products / GPU_PRODUCTS + systems / GPU_FLOAT32 + PASSES * 2 * k * (n_out + n_in) / GPU_BANDWIDTH


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, nargs=2, default=[2, 6], metavar="N")
    parser.add_argument("--bits", type=float, default=1.5)
    parser.add_argument("--iterations", type=int, default=3, help="of the second conversion; the first does 3 times it")
    parser.add_argument("--keep", action="store_true", help="keep the files")
    arguments, more = parser.parse_known_args()  # the rest goes to `dbf-gguf convert`
    if arguments.iterations < 3:  # before the first conversion has taken its time
        parser.error("--iterations must be at least 3, the least that convert takes")

    text = arguments.folder / "text.txt"
    results = []
    for blocks, iterations in zip(arguments.blocks, (3 * arguments.iterations, arguments.iterations), strict=True):
        folder = arguments.folder / f"{blocks}-blocks"
        write_checkpoint(folder, blocks)
        text.write_text("".join(random.Random(0).choices(SENTENCE.split(" "), k=4000)))
        results.append(convert(folder, text, arguments.bits, iterations, more))
        if not arguments.keep:
            for path in (folder, folder.with_name(f"{folder.name}-work")):
                shutil.rmtree(path)
            folder.with_suffix(".gguf").unlink()

    print(f"\n{'blocks':>6}  {'peak, GB':>8}  {'anonymous':>9}  {'minutes':>7}  at the peak, after the line")
    for blocks, r in zip(arguments.blocks, results, strict=True):
        line = f"{r['peak'] / 1e9:8.2f}  {r['anonymous'] / 1e9:9.2f}  {r['seconds'] / 60:7.1f}  {r['stage']}"
        print(f"{blocks:6}  {line}")

    budget = uniform_budget({f"model.layers.0.{n}": shape for n, shape in SHAPES.items()}, arguments.bits)
    print(f"\na whole model: {WHOLE} blocks, {arguments.bits} bits, {OUTER_ITERATIONS} iterations; seconds of a linear")
    print(f"{'shape':>13}  {'k':>5}  {'TFLOP':>6}  {'once':>6}  {'iteration':>9}  {'here':>7}  GPU (predicted)")
    total, predicted = 0.0, 0.0
    for shape in dict.fromkeys(SHAPES.values()):
        names = [name for name, s in SHAPES.items() if s == shape]
        k = budget[f"model.layers.0.{names[0]}"]
        many, few = (mean_seconds(r["linears"], shape) for r in results)
        iteration = (many - few) / (2 * arguments.iterations)
        once = few - arguments.iterations * iteration
        here, gpu = once + OUTER_ITERATIONS * iteration, OUTER_ITERATIONS * gpu_seconds(*shape, k)
        total += WHOLE * len(names) * here
        predicted += WHOLE * len(names) * gpu
        row = f"{sum(flops(*shape, k)) / 1e12:6.2f}  {once:6.1f}  {iteration:9.2f}  {here:7.0f}  {gpu:7.1f}"
        print(f"{shape[0]:>6}x{shape[1]:<6}  {k:5}  {row}   x {WHOLE * len(names)}")
    print(f"all linears: {total / 3600:.1f} h here; predicted {predicted / 60:.0f} min on a GPU of a 4090's class")

    peaks = [r["peak"] for r in results]
    good = max(peaks) <= LIMIT and max(peaks) <= (1 + SPREAD) * min(peaks)
    print(f"{'within' if good else 'NOT within'} {LIMIT / 1e9:.0f} GB and {SPREAD:.0%} of each other")
    return 0 if good else 1


def mean_seconds(linears: dict[str, float], shape: tuple[int, int]) -> float:
    """Of the linears of a shape."""
    kind = {(HIDDEN, HIDDEN): "attn_", (FEED_FORWARD, HIDDEN): "ffn_gate ffn_up", (HIDDEN, FEED_FORWARD): "ffn_down"}
    found = [s for name, s in linears.items() if any(part in name for part in kind[shape].split())]
    return sum(found) / len(found)


if __name__ == "__main__":
    sys.exit(main())

"""Does memory stay where it is when a model gets more blocks? And what would a whole 7B cost?

    python bench/large.py FOLDER
    python bench/large.py --linears cuda    # the second question alone, on any device, in a minute

Writes checkpoints of the shape of Llama-2-7B (hidden 4096, feed-forward 11008, 32 heads, vocabulary 32000, untied) with
2 and with 6 blocks of random weights into FOLDER (sharded safetensors in float16; 4.3 GB for both, and as much room for
their results), converts both with `--tune none` in processes of their own, and says how much memory these took and how
long a linear took. Ends with status 1 when a conversion fails, when one takes more than 6 GB (10^9 bytes), or when the
two differ by more than 10 %. Linux only: memory is read from /proc. Options that it does not know go to `convert`:
--block-tokens 2048 where time matters, --join none for the matrices of the paper. The result of a conversion is kept in
FOLDER, so an interrupted run repeats no more than one.

Little text goes through the blocks (4000 words; of more text what exceeds `blockwise.MEMORY_BYTES` is kept in a file),
and all linears get the same bits (`--budget adaptive` would first measure their effects).

Memory: resident set size of the process and its children together, twenty times a second, and their own high-water
marks; the pages of mapped files count. Time: the first checkpoint is converted with twice the iterations of the second,
so that the time of an iteration and what comes once (reading, eigenvectors, the closed-form fit) can be told apart.
Both are then counted up to a whole Llama-2-7B at the default iterations and to the effects' fewer; importance, passages
of text and the tuning by their arithmetic, in the amounts of the recipe, at the rate that the iterations had on the
average. What a GPU would take is predicted, see GPU_PRODUCTS. With
--linears one random weight of each shape is factorized twice, with few and with more iterations, and nothing else done.
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

from dbf_gguf import recipes, sensitivity
from dbf_gguf.budget import uniform_budget
from dbf_gguf.factorize import OUTER_ITERATIONS, InputMoment, factorize, few_equations
from dbf_gguf.join import JOINS
from dbf_gguf.pipeline import gguf_name

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

JOINED = ("attn_qkv", "attn_output", "ffn_gate_up", "ffn_down")
WARM_UP, TIMED = 3, (6, 18)  # iterations, with --linears
INPUTS = 2048  # random ones, whose moment is the metric

# What a GPU of the RTX 4090's class is assumed to sustain: half of its 165 dense bfloat16 TFLOPS with float32
# accumulation on products, a quarter of its 83 float32 TFLOPS on Cholesky factors, inverses and float32 products,
# 1 TFLOPS on eigenvectors, whose first half is bound by memory, 70 % of its 1 TB/s.
GPU_PRODUCTS, GPU_FLOAT32, GPU_EIGEN, GPU_BANDWIDTH = 80e12, 20e12, 1e12, 0.7e12
# over arrays [k, n_out] and [k, n_in] that an iteration makes beside its products, read and written (factorize.py)
PASSES_OUT, PASSES_IN = 19, 107
TUNING = 11  # FLOP a weight and token at 1.5 bits: dense model 2; factors forward 3, the same anew, and backward 3


def kinds() -> dict[str, tuple[int, int]]:
    """Shapes by the names that `convert` prints: "ffn_up" and so on, and the joint linears."""
    found = {gguf_name(f"model.layers.0.{linear}").rpartition(".")[2]: shape for linear, shape in SHAPES.items()}
    for join in JOINS.values():
        parts = [found[base] for base in join.bases]
        found[join.base] = (sum(n_out for n_out, _ in parts), parts[0][1])
    return found


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


def convert(folder: Path, blocks: int, text: Path, bits: float, iterations: int, more: list[str]) -> dict:
    """Converts one checkpoint; {"peak", "anonymous", "stage", "seconds", "linears": {"blk.0.ffn_up": seconds}}.

    The result is stored beside it, and taken from there when the same is wanted again. Linears may be factorized side
    by side: what each took is scaled so that all add up to the time that passed.
    """
    output, stored = folder.with_suffix(".gguf"), folder.with_suffix(".json")
    work = folder.with_name(f"{folder.name}-work")
    command = [sys.executable, "-m", "dbf_gguf", "convert", folder, "-o", output, "--work", work, "--calib", text]
    command += ["--tune", "none", "--budget", "uniform", "--bits", bits, "--iterations", iterations, "--device", "cpu"]
    command += ["--calib-sequences", 4, "--seq-len", 256, "--eval-windows", 2, *more]
    command = list(map(str, command))
    print("$", " ".join(command), flush=True)
    if stored.exists() and (before := json.loads(stored.read_text()))["command"] == command:
        print(f"  measured before: {stored} (delete it to measure again)")
        return before["result"]
    shutil.rmtree(work, ignore_errors=True)
    write_checkpoint(folder, blocks)
    begin = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
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
    share = (last - first) / max(sum(linears.values()), 1e-3)  # it prints tenths of a second
    linears = {name: seconds * share for name, seconds in linears.items()}
    result = {"peak": memory.peak, "anonymous": memory.anonymous, "stage": memory.stage}
    result |= {"linears": linears, "seconds": time.monotonic() - begin}
    stored.write_text(json.dumps({"command": command, "result": result}, indent=1))
    return result


def flops(n_out: int, n_in: int, k: int) -> tuple[float, float]:
    """Of one outer iteration with a metric (dbf_gguf/factorize.py): (products, system of k or n_in equations).

    For A': Gram matrix, right-hand side, times the inverse, and a product more when the smaller system is solved;
    Cholesky factor and inverse n³ for n equations. For B': Gram matrix, right-hand side, two changes of basis, and the
    Gram matrix times what it is solved for, four times. Gram matrices are whole, as on a card; CPUs make 0.65 of them.
    """
    size = n_in if few_equations(k, n_in, n_out) else k
    to_a = 2 * k * size * n_in + 2 * k * n_in * n_out + 2 * size * size * n_out
    if size < k:
        to_a += 2 * k * n_in * n_out
    to_b = 2 * k * k * n_out + 2 * k * n_out * n_in + 4 * k * n_in**2 + 8 * k * k * n_in
    return to_a + to_b, float(size**3)


def gpu_seconds(n_out: int, n_in: int, k: int) -> tuple[float, float]:
    """Predicted (once, for one outer iteration): products, systems and passes over the arrays one after the other.

    Once: eigenvectors of the metric, some 10 n³; V H Q; the system of the correction and of the last fit; their images.
    """
    products, systems = flops(n_out, n_in, k)
    passes = 2 * k * (PASSES_OUT * n_out + PASSES_IN * n_in)
    once = 10 * n_in**3 / GPU_EIGEN + (10 * n_out * n_in**2 + n_in**3 + 4 * k * n_out * n_in) / GPU_FLOAT32
    return once, products / GPU_PRODUCTS + systems / GPU_FLOAT32 + passes / GPU_BANDWIDTH


def passages(recipe: recipes.Recipe, linears: int) -> dict[str, tuple[int, float]]:
    """What is done beside factorizations, of a model with `linears` linears: (tokens of text, FLOP over all of it).

    Importance (dbf_gguf/importance.py): a block forward, the same anew, gradients of its inputs.
    Effects (dbf_gguf/sensitivity.py): the dense stream with H of each group's inputs; from each changed linear a few
    tokens through the blocks behind it, on the average half of them.
    Blocks (dbf_gguf/blockwise.py): to the inputs of the four groups, and to the block's end, the dense stream passes
    every linear once, the compressed one q, k, v, gate and up twice and the other two once. H and C of each group, R of
    two.
    """
    weights = sum(n_out * n_in for n_out, n_in in SHAPES.values())  # of a block
    moment = 2 * (3 * HIDDEN**2 + FEED_FORWARD**2)
    calibration, tuning = recipe.calib_sequences * recipe.seq_len, recipe.tune["tune_tokens"]
    of_effects = calibration * (2 * weights + moment) + linears * sensitivity.TOKENS * weights
    streams = 2 * ((4 + 7) * HIDDEN**2 + (3 + 5) * HIDDEN * FEED_FORWARD)
    of_blocks = recipe.block_tokens * (streams + 2 * moment + 2 * HIDDEN * (HIDDEN + FEED_FORWARD))
    return {
        "importance": (calibration, WHOLE * calibration * 6 * weights),
        "effects, passages": (calibration, WHOLE * of_effects),
        "blocks, passages": (recipe.block_tokens, WHOLE * of_blocks),
        "tuning": (tuning, WHOLE * tuning * TUNING * weights),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--linears", choices=("cpu", "cuda"), help="only time the factorizations, on this device")
    parser.add_argument("--blocks", type=int, nargs=2, default=[2, 6], metavar="N")
    parser.add_argument("--bits", type=float, default=1.5)
    parser.add_argument("--iterations", type=int, default=3, help="of the second conversion; the first has twice these")
    parser.add_argument("--keep", action="store_true", help="keep the files")
    arguments, more = parser.parse_known_args()  # the rest goes to `dbf-gguf convert`
    if arguments.iterations < 3:  # before the first conversion has taken its time
        parser.error("--iterations must be at least 3, the least that convert takes")
    if arguments.linears == "cuda" and not torch.cuda.is_available():
        parser.error("--linears cuda: there is no CUDA device, or torch is built without CUDA")
    if arguments.linears:
        time_linears(arguments.linears, arguments.bits)
        return 0
    if arguments.folder is None:
        parser.error("give a FOLDER for the checkpoints, or --linears cpu or cuda")

    recipe = recipes.load("llama2-7b")
    text = arguments.folder / "text.txt"
    arguments.folder.mkdir(parents=True, exist_ok=True)
    text.write_text(" ".join(random.Random(0).choices(SENTENCE.split(" "), k=4000)))
    results = []
    for blocks, iterations in zip(arguments.blocks, (2 * arguments.iterations, arguments.iterations), strict=True):
        folder = arguments.folder / f"{blocks}-blocks"
        results.append(convert(folder, blocks, text, arguments.bits, iterations, more))
        if not arguments.keep:
            for path in (folder, folder.with_name(f"{folder.name}-work")):
                shutil.rmtree(path, ignore_errors=True)
            folder.with_suffix(".gguf").unlink(missing_ok=True)

    print(f"\n{'blocks':>6}  {'peak, GB':>8}  {'anonymous':>9}  {'minutes':>7}  at the peak, after the line")
    for blocks, r in zip(arguments.blocks, results, strict=True):
        line = f"{r['peak'] / 1e9:8.2f}  {r['anonymous'] / 1e9:9.2f}  {r['seconds'] / 60:7.1f}  {r['stage']}"
        print(f"{blocks:6}  {line}")

    met = {name.rpartition(".")[2] for r in results for name in r["linears"]}
    shapes = {kind: shape for kind, shape in kinds().items() if kind in met}
    budget = uniform_budget(shapes, arguments.bits)
    print(f"\na whole model: {WHOLE} blocks, {arguments.bits} bits, {OUTER_ITERATIONS} iterations; seconds of a linear")
    print(f"{'shape':>13}  {'k':>5}  {'TFLOP':>6}  {'once':>6}  {'iteration':>9}  {'here':>7}  GPU (predicted)")
    wider = uniform_budget(shapes, max(sensitivity.CURVE_BITS))
    total = predicted = work = spent = effects = effects_predicted = 0.0
    for shape in dict.fromkeys(shapes.values()):
        names = [name for name, s in shapes.items() if s == shape]
        k = budget[names[0]]
        many, few = (mean_seconds(r["linears"], names) for r in results)
        n = arguments.iterations
        once, iteration, here, gpu = counted_up(shape, k, (n, few), (2 * n, many))
        total += WHOLE * len(names) * here
        predicted += WHOLE * len(names) * gpu
        wide = wider[names[0]]
        longer = sum(flops(*shape, wide)) / sum(flops(*shape, k))
        effects += WHOLE * len(names) * (once + sensitivity.ITERATIONS * longer * iteration)
        gpu_once, gpu_iteration = gpu_seconds(*shape, wide)
        effects_predicted += WHOLE * len(names) * (gpu_once + sensitivity.ITERATIONS * gpu_iteration)
        work += len(names) * sum(flops(*shape, k))
        spent += len(names) * max(iteration, 1e-9)
        row = f"{sum(flops(*shape, k)) / 1e12:6.2f}  {once:6.1f}  {iteration:9.2f}  {here:7.0f}  {gpu:7.1f}"
        print(f"{shape[0]:>6}x{shape[1]:<6}  {k:5}  {row}   x {WHOLE * len(names)}")
    print(f"all linears: {total / 3600:.1f} h here; predicted {predicted / 60:.0f} min on a GPU of a 4090's class")
    print(f"effects, linears: {effects / 3600:.1f} h here; predicted {effects_predicted / 60:.0f} min")
    for stage, (tokens, flop) in passages(recipe, WHOLE * len(shapes)).items():
        hours = f"{flop / (work / spent) / 3600:.0f} h at the iterations' {work / spent / 1e9:.0f} GFLOPS"
        minutes = f"{flop / GPU_PRODUCTS / 60:.0f} min"
        print(f"{stage}, {tokens:,} tokens, {flop / 1e15:.1f} PFLOP: {hours}; predicted {minutes}")

    peaks = [r["peak"] for r in results]
    good = max(peaks) <= LIMIT and max(peaks) <= (1 + SPREAD) * min(peaks)
    print(f"{'within' if good else 'NOT within'} {LIMIT / 1e9:.0f} GB and {SPREAD:.0%} of each other")
    return 0 if good else 1


def counted_up(shape: tuple[int, int], k: int, *measured: tuple[int, float]) -> tuple[float, float, float, float]:
    """Seconds of a factorization: (once, an iteration, all of them, all of them predicted for a GPU).

    measured  (iterations, seconds), twice
    """
    (n_few, few), (n_many, many) = measured
    iteration = (many - few) / (n_many - n_few)
    once = few - n_few * iteration
    gpu_once, gpu_iteration = gpu_seconds(*shape, k)
    return once, iteration, once + OUTER_ITERATIONS * iteration, gpu_once + OUTER_ITERATIONS * gpu_iteration


def time_linears(device: str, bits: float) -> None:
    """Times a factorization of each joint linear of a block, and counts it up to a whole model."""
    shapes = {kind: shape for kind, shape in kinds().items() if kind in JOINED}
    budget = uniform_budget(shapes, bits)
    print(f"a factorization on {device}, {bits} bits, random weights, by {TIMED[0]} and {TIMED[1]} iterations; seconds")
    print(f"{'shape':>13}  {'k':>5}  {'once':>6}  {'iteration':>9}  {f'all {OUTER_ITERATIONS}':>7}  4090 (predicted)")
    block = predicted = 0.0
    for kind in JOINED:
        (n_out, n_in), k = shapes[kind], budget[kind]
        generator = torch.Generator(device).manual_seed(0)
        weight = torch.randn(1, n_out, n_in, generator=generator, device=device)
        x = torch.randn(INPUTS, n_in, generator=generator, device=device)
        x *= torch.rand(n_in, generator=generator, device=device)
        seconds = {}
        for iterations in (WARM_UP, *TIMED):
            moment = InputMoment(x.T @ x / INPUTS)
            begin = time.monotonic()
            factorize(weight, k, moment=moment, iterations=iterations)[1].item()  # waits for the device
            seconds[iterations] = time.monotonic() - begin
        once, iteration, here, gpu = counted_up((n_out, n_in), k, *((n, seconds[n]) for n in TIMED))
        block += here
        predicted += gpu
        row = f"{k:5}  {once:6.2f}  {iteration:9.4f}  {here:7.1f}  {gpu:7.1f}"
        print(f"{n_out:>6}x{n_in:<6}  {row}", flush=True)
    print(f"{WHOLE} blocks: {WHOLE * block / 60:.1f} min here, {WHOLE * predicted / 60:.0f} min predicted for a 4090")


def mean_seconds(linears: dict[str, float], kinds: list[str]) -> float:
    """Of the linears of these kinds."""
    found = [seconds for name, seconds in linears.items() if name.rpartition(".")[2] in kinds]
    return sum(found) / len(found)


if __name__ == "__main__":
    sys.exit(main())

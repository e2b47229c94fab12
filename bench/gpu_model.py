"""How fast should it be on a GPU? The performance model of docs/gpu-model.md, and the tables that it predicts.

    python bench/gpu_model.py                            # the tables
    python bench/gpu_model.py --write docs/gpu-model.md  # puts them into the document

The model is arithmetic on public specifications (CARDS), on what the kernels' machine code looks like (KERNEL), on some
figures that were measured on one H200 (CHAIN, TILE, STEP, in clocks; EARLY, MANY_AS_FEW), and on a few times that are
assumed (Card.gap and the constants below KERNEL); docs/gpu-model.md derives the formulas. Everything printed is a
prediction. bench/gpu.py shows what a card really does beside it.
"""

import argparse
import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from synthetic import SHAPES, Shape

from dbf_gguf.budget import uniform_budget

MARKS = ("<!-- predicted: begin -->", "<!-- predicted: end -->")


@dataclass(frozen=True)
class Card:
    """Public specifications, and `gap`: assumed µs from the end of a kernel to the first instruction of the next."""

    name: str
    bandwidth: float  # GB/s
    sms: int
    clock: float  # GHz, boost
    int8: int  # dense int8 multiply-adds a clock and SM, by mma.sync
    fp16: int  # dense fp16 ones with float32 accumulation, by mma.sync
    cublas: int  # and what cuBLAS can use
    l2: int  # bytes a clock from L2 to all SMs together: NVIDIA's figure for the A100, else assumed
    gap: float
    early: bool = False  # may start a kernel before the one before it has ended (sm_90 and newer)


CARDS = {
    card.name: card
    for card in (
        Card("RTX 3090", 936, 82, 1.695, 1024, 256, 256, 3072, 1.1),
        Card("RTX 4090", 1008, 128, 2.52, 1024, 256, 256, 3072, 0.9),
        Card("RTX 5090", 1792, 170, 2.407, 1024, 256, 256, 4096, 0.9, early=True),
        Card("A100", 2039, 108, 1.41, 2048, 1024, 1024, 5120, 1.3),
        Card("H100", 3352, 132, 1.83, 2540, 1270, 2048, 5120, 1.1, early=True),  # mma.sync: 62 % of wgmma
        Card("H200", 4800, 132, 1.83, 2540, 1270, 2048, 5120, 1.1, early=True),
    )
}


@dataclass(frozen=True)
class Kernel:
    """Of the decode kernel, what its machine code and launch parameters say (tests/cuda/sass.py, dbf-launch.h)."""

    instructions: float = 24.0  # a thread's, for 32 signs: the most that the tests allow
    signs_an_mma: int = 512  # one m16n8k32 multiplies 16 rows of 32 signs by both planes
    quantize: float = 20.0  # a thread's instructions for one input value, two passes
    rows: int = 16  # of a tile, which a block takes at a time
    step: int = 512  # signs of a row that a warp takes at a time
    ahead: int = 2  # steps whose signs are on their way while a warp computes

    def warps(self, n: int) -> int:
        """Of a block, which share the n inputs."""
        return 16 if math.ceil(n / self.step) >= 16 else 8

    def blocks(self, n: int) -> int:
        """That an SM can hold; every one of them quantizes all inputs."""
        return 1 if self.warps(n) == 16 else 2


KERNEL = Kernel()


@dataclass(frozen=True)
class Gemm:
    """A kind of block of the kernel for several tokens (two planes), by the same sources."""

    tiles: int  # of columns, 4 tokens each
    rows: int
    blocks: int  # that an SM can hold
    ahead: int  # steps whose signs are on their way while a warp computes
    instructions: float  # a thread's, for 32 signs: the most that the tests allow
    tokens: int = 4  # of a tile
    warps: int = 4
    warp_rows: int = 32  # that a warp multiplies in a step

    @property
    def divides(self) -> bool:
        """The warps divide the steps; else each of them has its rows and takes all steps."""
        return self.rows == self.warp_rows


FEW = {1: Gemm(1, 32, 4, 2, 22.0), 2: Gemm(2, 32, 4, 2, 26.0)}
MANY = Gemm(8, 128, 2, 1, 50.0)
MANY_AS_FEW = 13  # a block of many columns takes as long as so many of two tiles (DBF_GEMM_MANY_AS_FEW)
FEW_TOKENS = (1, 4, 8, 16, 32, 48, 64, 128)  # of the table

EFFICIENCY = 0.92  # of the specified bandwidth, which a long stream of loads reaches
LATENCY = 0.7  # µs until the first bytes arrive
TAIL = 0.2  # µs: the warps' sums are added and written
EARLY = 0.3  # µs that are left of the gap where launches overlap
CHAIN = 2560  # clocks that a launch takes however few signs there are: input and scales come, maximum, rounding, sums
TILE = 1390  # clocks from a tile of a block to its next: sums, barrier
STEP = 1060  # clocks of a warp for a step of 16 rows
SMALL = 0.6  # µs that a small kernel (norm, rope ...) runs
OTHERS = 10  # launches of a block beside the linears: 2 norms, 2 rope, V into the cache, 2 attention, 2 adds, SwiGLU
FUSED = 2  # launches of a block that llama.cpp saves with dense weights: gate, up and SwiGLU are one
HOST = 80.0  # µs a token: start of the graph, wait, copy of the logits
L2_WIDTH = 64  # bytes a clock that an SM gets from L2
L2_EFFICIENCY = 0.65  # of what L2 gives at most, when all SMs read at the same time
L2_LATENCY = 0.15  # µs until a warp has the input of its next step
UTILIZATION = 0.5  # of the tensor cores' peak in a large batch: our kernels
CUBLAS_UTILIZATION = 0.7
UNCERTAINTY = 25  # percent

PAPER_SHAPES = ((4096, 4096), (4096, 14336), (8192, 8192), (8192, 28672))  # n_in, n_out
PAPER_BITS = (2.3, 2.0, 1.5, 1.0)
PAPER_MATVEC = {  # bits -> µs, in the order of PAPER_SHAPES: Table 3, RTX 4090
    16: (61, 153, 200, 548),
    2.3: (29, 56, 64, 167),
    2.0: (27, 51, 58, 149),
    1.5: (24, 43, 51, 115),
    1.0: (20, 37, 38, 84),
}
PAPER_DECODE = {  # model -> bits -> tokens a second: Table 4, RTX 4090
    "llama2-7b": {16: 68, 2.3: 144, 2.0: 153, 1.5: 167, 1.0: 170},
    "llama3-8b": {16: 60, 2.3: 121, 2.0: 133, 1.5: 153, 1.0: 174},
}


# --- one linear


def width(n_in: int, n_out: int, bits: float) -> int:
    """k of a linear by itself."""
    return uniform_budget({"linear": (n_out, n_in)}, bits)["linear"]


def stage(card: Card, n: int, rows: int, scales: int, early: bool | None = None) -> dict[str, float]:
    """One launch for one token, `rows` sign rows of `n`: its parts in µs, and `bound`, what streaming waits for.

    scales  bytes of scales that it reads
    early   it starts, and loads its first signs, while the one before it still runs; None: if the card can
    """
    signs = n * rows
    tiles = math.ceil(math.ceil(rows / KERNEL.rows) / card.sms)  # of the SM with most of them
    rounds = math.ceil(math.ceil(rows / KERNEL.rows) / (card.sms * KERNEL.blocks(n)))  # tiles of a block
    steps = rounds * math.ceil(math.ceil(n / KERNEL.step) / KERNEL.warps(n))  # of a warp
    blocks = min(KERNEL.blocks(n), tiles)
    in_flight = blocks * KERNEL.warps(n) * KERNEL.ahead * KERNEL.rows * KERNEL.step / 8
    later = max(0, tiles * KERNEL.rows * n / 8 - in_flight)  # bytes that are asked for when others have arrived
    clocks = card.sms * card.clock * 1e3  # a µs
    times = {
        "memory": (signs / 8 + scales) / (card.bandwidth * 1e3 * EFFICIENCY),
        "in flight": later / (in_flight / LATENCY),
        "instructions": signs / 32 * KERNEL.instructions / (128 * clocks),
        "tensor cores": signs / KERNEL.signs_an_mma * 4096 / (card.int8 * clocks),
        "rounds": ((rounds - 1) * TILE + (steps - 1) * STEP) / (card.clock * 1e3),  # the first is in CHAIN
    }
    bound = max(times, key=times.get)
    quantize = blocks * n * (4 / L2_WIDTH + KERNEL.quantize / 128) / (card.clock * 1e3)
    parts = {"gap": gap(card, early), "start": chain(card) + quantize, "stream": times[bound], "tail": TAIL}
    return parts | {"bound": bound, "times": times}


def gap(card: Card, early: bool | None) -> float:
    """µs before a DBF launch; `early` as for `stage`."""
    return EARLY if (card.early if early is None else early) else card.gap


def chain(card: Card) -> float:
    """µs of CHAIN, at least the latency of memory."""
    return max(LATENCY, CHAIN / (card.clock * 1e3))


def launch(parts: dict[str, float]) -> float:
    return parts["gap"] + parts["start"] + parts["stream"] + parts["tail"]


def linear(card: Card, n_in: int, n_out: int, k: int, early: bool | None = None) -> float:
    """µs of a DBF linear for one token: two launches."""
    return launch(stage(card, n_in, k, 2 * (n_in + k), early)) + launch(stage(card, k, n_out, 2 * n_out, early))


def f16_linear(card: Card, n_in: int, n_out: int) -> float:
    """µs of an F16 linear: one launch that streams at the same efficiency."""
    return card.gap + LATENCY + 2 * n_in * n_out / (card.bandwidth * 1e3 * EFFICIENCY) + TAIL


# --- a token


def token(
    card: Card, shape: Shape, bits: float | None, join: bool = False, early: bool | None = None, context: int = 64
) -> dict[str, float]:
    """µs of one decoded token by its parts; `bits` None is F16, head included, else the head is Q6_K.

    join     linears that read the same input are one, as convert makes them
    early    DBF launches overlap, see `stage`
    context  tokens in the cache: 64 on average over 128 from an empty prompt
    """
    linears = shape.linears(join)
    others = OTHERS * (card.gap + SMALL)
    cache = 4 * context * shape.n_head_kv * shape.head_dim  # bytes of K and V in F16
    others += cache / (card.bandwidth * 1e3 * EFFICIENCY)
    head = shape.n_vocab * shape.n_embd * (2 if bits is None else 6.5625 / 8)
    ends = {"head": 2 * (card.gap + SMALL) + head / (card.bandwidth * 1e3 * EFFICIENCY), "host": HOST}
    if bits is None:
        return dense(card, shape, 2) | ends
    ks = {name: width(n_in, n_out, bits) for name, (n_out, n_in) in linears.items()}
    total = sum(linear(card, n_in, n_out, ks[name], early) for name, (n_out, n_in) in linears.items())
    fixed = 2 * len(linears) * (gap(card, early) + chain(card) + TAIL)
    parts = {"weights": total - fixed, "launches": fixed, "others": others}
    return {name: shape.n_layer * time for name, time in parts.items()} | ends


def dense(card: Card, shape: Shape, bytes_a_weight: float) -> dict[str, float]:
    """µs of the blocks of a dense model for one token, by their parts: one launch for a linear, some fused."""
    linears = shape.linears().values()
    weights = sum(n_out * n_in for n_out, n_in in linears) * bytes_a_weight
    parts = {
        "weights": weights / (card.bandwidth * 1e3 * EFFICIENCY),
        "launches": (len(linears) - FUSED / 2) * (card.gap + LATENCY + TAIL),
        "others": (OTHERS - FUSED / 2) * (card.gap + SMALL),
    }
    return {name: shape.n_layer * time for name, time in parts.items()}


def tokens_a_second(
    card: Card, shape: Shape, bits: float | None, join: bool = False, early: bool | None = None
) -> float:
    return 1e6 / sum(token(card, shape, bits, join, early).values())


# What others measured, to hold the model against: dense models in llama.cpp, whose prompt was read one or two tokens
# at a time (llama-bench -p 512 -ub 1 or 2), so that every weight but the head's comes from memory for each step.
LLAMA_1B = Shape("Llama 3.2 1B", 2048, 8192, 32, 8, 16, 128256)
ANCHORS = (  # card, shape, type, bytes a weight, tokens a step, tokens a second, where it stands
    ("RTX 3090", LLAMA_1B, "F32", 4, 1, 201.2, "llama.cpp #14262"),
    ("RTX 3090", SHAPES["llama3-8b"], "BF16", 2, 1, 58.1, "llama.cpp #14262"),
    ("RTX 4090", LLAMA_1B, "F32", 4, 2, 455.9, "llama.cpp #24216"),
    ("RTX 5090", LLAMA_1B, "BF16", 2, 1, 652.3, "llama.cpp #24216"),
)


# --- a few tokens


def gemm(card: Card, rows: int, tokens: int) -> Gemm:
    """The kind of block that the plan takes (dbf_plan_gemm in dbf-launch.h)."""
    few = few_columns(tokens)
    return MANY if MANY_AS_FEW * busiest(card, rows, tokens, MANY) <= busiest(card, rows, tokens, few) else few


def few_columns(tokens: int) -> Gemm:
    """The kind of block with few columns for so many tokens."""
    return FEW[1 if tokens <= MANY.tokens else 2]


def busiest(card: Card, rows: int, tokens: int, kind: Gemm) -> int:
    """Blocks of the SM that has most of them."""
    return math.ceil(math.ceil(rows / kind.rows) * math.ceil(tokens / (kind.tokens * kind.tiles)) / card.sms)


def gemm_stage(card: Card, n: int, rows: int, scales: int, tokens: int, kind: Gemm) -> dict[str, float]:
    """Two launches for several tokens, the input is rounded and multiplied: parts in µs as in `stage`, and `round`."""
    blocks = busiest(card, rows, tokens, kind)
    resident = min(kind.blocks, blocks)
    steps = math.ceil(n / KERNEL.step)
    signs = blocks * kind.rows * n  # that this SM multiplies
    clocks = card.clock * 1e3  # a µs
    planes = 2 * n * kind.tokens * kind.tiles  # bytes that a block reads
    in_flight = resident * kind.warps * kind.ahead * kind.warp_rows * KERNEL.step / 8

    # One warp by itself: its quarter of the SM, and nothing to do until the input of its next step is there.
    step = kind.warp_rows * KERNEL.step
    alone = max(
        step / KERNEL.signs_an_mma * kind.tiles * 4096 / (card.int8 / 4),
        step / 32 * kind.instructions / (128 / 4),
    )
    steps_of_warp = math.ceil(steps / kind.warps) if kind.divides else steps
    times = {
        "memory": (rows * n / 8 + scales) / (card.bandwidth * 1e3 * EFFICIENCY),
        "L2": (signs / 8 + blocks * planes) * card.sms / (card.l2 * L2_EFFICIENCY * clocks),
        "in flight": max(0, signs / 8 - in_flight) / (in_flight / LATENCY),
        "instructions": signs / 32 * kind.instructions / (128 * clocks),
        "tensor cores": signs / KERNEL.signs_an_mma * kind.tiles * 4096 / (card.int8 * UTILIZATION * clocks),
        "steps": math.ceil(blocks / resident) * steps_of_warp * (L2_LATENCY + alone / clocks),
    }
    bound = max(times, key=times.get)
    rounds = SMALL + math.ceil(tokens / card.sms) * n * (4 / L2_WIDTH + KERNEL.quantize / 128) / clocks
    parts = {"gap": 2 * card.gap, "round": rounds, "start": LATENCY, "stream": times[bound], "tail": TAIL}
    return parts | {"bound": bound, "times": times}


def few_tokens(card: Card, shape: Shape, bits: float, tokens: int, rows: int | None = None, join: bool = True) -> float:
    """ms of the linears of a model for some tokens.

    rows  None: the blocks that the plan takes; 32: all of few columns; 128: all with so many rows, and with the columns
          that there would be if there were no other kind
    """
    total = 0.0
    for n_out, n_in in shape.linears(join).values():
        k = width(n_in, n_out, bits)
        if tokens == 1:
            total += linear(card, n_in, n_out, k)
            continue
        for n, height, scales in ((n_in, k, 2 * (n_in + k)), (k, n_out, 2 * n_out)):
            kind = gemm(card, height, tokens)
            if rows == MANY.rows:
                like = FEW.get(math.ceil(tokens / MANY.tokens), MANY)
                kind = replace(MANY, tiles=like.tiles, instructions=like.instructions)
            elif rows:
                kind = few_columns(tokens)
            parts = gemm_stage(card, n, height, scales, tokens, kind)
            total += launch(parts) + parts["round"]
    return shape.n_layer * total / 1e3


# --- a batch


def batch(card: Card, shape: Shape, bits: float, n: int) -> dict[str, float]:
    """ms of the linears of a model for many tokens, by the way they take: the tensor cores' time alone.

    planes  both int8 planes by mma.sync       fp16    activations in fp16 by mma.sync, signs expanded in registers
    cublas  signs expanded to fp16 in memory, written and read once, then cuBLAS
    """
    shapes = shape.all_linears()
    ks = uniform_budget(shapes, bits)
    signs = sum(ks[name] * (n_out + n_in) for name, (n_out, n_in) in shapes.items())
    clocks = card.sms * card.clock * 1e6  # a ms
    expand = 2 * 2 * signs / (card.bandwidth * 1e6 * EFFICIENCY)
    return {
        "planes": 2 * signs * n / (card.int8 * clocks * UTILIZATION),
        "fp16": signs * n / (card.fp16 * clocks * UTILIZATION),
        "cublas": signs * n / (card.cublas * clocks * CUBLAS_UTILIZATION) + expand,
    }


# --- the tables


def markdown(cells: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rows = [cells[0], ["-" * w for w in widths], *cells[1:]]
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def shape_name(n_in: int, n_out: int) -> str:
    return f"{n_in}×{n_out}"


def matvec_table() -> str:
    cells = [["bits", "shape", "k", "MB", "measured by the paper, 4090", *CARDS]]
    for bits in (16, *PAPER_BITS):
        for (n_in, n_out), paper in zip(PAPER_SHAPES, PAPER_MATVEC[bits], strict=True):
            k = 0 if bits == 16 else width(n_in, n_out, bits)
            size = 2 * n_in * n_out if bits == 16 else k * (n_in + n_out) / 8 + 2 * (n_in + k + n_out)
            times = [linear(card, n_in, n_out, k) if k else f16_linear(card, n_in, n_out) for card in CARDS.values()]
            row = [f"{bits:g}", shape_name(n_in, n_out), str(k or "F16"), f"{size / 1e6:.1f}", str(paper)]
            cells.append(row + [f"{time:.1f}" for time in times])
    return markdown(cells)


def parts_table(card: Card, bits: float = 2.0) -> str:
    cells = [["shape", "launch", "gap", "start", "stream", "tail", "sum", "waits for", "next limit"]]
    for n_in, n_out in PAPER_SHAPES:
        k = width(n_in, n_out, bits)
        for name, parts in (("B", stage(card, n_in, k, 2 * (n_in + k))), ("A", stage(card, k, n_out, 2 * n_out))):
            others = {what: t for what, t in parts["times"].items() if what != parts["bound"]}
            second = max(others, key=others.get)
            figures = [f"{parts[part]:.2f}" for part in ("gap", "start", "stream", "tail")]
            row = [shape_name(n_in, n_out), name, *figures, f"{launch(parts):.2f}", parts["bound"]]
            cells.append([*row, f"{second}, {others[second]:.2f}"])
    return markdown(cells)


def decode_table() -> str:
    cells = [["model", "bits", "joined", "measured by the paper, 4090", *CARDS]]
    for name, paper in PAPER_DECODE.items():
        for bits in (16, *PAPER_BITS):
            for join in (False, True)[: 1 if bits == 16 else 2]:
                speeds = [
                    tokens_a_second(card, SHAPES[name], None if bits == 16 else bits, join) for card in CARDS.values()
                ]
                row = [name, f"{bits:g}" if bits != 16 else "F16", "yes" if join else "no"]
                cells.append([*row, "" if join else str(paper[bits]), *(f"{speed:.0f}" for speed in speeds)])
    return markdown(cells)


def token_table(card: Card, name: str = "llama2-7b", bits: float = 1.5) -> str:
    cells = [["", "launches a block", "weights", "launches", "others", "head", "host", "sum", "tok/s"]]
    for join in (False, True):
        parts = token(card, SHAPES[name], bits, join)
        count = 2 * len(SHAPES[name].linears(join))
        total = sum(parts.values())
        figures = [f"{time / 1e3:.2f}" for time in (*parts.values(), total)]
        cells.append(["joined" if join else "separate", f"{count} + {OTHERS}", *figures, f"{1e6 / total:.0f}"])
    return markdown(cells)


def anchor_table() -> str:
    cells = [["card", "model", "type", "tokens a step", "measured, tok/s", "by the model", "difference", "measured in"]]
    for name, shape, kind, size, n, measured, where in ANCHORS:
        value = n * 1e6 / (sum(dense(CARDS[name], shape, size).values()) + HOST)
        row = [name, shape.name, kind, str(n), f"{measured:.1f}", f"{value:.1f}", f"{value / measured - 1:+.1%}", where]
        cells.append(row)
    return markdown(cells)


def early_table(bits: float = 1.5) -> str:
    cells = [["card", "model", "joined", "one after the other", "overlapping"]]
    for card in (card for card in CARDS.values() if card.early):
        for name in PAPER_DECODE:
            for join in (False, True):
                speeds = [tokens_a_second(card, SHAPES[name], bits, join, early) for early in (False, True)]
                cells.append([card.name, name, "yes" if join else "no", *(f"{speed:.0f}" for speed in speeds)])
    return markdown(cells)


def few_tokens_table(name: str = "llama2-7b", bits: float = 2.0) -> str:
    cells = [["card", "blocks", *(f"{n}" for n in FEW_TOKENS)]]
    for card in CARDS.values():
        for what, rows in (("all of 128 rows", MANY.rows), ("all of 32 rows", FEW[2].rows), ("as planned", None)):
            times = [few_tokens(card, SHAPES[name], bits, n, rows) for n in FEW_TOKENS]
            cells.append([card.name, what, *(f"{time:.2f}" for time in times)])
    return markdown(cells)


def batch_table(name: str = "llama2-7b", bits: float = 2.0) -> str:
    cells = [["card", "tokens", "two int8 planes", "fp16", "expanded, cuBLAS", "fastest"]]
    for card in CARDS.values():
        for n in (512, 2048):
            times = batch(card, SHAPES[name], bits, n)
            row = [card.name, str(n), *(f"{time:.1f}" for time in times.values())]
            cells.append([*row, min(times, key=times.get)])
    return markdown(cells)


def targets() -> str:
    """What the kernels were designed for on a 4090, each with what the model says."""
    card = CARDS["RTX 4090"]
    shape = SHAPES["llama2-7b"]
    rows = [
        ("4096×4096 at 2 bits, µs", "≤ 12", linear(card, 4096, 4096, width(4096, 4096, 2.0)), 12, False),
        ("8192×28672 at 2 bits, µs", "≤ 75", linear(card, 8192, 28672, width(8192, 28672, 2.0)), 75, False),
        ("Llama-2-7B at 1.5 bits, tok/s", "≥ 400", tokens_a_second(card, shape, 1.5, True), 400, True),
        ("the same with --join none", "≥ 400", tokens_a_second(card, shape, 1.5), 400, True),
    ]
    cells = [["on a 4090", "target", "predicted", ""]]
    for name, wanted, value, bound, more in rows:
        met = value >= bound if more else value <= bound
        cells.append([name, wanted, f"{value:.1f}" if value < 100 else f"{value:.0f}", "met" if met else "missed"])
    return markdown(cells)


def report() -> str:
    card = CARDS["RTX 4090"]
    sections = [
        ("Targets", targets()),
        ("Held against what others measured", anchor_table()),
        ("One linear, one token, µs (Table 3 of the paper)", matvec_table()),
        ("The same at 2 bits on a 4090 by its parts, µs", parts_table(card)),
        ("Tokens a second, 128 tokens from an empty prompt (Table 4)", decode_table()),
        ("A token of Llama-2-7B at 1.5 bits on a 4090 by its parts, ms", token_table(card)),
        ("Tokens a second at 1.5 bits where launches can overlap, and if they did not", early_table()),
        ("The linears of Llama-2-7B at 2 bits, joined, for 1 to 128 tokens, ms", few_tokens_table()),
        ("The linears of Llama-2-7B at 2 bits for a batch, ms", batch_table()),
    ]
    note = f"All predicted, ±{UNCERTAINTY} %. Measured (by others) is only what a column calls so."
    return "\n\n".join([note, *(f"### {title}\n\n{table}" for title, table in sections)])


def find_card(description: str) -> Card | None:
    """The card that a device's own description names ("NVIDIA GeForce RTX 4090"), if the model knows it."""
    for card in CARDS.values():
        # not its relatives with other memory: 4090 D, H100 PCIe, A100-SXM4-40GB
        if re.search(rf"\b{card.name}\b(?! (Ti|D|Laptop|SUPER|PCIe|NVL))(?!.*40GB)", description):
            return card
    return None


def replaced(document: str) -> str:
    """A document with the part between MARKS replaced by today's tables."""
    begin, end = MARKS
    before, _, rest = document.partition(begin)
    _, _, after = rest.partition(end)
    assert rest and end in rest, f"the document has no {begin} and {end}"
    return f"{before}{begin}\n{report()}\n{end}{after}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="example: python bench/gpu_model.py --write docs/gpu-model.md"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables into this document")
    arguments = parser.parse_args(argv)
    if arguments.write:
        arguments.write.write_text(replaced(arguments.write.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""How precise must activations be? KL divergence and perplexity by the form of the sign products' inputs.

    python bench/activations.py demo/work
    python bench/activations.py demo/work --windows 4 --text speeches

A sign product adds and subtracts its inputs (b ⊙ x in the first product of a linear, the middle channels in the
second); the kernels do so with integers. The model of a work folder runs in float32, its linears with inputs that are
rounded as each form has it:

    int8, token        one plane of bytes, one scale a token                       q = round(v / d), d = max|v| / 127
    int8, N            the same with a scale for every N inputs
    int8 x 2, token    two planes, q = 256·hi + lo, one scale a token              d = max|v| / (127·256 + 127)
    int8 x 2, N slices two planes, a scale for each of N parts of the inputs: what a warp or a chunk sums
    sums of 4, 14 bits one scale a token; what is rounded is every sum of four neighbours, to 14 bits
    fp16, token        half precision after scaling a token by a power of two

The reference is the same model without rounding. Printed are the mean KL divergence a token from it and how much the
perplexity moves. The kernels use two planes (CUDA: slices; CPUs without a byte shuffle: a scale a token) and sums of
four (all other CPUs); the bounds are a mean KL divergence of 1e-3 and 0.1 % of perplexity, and the command ends with
status 1 when a form that the kernels use misses them.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer

import dbf_gguf
from dbf_gguf import calibration
from dbf_gguf.checkpoint import WorkFolder
from dbf_gguf.errors import DBFError
from dbf_gguf.loss import cross_entropy, kl_divergence
from dbf_gguf.model import DBFLinear
from dbf_gguf.source import resolve

Rounding = Callable[[torch.Tensor], torch.Tensor]

N_CTX = 512
ONE_PLANE, TWO_PLANES, SUM_OF_FOUR = 127, 127 * 256 + 127, 8188
KLD_BOUND, PPL_BOUND = 1e-3, 1e-3


def integers(steps: int, group: int | None = None, slices: int | None = None) -> Rounding:
    """Rounds v [..., n] to integers of at most `steps`, with one scale for all, for every `group`, or for each slice.

    The last group may be shorter. Slices are whole words of 32, as a kernel divides them.
    """

    def rounded(v: torch.Tensor) -> torch.Tensor:
        n = v.shape[-1]
        size = group or (32 * math.ceil(n / 32 / slices) if slices else n)
        padded = nn.functional.pad(v, (0, -n % size)).unflatten(-1, (-1, size))
        d = padded.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30) / steps
        return (torch.round(padded / d) * d).flatten(-2)[..., :n]

    return rounded


def half(v: torch.Tensor) -> torch.Tensor:
    exponent = torch.frexp(v.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30)).exponent
    return torch.ldexp(torch.ldexp(v, -exponent).half().float(), exponent)


def sums_of_four(steps: int) -> Rounding:
    """Stands for rounding the sum of every four neighbours, with whatever signs, to integers of at most `steps`.

    A sum that is rounded to multiples of d has the error of four inputs that are rounded to multiples of d / 2.
    """

    def rounded(v: torch.Tensor) -> torch.Tensor:
        d = v.abs().unflatten(-1, (-1, 4)).sum(dim=-1).amax(dim=-1, keepdim=True).clamp_min(1e-30) / steps
        return torch.round(2 * v / d) * d / 2

    return rounded


FORMS: dict[str, Rounding] = {
    "int8, token": integers(ONE_PLANE),
    "int8, 128": integers(ONE_PLANE, group=128),
    "int8, 32": integers(ONE_PLANE, group=32),
    "fp16, token": half,
    "sums of 4, 14 bits": sums_of_four(SUM_OF_FOUR),
    "int8 x 2, token": integers(TWO_PLANES),
    "int8 x 2, 8 slices": integers(TWO_PLANES, slices=8),
}
USED = ("sums of 4, 14 bits", "int8 x 2, token", "int8 x 2, 8 slices")


@contextmanager
def rounded_products(model: nn.Module, form: Rounding) -> Iterator[None]:
    """Within, both products of every DBFLinear get rounded inputs."""

    def forward(self: DBFLinear, x: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.linear(form(x * self.scale_b), self.signs_b) * self.scale_m
        y = nn.functional.linear(form(hidden), self.signs_a) * self.scale_a
        return y if self.bias is None else y + self.bias

    plain, DBFLinear.forward = DBFLinear.forward, forward
    try:
        yield
    finally:
        DBFLinear.forward = plain


@torch.no_grad()
def measure(model: nn.Module, windows: torch.Tensor, forms: dict[str, Rounding]) -> dict[str, tuple[float, float]]:
    """{form: (mean KL divergence a token, relative change of the perplexity)} over `windows` [count, length]."""
    head = model.get_output_embeddings().weight
    kl, loss = dict.fromkeys(forms, 0.0), dict.fromkeys(forms, 0.0)
    for window in windows:
        wanted = model.model(window[None]).last_hidden_state[0, :-1]
        exact = cross_entropy(wanted, head, window[1:], gradient=False)[0]
        for name, form in forms.items():
            with rounded_products(model, form):
                hidden = model.model(window[None]).last_hidden_state[0, :-1]
            kl[name] += kl_divergence(hidden, wanted, head, gradient=False)[0]
            loss[name] += cross_entropy(hidden, head, window[1:], gradient=False)[0] - exact
    tokens = windows.numel() - len(windows)
    return {name: (kl[name] / tokens, math.expm1(loss[name] / tokens)) for name in forms}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="example: python bench/activations.py demo/work --windows 8"
    )
    parser.add_argument("work", type=Path, help="work folder of a finished `dbf-gguf convert`")
    parser.add_argument("--windows", type=int, default=8, help=f"windows of {N_CTX} tokens (default 8)")
    parser.add_argument("--text", choices=("wiki", "speeches"), default="wiki", help="evaluation text (default wiki)")
    arguments = parser.parse_args()
    if arguments.windows < 1:
        parser.error("--windows must be at least 1")
    try:
        model = dbf_gguf.load(arguments.work)
        tokenizer = AutoTokenizer.from_pretrained(resolve(WorkFolder.open(arguments.work).manifest["model"]).folder)
        text = calibration.speeches_text() if arguments.text == "speeches" else calibration.wiki_text("evaluation")
        bos = calibration.leading_bos(tokenizer)
        windows = calibration.evaluation_windows(tokenizer, text, N_CTX, arguments.windows, bos)
    except DBFError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    found = measure(model, windows, FORMS)
    print(f"{len(windows)} windows of {N_CTX} tokens of {arguments.text}, against the same model with float32 inputs\n")
    print("| inputs of the products | KL divergence a token | perplexity |\n|---|---|---|")
    for name, (kl, change) in found.items():
        print(f"| {name} | {kl:.2e} | {change:+.3%} |")
    missed = [name for name in USED if found[name][0] > KLD_BOUND or abs(found[name][1]) > PPL_BOUND]
    if missed:
        print(f"\nmissed {KLD_BOUND:g} or {PPL_BOUND:.1%}: {', '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

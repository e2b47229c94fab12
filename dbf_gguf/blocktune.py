"""Tuning of one compressed block towards the dense block's output (paper, section 3.4, the block by block part).

    minimize  Σ_t u_t Σ_c w_c² (ŷ_tc − y_tc)²        over scales and norms of the block and, if wanted, its signs

ŷ is the block's output in the compressed stream, y the dense one in the dense stream, w the RMS of the loss gradient at
the block's output: what the loss does not see need not be right. u keeps the few tokens of enormous size from being all
that counts (`blockwise.token_weights`).

Of several processes each computes the gradients for those windows of a step that are in its streams. A step has as many
windows as there are processes at least.

The state with the lowest loss on windows that are not trained on is kept; that may be the one it began with.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from . import parallel
from .model import DBFLinear
from .signs import SignTraining
from .trainables import BETAS, Trainables, learning_rate

STEP_TOKENS = 1024
HELD_OUT = 1 / 16  # of the windows
EPOCHS = 2
EVALUATIONS = 4  # in all


def tune(
    model,
    index: int,
    block: nn.Module,
    streams,
    weight: torch.Tensor,
    pool: ThreadPoolExecutor,
    *,
    lr: float,
    sign_lr: float | None,
    seed: int,
) -> tuple[dict[str, torch.Tensor], float, float]:
    """Tunes `block` in place. `streams` (`blockwise.Streams`) holds inputs in .compressed, wanted outputs in .dense.

    weight   w [d]
    pool     runs the windows of a step side by side, `streams.workers` at a time
    lr       of scales and norms, relative to each vector's RMS; sign_lr that of the signs, None for none

    Returns {"self_attn.q_proj.scale_a": θ, …} float32 (the signs are in the block), and the relative error of the
    held-out windows before and after.
    """
    device = next(block.parameters()).device
    weight = (weight.float() / weight.float().square().mean().sqrt()).to(device)
    count, length = streams.count, streams.length
    batch = max(parallel.count(), STEP_TOKENS // length)
    n_held_out = max(1, int(HELD_OUT * count))
    held_out, training = torch.arange(count).split([n_held_out, count - n_held_out])
    parameters = Trainables(block)
    signs = None if sign_lr is None else SignTraining(m for m in block.modules() if isinstance(m, DBFLinear))
    delta = nn.Parameter(torch.zeros_like(parameters.start))
    adam = torch.optim.Adam([delta], lr=0.0, betas=BETAS, eps=1e-12)

    def error(number: int, grad: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted squares of the error and of what the block adds to its input, sums over a window."""
        place = streams.place(number)
        hidden, wanted = streams.compressed.read(place).to(device), streams.dense.read(place).to(device)
        with torch.set_grad_enabled(grad):
            output = model.run(index, block, hidden)
            tokens = streams.token_weights(wanted[0]).float()
            squares = ((output - wanted)[0].float() * weight).square() * tokens
            return squares.sum(), ((wanted - hidden)[0].float() * weight).square().mul(tokens).sum()

    def gradient(number: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        loss, size = error(number, grad=True)
        return parameters.gradient(loss / size.detach(), others=signs.signs if signs else ())

    def total(parts: list, like: torch.Tensor) -> torch.Tensor:
        """The sum of parts in their order, the same whichever was ready first; there may be none in this process."""
        return parallel.total(sum(parts, torch.zeros_like(like)))

    def evaluate() -> float:
        found = list(pool.map(error, own(held_out)))
        errors, sizes = (total([pair[i] for pair in found], weight[0]) for i in (0, 1))
        return (errors / sizes).item()

    def own(numbers: torch.Tensor) -> list[int]:
        return [number for number in numbers.tolist() if number in streams.own]

    def state() -> tuple[torch.Tensor, list[torch.Tensor]]:
        return delta.detach().clone(), [s.detach().to(torch.int8) for s in signs.signs] if signs else []

    before = best = evaluate()
    kept = state()
    per_epoch = max(1, len(training) // batch)
    steps = EPOCHS * per_epoch
    every = max(1, steps // EVALUATIONS)
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed + epoch))
        chosen = training[order[place * batch : (place + 1) * batch]]
        parts = list(pool.map(gradient, own(chosen)))
        delta.grad = total([part for part, _ in parts], delta) / len(chosen)
        adam.param_groups[0]["lr"] = learning_rate(step, steps, lr)
        adam.step()
        parameters.set(delta.detach())
        if signs:
            each = (total([values[i] for _, values in parts], matrix) for i, matrix in enumerate(signs.signs))
            signs.step(each, learning_rate(step, steps, sign_lr))
        if (step + 1) % every == 0 or step + 1 == steps:
            now = evaluate()
            if math.isfinite(now) and now < best:
                best, kept = now, state()
    theta, old = kept
    parameters.set(theta)
    if signs:
        signs.close()
        with torch.no_grad():
            for matrix, values in zip(signs.signs, old, strict=True):
                matrix.copy_(values)
    for parameter in parameters.parameters.values():
        parameter.requires_grad_(False)
    return parameters.values(theta), before, best

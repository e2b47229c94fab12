"""Which rows and columns of a weight matter: RMS of a linear's input activations and of its output gradients.

The paper (section 3.3) factorizes diag(o) W diag(i), i the norm of the input activations per column and o the norm of
the loss gradient per row, a rank-1 approximation of the diagonal Fisher information. The energies of a few tokens'
gradients are up to thousands of times the others': without a bound (TOKEN_CAP) these few would say what matters. One
pass over the calibration windows yields both, with one block in memory at a time and in memory that grows neither with
blocks nor with windows:

    forward    every block's input is kept, for all windows of a group
    loss       the gradient for the last block's output, logits a piece at a time
    backward   from the last block to the first: run again on the kept input, differentiated; hooks on its linears keep
               running sums of squares, no weight has a gradient

A group is as many windows as `GROUP_BYTES` of inputs allow, so each block is read twice a group. Windows are added up
in their order whatever the groups are, so that the result does not depend on these bounds. Of several processes each
does this with its share of the windows.
"""

import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from . import parallel
from .blocks import Activations, BlockModel, linears
from .loss import cross_entropy
from .threads import side_by_side

MEMORY_BYTES = 1 << 30  # of block inputs that are kept in memory; a larger group's are in a file
GROUP_BYTES = 8 << 30  # of block inputs in a file, or half of the free disk where that is less
# Times the median energy of a token's output gradient in its window; a token above it counts as if it had that much.
# SmolLM2 with only these linears compressed (2.2 bits, no metric), KL on other text without and with it: q, k, v of
# blocks 8 to 29 0.192 and 0.130 (another seed 0.200 and 0.138), of blocks 0 to 7 0.064 and 0.060, all o 0.138 and
# 0.133. It makes no clear difference to gate and up; a bound of 2 does about the same.
TOKEN_CAP = 10.0


def arguments(names: list[str], found: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """The arguments of `factorize` for these linears, of one shape, from what `measure` has found; {} for None."""
    if found is None:
        return {}
    sides = (("importance_in", "input"), ("importance_out", "output"))
    return {argument: torch.stack([found[f"{name}.{side}"] for name in names]) for argument, side in sides}


def measure(
    model: BlockModel,
    windows: torch.Tensor,
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, torch.Tensor]:
    """Importance of every block linear over `windows` [count, length] (token ids); inputs go into `folder` if need be.

    `progress` gets (done, total) in passages of a window through a block. Returns {"<linear>.input": [n_in],
    "<linear>.output": [n_out]} in float32 on the CPU: root of the mean over all tokens of the squared activation, and
    of the squared gradient of the mean next-token loss, no token above TOKEN_CAP. Raises DBFError when a weight is
    missing or the disk is full.
    """
    tokens = windows.numel()
    windows = parallel.share(windows)
    count, length = windows.shape
    depth, d = len(model), model.config.hidden_size
    each = (depth + 1) * length * d * model.dtype.itemsize
    free = shutil.disk_usage(folder).free // parallel.count()
    group = min(count, max(1, max(MEMORY_BYTES, min(GROUP_BYTES, free // 2)) // each))
    # the input of block i for window w of the group is at i * group + w; at i = depth the last output, then gradients
    states = Activations((depth + 1) * group, length, d, model.dtype, folder, MEMORY_BYTES)
    sums: dict[str, torch.Tensor] = {}
    done, total = 0, 2 * depth * count

    def each_window(pool, work: Callable[[int], dict], n: int) -> None:
        nonlocal done
        for squares in pool.map(work, range(n)):  # in the windows' order, whichever is ready first
            for key, square in squares.items():
                sums[key] = sums[key] + square if key in sums else square
            done += 1
            progress(done, total)

    with side_by_side(model.workers(length, backward=True)) as pool:
        for start in range(0, count, group):
            ids = windows[start : start + group]
            for number, window in enumerate(ids):
                states.write(slice(number, number + 1), model.embed(window[None]))
            model.release()
            for index in range(depth):
                block = model.block(index)
                each_window(pool, partial(_forward, model, states, group, index, block), len(ids))
            list(pool.map(partial(_loss, model, states, group, ids), range(len(ids))))
            model.release()
            for index in reversed(range(depth)):
                block, local = model.block(index), threading.local()
                for name, module in linears(index, block).items():
                    module.register_forward_hook(partial(_count, name, local))
                each_window(pool, partial(_backward, model, states, group, index, block, local), len(ids))
    keys = [f"{name}.{side}" for name, side in _order(sums)]
    return {key: (parallel.total(sums[key]) / tokens).sqrt().cpu() for key in keys}


def _order(sums: dict[str, torch.Tensor]) -> list[tuple[str, str]]:
    """(linear, side) from the first block to the last; sums were begun from the last to the first."""
    names = [key.removesuffix(".input") for key in sums if key.endswith(".input")]
    names.sort(key=lambda name: int(name.split(".")[2]))
    return [(name, side) for name in names for side in ("input", "output")]


@torch.no_grad()
def _forward(model: BlockModel, states: Activations, group: int, index: int, block, window: int) -> dict:
    here, there = index * group + window, (index + 1) * group + window
    states.write(slice(there, there + 1), model.run(index, block, states.read(slice(here, here + 1))))
    return {}


def _loss(model: BlockModel, states: Activations, group: int, ids: torch.Tensor, window: int) -> None:
    """Replaces the last block's output by the gradient of the window's mean next-token loss."""
    place = slice(len(model) * group + window, len(model) * group + window + 1)
    hidden = states.read(place).to(model.device).requires_grad_()
    normed = model.norm(hidden)
    flat = normed.detach()[0, :-1]
    _, gradient = cross_entropy(flat, model.head, ids[window, 1:].to(model.device))
    full = torch.zeros_like(normed)
    full[0, :-1] = gradient / len(flat)
    states.write(place, torch.autograd.grad(normed, hidden, full)[0])


def _backward(model: BlockModel, states: Activations, group: int, index: int, block, local, window: int) -> dict:
    """Replaces the gradient for a block's output by that for its input; returns this window's sums of squares."""
    here, place = index * group + window, len(model) * group + window
    hidden = states.read(slice(here, here + 1)).to(model.device).requires_grad_()
    squares = local.squares = {}
    output = model.run(index, block, hidden)
    gradient = states.read(slice(place, place + 1)).to(model.device)
    states.write(slice(place, place + 1), torch.autograd.grad(output, hidden, gradient)[0])
    return squares


def _count(name: str, local: threading.local, _module, inputs, output: torch.Tensor) -> None:
    """Forward hook of a linear: sums of squares over the tokens of the window that this thread is at."""
    squares = local.squares
    squares[f"{name}.input"] = _squares(inputs[0])
    output.register_hook(lambda gradient: squares.__setitem__(f"{name}.output", _squares(gradient, TOKEN_CAP)))


def token_weights(x: torch.Tensor, cap: float) -> torch.Tensor:
    """Weights [tokens, 1], float32, by which no token counts for more than `cap` times the median one of x [tokens, n].

    Tokens of zeros, such as the last one's gradient, or of rounding errors in their place are none for the median.
    """
    energy = x.float().square().sum(dim=1, keepdim=True)
    some = energy[energy > 1e-10 * energy.max()]
    median = some.median() if len(some) else energy.new_ones(())
    return (cap * median / energy.clamp_min(1e-30)).clamp_max(1)


def _squares(values: torch.Tensor, cap: float | None = None) -> torch.Tensor:
    """Sum of the squares over the tokens of [..., n], each token's bounded by `cap`: [n], float32."""
    values = values.detach().float().flatten(0, -2)
    squares = values.square()
    return (squares if cap is None else squares.mul_(token_weights(values, cap))).sum(dim=0)

"""Perplexity in PyTorch, counted as llama-perplexity counts it.

The text is cut into windows of `n_ctx` tokens; in each only the second half is scored, so that every scored token has
at least n_ctx / 2 tokens before it. llama.cpp puts a BOS token in the place of the first token of each window when the
model asks for one (`add_bos_token`).

`perplexity` is for a model in memory; `dense_and_compressed` reads each block once and takes all windows through its
two versions, in the memory of one block.
"""

import copy
import math
from collections.abc import Callable

import torch

from .blocks import Activations, BlockModel, apply_norms, apply_work
from .checkpoint import WorkFolder
from .loss import cross_entropy
from .threads import side_by_side

MEMORY_BYTES = 512 << 20  # of hidden states of either version that are kept in memory; larger ones are in a file


def first_scored(n_ctx: int) -> int:
    """Position of the first token whose successor is scored (llama-perplexity's n_ctx / 2)."""
    return n_ctx // 2


@torch.no_grad()
def perplexity(
    model, windows: torch.Tensor, bos: int | None = None, progress: Callable[[int], None] = lambda done: None
) -> float:
    """exp of the mean next-token loss over the second halves of `windows` [count, n_ctx], token ids."""
    device = model.get_input_embeddings().weight.device
    head = model.get_output_embeddings().weight
    start = first_scored(windows.shape[1])
    total, count = 0.0, 0
    for number, window in enumerate(_with_bos(windows, bos).to(device), 1):
        hidden = model.model(window[None]).last_hidden_state[0, start:-1]
        loss, _ = cross_entropy(hidden, head, window[start + 1 :], gradient=False)
        total, count = total + loss, count + len(hidden)
        progress(number)
    return math.exp(total / count)


def dense_and_compressed(
    model: BlockModel,
    work: WorkFolder,
    windows: torch.Tensor,
    bos: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[float, float]:
    """`perplexity` of the model as it is, and with the work folder's linears and norms in it, over the same windows.

    `progress` gets (done, total) in passages of a window through a block. Hidden states beyond `MEMORY_BYTES` are kept
    in a file in the work folder. Raises DBFError when a weight is missing or the disk is full.
    """
    windows = _with_bos(windows, bos)
    count, length = windows.shape
    shape = (count, length, model.config.hidden_size)
    dense, compressed = (Activations(*shape, model.dtype, work.path, MEMORY_BYTES) for _ in range(2))
    for number in range(count):
        embedded = model.embed(windows[number : number + 1])
        for states in (dense, compressed):
            states.write(slice(number, number + 1), embedded)
    model.release()
    done, total = 0, 2 * len(model) * count

    @torch.no_grad()
    def advance(states: Activations, index: int, block, number: int) -> None:
        place = slice(number, number + 1)
        states.write(place, model.run(index, block, states.read(place)))

    with side_by_side(model.workers(length, backward=False)) as pool:
        for index in range(len(model)):
            block = model.block(index)
            for states in (dense, compressed):
                if states is compressed:
                    apply_work(index, block, work, model.dtype)
                for _ in pool.map(lambda number, s=states, i=index, b=block: advance(s, i, b, number), range(count)):
                    done += 1
                    progress(done, total)
    tuned = copy.deepcopy(model.norm)
    apply_norms(tuned, "model.norm.", work.final_norms())
    return _last_step(model, dense, model.norm, windows), _last_step(model, compressed, tuned, windows)


@torch.no_grad()
def _last_step(model: BlockModel, states: Activations, norm, windows: torch.Tensor) -> float:
    """Perplexity from the last block's outputs."""
    start = first_scored(windows.shape[1])
    total = 0.0
    for number, window in enumerate(windows):
        hidden = norm(states.read(number)[start:-1].to(model.device))
        total += cross_entropy(hidden, model.head, window[start + 1 :].to(model.device), gradient=False)[0]
    return math.exp(total / (len(windows) * (windows.shape[1] - 1 - start)))


def _with_bos(windows: torch.Tensor, bos: int | None) -> torch.Tensor:
    """A copy of the windows that begin with the BOS token, if there is one."""
    windows = windows.clone()
    if bos is not None:
        windows[:, 0] = bos
    return windows

"""Perplexity in PyTorch, counted as llama-perplexity counts it.

The text is cut into windows of `n_ctx` tokens; in each only the second half is scored, so that every scored token has
at least n_ctx / 2 tokens before it. llama.cpp puts a BOS token in the place of the first token of each window when the
model asks for one (`add_bos_token`).
"""

import math
from collections.abc import Callable

import torch

from .loss import cross_entropy


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
    for number, window in enumerate(windows.to(device), 1):
        ids = window.clone()
        if bos is not None:
            ids[0] = bos
        hidden = model.model(ids[None]).last_hidden_state[0, start:-1]
        loss, _ = cross_entropy(hidden, head, window[start + 1 :], gradient=False)
        total, count = total + loss, count + len(hidden)
        progress(number)
    return math.exp(total / count)

"""Which rows and columns of a weight matter: RMS of a linear's input activations and of its output gradients.

The paper (section 3.3) factorizes diag(o) W diag(i), i the norm of the input activations per column and o the norm of
the loss gradient per row, a rank-1 approximation of the diagonal Fisher information. One pass over the calibration
windows yields both, in memory that does not grow with their number: hooks keep running sums of squares, no weight has
a gradient, blocks are recomputed in the backward pass (gradient checkpointing), and logits exist only piece by piece.
"""

from collections.abc import Callable

import torch

from .loss import cross_entropy
from .model import block_linears, checkpointing


def measure(model, windows: torch.Tensor, progress: Callable[[int], None] = lambda done: None):
    """Importance of every block linear over `windows` [count, length] (token ids), one window at a time.

    Returns {"<linear>.input": [n_in], "<linear>.output": [n_out]} in float32 on the CPU: root of the mean over all
    tokens of the squared activation, and of the squared gradient of the mean next-token loss.
    """
    sums: dict[str, torch.Tensor] = {}
    handles = []
    first_pass = False  # blocks run again in the backward pass: that pass must neither count nor hold anything

    def add(key: str, values: torch.Tensor) -> None:
        square = values.detach().float().flatten(0, -2).square().sum(dim=0)
        sums[key] = sums[key] + square if key in sums else square

    def hook(name: str):
        def forward(_module, inputs, output):
            if first_pass:
                add(f"{name}.input", inputs[0])
                output.register_hook(lambda gradient: add(f"{name}.output", gradient))

        return forward

    for name, module in block_linears(model).items():
        handles.append(module.register_forward_hook(hook(name)))
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings().weight
    try:
        with checkpointing(model):
            for number, window in enumerate(windows.to(embedding.weight.device), 1):
                embedded = embedding(window[None]).requires_grad_()
                first_pass = True
                hidden = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
                first_pass = False
                flat = hidden.detach()[0, :-1]
                _, gradient = cross_entropy(flat, head, window[1:])
                full = torch.zeros_like(hidden)
                full[0, :-1] = gradient / len(flat)
                hidden.backward(full)
                progress(number)
    finally:
        for handle in handles:
            handle.remove()
    tokens = windows.numel()
    return {key: (total / tokens).sqrt().cpu() for key, total in sums.items()}

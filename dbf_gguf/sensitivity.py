"""How much the model suffers from each linear's compression: what an adaptive budget is computed from.

Every linear is factorized by a few iterations at two widths k₀ < k₁ of 1 and 2 bits a weight. Put into the otherwise
dense model at k₀, it gives the effect

    effect(k₀) = KL(dense ‖ dense but for this linear)        mean over the tokens of a few calibration windows

At k₁ the KL is taken to have fallen as the factorization error has, effect(k₁) = effect(k₀) · e(k₁) / e(k₀): where
it is small the KL is quadratic in the error of the weights, and a pass is saved. The two points are the linear's
curve, from which `adaptive_budget` allocates any number of bits: the widths do not depend on the wanted size.

The KL, not the loss on the text, because it is what the tuning minimizes, and because it is 0 for the dense model: a
next-token loss may fall by chance when a linear is damaged. Against the dense model, not a compressed one, because at
few bits and before tuning the latter predicts next to nothing, in which the differences drown.
"""

import copy
import json
import math
from collections.abc import Callable, Collection
from concurrent.futures import as_completed
from pathlib import Path
from queue import SimpleQueue

import torch

from .budget import Curve, uniform_budget
from .checkpoint import write_atomically
from .errors import DBFError
from .factorize import factorize
from .factors import BLOCK
from .loss import kl_divergence
from .model import block_linears, put, replace_linear
from .threads import side_by_side

MEASURED_BITS = (1.0, 2.0)
ITERATIONS = 15  # enough to compare linears; the errors are some percent above those of a full factorization
TOKENS, LENGTH = 512, 256  # of calibration text, in windows of at most LENGTH
LEAST_EFFECT = 1e-9  # below it the KL is rounding
FORMAT = 1


def measure(
    model,
    windows: torch.Tensor,
    importance: dict[str, torch.Tensor],
    *,
    known: Collection[str],
    workers: int,
    seed: int,
    record: Callable[[str, Curve], None],
) -> None:
    """Measures every block linear of the dense `model` that is not in `known`, and tells `record` each curve.

    windows     calibration windows [count, length], token ids
    importance  that of `importance.measure`
    workers     how many linears at a time; `record` is called by one thread alone

    Memory: the model, and for each worker what factorizing one linear takes. Raises DBFError for weights that cannot be
    factorized.
    """
    linears = block_linears(model)
    shapes = {name: tuple(module.weight.shape) for name, module in linears.items()}
    low, high = (uniform_budget(shapes, bits) for bits in MEASURED_BITS)
    windows = windows[:, :LENGTH]
    ids = windows[: math.ceil(TOKENS / windows.shape[1])].to(model.get_input_embeddings().weight.device)
    head = model.get_output_embeddings().weight
    # Copies of the modules, not of the tensors: each worker replaces a linear in a model of its own.
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    models: SimpleQueue = SimpleQueue()
    for _ in range(workers):
        models.put(copy.deepcopy(model, dict(tensors)))

    @torch.no_grad()
    def hidden(model) -> torch.Tensor:
        return model.model(ids, use_cache=False).last_hidden_state.flatten(0, 1)

    def curve(name: str) -> Curve:
        widths = low[name], max(low[name] + BLOCK, high[name])
        try:
            results = [
                factorize(
                    linears[name].weight.detach()[None],
                    k,
                    importance_in=importance[f"{name}.input"][None],
                    importance_out=importance[f"{name}.output"][None],
                    iterations=ITERATIONS,
                    seed=seed,
                )
                for k in widths
            ]
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise DBFError(f"{name}: {error}") from None
        (((factors,), error), (_, smaller)) = results
        student = models.get()
        try:
            replace_linear(student, name, factors, linears[name].weight.dtype)
            total, _ = kl_divergence(hidden(student), reference, head, gradient=False)
        finally:
            put(student, name, linears[name])
            models.put(student)
        effect = max(total / ids.numel(), LEAST_EFFECT)
        ratio = min(smaller.item() / max(error.item(), 1e-30), 0.999)  # a curve that does not fall cannot be ranked
        return (widths[0], effect), (widths[1], effect * max(ratio, 1e-6))

    with side_by_side(workers) as pool:
        reference = pool.submit(hidden, model).result()
        waiting = {pool.submit(curve, name): name for name in shapes if name not in known}
        for future in as_completed(waiting):
            record(waiting[future], future.result())


def write(path: Path, weights: str, curves: dict[str, Curve], **allocation) -> None:
    """Stores the curves of the model with the fingerprint `weights` as JSON, and `allocation` beside them."""
    text = json.dumps({"format": FORMAT, "weights": weights, "curves": curves} | allocation, indent=1)
    write_atomically(path, lambda part: part.write_text(text))


def read(path: Path, weights: str) -> dict[str, Curve]:
    """The curves stored in `path`. Raises DBFError when it is no such file, or one of a model with other weights."""
    try:
        stored = json.loads(path.read_text())
        if stored["format"] != FORMAT:
            raise ValueError("another format")
        found = stored["weights"]
        curves = {name: ((int(a), float(b)), (int(c), float(d))) for name, ((a, b), (c, d)) in stored["curves"].items()}
    except OSError as error:
        raise DBFError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DBFError(f"{path} is no budget: give uniform, adaptive, or a work folder's budget.json") from None
    if found != weights:
        raise DBFError(f"{path} was measured on another model: --budget adaptive measures this one")
    return curves

"""The continuous parameters of a compressed model or block: all scales and norms as one vector.

All trained vectors are one flat vector θ = θ₀ + r ⊙ δ, where r is the RMS of the vector an entry belongs to. Adam
moves δ, so one learning rate is relative to the size of each vector, however large that is. θ and δ are float32;
modules of lower precision get rounded copies after every step.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from .checkpoint import SCALES
from .model import DBFLinear, norm_weights

BETAS = (0.9, 0.99)
WARM_UP = 20  # steps
FINAL_RATE = 0.02  # of the peak, at the end of the cosine


class Trainables:
    """The trained parameters of a model as one flat float32 vector, in a fixed order."""

    def __init__(self, model: nn.Module):
        self.parameters = {
            f"{name}.{scale}": getattr(module, scale)
            for name, module in model.named_modules()
            if isinstance(module, DBFLinear)
            for scale in SCALES
        } | norm_weights(model)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        values = [p.detach().float().flatten() for p in self.parameters.values()]
        self.start = torch.cat(values)  # θ₀ [n]
        self.rms = torch.cat([v.square().mean().sqrt().expand(len(v)) for v in values])  # r [n]
        self.sizes = [len(v) for v in values]

    def set(self, delta: torch.Tensor) -> None:
        """Writes θ₀ + r ⊙ δ into the model."""
        theta = self.start + self.rms * delta
        with torch.no_grad():
            for parameter, value in zip(self.parameters.values(), theta.split(self.sizes), strict=True):
                parameter.copy_(value.view_as(parameter))

    def gradient(self, output: torch.Tensor, factor: torch.Tensor | None = None, others: Sequence[torch.Tensor] = ()):
        """The gradient of Σ factor ⊙ output, or of a scalar output, with respect to δ, float32 [n], and to `others`.

        `output` is computed by the model.
        """
        gradients = torch.autograd.grad(output, [*self.parameters.values(), *others], factor)
        own = gradients[: len(self.parameters)]
        return torch.cat([g.float().flatten() for g in own]) * self.rms, list(gradients[len(own) :])

    def values(self, delta: torch.Tensor) -> dict[str, torch.Tensor]:
        """θ by name, float32."""
        named = zip(self.parameters.items(), (self.start + self.rms * delta).split(self.sizes), strict=True)
        return {name: value.view_as(parameter).clone() for (name, parameter), value in named}

    def tensors(self, delta: torch.Tensor) -> dict[str, torch.Tensor]:
        """θ by name as it is exported: scales in float16, norms in float32."""
        return {name: value.half() if name.endswith(SCALES) else value for name, value in self.values(delta).items()}


def learning_rate(step: int, steps: int | None, peak: float) -> float:
    """Linear warm-up over 20 steps, then a cosine down to 2 % of the peak. `steps` may be unknown during warm-up."""
    rate = peak * min(1.0, (step + 1) / WARM_UP)
    if steps is None:
        return rate
    return rate * (FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))

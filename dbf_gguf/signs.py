"""Training of signs: straight through, and only the surest change.

A sign has no slope. So beside every sign s a latent value z is kept, ±1 at first; z is moved against the gradient for s
(the straight-through estimate), and s follows once z has changed sides:

    v ← β v + (1 − β) mean g²        z ← z − η g / √v        s ← sign(z), for the largest |z| that differ in sign from s

v is one number a matrix. The paper has Adam here, which gives every entry a v of its own: then those whose gradient is
nothing but noise move as far as those that matter, and signs are turned at random (tests/test_blockwise.py has a case).

However many differ, at most a share of all signs flips in a step (PV-tuning: few changes at a high rate instead of many
at a low one), and none in the first steps. z takes 4 bytes a sign, so this is for one block, or a few linears of a
model.
"""

import math
from collections.abc import Iterable

import torch

from .model import DBFLinear

BETA = 0.95
WARM_UP = 5  # steps without a flip
SHARE = 1e-4  # of a matrix' signs that may flip in a step


class SignTraining:
    """Trains both sign matrices of `linears`, in place. While it lives, the matrices have gradients; see `close`."""

    def __init__(self, linears: Iterable[DBFLinear]):
        self.signs = [matrix for linear in linears for matrix in (linear.signs_a, linear.signs_b)]
        self.latent = [matrix.detach().to(torch.float32, copy=True) for matrix in self.signs]
        self.square = [0.0] * len(self.signs)  # v
        self.steps = 0
        for matrix in self.signs:
            matrix.requires_grad_(True)

    @torch.no_grad()
    def step(self, gradients: Iterable[torch.Tensor], rate: float) -> None:
        """One step against the gradients, in the order of `signs`."""
        self.steps += 1
        for number, (s, z, g) in enumerate(zip(self.signs, self.latent, gradients, strict=True)):
            g = g.float()
            v = self.square[number] = BETA * self.square[number] + (1 - BETA) * g.square().mean().item()
            z.add_(g, alpha=-rate / max(1e-30, math.sqrt(v / (1 - BETA**self.steps))))
            if self.steps > WARM_UP:
                self._flip(s, z)

    def _flip(self, s: torch.Tensor, z: torch.Tensor) -> None:
        flat_s, flat_z = s.view(-1), z.view(-1)
        differ = (flat_s * flat_z < 0).nonzero()[:, 0]
        most = max(1, int(SHARE * len(flat_s)))
        if len(differ) > most:
            differ = differ[flat_z[differ].abs().topk(most).indices]
        flat_s[differ] = -flat_s[differ]

    def close(self) -> None:
        """The matrices are constants again."""
        for matrix in self.signs:
            matrix.requires_grad_(False)

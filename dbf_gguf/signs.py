"""Training of signs: straight through, and only the surest change.

A sign has no slope. So beside every sign s a latent value z is kept, +-1 at first; z is moved by Adam against the
gradient for s (the straight-through estimate), and s follows once z has changed sides:

    v ← β₂ v + (1 − β₂) g²        z ← z − η g / √v        s ← sign(z), for the largest |z| that differ in sign from s

However many differ, at most a share of all signs flips in a step (PV-tuning: few changes at a high rate instead of many
at a low one), and none in the first steps, while v is still a guess.

In memory are z and v in float32, 8 bytes a sign, so this is for the linears of one block, or a random few of a model.
"""

from collections.abc import Iterable

import torch

from .model import DBFLinear

BETA = 0.99  # β₂
WARM_UP = 5  # steps without a flip
SHARE = 1e-4  # of a matrix' signs that may flip in a step


class SignTraining:
    """Trains both sign matrices of `linears`, in place. While it lives, the matrices have gradients; see `close`."""

    def __init__(self, linears: Iterable[DBFLinear]):
        self.signs = [matrix for linear in linears for matrix in (linear.signs_a, linear.signs_b)]
        self.latent = [matrix.detach().float() for matrix in self.signs]
        self.square = [torch.zeros_like(z) for z in self.latent]
        self.steps = 0
        for matrix in self.signs:
            matrix.requires_grad_(True)

    @torch.no_grad()
    def step(self, gradients: Iterable[torch.Tensor], rate: float) -> None:
        """One step against the gradients, in the order of `signs`."""
        self.steps += 1
        for s, z, v, g in zip(self.signs, self.latent, self.square, gradients, strict=True):
            g = g.float()
            v.lerp_(g.square(), 1 - BETA)
            size = v.div(1 - BETA**self.steps).sqrt_().clamp_min_(1e-30)
            z.addcdiv_(g, size, value=-rate)
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

"""One linear layer in Double Binary Factorization, and how its signs are packed.

    W ≈ diag(a) · A · diag(m) · B · diag(b)        A ∈ {±1}^(n_out×k),  B ∈ {±1}^(k×n_in)          (paper, eq. 3)
    y = a ⊙ (A (m ⊙ (B (b ⊙ x))))

Signs are packed as FORMAT's `DBF` tensor type stores them: 32 signs in one little-endian 32-bit word, bit j of the word
is element j of the block, 1 = +1 and 0 = -1. On bytes this is simply little-endian bit order, so the packed rows below
are the bytes of the GGUF tensor, and the checkpoint and the file can be compared without decoding.
"""

from dataclasses import dataclass

import numpy as np
import torch

BLOCK = 32  # signs in one packed word; n_in and k are multiples of it


def pack_signs(signs: torch.Tensor) -> np.ndarray:
    """Packs ±1 (any dtype; positive means +1) `[rows, columns]` into uint8 `[rows, columns / 8]`.

    Raises ValueError when `columns` is no multiple of 32.
    """
    if signs.ndim != 2 or signs.shape[1] % BLOCK:
        raise ValueError(f"signs of shape {tuple(signs.shape)}: need two dimensions, columns a multiple of {BLOCK}")
    return np.packbits((signs > 0).cpu().numpy(), axis=1, bitorder="little")


def unpack_signs(packed: np.ndarray) -> torch.Tensor:
    """The inverse of `pack_signs`: uint8 `[rows, columns / 8]` to int8 ±1 `[rows, columns]`."""
    bits = np.unpackbits(np.ascontiguousarray(packed), axis=1, bitorder="little")
    return torch.from_numpy(bits.view(np.int8)) * 2 - 1


@dataclass
class Factors:
    """The five parts of a factorized linear. Signs are int8 ±1, scales float32 (computing) or float16 (stored)."""

    signs_a: torch.Tensor  # [n_out, k]
    signs_b: torch.Tensor  # [k, n_in]
    scale_a: torch.Tensor  # [n_out]
    scale_m: torch.Tensor  # [k]
    scale_b: torch.Tensor  # [n_in]

    def __post_init__(self):
        n_out, k = self.signs_a.shape
        n_in = self.signs_b.shape[1]
        shapes = [tuple(t.shape) for t in (self.signs_b, self.scale_a, self.scale_m, self.scale_b)]
        if shapes != [(k, n_in), (n_out,), (k,), (n_in,)]:
            raise ValueError(f"factor shapes do not chain: A {n_out}x{k}, then B, a, m, b = {shapes}")

    @property
    def n_out(self) -> int:
        return self.signs_a.shape[0]

    @property
    def k(self) -> int:
        return self.signs_a.shape[1]

    @property
    def n_in(self) -> int:
        return self.signs_b.shape[1]

    def dense(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> torch.Tensor:
        """The represented weight `[n_out, n_in]`, computed in `dtype` on `device`, by default where the factors are."""
        signs_a, signs_b = self.signs_a.to(device).to(dtype), self.signs_b.to(device).to(dtype)
        a, m, b = (scale.to(device, dtype) for scale in (self.scale_a, self.scale_m, self.scale_b))
        return (a[:, None] * signs_a * m) @ (signs_b * b)

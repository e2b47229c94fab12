"""Products with sign matrices by table lookup: the greater part of tuning, on CPUs without matrix units.

torch multiplies ±1 matrices as if they were any numbers. Sums of four inputs that are looked up instead (llama.cpp's
CPU kernels of this project, `cuda_patches/src/ggml/src/ggml-cpu/dbf-tables.h`) take a quarter to a third of the time
of float32 products with AVX2; on a Zen 4, which multiplies bfloat16, a whole step of tuning is 1.12 times as fast. With
y = a ⊙ t, t = A h, h = m ⊙ z, z = B (b ⊙ x) and the gradient ȳ of y, the gradients need the transposed signs only:

    ā = Σ ȳ ⊙ t        u = Aᵀ (a ⊙ ȳ)        m̄ = Σ u ⊙ z        v = Bᵀ (m ⊙ u)        b̄ = Σ v ⊙ x        x̄ = b ⊙ v

(Σ over tokens). Inputs of a product are rounded to 14 bits of the largest sum of four of their token: a relative error
of some 1e-4 in either direction, much less than what one batch of text differs from the next.

`lookup.cpp` is compiled when it is first needed, with the user's C++ compiler, and kept in the cache. It runs on the
OpenMP threads of torch: those of a second pool would compete with threads of the first that still wait for work.
"""

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import nn

from .errors import DBFError
from .factors import BLOCK, pack_signs
from .machine import compiler
from .model import DBFLinear
from .paths import cache_dir, data_dir

SOURCE = Path(__file__).with_name("lookup.cpp")
TABLES = "src/ggml/src/ggml-cpu/dbf-tables.h"  # in the patch set
FLAGS = ("-O3", "-std=c++17", "-mavx2", "-mfma", "-fPIC", "-fopenmp")


def faster(device: str, dtype: torch.dtype) -> bool:
    """Whether lookups are known to be faster than torch's products in `dtype`.

    They are in float32 with AVX2, and in bfloat16 with AVX-512 but no AMX. Other CPUs were not measured.
    """
    if device != "cpu":
        return False
    capability = torch.backends.cpu.get_cpu_capability()
    if dtype == torch.float32:
        return capability == "AVX2"
    return dtype == torch.bfloat16 and capability == "AVX512" and not torch.cpu.get_capabilities().get("amx_bf16")


@cache
def product():
    """The compiled function. Raises DBFError, one line, when it cannot be compiled or loaded here."""
    command = compiler("CXX", "c++", "g++")
    if not command:
        raise DBFError("there is no C++ compiler (apt-get install g++)")
    header = data_dir("cuda_patches") / TABLES
    openmp = _openmp()
    version = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    parts = [SOURCE.read_text(), header.read_text(), *FLAGS, *command, version, *openmp]
    folder = cache_dir() / "lookup"
    library = folder / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary) / "lookup"
            to_object = [*FLAGS, f"-I{header.parent}", "-c", SOURCE, "-o", f"{made}.o"]
            to_library = ["-shared", f"{made}.o", *openmp, "-o", f"{made}.so"]
            for arguments in (to_object, to_library):
                done = subprocess.run([*command, *arguments], capture_output=True, text=True)
                if done.returncode:
                    reason = next((line for line in done.stderr.splitlines() if "error" in line), "no reason given")
                    raise DBFError(f"{command[0]} cannot compile {SOURCE.name}: {reason}")
            os.replace(f"{made}.so", library)
    try:
        function = ctypes.CDLL(str(library)).dbf_sign_product
    except OSError as error:
        raise DBFError(f"{library} cannot be loaded: {error}") from None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, number, number, pointer, pointer, number, pointer, ctypes.c_int]
    function.restype = None
    return function


def _openmp() -> list[str]:
    """What to link for OpenMP: the very library that torch has loaded, if it is GCC's."""
    try:
        found = re.search(r"/\S*/libgomp[^/\s]*", Path("/proc/self/maps").read_text())
    except OSError:
        found = None
    return [found[0]] if found else ["-fopenmp"]


def multiply(packed: torch.Tensor, scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Signs, packed as uint8 [rows, n / 8], times scale ⊙ x, float32 [n] and [tokens, n]: [tokens, rows]."""
    (rows, columns), tokens = packed.shape, len(x)
    x, y = x.contiguous(), torch.empty(tokens, rows)
    if x.shape[1:] != scale.shape or len(scale) != 8 * columns or {x.dtype, scale.dtype} != {torch.float32}:
        raise ValueError(f"rows of {8 * columns} signs, {len(scale)} scales, vectors {tuple(x.shape)} {x.dtype}")
    assert packed.is_contiguous() and scale.is_contiguous()
    sizes, pointers = (rows, 8 * columns), (scale.data_ptr(), x.data_ptr())
    product()(packed.data_ptr(), *sizes, *pointers, tokens, y.data_ptr(), torch.get_num_threads())
    return y


class _Lookup:
    """The forward pass of a DBFLinear: both sign matrices and their transposes, packed; anew when they have changed."""

    def __init__(self, linear: DBFLinear):
        self.linear, self.versions = linear, None

    def packed(self) -> list[torch.Tensor]:
        """B [k, n_in / 8], A [n_out, k / 8], Aᵀ [k, n_out / 8], Bᵀ [n_in, k / 8]."""
        a, b = self.linear.signs_a.detach(), self.linear.signs_b.detach()
        if (a._version, b._version) != self.versions:
            self.matrices = [torch.from_numpy(pack_signs(matrix.contiguous())) for matrix in (b, a, a.T, b.T)]
            self.versions = a._version, b._version
        return self.matrices

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n_in], of any floating-point dtype -> y [..., n_out], float32, without the bias."""
        linear = self.linear
        scales = linear.scale_b, linear.scale_m, linear.scale_a
        return _Product.apply(x.reshape(-1, x.shape[-1]).float(), *scales, self.packed()).view(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """y of the formulas above, [tokens, n_out]."""

    @staticmethod
    def forward(ctx, x, scale_b, scale_m, scale_a, packed):
        z = multiply(packed[0], scale_b, x)
        t = multiply(packed[1], scale_m, z)
        ctx.save_for_backward(x, z, t, scale_b, scale_m, scale_a)
        ctx.packed = packed
        return t * scale_a

    @staticmethod
    def backward(ctx, gradient):
        x, z, t, scale_b, scale_m, scale_a = ctx.saved_tensors
        u = multiply(ctx.packed[2], scale_a, gradient)
        v = multiply(ctx.packed[3], scale_m, u)
        return v * scale_b, (v * x).sum(0), (u * z).sum(0), (gradient * t).sum(0), None


@contextmanager
def lookups(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Within, the DBFLinears of `model`, on a CPU, look their products up, but those whose signs are trained.

    A linear whose n_out is no multiple of 32 stays as it is. Raises what `product` raises.
    """
    found = [m for m in model.modules() if enabled and isinstance(m, DBFLinear) and m.signs_a.shape[0] % BLOCK == 0]
    if found:
        product()
    for linear in found:
        linear.lookup = _Lookup(linear)
    try:
        yield
    finally:
        for linear in found:
            linear.lookup = None

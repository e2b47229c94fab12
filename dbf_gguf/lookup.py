"""Products with sign matrices by table lookup: the greater part of tuning, on CPUs without matrix units.

torch multiplies ±1 matrices as if they were any numbers. Sums of four inputs that are looked up instead (llama.cpp's
CPU kernels of this project, `cuda_patches/src/ggml/src/ggml-cpu/dbf-tables.h`) take a quarter to a third of the time
of float32 products with AVX2; on a Zen 4, which multiplies bfloat16, a whole step of tuning is 1.3 times as fast. With
y = a ⊙ t, t = A h, h = m ⊙ z, z = B (b ⊙ x) and the gradient ȳ of y, the gradients need the transposed signs only:

    ā = Σ ȳ ⊙ t        u = Aᵀ (a ⊙ ȳ)        m̄ = Σ u ⊙ z        v = Bᵀ (m ⊙ u)        b̄ = Σ v ⊙ x        x̄ = b ⊙ v

(Σ over tokens); what is no product is computed in the same pass, while its rows are in the cache. Inputs of a product
are rounded to 14 bits of the largest sum of four of their token: a relative error of some 1e-4 in either direction,
much less than what one batch of text differs from the next.

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
from .machine import compiler, cpu_features
from .model import DBFLinear
from .paths import cache_dir, data_dir

SOURCE = Path(__file__).with_name("lookup.cpp")
TABLES = "src/ggml/src/ggml-cpu/dbf-tables.h"  # in the patch set
FLAGS = ("-O3", "-std=c++17", "-mavx2", "-mfma", "-fPIC", "-fopenmp")
DTYPES = (torch.float32, torch.bfloat16)
AVX512 = ("f", "bw", "vbmi", "vnni")  # what the code for AVX-512 needs


def faster(device: str, dtype: torch.dtype) -> bool:
    """Whether lookups are known to be faster than torch's products in `dtype`.

    They are in float32 with AVX2, and in bfloat16 with AVX-512 but no AMX. Other CPUs were not measured.
    """
    if device != "cpu":
        return False
    capability = torch.backends.cpu.get_cpu_capability()
    if dtype == torch.float32:
        return capability == "AVX2"
    return dtype == torch.bfloat16 and capability == "AVX512" and not cpu_features().get("amx_bf16")


@cache
def product():
    """The compiled function. Raises DBFError, one line, when it cannot be compiled or loaded here."""
    command = compiler("CXX", "c++", "g++")
    if not command:
        raise DBFError("there is no C++ compiler (apt-get install g++)")
    header = data_dir("cuda_patches") / TABLES
    openmp = _openmp()
    version = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    found = cpu_features()
    wide = [f"-mavx512{part}" for part in AVX512] if all(found.get(f"avx512_{part}") for part in AVX512) else []
    flags = [*FLAGS, *wide]
    parts = [SOURCE.read_text(), header.read_text(), *flags, *command, version, *openmp]
    folder = cache_dir() / "lookup"
    library = folder / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary) / "lookup"
            to_object = [*flags, f"-I{header.parent}", "-c", SOURCE, "-o", f"{made}.o"]
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
    either = [pointer, ctypes.c_int]  # the address, and whether it is bfloat16
    inputs, results = [pointer, *either, pointer, pointer], [pointer, pointer, *either, *either, pointer]
    function.argtypes = [pointer, number, number, number, ctypes.c_int, *inputs, *results]
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
    y = torch.empty(len(x), len(packed))
    _multiply(packed, scale, x, y=y)
    return y


def _multiply(
    packed, scale, x, *, x_other=None, x_dots=None, y=None, out_scale=None, scaled=None, other=None, dots=None
) -> None:
    """The product p = signs · (scale ⊙ x), of which in the same pass is made what is given:

    x_dots  [n]             Σ x ⊙ x_other, over the tokens
    y       [tokens, rows]  p
    scaled  [tokens, rows]  p ⊙ out_scale
    dots    [rows]          Σ p ⊙ other, over the tokens

    x, scaled and other may be bfloat16, all else is float32.
    """
    rows, columns = packed.shape
    if x.shape[1:] != scale.shape or len(scale) != 8 * columns or scale.dtype != torch.float32 or x.dtype not in DTYPES:
        raise ValueError(f"rows of {8 * columns} signs, {len(scale)} scales, vectors {tuple(x.shape)} {x.dtype}")
    x = x.contiguous()
    rest = (packed, scale, x_other, x_dots, y, out_scale, scaled, other, dots)
    assert all(tensor is None or tensor.is_contiguous() for tensor in rest)

    def address(tensor):
        return None if tensor is None else tensor.data_ptr()

    def vectors(tensor):
        return address(tensor), tensor is not None and tensor.dtype == torch.bfloat16

    sizes = (rows, 8 * columns, len(x), torch.get_num_threads())
    inputs = (address(scale), *vectors(x), address(x_other), address(x_dots))
    results = (address(y), address(out_scale), *vectors(scaled), *vectors(other), address(dots))
    product()(address(packed), *sizes, *inputs, *results)


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
        """x [..., n_in], float32 or bfloat16 -> y [..., n_out] of the same dtype, without the bias."""
        linear = self.linear
        scales = linear.scale_b, linear.scale_m, linear.scale_a
        return _Product.apply(x.reshape(-1, x.shape[-1]).contiguous(), *scales, self.packed()).view(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """y of the formulas above, [tokens, n_out]."""

    @staticmethod
    def forward(ctx, x, scale_b, scale_m, scale_a, packed):
        z = multiply(packed[0], scale_b, x)
        t, y = torch.empty(len(x), len(scale_a)), x.new_empty(len(x), len(scale_a))
        _multiply(packed[1], scale_m, z, y=t, out_scale=scale_a, scaled=y)
        ctx.save_for_backward(x, z, t, scale_b, scale_m, scale_a)
        ctx.packed = packed
        return y

    @staticmethod
    def backward(ctx, of_y):
        x, z, t, *scales = ctx.saved_tensors
        u, of_x = torch.empty_like(z), torch.empty_like(x)
        of_b, of_m, of_a = (torch.empty_like(scale) for scale in scales)
        scale_b, scale_m, scale_a = scales
        _multiply(ctx.packed[2], scale_a, of_y, x_other=t, x_dots=of_a, y=u, other=z, dots=of_m)
        _multiply(ctx.packed[3], scale_m, u, out_scale=scale_b, scaled=of_x, other=x, dots=of_b)
        return of_x, of_b, of_m, of_a, None


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

"""DBF products to compute with the emulated kernels, and what must come out.

`Case` is one product with everything that may matter to a kernel: shapes, types, strides, alignment of each pointer,
the card, the order of the threads. `reference` is the product in float64, straight from the definition. `bound` is how
far a right kernel may be off. `run_cases` gives cases to a driver program in one file and reads the results.
"""

import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from emulator import run

QMAX = 127 * 256 + 127  # two planes of int8
TINY = 1e-30  # a vector whose largest element is below may count as zero
BUFFERS = ("A", "B", "sa", "sm", "sb", "x", "y")


@dataclass(frozen=True)
class Device:
    """What the host side of the kernels asks a card for."""

    cc: int = 800  # 100*major + 10*minor
    n_sm: int = 4
    shared: int = 99 * 1024  # bytes that a block may have


@dataclass
class Case:
    n_in: int
    k: int
    n_out: int
    n_tokens: int = 1
    device: Device = Device()
    types: tuple[str, str, str] = ("f16", "f16", "f16")  # of sa, sm, sb
    padding: int = 0  # floats between the tokens of x
    offsets: dict[str, int] = field(default_factory=dict)  # buffer -> bytes behind a multiple of 256
    path: str = ""  # what the user asks for: "" is the default
    seed: int = 0  # of the fibers' order
    poison: int = 0xFF
    magnitude: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)  # of sa, sm, sb, x
    edit: object = None  # called with the dict of arrays, to put in what is special

    def __post_init__(self):
        rng = np.random.default_rng([self.n_in, self.k, self.n_out, self.n_tokens])
        dtypes = [np.float16 if t == "f16" else np.float32 for t in self.types]
        self.arrays = {
            "A": rng.integers(0, 2**32, (self.n_out, self.k // 32), np.uint32),
            "B": rng.integers(0, 2**32, (self.k, self.n_in // 32), np.uint32),
            "sa": (rng.standard_normal(self.n_out) * self.magnitude[0]).astype(dtypes[0]),
            "sm": (rng.standard_normal(self.k) * self.magnitude[1]).astype(dtypes[1]),
            "sb": (rng.standard_normal(self.n_in) * self.magnitude[2]).astype(dtypes[2]),
            "x": (rng.standard_normal((self.n_tokens, self.n_in)) * self.magnitude[3]).astype(np.float32),
        }
        if self.edit:
            self.edit(self.arrays)

    def __str__(self):
        d = self.device
        shape = f"{self.n_in}x{self.k}x{self.n_out} tokens {self.n_tokens} {'/'.join(self.types)}"
        card = f"cc {d.cc} sm {d.n_sm} shared {d.shared}"
        return f"{shape}, {card}, {self.path} seed {self.seed} padding {self.padding} offsets {self.offsets}"


def signs(words: np.ndarray) -> np.ndarray:
    """Bit j of a row's 32-bit word i is element 32*i + j, 1 = +1 and 0 = -1. float64."""
    bits = words[:, :, None] >> np.arange(32, dtype=np.uint32) & 1
    return bits.reshape(len(words), -1) * 2.0 - 1.0


def reference(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(v, h, y) in float64: v = sb*x [tokens, n_in], h = sm*(B v) [tokens, k], y = sa*(A h) [tokens, n_out]."""
    a = {name: array.astype(np.float64) for name, array in case.arrays.items() if name not in "AB"}
    with np.errstate(invalid="ignore"):
        v = a["x"] * a["sb"]
        h = (v @ signs(case.arrays["B"]).T) * a["sm"]
        y = (h @ signs(case.arrays["A"]).T) * a["sa"]
    return v, h, y


def bound(case: Case, half: bool = False) -> np.ndarray:
    """Largest |error| of each y [tokens, n_out] that rounding explains.

    A vector v is rounded to multiples of d <= max|v|/QMAX: each element is off by at most d/2, and by a little more
    because 1/d is rounded too: 0.51 d. (`half`: to fp16 instead, off by |v| 2^-11.) The row of signs adds up these
    errors e_i as +-e_i. The signs of the tests are random and know nothing of the errors, so by Hoeffding's inequality
    the sum exceeds 6 sqrt(sum e_i^2) once in 30 million times. The errors of h are carried on the same way, and to each
    sum of floats come 64 roundings of 2^-24 of the sum of magnitudes; more than the blocks of any row, and than the
    accumulation in the tensor core's float. What is below TINY may be lost altogether.
    """
    v, h, _ = reference(case)
    v, h = np.abs(v), np.abs(h)
    sm, sa = (np.abs(case.arrays[s].astype(np.float64)) for s in ("sm", "sa"))

    def rounding(u):  # sqrt of the sum of squares of the errors of a vector's elements [tokens, 1]
        largest = u.max(axis=1, keepdims=True)
        step = 0.51 * largest / QMAX
        error = u * 2.0**-11 + largest * 2.0**-24 if half else np.broadcast_to(step, u.shape)
        return np.sqrt(np.square(np.where(largest < TINY, TINY, error)).sum(axis=1, keepdims=True))

    floats = 64 * 2.0**-24
    error_h = sm * (rounding(v) + floats / 6 * v.sum(axis=1, keepdims=True))
    carried = np.sqrt(np.square(error_h).sum(axis=1, keepdims=True))
    worst_h = h + 6 * error_h
    return sa * (6 * np.hypot(carried, rounding(worst_h)) + floats * worst_h.sum(axis=1, keepdims=True)) + 1e-37


def write_cases(cases: list[Case], path: Path) -> None:
    """The file that driver.cpp reads: for each case a line of numbers, then the arrays."""
    with open(path, "wb") as f:
        for case in cases:
            d = case.device
            numbers = [case.n_in, case.k, case.n_out, case.n_tokens, case.n_in + case.padding, d.cc, d.n_sm, d.shared,
                       *(t == "f16" for t in case.types), *(case.offsets.get(b, 0) for b in BUFFERS),
                       case.path == "f16", case.seed, case.poison]
            f.write(struct.pack(f"<{len(numbers)}q", *map(int, numbers)))
            for name in BUFFERS[:-1]:
                f.write(np.ascontiguousarray(case.arrays[name]).tobytes())


def run_cases(program: Path, cases: list[Case], folder: Path) -> list[np.ndarray]:
    """y [tokens, n_out] of each case. Fails when the program does: it says where."""
    write_cases(cases, folder / "cases")
    result = run(program, folder / "cases", folder / "results")
    assert result.returncode == 0, result.stderr[-4000:] + failed_case(result.stderr, cases)
    flat = np.fromfile(folder / "results", np.float32)
    results = []
    for case in cases:
        n = case.n_tokens * case.n_out
        results.append(flat[:n].reshape(case.n_tokens, case.n_out))
        flat = flat[n:]
    assert len(flat) == 0
    return results


def failed_case(stderr: str, cases: list[Case]) -> str:
    """The driver prints the number of each case before it begins."""
    numbers = [line.removeprefix("case ") for line in stderr.splitlines() if line.startswith("case ")]
    return f"\ncase {numbers[-1]}: {cases[int(numbers[-1])]}" if numbers else ""


def errors(case: Case, y: np.ndarray, half: bool = False) -> str:
    """What is wrong with y, or nothing."""
    _, _, expected = reference(case)
    if y.shape != expected.shape:
        return f"{case}: shape {y.shape}"
    if not np.array_equal(np.isnan(y), np.isnan(expected)):
        wrong = np.argwhere(np.isnan(y) != np.isnan(expected))
        return f"{case}: {len(wrong)} NaNs are missing or too many, first at token, row {wrong[0]}"
    with np.errstate(invalid="ignore"):
        off = np.abs(y - expected) / bound(case, half)
    off = np.nan_to_num(off, nan=0.0)
    if off.max() > 1:
        t, r = np.unravel_index(off.argmax(), off.shape)
        worst = f"token {t} row {r}: {y[t, r]} for {expected[t, r]}, {off[t, r]:.3g} times the bound"
        return f"{case}: {(off > 1).sum()} of {off.size} are off, worst at {worst}"
    return ""

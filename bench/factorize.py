"""Our factorization against the plain one, on real matrices: error and time, side by side.

    python bench/factorize.py                        9 cases, minutes on two cores
    python bench/factorize.py --layers layers.5.self_attn.q_proj --bits 1

`reference` below is the algorithm as the paper's authors run it: 260 outer iterations of 3 inner ADMM steps in float32,
explicit inverses, 5 power iterations from a vector of ones in every projection. It is written for reading, and is also
what tests/test_factorize.py compares with. `dbf_gguf.factorize` runs with its defaults. Both get the same matrix and
the same k in one process, and take turns in going first.

The error is the relative squared error ‖W − Ŵ‖² / ‖W‖², without importance. Ours is that of the stored form: signs and
float16 scales. Ends with status 1 when ours is anywhere less than 3 times as fast or has the higher error.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open

from dbf_gguf.errors import DBFError
from dbf_gguf.factorize import factorize
from dbf_gguf.factors import BLOCK

LAYERS = ("layers.5.self_attn.q_proj", "layers.12.mlp.gate_proj", "layers.12.mlp.down_proj")
BITS = (1.0, 1.5, 2.0)
LEAST_RATIO = 3.0


def channels(bits: float, n_out: int, n_in: int) -> int:
    """k for `bits` sign bits a weight, the nearest multiple of 32 (scales not counted, as in the paper)."""
    return max(BLOCK, BLOCK * round(bits * n_out * n_in / (n_out + n_in) / BLOCK))


# --- the reference


def svid(z: torch.Tensor, power_iterations: int = 5) -> torch.Tensor:
    """sign(Z) ⊙ rank-1 approximation of |Z| (paper, section 3.2)."""
    magnitude = z.abs()
    v = torch.ones(z.shape[1])
    for _ in range(power_iterations):
        u = magnitude @ v
        u = u / u.norm()
        v = magnitude.T @ u  # its length is the singular value
        size = v.norm()
        v = v / size
    return torch.sign(z) * torch.outer(u * size, v)


def half_step(
    fixed: torch.Tensor, free: torch.Tensor, dual: torch.Tensor, target: torch.Tensor, rho: float, inner: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`inner` ADMM steps on one factor. fixed [d, k], free and dual [k, n], target [d, n]; fixed @ free ≈ target.

    Returns (fixed with columns of length 1, free, dual): the free factor absorbs the lengths.
    """
    fixed = fixed / fixed.norm(dim=0).clamp_min(1e-12)
    gram = fixed.T @ fixed
    identity = torch.eye(gram.shape[0])
    gram = gram + 3e-2 * gram.diagonal().mean() * identity
    wanted = fixed.T @ target
    inverses = {r: torch.linalg.inv(gram + r * identity) for r in (rho, 1.0)}
    for step in range(inner):
        r = rho if step == 0 else 1.0
        solution = inverses[r] @ (wanted + r * (free - dual))
        free = svid(solution + dual)
        dual = dual + solution - free
    return fixed, free, dual


def reference(weight: torch.Tensor, k: int, outer: int = 260, inner: int = 3, seed: int = 0) -> torch.Tensor:
    """The plain algorithm on `weight` `[n_out, n_in]`. Returns the approximation it ends with, float32, same shape.

    Each factor is kept as its ADMM pair (free, dual), in the gauge of its own half step: there the opposite factor has
    columns of length 1.
    """
    generator = torch.Generator().manual_seed(seed)
    n_out, n_in = weight.shape
    size = weight.float().square().mean().sqrt()
    w = weight.float() / size
    a, b = torch.randn(n_out, k, generator=generator), torch.randn(k, n_in, generator=generator)
    dual_a, dual_b = torch.zeros(k, n_out), torch.zeros(k, n_in)
    for t in range(outer):
        rho = min(1.0, t / (outer - 3)) ** 3
        _, at, dual_a = half_step(b.T, a.T, dual_a, w.T, rho, inner)
        a = at.T
        left, b, dual_b = half_step(a, b, dual_b, w, rho, inner)
    return size * (left @ b)


# --- the comparison


def ours(weight: torch.Tensor, k: int) -> torch.Tensor:
    """`dbf_gguf.factorize` with its defaults; the approximation as it would be stored, float32."""
    (factors,), _ = factorize(weight[None], k)
    for name in ("scale_a", "scale_m", "scale_b"):
        setattr(factors, name, getattr(factors, name).half())
    return factors.dense()


def relative_error(weight: torch.Tensor, approximation: torch.Tensor) -> float:
    weight = weight.double()
    return ((weight - approximation.double()).square().sum() / weight.square().sum()).item()


def timed(run, weight: torch.Tensor, k: int) -> tuple[float, float]:
    """(error, seconds)."""
    begin = time.perf_counter()
    approximation = run(weight, k)
    seconds = time.perf_counter() - begin
    return relative_error(weight, approximation), seconds


def load_layers(model: str, layers: list[str]) -> dict[str, torch.Tensor]:
    """Layer name -> weight in float32, from the safetensors of a model named as for `dbf-gguf convert`."""
    from dbf_gguf.source import resolve

    found = {}
    for path in sorted(Path(resolve(model).folder).glob("*.safetensors")):
        with safe_open(str(path), "pt") as f:
            names = set(f.keys())
            found |= {x: f.get_tensor(f"model.{x}.weight").float() for x in layers if f"model.{x}.weight" in names}
    missing = [layer for layer in layers if layer not in found]
    if missing:
        raise DBFError(f"{model} has no {', '.join(missing)}")
    return {layer: found[layer] for layer in layers}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="as for dbf-gguf convert (default: %(default)s)")
    parser.add_argument("--layers", nargs="+", default=LAYERS, help="default: %(default)s")
    parser.add_argument("--bits", nargs="+", type=float, default=BITS, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="threads of torch (default: all cores)")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each; the fastest counts (default: 1)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        weights = load_layers(args.model, list(args.layers))
    except DBFError as error:
        print(f"bench/factorize.py: {error}", file=sys.stderr)
        return 1

    print(f"{args.model}, {torch.get_num_threads()} threads, torch {torch.__version__}, fastest of {args.repeat}")
    width = max(map(len, weights))
    print(f"{'layer':{width}}  bits     k  {'reference':>17}  {'ours':>17}  times as fast")
    runs = {"reference": reference, "ours": ours}
    warm_up = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for run in runs.values():
        run(warm_up, 32)
    good, turn = True, 0
    for layer, weight in weights.items():
        for bits in args.bits:
            k = channels(bits, *weight.shape)
            errors, seconds = {}, {name: float("inf") for name in runs}
            for _ in range(args.repeat):
                for name in list(runs)[:: 1 if turn % 2 == 0 else -1]:
                    errors[name], once = timed(runs[name], weight, k)
                    seconds[name] = min(seconds[name], once)
                turn += 1
            ratio = seconds["reference"] / seconds["ours"]
            verdict = ["error is higher"] if errors["ours"] > errors["reference"] else []
            verdict += [f"below {LEAST_RATIO:g}"] if ratio < LEAST_RATIO else []
            good = good and not verdict
            columns = "  ".join(f"{errors[name]:.4f}  {seconds[name]:7.1f} s" for name in runs)
            print(f"{layer:{width}}  {bits:4.2f}  {k:4d}  {columns}  {ratio:13.1f}  {', '.join(verdict)}", flush=True)
    print("every case: error no higher, at least 3 times as fast" if good else "NOT every case holds")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

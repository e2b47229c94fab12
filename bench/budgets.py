"""Which budget is best: the same bits for all linears, or divided by effects on the output, or by channel scores.

    python bench/budgets.py smollm2-135m
    python bench/budgets.py smollm2-135m --bits 1.5 -- --blocks fit --block-tokens 49152 --iterations 60 --tune none

Four converts with the same options (those after `--`, else little of everything and no tuning): one with `--budget
uniform`, one with `--budget adaptive`, and two for the paper's own way (section 3.5): one of somewhat more bits, and
from the scores of its middle channels

    s_c = Σ over windows (∂E/∂m_c · m_c)²        E: KL divergence to the dense model

the widths of the last. Linears of equal shape are a pool: of all channels in it those with the highest scores are kept,
as many as the wanted bits allow, and every linear gets as many channels as it keeps, in multiples of 32, but no fewer
than --floor of the bits come to.

Measured is what `convert` measures at its end: perplexities in PyTorch on the evaluation text. The same command goes on
where it was interrupted. All files go into --out; at the end a table and --out/budgets.json.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import torch
from commands import StepFailed, dbf_gguf, heading, run

import dbf_gguf as package
from dbf_gguf import cli, pipeline
from dbf_gguf.budget import bits_per_weight, linear_bits, uniform_budget
from dbf_gguf.checkpoint import WorkFolder
from dbf_gguf.errors import DBFError
from dbf_gguf.factors import BLOCK
from dbf_gguf.loss import kl_divergence
from dbf_gguf.model import DBFLinear, linear_shapes, load_dense
from dbf_gguf.prepare import BUDGET, WINDOWS
from dbf_gguf.source import resolve

GIVEN_WIDTHS = "--given-widths"
LITTLE = "--blocks fit --block-tokens 24576 --iterations 30 --calib-sequences 12 --tune none"


def channel_scores(work: WorkFolder) -> dict[str, torch.Tensor]:
    """s_c [k] of every linear in a finished work folder, over the windows that its importance was measured on."""
    teacher = load_dense(resolve(work.manifest["model"]).folder, join=work.join)
    student = package.load(work.path).requires_grad_(False)
    head = teacher.get_output_embeddings().weight
    scales = {name: module.scale_m for name, module in student.named_modules() if isinstance(module, DBFLinear)}
    for scale in scales.values():
        scale.requires_grad_(True)
    scores = {name: torch.zeros_like(scale) for name, scale in scales.items()}
    for window in work.read_tensors(WINDOWS)["calibration"].long():
        with torch.no_grad():
            target = teacher.model(window[None], use_cache=False).last_hidden_state[0]
        hidden = student.model(window[None], use_cache=False).last_hidden_state[0]
        _, gradient = kl_divergence(hidden.detach(), target, head)
        for (name, m), g in zip(scales.items(), torch.autograd.grad(hidden, scales.values(), gradient), strict=True):
            scores[name] += (g * m.detach()).square()
    return scores


def widths(
    scores: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, int]], bits: float, floor: float
) -> dict[str, int]:
    """k of every linear by the scores of its channels, for as many bits as `uniform_budget` spends in each pool.

    A linear has a multiple of 32, `floor` of `bits` at least, and at most as many channels as have scores.
    """
    even = uniform_budget(shapes, bits)
    result = {}
    for shape in dict.fromkeys(shapes.values()):
        names = [name for name in shapes if shapes[name] == shape]
        n_out, n_in = shape
        fixed = linear_bits(n_out, n_in, 0)
        least = math.ceil((floor * bits * n_out * n_in - fixed) / (n_out + n_in + 16) / BLOCK) * BLOCK
        left = sum(even[name] for name in names)
        pooled = torch.cat([scores[name] for name in names])
        owner = torch.cat([torch.full((len(scores[name]),), i) for i, name in enumerate(names)])
        kept = owner[pooled.argsort(descending=True)[:left]].bincount(minlength=len(names))
        # whole steps of 32 first, then one more where the most channels are beyond the last
        k = {n: max(least, BLOCK * (count // BLOCK)) for n, count in zip(names, kept.tolist(), strict=True)}
        beyond = {n: count - k[n] for n, count in zip(names, kept.tolist(), strict=True)}
        left -= sum(k.values())
        while left >= BLOCK:
            name = max((n for n in names if k[n] + BLOCK <= len(scores[n])), key=beyond.__getitem__)
            k[name] += BLOCK
            beyond[name] -= BLOCK
            left -= BLOCK
        while left <= -BLOCK:  # the floor has given what the pool does not have
            name = min((n for n in names if k[n] - BLOCK >= least), key=beyond.__getitem__)
            k[name] -= BLOCK
            beyond[name] += BLOCK
            left += BLOCK
        result |= k
    return {name: result[name] for name in shapes}


def convert_with(file: Path, arguments: list[str]) -> None:
    """`dbf-gguf convert` with the widths in a JSON file.

    It has no option for them: they take the place of those that it would make of the measured effects.
    """
    chosen = json.loads(file.read_text())
    with mock.patch.object(pipeline, "adaptive_budget", lambda shapes, bits, curves: chosen):
        sys.argv = ["dbf-gguf", "convert", *arguments]
        cli.main()


def main() -> int:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # for the process with given widths, see dbf_gguf/cli/convert.py
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what `dbf-gguf convert` takes")
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--above", type=float, default=0.1, help="bits more, from which channels are taken away")
    parser.add_argument("--floor", type=float, default=0.75, help="share of the bits that every linear keeps")
    parser.add_argument("--out", type=Path, default=Path("budgets"))
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    args, options = parser.parse_args(given[:cut]), given[cut + 1 :] or LITTLE.split()
    if not 0 <= args.floor < 1:
        parser.error("--floor must be between 0 and 1: what every linear keeps of its bits")
    if args.above <= 0:
        parser.error("--above must be positive: channels can only be taken away")
    args.out.mkdir(parents=True, exist_ok=True)

    def arguments(name: str, bits: float, budget: str | Path) -> list:
        place = ["--work", args.out / f"{name}-work", "-o", args.out / f"{name}.gguf"]
        return [args.model, "--bits", bits, "--budget", budget, *options, *place]

    try:
        for name, bits, budget in (
            ("uniform", args.bits, "uniform"),
            ("adaptive", args.bits, "adaptive"),
            ("more", args.bits + args.above, "uniform"),
        ):
            heading(name)
            dbf_gguf("convert", *arguments(name, bits, budget))
            if "perplexity" not in WorkFolder.open(args.out / f"{name}-work").manifest:
                raise StepFailed("there is nothing to compare by: leave --eval-windows 0 out")
        heading("scores")
        more = WorkFolder.open(args.out / "more-work")
        shapes = linear_shapes(resolve(args.model).folder, more.join)
        chosen = widths(channel_scores(more), shapes, args.bits, args.floor)
        file = args.out / "widths.json"
        file.write_text(json.dumps(chosen))
        rest = arguments("scores", args.bits, args.out / "adaptive-work" / BUDGET)
        run([sys.executable, __file__, GIVEN_WIDTHS, file, *rest])
    except (DBFError, StepFailed) as error:
        print(f"budgets: {error}", file=sys.stderr)
        return 1
    rows = []
    print("\n| budget | bits | bits of a linear | times the dense perplexity |\n|---|---|---|---|")
    for name in ("uniform", "adaptive", "scores"):
        manifest = WorkFolder.open(args.out / f"{name}-work").manifest
        ks, ppl = manifest["budget"], manifest["perplexity"]
        each = [bits_per_weight(shapes, {linear: k}) for linear, k in ks.items()]
        rows.append({"budget": name, "bits": bits_per_weight(shapes, ks), "k": ks, **ppl})
        times = ppl["compressed"] / ppl["dense"]
        print(f"| {name} | {rows[-1]['bits']:.3f} | {min(each):.2f} to {max(each):.2f} | {times:.3f} |")
    (args.out / "budgets.json").write_text(json.dumps({"options": options, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == [GIVEN_WIDTHS]:  # this program's own call
        convert_with(Path(sys.argv[2]), sys.argv[3:])
    else:
        sys.exit(main())

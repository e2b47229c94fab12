"""What each ingredient of the compression brings: one convert with all of them, and one without each in turn.

    python bench/ablation.py smollm2-135m
    python bench/ablation.py smollm2-135m --bits 1.5 --tune-tokens 98304 --block-tokens 65536 --iterations 60

All arms get the same text, tokens, iterations and seed, but for one that has all ingredients and another seed (other
signs to begin with, other windows of the text): how far it comes out from the first is chance. Measured is what
`dbf-gguf convert` measures at its end: the perplexity of the dense and of the compressed model in PyTorch on the
evaluation text. An ingredient that makes no more difference than chance, or than --noise, is said to bring nothing; so
is one without which the result is better. Blocks cannot be tuned where nothing goes block by block, nor signs where
nothing is distilled: these two arms lack both.

All files go into --out, one work folder an arm; the same command again goes on where it was interrupted. Effects of
single linears that would come out the same are measured once. At the end a table and --out/ablation.json.
"""

import argparse
import json
import sys
from pathlib import Path

from commands import StepFailed, dbf_gguf, heading

from dbf_gguf.join import ALL, NONE
from dbf_gguf.prepare import BUDGET

FULL = {"--blocks": "signs", "--tune": "signs", "--budget": "adaptive", "--join": ALL}
CHANCE = "nothing, another seed"
ARMS = {  # name of what is missing -> options in the place of those of the full one
    "nothing": {},
    CHANCE: {"--seed": "1"},
    "importance": {"--no-importance": None},
    "block by block, tuning of blocks": {"--blocks": "none"},
    "tuning of blocks": {"--blocks": "fit"},
    "signs in blocks": {"--blocks": "scales"},
    "any distillation": {"--tune": "none"},
    "signs in distillation": {"--tune": "scales"},
    "adaptive budget": {"--budget": "uniform"},
    "joint linears": {"--join": NONE},
}
# arms that change nothing before the blocks are tuned: their linears have the effects that the full one has measured
SAME_EFFECTS = ("tuning of blocks", "signs in blocks", "any distillation", "signs in distillation")


def convert(model: str, missing: str, out: Path, given: list[str]) -> dict:
    """One arm's figures; `given` are the options that all arms share. Raises StepFailed."""
    name = missing.replace(",", "").replace(" ", "-")
    output, work = out / f"{name}.gguf", out / f"{name}-work"
    options = FULL | ARMS[missing]
    if missing in SAME_EFFECTS:
        options["--budget"] = out / "nothing-work" / BUDGET
    options = [item for pair in options.items() for item in pair if item is not None]
    if missing == "any distillation":  # which has no tokens then
        drop = given.index("--tune-tokens")
        given = given[:drop] + given[drop + 2 :]
    # also when it is finished: it takes seconds then, and is refused where the options are others
    dbf_gguf("convert", model, *given, *options, "-o", output, "--work", work)
    found = json.loads((work / "manifest.json").read_text())["perplexity"]
    return {"missing": missing, "ppl": found["compressed"], "dense": found["dense"]}


def table(rows: list[dict], noise: float) -> str:
    """The arms, the worst first after the full one, and what the ingredient brings."""
    full, chance = rows[0], next(row for row in rows if row["missing"] == CHANCE)
    noise = max(noise, abs(chance["ppl"] / full["ppl"] - 1))
    lines = ["| without | perplexity | times dense | brings |", "|---|---|---|---|"]
    others = [row for row in rows if row not in (full, chance)]
    for row in [full, chance, *sorted(others, key=lambda row: -row["ppl"])]:
        gain = row["ppl"] / full["ppl"] - 1
        if row is full:
            brings = ""
        elif row is chance:
            brings = f"chance: {100 * gain:+.1f} %"
        else:
            brings = f"{100 * gain:.1f} %" if gain > noise else "nothing"
        lines.append(f"| {row['missing']} | {row['ppl']:.2f} | {row['ppl'] / row['dense']:.2f} | {brings} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what `dbf-gguf convert` takes")
    parser.add_argument("--bits", default="1.5")
    parser.add_argument("--iterations", default="60")
    parser.add_argument("--block-tokens", default="65536")
    parser.add_argument("--tune-tokens", default="98304")
    parser.add_argument("--eval-windows", default="32")
    parser.add_argument("--calib", default="wiki")
    parser.add_argument("--noise", type=float, default=0.005, help="share of the perplexity that counts as nothing")
    parser.add_argument("--out", type=Path, default=Path("ablation"))
    args = parser.parse_args()
    if not args.eval_windows.isdecimal() or int(args.eval_windows) == 0:
        parser.error("--eval-windows must be a positive number: the arms are compared by their perplexity")
    names = ("bits", "iterations", "block_tokens", "tune_tokens", "eval_windows", "calib")
    given = [item for name in names for item in (f"--{name.replace('_', '-')}", getattr(args, name))]
    rows = []
    args.out.mkdir(parents=True, exist_ok=True)
    for missing in ARMS:
        heading(f"without {missing}")
        try:
            rows.append(convert(args.model, missing, args.out, list(given)))
        except StepFailed as error:
            print(f"ablation: {error}", file=sys.stderr)
            return 1
    (args.out / "ablation.json").write_text(json.dumps({"options": given, "rows": rows}, indent=1))
    print(table(rows, args.noise))
    return 0


if __name__ == "__main__":
    sys.exit(main())

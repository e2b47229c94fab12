"""`dbf-gguf convert`: options, recipe and defaults become settings; the work is `pipeline`'s."""

import math
import os
import re
from dataclasses import asdict, replace
from pathlib import Path

import click

from ..errors import DBFError
from ..join import ALL, CHOICES

GROUPS = {
    "Basic": ("bits", "size", "effort", "output", "work", "resume"),
    "Calibration": ("calib", "calib_sequences", "seq_len", "importance"),
    "Block by block": ("blocks", "block_tokens", "block_lr", "block_sign_lr"),
    "Tuning of the whole": ("tune", "tune_tokens", "tune_minutes", "tune_seq_len", "tune_lr", "tune_sign_lr"),
    "File": ("embedding_type", "output_type"),
    "Resources": ("threads", "device"),
    "Advanced": ("join", "budget", "iterations", "seed", "eval_windows"),
}


class _GroupedCommand(click.Command):
    def format_options(self, ctx, formatter):
        options = {p.name: p.get_help_record(ctx) for p in self.get_params(ctx) if p.get_help_record(ctx)}
        for title, names in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([options.pop(name) for name in names])
        with formatter.section("Other"):
            formatter.write_dl(list(options.values()))


@click.command(
    cls=_GroupedCommand,
    epilog="""\b
Example:
  dbf-gguf convert smollm2-135m --bits 1.5 --tune-minutes 5 -o smollm2-1.5.gguf
  dbf-gguf verify smollm2-1.5.gguf --work smollm2-1.5-work""",
)
@click.argument("model")
@click.option("--bits", type=float, help="Bits a weight over the compressed linears, scales included.")
@click.option("--size", help="Size of the GGUF file instead of --bits: 1.9GiB, 700MB, bytes; all is counted.")
@click.option(
    "--effort",
    type=click.Choice(["fast", "normal", "max"]),
    default="normal",
    show_default=True,
    help="How long to work on it: sets the defaults of --budget, --iterations, --block-tokens, "
    "--tune-tokens and --tune-minutes.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="The GGUF file to write.  [default: MODEL-dbf-BITS.gguf here, or MODEL-dbf-SIZE.gguf]",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for what is finished; a begun one is gone on with.  [default: beside the output, named after it]",
)
@click.option("--resume", is_flag=True, help="Go on in the default work folder, if it was begun.")
@click.option("--calib", help="Calibration text: a text file, a hub dataset owner/name, or `wiki`.")
@click.option("--calib-sequences", type=click.IntRange(1), help="Windows of it that importance is measured on.")
@click.option("--seq-len", type=click.IntRange(16), help="Tokens in each of them.")
@click.option(
    "--importance/--no-importance",
    default=True,
    show_default=True,
    help="Weight rows and columns by what the calibration text makes of them.",
)
@click.option(
    "--blocks",
    type=click.Choice(["none", "fit", "scales", "signs"]),
    help="Compress every linear by itself (none), or block by block: each fitted to what those before it give (fit), "
    "then its scales tuned (scales), or these and its signs (signs).  [default: fit]",
)
@click.option("--block-tokens", type=click.IntRange(1), help="Tokens that go through the blocks for it.")
@click.option("--block-lr", type=click.FloatRange(0, min_open=True), help="Rate for scales, relative to their RMS.")
@click.option("--block-sign-lr", type=click.FloatRange(0, min_open=True), help="Rate for latent signs.")
@click.option(
    "--tune",
    type=click.Choice(["none", "scales", "signs"]),
    help="Distillation of the whole model into scales and norms (scales), and into the signs of some linears (signs).",
)
@click.option("--tune-tokens", type=click.IntRange(1), help="Tokens to tune on.")
@click.option(
    "--tune-minutes",
    type=click.FloatRange(0, min_open=True),
    help="Minutes to tune, turned into tokens by timing the first steps.",
)
@click.option("--tune-seq-len", type=click.IntRange(16), help="Tokens in a window that is tuned on.")
@click.option("--tune-lr", type=click.FloatRange(0, min_open=True), help="Rate for scales, relative to their RMS.")
@click.option("--tune-sign-lr", type=click.FloatRange(0, min_open=True), help="Rate for latent signs.")
@click.option("--embedding-type", help="GGUF type of the embeddings: q8_0, q6_k, f16, …")
@click.option("--output-type", help="GGUF type of the output head, where it is not tied to the embeddings.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads of each process.  [default: all cores, divided]")
@click.option("--device", help="cpu, cuda, cuda:1, mps.  [default: cuda where torch finds it, else cpu]")
@click.option(
    "--join",
    type=click.Choice(CHOICES),
    default=ALL,
    show_default=True,
    help="Linears that read the same input, compressed and computed as one: q, k and v; gate and up.",
)
@click.option(
    "--budget",
    help="Bits of each linear: `uniform`, `adaptive` to what compressing it does to the model's output, or the "
    "budget.json of a work folder, to allocate by what was measured there.",
)
@click.option("--iterations", type=click.IntRange(3), help="Outer iterations of the factorization.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**62),
    default=0,
    show_default=True,
    help="Of the random start and the choice of text.",
)
@click.option(
    "--eval-windows",
    type=click.IntRange(0),
    default=32,
    show_default=True,
    help="Windows of 512 tokens for the perplexities at the end; 0 for none.",
)
def command(model: str, output: Path | None, work: Path | None, resume: bool, **options) -> None:
    """Compress MODEL and write it as one GGUF.

    MODEL is a recipe name (`dbf-gguf recipes`), a Hugging Face id, a local folder with safetensors, or a .gguf file.
    What is not given comes from the recipe. Killed or interrupted, the same command with --resume goes on.
    """
    # OpenMP threads that wait by spinning slow each other tenfold as soon as another program wants a core, and a long
    # convert is not alone; threads that never spin halve the speed of an idle machine. So: spin, but briefly. Must be
    # set before torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

    from .. import parallel
    from ..pipeline import convert
    from ..screen import Screen

    with parallel.together():
        device = parallel.own_device(_device(options.pop("device")))
        source, output, work, settings = parallel.from_main(
            lambda: _resolved(model, output, work, resume, device, options)
        )
        screen = Screen(quiet=not parallel.is_main())
        shown = {"model": f"{source.name} ({source.origin})", "output": output, "work": work} | asdict(settings)
        if parallel.count() > 1:
            shown["processes"] = parallel.count()
        for name, value in shown.items():
            if value is not None:
                screen.line(f"{name.replace('_', ' '):<16} {value}")
        convert(source, model, output, work, replace(settings, device=device), screen)


def _resolved(model: str, output: Path | None, work: Path | None, resume: bool, device: str, options: dict) -> tuple:
    """(source, output, work, settings), of which the last three may have come from defaults."""
    from ..budget import uniform_budget
    from ..gguf_writer import check_output
    from ..source import resolve

    size = options["size"]
    if size is not None:
        options["size"] = parse_size(size)
        if options["bits"] is not None:
            raise DBFError("--bits and --size both say how large the result is: give one of them")
    if options["bits"] is not None:
        uniform_budget({}, options["bits"])  # refuses what cannot be made before a model is fetched
    source = resolve(model)
    settings = resolve_settings(source, device, options)
    output = output or Path(f"{source.name}-dbf-{settings.bits if size is None else size.replace(' ', '')}.gguf")
    check_output(output, source.gguf)
    if work is None:
        work = output.with_name(f"{output.name.removesuffix('.gguf')}-work")
        if not resume and (work / "manifest.json").exists():
            raise DBFError(f"{work} holds an earlier convert: --resume goes on with it, --work names another folder")
    return source, output, work, settings


UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of "1.9GiB", "700 MB" or "123456789"; case does not matter. Raises DBFError for anything else."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([KMG]I?B|)B?", text.strip().upper())
    if not found or not 0 < float(found[1]) < math.inf:
        raise DBFError(f"--size {text} is no size: give it like 1.9GiB, 700MB, or as plain bytes")
    return round(float(found[1]) * UNITS[found[2]])


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise DBFError(f"torch finds no device {name} here: leave --device out to take what there is") from None
    return name


def resolve_settings(source, device: str, options: dict):
    """The settings of a run: options where given, else the model's recipe, else the defaults of a model without one."""
    from .. import parallel
    from ..factorize import OUTER_ITERATIONS
    from ..machine import available_cpus
    from ..prepare import Settings
    from ..recipes import DEFAULT, EFFORTS
    from ..source import context_length

    recipe, effort = source.recipe or DEFAULT, EFFORTS[options["effort"]]
    recipe_seq_len = min(recipe.seq_len, context_length(source.folder))

    def chosen(name: str, otherwise):
        return otherwise if options[name] is None else options[name]

    tokens, minutes = options["tune_tokens"], options["tune_minutes"]
    if minutes is not None and not math.isfinite(minutes):
        raise DBFError("--tune-minutes must be finite: --tune none does without tuning")
    for rate in ("block_lr", "block_sign_lr", "tune_lr", "tune_sign_lr"):
        if options[rate] is not None and not math.isfinite(options[rate]):
            raise DBFError(f"--{rate.replace('_', '-')} must be finite")
    if tokens is None and minutes is None:
        tokens, minutes = recipe.tune.get("tune_tokens"), recipe.tune.get("tune_minutes")
        tokens, minutes = (None if x is None else type(x)(x * effort.tune_tokens) for x in (tokens, minutes))
    tune = chosen("tune", recipe.tune["tune"])
    blocks, block_tokens = chosen("blocks", "fit"), recipe.block_tokens
    return Settings(
        bits=chosen("bits", recipe.bits) if options["size"] is None else None,
        size=options["size"],
        join=options["join"],
        budget=chosen("budget", effort.budget),
        calib=chosen("calib", recipe.calib),
        calib_sequences=chosen("calib_sequences", recipe.calib_sequences),
        seq_len=chosen("seq_len", recipe_seq_len),
        importance=options["importance"],
        iterations=chosen("iterations", round(effort.iterations * (recipe.iterations or OUTER_ITERATIONS))),
        blocks=blocks,
        block_tokens=None if blocks == "none" else chosen("block_tokens", round(effort.block_tokens * block_tokens)),
        block_lr=chosen("block_lr", 2e-3) if blocks in ("scales", "signs") else None,
        block_sign_lr=chosen("block_sign_lr", 0.03) if blocks == "signs" else None,
        tune=tune,
        tune_tokens=None if tune == "none" else tokens,
        tune_minutes=None if tune == "none" else minutes,
        tune_seq_len=chosen(
            "tune_seq_len", min(recipe.tune.get("seq_len", recipe.seq_len), chosen("seq_len", recipe_seq_len))
        ),
        tune_lr=chosen("tune_lr", recipe.tune["lr"]),
        tune_sign_lr=chosen("tune_sign_lr", 5e-3) if tune == "signs" else None,
        embedding_type=chosen("embedding_type", recipe.embedding_type),
        output_type=chosen("output_type", recipe.output_type),
        seed=options["seed"],
        threads=chosen("threads", max(1, available_cpus() // parallel.count())),
        device=device,
        eval_windows=options["eval_windows"],
    )

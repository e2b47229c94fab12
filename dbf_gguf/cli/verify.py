"""`dbf-gguf verify`: every rule of the format, and the comparison with the work folder."""

import sys
from pathlib import Path

import click

SHOWN = 30  # violations

@click.command(
    epilog="""\b
Example:
  dbf-gguf verify smollm2.gguf --work smollm2-work"""
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--work", type=click.Path(path_type=Path), help="Also compare with this work folder, bit for bit.")
def command(file: Path, work: Path | None) -> None:
    """Check a DBF GGUF: its structure, every rule of the format, and on request its work folder.

    Lists violations and ends with status 1 when there are any.
    """
    from ..checkpoint import FINAL, WorkFolder
    from ..errors import DBFError
    from ..gguf_file import GGUFFile
    from ..verify import check_format, check_work

    folder = WorkFolder.open(work) if work else None
    if folder and not folder.has(FINAL):
        raise DBFError(f"{work} is not finished: the same `dbf-gguf convert` again goes on")
    try:
        with GGUFFile(file) as gguf:
            found = check_format(gguf)
            n_linears = len(gguf.linears())
            if folder and found:
                found.append("not compared with the work folder: the file breaks the format")
            elif folder:
                found = check_work(gguf, folder)
    except DBFError as error:
        found = [str(error)]
    for violation in found[:SHOWN]:
        click.echo(violation)
    if len(found) > SHOWN:
        click.echo(f"... and {len(found) - SHOWN} more")
    if found:
        click.echo(f"{file}: {len(found)} violation{'s' * (len(found) > 1)}", err=True)
        sys.exit(1)
    click.echo(f"{file}: {n_linears} DBF linears, every rule holds" + (f", equal to {work}" if work else ""))

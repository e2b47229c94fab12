"""`dbf-gguf recipes`: the models that are known by name."""

import click


@click.command(
    epilog="""\b
Example:
  dbf-gguf recipes"""
)
def command() -> None:
    """List the recipes, one line each: name, source, default bits, summary.

    Any other MODEL works too: a Hugging Face id, a local folder or a .gguf file of the same families.
    """
    from .. import recipes

    rows = [
        (recipe.name, recipe.source, f"{recipe.bits:g} bits", recipe.summary)
        for recipe in map(recipes.load, recipes.names())
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        click.echo("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]))

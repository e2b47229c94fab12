"""`dbf-gguf reference`: the uncompressed model as GGUF, to compare with."""

from pathlib import Path

import click


@click.command(
    epilog="""\b
Example:
  dbf-gguf reference smollm2-135m -o smollm2-f16.gguf"""
)
@click.argument("model")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The GGUF file to write."
)
def command(model: str, output: Path) -> None:
    """Write MODEL uncompressed as F16 GGUF, by the same converter that writes the compressed one.

    MODEL is a recipe name, a Hugging Face id, a local folder or a .gguf file, as for `convert`.
    """
    from ..gguf_writer import write_gguf
    from ..llama_cpp import source_tree
    from ..source import resolve

    source = resolve(model)
    write_gguf(
        output,
        source.folder,
        work=None,
        embedding_type="f16",
        output_type="f16",
        llama_cpp=source_tree(),
        tokenizer_gguf=source.gguf,
        name=source.name,
    )
    click.echo(f"{output}: {output.stat().st_size / 2**20:.1f} MiB, F16")

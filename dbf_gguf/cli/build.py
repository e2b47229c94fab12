"""`dbf-gguf build`: the patched llama.cpp."""

from pathlib import Path

import click

from .. import llama_cpp

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command(
    epilog="""\b
Example:
  dbf-gguf build --jobs 2
  dbf-gguf build --cuda --cuda-arch 89
  $(dbf-gguf build | tail -n 1)/llama-cli --version""",
    short_help="Build the patched llama.cpp.",
)
@click.option("--cuda", is_flag=True, help="With the CUDA backend; needs nvcc.")
@click.option(
    "--cuda-arch", metavar="LIST", help="For which cards, 86,89 for instance.  [default: those of this machine]"
)
@click.option("--source", type=_FOLDER, help="Your own checkout of the pinned llama.cpp; it is patched in place.")
@click.option("--jobs", type=click.IntRange(min=1), help="Parallel compilers.  [default: by CPUs and memory]")
@click.option(
    "--regenerate-patch",
    type=_FOLDER,
    metavar="TREE",
    help="Advanced: do not build; write the patch set anew from an edited tree.",
)
def command(cuda: bool, cuda_arch: str | None, source: Path | None, jobs: int | None, regenerate_patch: Path | None):
    """Fetch the pinned llama.cpp, patch it for DBF, and build it.

    The last line of the output is the folder with llama-cli, llama-perplexity and the other programs. A finished build
    is kept in the cache and returned at once.
    """
    if regenerate_patch is not None:
        for path in llama_cpp.regenerate_patch(regenerate_patch):
            click.echo(path)
        return
    if cuda_arch and not cuda:
        raise click.UsageError("--cuda-arch goes with --cuda")
    click.echo(f"{llama_cpp.pin()}, patch set {llama_cpp.patch_key()}")
    click.echo(llama_cpp.build(source, cuda=cuda, jobs=jobs, cuda_arch=cuda_arch))

"""The command line: one file per subcommand; this one only gathers them and turns expected errors into one line."""

import importlib
import sys

import click

from .. import __version__
from ..errors import DBFError

# Subcommand -> one-line help. The modules are imported when called, so that `dbf-gguf --help` does not load torch.
COMMANDS = {
    "convert": "Compress a model and write it as one GGUF.",
    "recipes": "List the known models.",
    "build": "Build the patched llama.cpp.",
    "inspect": "Show what a DBF GGUF holds.",
    "verify": "Check a DBF GGUF against the format and its work folder.",
    "reference": "Write the uncompressed model as F16 GGUF, for comparison.",
    "text": "Write calibration or evaluation text to a file.",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx):
        return list(COMMANDS)

    def get_command(self, ctx, name):
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"dbf_gguf.cli.{name}").command

    def format_commands(self, ctx, formatter):
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="dbf-gguf")
def cli():
    """Compress Llama-family models to about 1 to 2.3 bits a weight and run them in a patched llama.cpp."""


def main() -> None:
    """Console entry: expected errors end as one line on stderr and exit status 1."""
    try:
        cli(standalone_mode=False)
    except DBFError as error:
        click.echo(f"dbf-gguf: {error}", err=True)
        sys.exit(1)
    except OSError as error:  # where no module had a better sentence: mostly the cache's disk, full or not writable
        where = f"{error.filename}: " if error.filename else ""
        hint = "the environment variable DBF_GGUF_CACHE names another place for the cache"
        click.echo(f"dbf-gguf: {where}{error.strerror or error} ({hint})", err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        goes_on = ": the same command with --resume goes on" if sys.argv[1:2] == ["convert"] else ""
        click.echo(f"dbf-gguf: interrupted{goes_on}", err=True)
        sys.exit(130)

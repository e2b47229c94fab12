"""What a person sees during a long run: lines that stay, and one progress bar with the time left below them.

Where the output is no terminal (a log file, CI) there are only the lines.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Screen:
    def __init__(self, quiet: bool = False):
        # plain text: no wrapping at 80 columns in a log, no colours in names that happen to look like markup
        self.console = Console(highlight=False, markup=False, soft_wrap=True, quiet=quiet)

    def line(self, text: str = "") -> None:
        self.console.print(text)

    @contextmanager
    def progress(self, title: str, total: int | None, done: int = 0) -> Iterator[Callable[..., None]]:
        """A bar while the body runs. Yields `update(completed, total=None)`."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        hidden = self.console.quiet or not self.console.is_terminal
        bar = RichProgress(*columns, console=self.console, transient=True, disable=hidden)
        with bar:
            task = bar.add_task(title, total=total, completed=done)
            yield lambda completed, total=None: bar.update(task, completed=completed, total=total)

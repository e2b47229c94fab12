"""Running the commands that a benchmark shows: what bench/demo.py and bench/quality.py share."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path


class StepFailed(Exception):
    """A command ended with an error; its output says why."""


def heading(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def run(command: list, *, log: Path | None = None, capture: bool = False) -> str:
    """Shows and runs a command. With `log`, stderr goes there; with `capture`, stdout and stderr go there and are
    returned. Raises StepFailed."""
    print(f"$ {shlex.join(map(str, command))}", flush=True)
    with open(log or os.devnull, "w+", encoding="utf-8", errors="replace") as f:
        to = {"stdout": f if capture else None, "stderr": f if log else None}
        status = subprocess.run(list(map(str, command)), stdin=subprocess.DEVNULL, **to).returncode
        f.seek(0)
        text = f.read() if log else ""
    if status != 0:
        print("\n".join(text.splitlines()[-20:]), file=sys.stderr)
        raise StepFailed(f"{Path(command[0]).name} ended with status {status}")
    return text


def dbf_gguf(*args) -> None:
    run([os.path.relpath(Path(sys.executable).with_name("dbf-gguf")), *args])


def final_estimate(output: str, log: Path) -> tuple[str, float, float]:
    """llama-perplexity's own line with its result, the perplexity and the error. Raises StepFailed when there is none;
    `log` is where the output lies."""
    found = re.search(r"Final estimate: PPL = ([0-9.]+) \+/- ([0-9.]+)", output)
    if not found:
        raise StepFailed(f"llama-perplexity gave no estimate; see {log}")
    return found[0], float(found[1]), float(found[2])

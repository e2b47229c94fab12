"""The whole way on a small real model: compress, run, measure. `make demo` calls it after `dbf-gguf build`.

    python bench/demo.py

Compresses SmolLM2-135M to 2 bits a weight, lets the patched llama.cpp write with it, and compares its perplexity with
the F16 model's on text that the compression has not seen. Shows every command it runs; all files go into demo/. Ends
with status 1 when a step fails or when the compressed model's perplexity is more than twice the F16 one's.
"""

import argparse
import sys
import time
from pathlib import Path

from commands import StepFailed, dbf_gguf, final_estimate, heading, run

from dbf_gguf.errors import DBFError
from dbf_gguf.llama_cpp import tool

MODEL = "smollm2-135m"
BITS = "2.0"
BOUND = 2.0  # perplexity, compressed against F16
CHUNKS = 40  # windows of 512 tokens; each counts its second half
TOKENS = 64
PROMPT = "The Alps are a mountain range in"

FOLDER = Path("demo")
DBF = FOLDER / f"{MODEL}-dbf-{BITS}.gguf"
F16 = FOLDER / f"{MODEL}-f16.gguf"
TEXT = FOLDER / "wiki-evaluation.txt"


def perplexity(model: Path) -> float:
    log = model.with_suffix(".perplexity.log")
    command = [tool("llama-perplexity"), "-m", model, "-f", TEXT, "-c", "512", "--chunks", str(CHUNKS)]
    line, ppl, _ = final_estimate(run(command, log=log, capture=True), log)
    print(line, flush=True)
    return ppl


def demo() -> bool:
    FOLDER.mkdir(exist_ok=True)
    heading("The patched llama.cpp")
    run([tool("llama-cli"), "--version"])

    heading(f"Compress {MODEL} to {BITS} bits a weight")
    # `fast`, whose tuning is bounded in minutes as well, so that a slow machine ends too: block by block it starts near
    # enough for few steps to do. Few windows for convert's own figure: llama-perplexity measures the same below.
    options = ["--bits", BITS, "--effort", "fast", "--eval-windows", "16"]
    limits = ["--tune-tokens", "89600", "--tune-minutes", "8"]
    dbf_gguf("convert", MODEL, *options, *limits, "--work", FOLDER / "work", "-o", DBF)

    heading("The same model uncompressed, and text that the compression has not seen")
    dbf_gguf("reference", MODEL, "-o", F16)
    dbf_gguf("text", "wiki", "--split", "evaluation", "-o", TEXT)

    heading(f"The compressed model writes {TOKENS} tokens")
    command = [tool("llama-completion"), "-m", DBF, "-no-cnv", "-p", PROMPT, "-n", TOKENS, "--ignore-eos"]
    run([*command, "--temp", "0", "--repeat-penalty", "1.2"], log=FOLDER / "completion.log")
    print(flush=True)

    heading(f"Perplexity, {CHUNKS} windows of 512 tokens")
    f16, dbf = perplexity(F16), perplexity(DBF)
    print(f"\nsize:        F16 {F16.stat().st_size / 2**20:.1f} MiB, DBF {DBF.stat().st_size / 2**20:.1f} MiB")
    print(f"perplexity:  F16 {f16:.2f}, DBF {dbf:.2f}, ratio {dbf / f16:.2f} (bound {BOUND})", flush=True)
    return dbf <= BOUND * f16


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    begin = time.monotonic()
    try:
        good = demo()
    except (DBFError, StepFailed) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    print(f"demo ended after {(time.monotonic() - begin) / 60:.0f} minutes", flush=True)
    if not good:
        print(f"demo: the compressed model's perplexity is above {BOUND} times the F16 model's", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

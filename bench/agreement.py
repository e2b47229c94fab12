"""Does llama.cpp compute what PyTorch computes? Perplexity and greedy continuations of one compressed model.

    python bench/agreement.py demo/smollm2-135m-dbf-2.0.gguf demo/work

PyTorch runs the work folder in float32 with the signs as they are, llama.cpp the GGUF made from it, with its 8-bit
activations, embeddings of the chosen type and packed signs. Perplexity is counted on the same tokens; the bound on the
difference is 0.5 %. Continuations are 32 tokens of five prompts; where they part, the two tokens' logits in PyTorch
show how near a tie it was. Ends with status 1 when the bound is missed or when they part at a gap above 0.1.
"""

import argparse
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoTokenizer

import dbf_gguf
from dbf_gguf import calibration
from dbf_gguf.checkpoint import WorkFolder
from dbf_gguf.evaluate import perplexity
from dbf_gguf.llama_cpp import tool
from dbf_gguf.source import resolve

PROMPTS = (
    "The Alps are a mountain range in",
    "Water boils at",
    "The first president of the United States was",
    "A triangle has three",
    "In the year 1969, humans",
)
LENGTH = 32  # tokens
NEAR_TIE = 0.1  # difference of two logits
BOUND = 0.005  # relative difference of the perplexities
N_CTX = 512


def llama_perplexity(model: Path, text: str, windows: int) -> float:
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        command = [tool("llama-perplexity"), "-m", model, "-f", f.name, "-c", str(N_CTX), "--chunks", str(windows)]
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    found = re.search(r"Final estimate: PPL = ([0-9.]+)", run.stdout + run.stderr)
    if not found:
        sys.exit(f"llama-perplexity gave no estimate:\n{run.stderr[-1000:]}")
    return float(found[1])


@contextmanager
def server(model: Path):
    """A llama-server with the model; yields a function that posts a JSON request and returns the answer."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [tool("llama-server"), "-m", model, "--port", str(port), "-c", "1024"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def post(path: str, body: dict) -> dict:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except (urllib.error.URLError, ConnectionError):
                if process.poll() is not None:
                    sys.exit("llama-server ended before it answered")
                time.sleep(0.25)
        else:
            sys.exit("llama-server did not answer within a minute")
        yield post
    finally:
        process.terminate()
        process.wait()


@torch.no_grad()
def compare_continuation(model, ids: list[int], theirs: list[int], banned: list[int]) -> tuple[int, float]:
    """How many tokens of llama.cpp's continuation are PyTorch's own choice, and by how much PyTorch prefers another
    token at the first that is not (0 if all agree). `banned`: tokens that end a text, which llama.cpp was denied."""
    logits = model(torch.tensor([ids + theirs])).logits[0, len(ids) - 1 : -1].float()
    logits[:, banned] = -torch.inf
    for place, (row, token) in enumerate(zip(logits, theirs, strict=True)):
        if row.argmax().item() != token:
            return place, (row.max() - row[token]).item()
    return len(theirs), 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--windows", type=int, default=32)
    arguments = parser.parse_args()

    model = dbf_gguf.load(arguments.work)
    tokenizer = AutoTokenizer.from_pretrained(resolve(WorkFolder.open(arguments.work).manifest["model"]).folder)
    text = calibration.wiki_text("evaluation")
    bos = calibration.leading_bos(tokenizer)
    windows = calibration.evaluation_windows(tokenizer, text, N_CTX, arguments.windows, bos)
    print(f"{len(windows)} windows in PyTorch, then in llama.cpp (minutes each)", file=sys.stderr, flush=True)
    ours = perplexity(model, windows, bos)
    theirs = llama_perplexity(arguments.gguf, text, len(windows))
    difference = theirs / ours - 1
    both = f"PyTorch {ours:.4f}, llama.cpp {theirs:.4f} ({difference:+.2%})"
    print(f"perplexity, {len(windows)} windows of {N_CTX}: {both}", flush=True)
    good = abs(difference) <= BOUND

    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    banned = [special[name] for name in ("<|endoftext|>", "<|im_end|>", "</s>") if name in special]
    with server(arguments.gguf) as post:
        for prompt in PROMPTS:
            ids = tokenizer(prompt)["input_ids"]
            body = {"prompt": ids, "n_predict": LENGTH, "temperature": 0, "return_tokens": True, "ignore_eos": True}
            answer = post("/completion", body)
            agree, gap = compare_continuation(model, ids, answer["tokens"], banned)
            where = "all agree" if agree == LENGTH else f"part at token {agree}, logits {gap:.4f} apart"
            print(f"{prompt!r}: {len(answer['tokens'])} tokens, {where}: {answer['content'][:60]!r}", flush=True)
            good &= gap <= NEAR_TIE and len(answer["tokens"]) == LENGTH
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

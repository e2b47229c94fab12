"""Where things lie on disk: the shipped data (recipes, llama.cpp patch set) and the user's cache.

`convert/` and `cuda_patches/` stand at the top level of the repository and travel inside the package in a wheel, so
`data_dir` looks in both places. Everything fetched or built goes below `cache_dir`, never into the clone.
"""

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def data_dir(name: str) -> Path:
    """The folder `name` ("convert" or "cuda_patches") of the installed wheel, else of the source checkout."""
    for folder in (_PACKAGE / "_data" / name, _PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise AssertionError(f"installation is broken: no folder {name}")


def cache_dir() -> Path:
    """The cache: $DBF_GGUF_CACHE, else $XDG_CACHE_HOME/dbf-gguf, else ~/.cache/dbf-gguf. Created when missing."""
    root = os.environ.get("DBF_GGUF_CACHE")
    if not root:
        base = os.environ.get("XDG_CACHE_HOME")
        root = (Path(base) if base else Path.home() / ".cache") / "dbf-gguf"
    path = Path(root)
    path.mkdir(parents=True, exist_ok=True)
    return path

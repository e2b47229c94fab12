"""The patched llama.cpp: fetch the pinned tree, apply the patch set, build it.

The patch set lies in `cuda_patches/` (see its README.md): `pin.toml` says which llama.cpp, `src/` holds our own files
whole, laid out as in the llama.cpp tree, and `hooks.patch` the few lines that upstream's own files need.

How it works
- Everything goes below `cache_dir()/llama.cpp/<key>`: `src/` (the patched tree) and `build/` or `build-cuda/`. The key
  names the pin and the bytes of the patch set, so another version of either never meets an old tree.
- The hooks are applied by the few lines of Python below and not by `patch` or `git`, which a bare machine may lack.
  They are strict on purpose: a hunk fits at its very line or not at all. The pin is exact, so there is nothing to
  guess, and a hunk with one line of context that lands elsewhere would still compile.
- Each file is either untouched or already patched; anything else is refused before the first byte is written. So
  applying twice is the same as applying once, and an interrupted application is finished by the next.
"""

import contextlib
import difflib
import fcntl
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import fetch
from .errors import DBFError
from .machine import available_cpus, available_memory, compiler, cuda_capabilities, cuda_driver
from .paths import cache_dir, data_dir

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TARGETS = (
    "llama-perplexity",
    "llama-completion",
    "llama-quantize",
    "llama-bench",
    "llama-imatrix",
    "test-backend-ops",
    "llama-dbf-matvec",
    "llama-cli",
    "llama-server",
)

_BUILD_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "CMAKE_C_FLAGS_RELEASE": "-O2 -DNDEBUG",  # but ggml: see dbf-release.cmake
    "CMAKE_CXX_FLAGS_RELEASE": "-O2 -DNDEBUG",
    "BUILD_SHARED_LIBS": "ON",
    "GGML_NATIVE": "ON",
    "LLAMA_BUILD_TESTS": "ON",  # test-backend-ops
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",  # else cmake downloads it
}

_GIB_PER_JOB = 2  # the unity builds of libllama and the server peak near this


@dataclass(frozen=True)
class Pin:
    """Which llama.cpp: the folder `tree` inside the sdist `requirement` with this sha256; `commit` is upstream's."""

    requirement: str
    sha256: str
    tree: str
    commit: str

    def __str__(self) -> str:
        return f"llama.cpp {self.commit} ({self.requirement})"


def pin() -> Pin:
    """The pin of the shipped patch set."""
    return Pin(**tomllib.loads((data_dir("cuda_patches") / "pin.toml").read_text()))


# ---- the patch set: own files and hooks


def _lines(data: bytes) -> list[str]:
    """Lines with their ends, split at line feeds only (str.splitlines knows more ends than diff does)."""
    return io.StringIO(data.decode("utf-8", "surrogateescape"), newline="\n").readlines()


def _bytes(lines: list[str]) -> bytes:
    return "".join(lines).encode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class Hunk:
    """`old` lines from line `old_start` on (counted from 0) become `new` lines from line `new_start` on."""

    old_start: int
    new_start: int
    old: tuple[str, ...]
    new: tuple[str, ...]


def own_files(patches: Path | None = None) -> dict[str, bytes]:
    """Path in the llama.cpp tree -> content, of the files that are ours alone."""
    root = (patches or data_dir("cuda_patches")) / "src"
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def parse_hooks(diff: bytes) -> dict[str, list[Hunk]]:
    """Path in the llama.cpp tree -> hunks, of a unified diff as `regenerate_patch` writes it."""
    files: dict[str, list[Hunk]] = {}
    hunks: list[Hunk] = []
    lines = _lines(diff)
    i = 0
    while i < len(lines):
        if lines[i].startswith("--- "):
            assert lines[i + 1].startswith("+++ b/"), f"hooks.patch:{i + 2}: expected '+++ b/PATH'"
            hunks = files.setdefault(lines[i + 1][len("+++ b/") :].strip(), [])
            i += 2
            continue
        match = re.match(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@", lines[i])
        assert match, f"hooks.patch:{i + 1}: expected a hunk"
        old_start, old_count, new_start, new_count = (int(g) if g is not None else 1 for g in match.groups())
        old: list[str] = []
        new: list[str] = []
        i += 1
        while len(old) < old_count or len(new) < new_count:
            kind, line = lines[i][0], lines[i][1:]
            assert kind in " -+", f"hooks.patch:{i + 1}: malformed hunk"
            if kind in " -":
                old.append(line)
            if kind in " +":
                new.append(line)
            i += 1
        hunks.append(Hunk(old_start - 1, new_start - 1, tuple(old), tuple(new)))
    return files


def patch_key(patches: Path | None = None) -> str:
    """ "<upstream commit>-<hash of the patch set>": names the folder in the cache and the version the tools print."""
    root = patches or data_dir("cuda_patches")
    digest = hashlib.sha256((root / "pin.toml").read_bytes() + (root / "hooks.patch").read_bytes())
    for path, content in own_files(root).items():
        digest.update(f"\0{path}\0{len(content)}\0".encode() + content)
    return f"{pin().commit}-{digest.hexdigest()[:12]}"


def _swap(lines: list[str], hunks: list[Hunk]) -> list[str] | None:
    """The lines with every hunk applied, or None if one does not match at its very place."""
    out: list[str] = []
    at = 0
    for h in hunks:
        if tuple(lines[h.old_start : h.old_start + len(h.old)]) != h.old:
            return None
        out += lines[at : h.old_start]
        assert len(out) == h.new_start, "hooks.patch: line numbers of a hunk do not follow from those before it"
        out += h.new
        at = h.old_start + len(h.old)
    return out + lines[at:]


def _reverse(hunks: list[Hunk]) -> list[Hunk]:
    return [Hunk(h.new_start, h.old_start, h.new, h.old) for h in hunks]


def apply_patch(tree: Path, patches: Path | None = None) -> bool:
    """Patches a llama.cpp tree in place. Returns False when there was nothing to do: all is applied already.

    Raises DBFError, before anything is written, when a file is neither as in the pinned tree nor as patched.
    """
    root = patches or data_dir("cuda_patches")
    writes: dict[Path, bytes] = {}
    for name, hunks in parse_hooks((root / "hooks.patch").read_bytes()).items():
        path = tree / name
        if not path.is_file():
            raise DBFError(f"{tree} has no {name}: not a tree of {pin()}, which the patch set is made for")
        lines = _lines(path.read_bytes())
        patched = _swap(lines, hunks)
        if patched is not None:
            writes[path] = _bytes(patched)
        elif _swap(lines, _reverse(hunks)) is None:
            raise DBFError(f"{path} is neither as in {pin()} nor as patched by this version; take a clean checkout")
    for name, content in own_files(root).items():
        path = tree / name
        if not path.exists():
            writes[path] = content
        elif path.read_bytes() != content:
            raise DBFError(f"{path} is from another version of the patch set; take a clean checkout of {pin()}")
    for path, content in writes.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_bytes(content)
        if path.exists():
            shutil.copymode(path, part)
        os.replace(part, path)
    return bool(writes)


def regenerate_patch(tree: Path, patches: Path | None = None) -> list[str]:
    """Writes `hooks.patch` and `src/` anew from an edited tree; returns the paths of the files they hold.

    The tree is compared with the pinned one. A file that the pinned tree lacks counts as ours when its name holds
    "dbf"; everything else that is new (build folders and the like) is left alone.
    """
    root = patches or data_dir("cuda_patches")
    if not (tree / "ggml" / "CMakeLists.txt").is_file():
        raise DBFError(f"{tree} is no llama.cpp tree")
    hooks: list[str] = []
    own: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory(dir=cache_dir()) as tmp:
        pristine = Path(tmp)
        _extract(pristine)
        for base in sorted(pristine.rglob("*")):
            name = base.relative_to(pristine).as_posix()
            edited = tree / name
            if not base.is_file():
                continue
            if not edited.is_file():
                raise DBFError(f"{edited} is gone; the patch set only edits and adds files")
            old, new = base.read_bytes(), edited.read_bytes()
            if old != new:
                diff = list(difflib.unified_diff(_lines(old), _lines(new), f"a/{name}", f"b/{name}", n=1))
                assert all(line.endswith("\n") for line in diff), f"{name}: a hook at a last line without newline"
                hooks += diff
        for path in sorted(tree.rglob("*dbf*")):
            name = path.relative_to(tree).as_posix()
            inside = [part for part in Path(name).parts[:-1] if part == ".git" or part.startswith("build")]
            if path.is_file() and not inside and not (pristine / name).exists():
                own[name] = path.read_bytes()
    with tempfile.TemporaryDirectory(dir=root) as tmp:
        for name, content in own.items():
            path = Path(tmp) / "src" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        shutil.rmtree(root / "src", ignore_errors=True)
        os.replace(Path(tmp) / "src", root / "src")
    (root / "hooks.patch").write_bytes(_bytes(hooks))
    return [*parse_hooks(_bytes(hooks)), *own]


# ---- the tree


def _extract(target: Path) -> None:
    """The pinned tree, untouched, into the empty folder `target`."""
    p = pin()
    archive = fetch.pypi_archive(p.requirement, p.sha256, sdist=True)
    prefix = p.tree + "/"
    found = False
    with tarfile.open(archive) as tar:
        for member in tar:
            # `.git` is a submodule's pointer to nowhere; cmake and git would trip over it
            if not member.isfile() or not member.name.startswith(prefix) or member.name == prefix + ".git":
                continue
            path = target / member.name[len(prefix) :]
            path.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as src, open(path, "wb") as dst:
                shutil.copyfileobj(src, dst)
            path.chmod(0o755 if member.mode & 0o100 else 0o644)
            os.utime(path, (member.mtime, member.mtime))
            found = True
    if not found:
        raise DBFError(f"{archive.name} holds no {p.tree}: wrong tree in pin.toml")


def _check_git(tree: Path) -> None:
    """Raises DBFError when a checkout has uncommitted changes that are not the patch set's."""
    if not (tree / ".git").exists() or not shutil.which("git"):
        return

    def git(*args: str) -> bytes:
        run = subprocess.run(["git", "-C", str(tree), *args], capture_output=True)
        if run.returncode != 0:
            raise DBFError(f"git {args[0]} fails in {tree}: {run.stderr.decode(errors='replace').strip()}")
        return run.stdout

    if (tree / ".git").is_file():  # a submodule, or what is left of one in an unpacked sdist: a pointer to nowhere
        pointer = (tree / ".git").read_text().partition("gitdir:")[2].strip()
        if not (tree / pointer).exists():
            return
    hooks = parse_hooks((data_dir("cuda_patches") / "hooks.patch").read_bytes())
    for name in git("diff", "HEAD", "--name-only", "-z", "--relative").decode(errors="surrogateescape").split("\0"):
        if not name or name in own_files():
            continue
        if name in hooks:
            patched = _swap(_lines(git("show", f"HEAD:./{name}")), hooks[name])
            if patched is not None and (tree / name).exists() and (tree / name).read_bytes() == _bytes(patched):
                continue
        raise DBFError(f"{tree} has uncommitted changes ({name}); commit or stash them first")


def source_tree(source: Path | None = None) -> Path:
    """A patched llama.cpp tree: the pinned one in the cache, or the checkout `source`, which is patched in place.

    Raises DBFError when the sdist cannot be fetched, when `source` is not a tree that the patch set fits, or when it is
    a git checkout with uncommitted changes of its own.
    """
    if source is not None:
        if not (source / "ggml" / "CMakeLists.txt").is_file():
            raise DBFError(f"{source} is no llama.cpp tree")
        _check_git(source)
        apply_patch(source)
        return source
    target = _key_dir() / "src"
    if not target.is_dir():
        with _lock("source"):
            if not target.is_dir():
                with tempfile.TemporaryDirectory(dir=_key_dir(), prefix="src.") as tmp:
                    part = Path(tmp) / "src"
                    part.mkdir()
                    _extract(part)
                    apply_patch(part)
                    os.replace(part, target)
    return target


def _key_dir() -> Path:
    path = cache_dir() / "llama.cpp" / patch_key()
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def _lock(name: str) -> Iterator[None]:
    """One process at a time, so that two builds do not write into one folder."""
    with open(_key_dir() / f"{name}.lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another dbf-gguf build of the same tree", file=sys.stderr)
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


# ---- the build


def _nvcc() -> str | None:
    standard = Path("/usr/local/cuda/bin/nvcc")
    found = compiler("CUDACXX", "nvcc") or [str(standard)] * standard.exists()
    return found[0] if found else None


def check_tools(cuda: bool = False) -> None:
    """Raises DBFError, one line, naming every build tool that is missing and how to get it."""
    missing = []
    packages = []
    if not (compiler("CC", "cc", "gcc", "clang") and compiler("CXX", "c++", "g++", "clang++")):
        missing.append("a C and C++ compiler")
        packages.append("build-essential")
    if not (shutil.which("ninja") or shutil.which("make")):
        missing.append("make or ninja")
        packages.append("make")
    if not shutil.which("cmake"):
        missing.append("cmake")
        packages.append("cmake")
    hints = [f"apt-get install {' '.join(packages)}"] if packages else []
    if cuda and not _nvcc():
        missing.append("nvcc")
        hints.append("install the CUDA toolkit, or build without --cuda")
    if missing:
        raise DBFError(f"cannot build llama.cpp, missing: {', '.join(missing)} ({'; '.join(hints)})")


def cuda_architectures(given: str | None = None) -> str:
    """What the CUDA backend is compiled for, as cmake writes it: "86-real;89-real".

    given  "86,89", or cmake's own words ("89-real;90-virtual"); None takes the cards of this machine

    Each architecture takes a core half an hour, so all of them would be a poor default. cmake's "native" is not used:
    without a card it becomes nvcc's oldest architecture with a mere warning, and cmake before 3.24 lacks it.

    Raises DBFError when `given` makes no sense, when there is no card to go by, or when nvcc is too new or too old.
    """
    if given is None:
        names = [f"{capability}-real" for capability in cuda_capabilities()]
        if not names:
            raise DBFError("no NVIDIA card is visible: name its architecture, for example --cuda-arch 89 for RTX 40xx")
    else:
        names = [name.strip() for name in re.split("[,;]", given)]
        for name in names:
            if not re.fullmatch(r"\d{2,3}[af]?(-real|-virtual)?", name):
                raise DBFError(f"--cuda-arch: {name!r} is no architecture; a list looks like 86,89,120")
        # machine code alone, unless asked otherwise: PTX would be for cards that are newer than all of these
        names = [name if "-" in name else f"{name}-real" for name in names]
    known = sorted(map(int, _nvcc_says("--list-gpu-code", pattern=r"^sm_(\d+)$")))
    for name in names:
        if (number := int(re.match(r"\d+", name)[0])) not in known:
            raise DBFError(f"{_nvcc()} knows sm_{known[0]} to sm_{known[-1]} but no sm_{number}: another CUDA toolkit?")
    return ";".join(names)


def _nvcc_says(*arguments: str, pattern: str) -> list[str]:
    """What matches in nvcc's output, line by line. Raises DBFError when nothing does: then it is no nvcc."""
    run = subprocess.run([_nvcc(), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    found = re.findall(pattern, run.stdout, re.MULTILINE)
    if not found:
        raise DBFError(f"{_nvcc()} does not work: {(run.stdout.splitlines() or ['no output'])[0]}")
    return found


def default_jobs() -> int:
    """Parallel compilers: one per CPU that this process may use, fewer when the memory would not hold them."""
    return max(1, min(available_cpus(), available_memory() // (_GIB_PER_JOB << 30)))


def _run(command: list[str], log: Path, env: dict[str, str], what: str) -> None:
    """Runs with all output in the log. On a terminal the current line is shown; a failure shows the end of the log."""
    tty = sys.stderr.isatty()
    print(f"{what} (log: {log})", file=sys.stderr, flush=True)
    with open(log, "a", encoding="utf-8", errors="replace") as f:
        f.write(f"$ {' '.join(command)}\n")
        f.flush()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=env
        )
        try:
            for line in process.stdout:
                f.write(line)
                if tty and (line.startswith("[") or line.startswith("--")):
                    print(f"\r\033[K{line.rstrip()[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr)
        except BaseException:
            process.terminate()
            raise
        finally:
            if tty:
                print("\r\033[K", end="", file=sys.stderr, flush=True)
        status = process.wait()
    if status != 0:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
        print("\n".join(tail), file=sys.stderr)
        raise DBFError(f"{what.split(' (')[0]} failed; the end of the log is above, all of it in {log}")


def _build_dir(source: Path | None, cuda: bool) -> Path:
    # llama.cpp's .gitignore covers build*
    base = _key_dir() / "build" if source is None else source / "build-dbf"
    return base.with_name(base.name + "-cuda") if cuda else base


def build(
    source: Path | None = None, cuda: bool = False, jobs: int | None = None, cuda_arch: str | None = None
) -> Path:
    """Builds TARGETS from the patched tree and returns the folder of the programs and shared libraries.

    The default tree's build is done once for a patch set and then only returned; a tree of the user's own is always
    handed to cmake, which rebuilds what changed. Objects come from ccache when it is installed.

    cuda_arch  see `cuda_architectures`; a finished build for other architectures is done anew

    Raises DBFError when a build tool is missing, when there is no card to build for, when the tree cannot be had (see
    `source_tree`), or when compiling fails.
    """
    if source is not None:
        source = source.resolve()
    folder = _build_dir(source, cuda)
    if source is None and cuda_arch is None and _is_complete(folder):
        return folder / "bin"
    check_tools(cuda)
    arch = cuda_architectures(cuda_arch) if cuda else ""
    tree = source_tree(source)
    with _lock("build"):
        if source is None and _is_complete(folder) and (folder / ".complete").read_text() == arch:
            return folder / "bin"
        _build(tree, folder, arch, jobs or default_jobs())
    return folder / "bin"


def _build(tree: Path, folder: Path, cuda_arch: str, jobs: int) -> None:
    (folder / ".complete").unlink(missing_ok=True)
    log, env = configure(tree, folder, cuda_arch)
    what = f"building llama.cpp with {jobs} jobs (minutes, unless ccache knows it)"
    _run(["cmake", "--build", str(folder), "-j", str(jobs), "--target", *TARGETS], log, env, what)
    missing = [name for name in TARGETS if not (folder / "bin" / name).exists()]
    if missing:
        raise DBFError(f"the build made no {', '.join(missing)}; see {log}")
    (folder / ".complete").write_text(cuda_arch)


def configure(tree: Path, folder: Path, cuda_arch: str = "", **options: str) -> tuple[Path, dict[str, str]]:
    """Lets cmake make the build folder. Returns its log and the environment in which to compile.

    cuda_arch  from `cuda_architectures`; "" builds without CUDA
    options    further options of cmake; they win over ours
    """
    folder.mkdir(parents=True, exist_ok=True)
    commit, patch = patch_key().split("-")
    settings = _BUILD_OPTIONS | {
        "LLAMA_BUILD_NUMBER": "0",
        "LLAMA_BUILD_COMMIT": f"{commit}-dbf-{patch}",
        "GGML_CUDA": "ON" if cuda_arch else "OFF",
        "CMAKE_PROJECT_ggml_INCLUDE": str(tree / "ggml" / "cmake" / "dbf-release.cmake"),
    }
    if cuda_arch:
        settings["CMAKE_CUDA_COMPILER"] = _nvcc()
        settings["CMAKE_CUDA_ARCHITECTURES"] = cuda_arch
        if "CUDACXX" in os.environ:  # cmake would compile with that nvcc and take libraries of the one on the PATH
            settings["CUDAToolkit_ROOT"] = _nvcc_says("--dryrun", "-c", "none.cu", pattern=r"^#\$ TOP=(.*)$")[0]
    env = dict(os.environ)
    if shutil.which("ccache"):
        # The path of the tree changes with the patch set. These two keep it out of what ccache compares (unity builds
        # and GGML_ASSERT put absolute paths into the text), so that a new patch set compiles only what it changed.
        env["CCACHE_BASEDIR"] = str(tree.parent)
        for language in ("C", "CXX"):
            flags = [os.environ.get(f"{language}FLAGS", ""), f"-fmacro-prefix-map={tree.parent}/="]
            settings[f"CMAKE_{language}_FLAGS"] = " ".join(flags).strip()
    generator = ["-G", "Ninja"] if shutil.which("ninja") else ["-G", "Unix Makefiles"]
    log = folder / "build.log"
    log.unlink(missing_ok=True)
    defines = [f"-D{name}={value}" for name, value in (settings | options).items()]
    _run(["cmake", *generator, *defines, "-S", str(tree), "-B", str(folder)], log, env, "configuring llama.cpp")
    return log, env


def _is_complete(folder: Path) -> bool:
    return (folder / ".complete").exists() and all((folder / "bin" / name).exists() for name in TARGETS)


def bin_dir() -> Path | None:
    """The folder of the built programs of this patch set; None before `build`.

    Of two builds the CUDA one, which runs without a card too, but not without NVIDIA's driver.
    """
    for cuda in (True, False) if cuda_driver() else (False, True):
        folder = _build_dir(None, cuda)
        if _is_complete(folder):
            return folder / "bin"
    return None


def tool(name: str) -> Path:
    """Path of a built program, for example "llama-perplexity". Raises DBFError when nothing is built yet."""
    folder = bin_dir()
    if folder is None:
        raise DBFError(f"{name} is not built: run `dbf-gguf build` first")
    return folder / name

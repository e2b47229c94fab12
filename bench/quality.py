"""Quality against size: DBF and llama.cpp's own types, measured alike against the F16 model, in one run.

    python bench/quality.py smollm2-135m
    python bench/quality.py smollm2-135m --dbf demo/smollm2-135m-dbf-2.0.gguf --types Q2_0 IQ2_XXS Q4_0 --chunks 10
    python bench/quality.py smollm2-135m --bits 1.5 1.0 -- --tune-minutes 20

MODEL is what `dbf-gguf convert` takes. DBF files are made with `convert`, which gets the options after `--`, or given
by --dbf. llama.cpp's types are what llama-quantize makes of the F16 model by default, with an importance matrix from
the same calibration text. Where a row length is no multiple of a type's block llama-quantize takes a bigger type for
that tensor, so the bits are counted from the tensors of the file: over the linears, that is all matrices within the
blocks.

Each is measured with llama-perplexity on two texts that no model was calibrated on: `wiki`, of the kind of the default
calibration text, and `speeches`, of another kind. Perplexity and its error; the Kullback-Leibler divergence (KLD) of
the next-token distributions from the F16 model's, the mean and the 99th percentile; how often both hold the same token
for the likeliest. Windows of 512 tokens, of which the second halves count.

Prints every command, then a table for each text, and for each DBF file whether it has lower perplexity and lower KLD
than every type whose file is no larger. Ends with status 1 when one has not, or when a step fails.

All files go into --out: quality.json (all figures), quality.png, logs, the F16 model, the importance matrix and the DBF
files. llama.cpp's quantized models are deleted as soon as they are measured. So are the F16 model's distributions at
the end, which are large: --chunks x 255 x vocabulary x 2 bytes for each text. What was measured is kept in
quality.json: the same command again goes on where it was interrupted. A figure is measured anew when one of the files
that it depends on is another (by sha256).
"""

import argparse
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from commands import StepFailed, dbf_gguf, final_estimate, heading, run

from dbf_gguf.errors import DBFError
from dbf_gguf.fetch import sha256_of
from dbf_gguf.gguf_file import DBF_TYPE, PARTS, GGUFFile
from dbf_gguf.llama_cpp import patch_key, pin, tool
from dbf_gguf.recipes import DEFAULT
from dbf_gguf.source import resolve

N_CTX = 512
TEXTS = ("wiki", "speeches")
BITS = (2.0, 1.5, 1.0)
NOT_COMPARED = ("F16", "BF16", "F32", "COPY", "MXFP4_MOE")
MIB = 2**20
BROKEN = {"ppl": 6, "kld": 3}  # perplexity against F16's, nats: of no use, and off the picture's scale
F16, DBF, LLAMA_CPP = "F16", "DBF", "llama.cpp"  # kinds of candidates

FIGURES = {  # name -> its line in the output of llama-perplexity --kl-divergence
    "ppl": r"Mean PPL\(Q\)\s*:\s*(\S+) ± +(\S+)",
    "kld": r"Mean +KLD:\s*(\S+) ± +(\S+)",
    "kld_99": r"99\.0% +KLD:\s*(\S+)",
    "same_top": r"Same top p:\s*(\S+) ± +(\S+) %",
}


# --- what llama.cpp's programs say


def parse_figures(output: str) -> dict[str, float | None]:
    """FIGURES, those with an error bar also as `<name>_error`, out of llama-perplexity's output; `same_top` in percent.
    None stands for what is not finite. Raises StepFailed when one is missing."""
    figures = {}
    for name, pattern in FIGURES.items():
        found = re.search(pattern, output)
        if not found:
            raise StepFailed(f"llama-perplexity gave no {name}")
        values = [float(value) for value in found.groups()]
        for key, value in zip((name, f"{name}_error"), values, strict=False):
            figures[key] = value if math.isfinite(value) else None
    return figures


def parse_types(usage: str) -> list[str]:
    """The types that llama-quantize's usage text lists, without aliases, float formats and those for experts only."""
    listed = re.findall(r"^ +\d+ +or +(\S+) *: *(.*)$", usage, re.MULTILINE)
    return [name for name, about in listed if name not in NOT_COMPARED and not about.startswith("alias")]


def llama_cpp_types() -> list[str]:
    usage = subprocess.run([tool("llama-quantize"), "--help"], capture_output=True, text=True)
    types = parse_types(usage.stdout + usage.stderr)
    if not types:
        raise StepFailed("llama-quantize --help lists no types")
    return types


# --- files


def describe(path: Path) -> dict:
    """`bytes` of a GGUF file; `bits` a weight over its linears, that is the matrices in its blocks, scales included;
    `types`: type of tensor -> share of the linears' weights."""
    with GGUFFile(path) as file:
        stored, weights = 0, Counter()
        for parts in file.linears().values():
            if set(parts) == set(PARTS):
                stored += sum(part.nbytes for part in parts.values())
                weights["DBF"] += parts["dbf_b"].ne[0] * parts["dbf_a"].ne[1]
        for tensor in file.tensors.values():
            matrix = len(tensor.ne) > 1 and tensor.type != DBF_TYPE
            if matrix and re.fullmatch(r"blk\.\d+\..+\.weight", tensor.name):
                stored += tensor.nbytes
                weights[tensor.type_name] += tensor.n_elements
        total = sum(weights.values())
        if not total:
            raise DBFError(f"{path} has no linears: no matrix named blk.<number>....weight and no DBF linear")
        shares = {name: count / total for name, count in weights.most_common()}
        return {"bytes": file.size, "bits": 8 * stored / total, "types": shares}


def digest(*parts) -> str:
    """One key out of all that a result depends on."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Candidate:
    """A model to be measured. Another `key` means another file."""

    name: str
    kind: str
    key: str
    path: Path


class Store:
    """What has been measured, in a JSON file that is written after every step: a file's description and its figures on
    each text, each under the key of what it depends on. Under another key there is nothing."""

    def __init__(self, path: Path, model: str):
        self.path = path
        self.data = {"model": model, "files": {}, "figures": {}}
        if path.exists():
            try:
                data = json.loads(path.read_text(encoding="utf-8"))
                found = data["model"]
                data["files"], data["figures"]
            except (ValueError, KeyError, TypeError):
                raise DBFError(f"{path} is damaged: delete it, and all is measured again") from None
            if found != model:
                raise DBFError(f"{path.parent} holds the figures of {found}: name another folder with --out")
            self.data = data

    def get(self, part: str, name: str, key: str) -> dict | None:
        entry = self.data[part].get(name)
        return entry["value"] if entry and entry["key"] == key else None

    def put(self, part: str, name: str, key: str, value: dict) -> None:
        self.data[part][name] = {"key": key, "value": value}
        self.save()

    def save(self) -> None:
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(part, self.path)


# --- measuring


class Bench:
    """One run: the files in `out`, and what is to be measured of them."""

    def __init__(self, arguments: argparse.Namespace, convert_options: list[str]):
        self.model, self.convert_options = arguments.model, convert_options
        source = resolve(arguments.model)
        self.out = arguments.out or Path("quality") / source.name
        self.out.mkdir(parents=True, exist_ok=True)
        self.store = Store(self.out / "quality.json", source.origin)
        self.calib = arguments.calib or (source.recipe or DEFAULT).calib
        self.chunks, self.imatrix_chunks = arguments.chunks, arguments.imatrix_chunks
        self.threads = ["-t", arguments.threads] if arguments.threads else []
        self.dbf, self.bits, self.types = arguments.dbf, arguments.bits, arguments.types
        texts = [spec if spec in TEXTS else Path(spec).stem for spec in arguments.text]
        models = ["F16", *(f"dbf-{bits}" for bits in self.bits), *(path.stem for path in self.dbf), *self.types]
        for names in (texts, models):
            for name, count in Counter(names).items():
                if count > 1:
                    raise DBFError(f"{count} of the files to compare have the same name, {name}: give it to one only")
        self.texts = dict(zip(texts, arguments.text, strict=True))
        for path in self.dbf:
            if not describe(path)["types"].get("DBF"):
                raise DBFError(f"{path} has no DBF linears")

    # what others are made from or compared with

    @cached_property
    def f16(self) -> Candidate:
        path = self.out / "f16.gguf"
        dbf_gguf("reference", self.model, "-o", path)
        return Candidate("F16", F16, sha256_of(path), path)

    def text_path(self, name: str) -> Path:
        return self.out / f"text-{name}.txt"

    @cached_property
    def text_keys(self) -> dict[str, str]:
        for name, spec in self.texts.items():
            dbf_gguf("text", spec, "-o", self.text_path(name))
        return {name: sha256_of(self.text_path(name)) for name in self.texts}

    @cached_property
    def calibration_text(self) -> Path:
        path = self.out / "calibration.txt"
        dbf_gguf("text", self.calib, "--split", "calibration", "-o", path)
        return path

    @cached_property
    def imatrix_key(self) -> str:
        return digest(self.f16.key, sha256_of(self.calibration_text), self.imatrix_chunks, N_CTX, pin().commit)

    def imatrix(self) -> Path:
        path = self.out / f"imatrix-{self.imatrix_key}.gguf"
        if not path.exists():
            part = self.out / "imatrix.part.gguf"
            command = [tool("llama-imatrix"), "-m", self.f16.path, "-f", self.calibration_text, "-o", part]
            command += ["-c", N_CTX, "--chunks", self.imatrix_chunks, *self.threads]
            run(command, log=self.out / "imatrix.log", capture=True)
            os.replace(part, path)
        return path

    # the candidates

    def candidates(self) -> list[Candidate]:
        """F16 first, then the DBF files, then llama.cpp's types, which are not made before they are to be measured."""
        made = []
        for bits in self.bits:
            path = self.out / f"dbf-{bits}.gguf"
            command = ["convert", self.model, "--bits", bits, "--calib", self.calib, "--eval-windows", 0]
            command += ["--threads", self.threads[1]] if self.threads else []
            dbf_gguf(*command, "--work", self.out / f"dbf-{bits}-work", "-o", path, *self.convert_options)
            made.append(path)
        found = [self.f16]
        text = Path(self.calib).expanduser()
        here = f"{text.name} {sha256_of(text)[:12]}" if text.is_file() else self.calib  # as convert writes it down
        for path in [*made, *self.dbf]:
            found.append(Candidate(path.stem, DBF, sha256_of(path), path))
            with GGUFFile(path) as file:
                calib = json.loads(file.get("dbf.settings", "{}")).get("calib")
            if calib != here:
                print(f"note: {path} was calibrated on {calib}, llama.cpp's types are on {here}")
        for name in self.types:
            key = digest(self.f16.key, self.imatrix_key, name, pin().commit)
            found.append(Candidate(name, LLAMA_CPP, key, self.out / f"{name}.gguf"))
        return found

    def figures_key(self, candidate: Candidate, text: str) -> str:
        # the patch set concerns DBF only; llama.cpp's own types are computed by the pinned upstream code
        code = patch_key() if candidate.kind == DBF else pin().commit
        return digest(candidate.key, self.f16.key, self.text_keys[text], self.chunks, N_CTX, code)

    def figures(self, candidate: Candidate, text: str) -> dict | None:
        return self.store.get("figures", f"{candidate.name} {text}", self.figures_key(candidate, text))

    def measure(self, candidate: Candidate) -> None:
        """Whatever the store does not have of it yet."""
        description = self.store.get("files", candidate.name, candidate.key)
        missing = [text for text in self.texts if self.figures(candidate, text) is None]
        if description and (not missing or "refused" in description):
            return
        heading(candidate.name)
        try:
            if candidate.kind == LLAMA_CPP and not self.quantize(candidate):
                return
            self.store.put("files", candidate.name, candidate.key, describe(candidate.path))
            for text in missing:
                base = self.base(text)
                if candidate.kind == F16:
                    continue  # measured in passing
                log = self.out / f"{candidate.name}-{text}.log"
                command = [*self.perplexity(candidate, text), "--kl-divergence-base", base, "--kl-divergence"]
                figures = parse_figures(run(command, log=log, capture=True))
                print(", ".join(f"{key} {value}" for key, value in figures.items()), flush=True)
                self.put_figures(candidate, text, figures)
        finally:
            if candidate.kind == LLAMA_CPP:
                candidate.path.unlink(missing_ok=True)

    def put_figures(self, candidate: Candidate, text: str, figures: dict) -> None:
        self.store.put("figures", f"{candidate.name} {text}", self.figures_key(candidate, text), figures)

    def perplexity(self, candidate: Candidate, text: str) -> list:
        command = [tool("llama-perplexity"), "-m", candidate.path, "-f", self.text_path(text), "-c", N_CTX]
        return [*command, "--chunks", self.chunks, *self.threads]

    def quantize(self, candidate: Candidate) -> bool:
        """Makes the file; False when llama-quantize has no type that fits the model's tensors."""
        log = self.out / f"{candidate.name}-quantize.log"
        command = [tool("llama-quantize"), "--imatrix", self.imatrix(), self.f16.path, candidate.path, candidate.name]
        try:
            run([*command, *self.threads[1:]], log=log, capture=True)
        except StepFailed:
            reason = refusal(log.read_text(encoding="utf-8", errors="replace"))
            if reason is None:
                raise
            self.store.put("files", candidate.name, candidate.key, {"refused": reason})
            return False
        return True

    def base(self, text: str) -> Path:
        """The F16 model's distributions on a text. Making them gives its perplexity, too."""
        key = self.figures_key(self.f16, text)
        path = self.out / f"base-{text}-{key}.kld"
        if not path.exists() or self.figures(self.f16, text) is None:
            part = path.with_suffix(".part")
            log = self.out / f"{self.f16.name}-{text}.log"
            self.check_disk()
            output = run([*self.perplexity(self.f16, text), "--kl-divergence-base", part], log=log, capture=True)
            line, ppl, error = final_estimate(output, log)
            print(line, flush=True)
            exact = {"kld": 0.0, "kld_error": 0.0, "kld_99": 0.0, "same_top": 100.0, "same_top_error": 0.0}
            self.put_figures(self.f16, text, {"ppl": ppl, "ppl_error": error} | exact)
            os.replace(part, path)
        return path

    def check_disk(self) -> None:
        with GGUFFile(self.f16.path) as file:
            vocabulary = len(file.get("tokenizer.ggml.tokens", ()))
        need, free = self.chunks * (N_CTX // 2) * vocabulary * 2, shutil.disk_usage(self.out).free
        if need > free:
            sizes = f"{need / MIB:,.0f} MiB for one text, {free / MIB:,.0f} are free"
            raise DBFError(f"the disk of {self.out} is too full: {sizes}; give fewer --chunks or another --out")

    def rows(self, candidates: list[Candidate]) -> list[dict]:
        """One dict for each: name, kind, then either `refused` or its description and `figures`, text -> dict."""
        rows = []
        for candidate in candidates:
            row = {"name": candidate.name, "kind": candidate.kind}
            row |= self.store.get("files", candidate.name, candidate.key)
            if "refused" not in row:
                row["figures"] = {text: self.figures(candidate, text) for text in self.texts}
            rows.append(row)
        return rows

    def clean(self) -> None:
        """The large files that only a run in progress needs."""
        for path in [*self.out.glob("base-*.kld"), *self.out.glob("base-*.part")]:
            path.unlink()


def refusal(log: str) -> str | None:
    """Why llama-quantize has no such type for this model, None when the log shows a failure of another kind."""
    found = re.search(r"failed to quantize: (.*(?:fallback|importance matrix).*)", log)
    return found[1].strip() if found else None


# --- showing


def table(rows: list[dict], text: str) -> str:
    """The figures on one text as a Markdown table, the largest file first."""
    figures = ["perplexity", "mean KLD", "99 % KLD", "same top token, %"]
    cells = [["model", "file, MiB", "bits, linears", *figures, "linears are"]]
    for row in sorted(_measured(rows), key=lambda row: -row["bytes"]):
        f = row["figures"][text]
        types = ", ".join(f"{name} {share:.0%}" if share < 1 else name for name, share in row["types"].items())
        cells.append(
            [row["name"], f"{row['bytes'] / MIB:.1f}", f"{row['bits']:.3f}", _with_error(f, "ppl", 2)]
            + [_with_error(f, "kld", 4), _shown(f["kld_99"], 3), _with_error(f, "same_top", 2), types]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells)


def _measured(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "refused" not in row]


def _shown(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:,.{digits}f}"


def _with_error(figures: dict, name: str, digits: int) -> str:
    return f"{_shown(figures[name], digits)} ± {_shown(figures[f'{name}_error'], digits)}"


def verdict(rows: list[dict], texts: list[str]) -> tuple[list[str], bool]:
    """One line for each DBF file on how it does against llama.cpp's types of at most its size, and whether all have
    lower perplexity and lower KLD than each of those, on each text. A file without such rivals counts as good."""
    lines, good = [], True
    types = [row for row in _measured(rows) if row["kind"] == LLAMA_CPP]
    for row in rows:
        if row["kind"] != DBF:
            continue
        rivals = [other for other in types if other["bytes"] <= row["bytes"]]
        larger = sorted((other for other in types if other["bytes"] > row["bytes"]), key=lambda other: other["bytes"])
        line = f"{row['name']} ({row['bytes'] / MIB:.1f} MiB): "
        if rivals:
            line += f"no larger are {', '.join(other['name'] for other in rivals)}"
            for text in texts:
                lost = [shortfall for other in rivals if (shortfall := _shortfall(row, other, text))]
                good &= not lost
                line += f"; {text}: " + (f"NOT better than {', '.join(lost)}" if lost else "better than all of them")
        else:
            line += "no type of llama.cpp makes a file as small"
            if larger:
                line += f" (the smallest is {larger[0]['name']}, {larger[0]['bytes'] / MIB:.1f} MiB)"
        beaten = [other["name"] for other in larger if not any(_shortfall(row, other, text) for text in texts)]
        if beaten:
            line += f"; of the larger it is better than {', '.join(beaten)} on every text"
        lines.append(line)
    return lines, good


def _shortfall(row: dict, other: dict, text: str) -> str:
    """Where `row` is not lower than `other`, for reading; empty if it is lower in both perplexity and KLD."""
    mine, theirs = (
        {key: math.inf if f[key] is None else f[key] for key in ("ppl", "kld")}
        for f in (row["figures"][text], other["figures"][text])
    )
    names = {"ppl": "perplexity", "kld": "KLD"}
    lost = [f"{names[k]} {mine[k]:.4g} against {theirs[k]:.4g}" for k in names if not mine[k] < theirs[k]]
    return f"{other['name']} ({' and '.join(lost)})" if lost else ""


def plot(rows: list[dict], texts: list[str], title: str, path: Path) -> None:
    """Perplexity and mean KLD against file size, a column of panels for each text; F16's perplexity is a line.

    What is BROKEN stands at the panel's upper edge with its value, since it would squeeze the rest together.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from adjustText import adjust_text
    from matplotlib.ticker import LogLocator, NullLocator

    figure, panels = plt.subplots(2, len(texts), figsize=(9 * len(texts), 14), squeeze=False, layout="constrained")
    figure.suptitle(title)
    f16 = next(row["figures"] for row in rows if row["kind"] == F16)
    colours = {DBF: "tab:red", LLAMA_CPP: "tab:blue"}
    for column, text in enumerate(texts):
        for panel, (key, label) in zip(
            panels[:, column], {"ppl": "perplexity", "kld": "mean KLD to F16"}.items(), strict=True
        ):
            panel.set(xscale="log", yscale="log", xlabel="file, MiB", ylabel=label, title=text)
            limit = BROKEN[key] * (f16[text]["ppl"] if key == "ppl" else 1)
            same: dict[tuple, list[str]] = {}  # types that fall back to the same tensors are one point
            for row in _measured(rows):
                y, name = row["figures"][text][key], row["name"]
                if y is None or y > limit:
                    value = "not finite" if y is None else f"{y:,.0f}" if y >= 10 else f"{y:.2g}"
                    y, name = limit, f"{name} ({value})"
                if row["kind"] == F16 and key == "ppl":
                    panel.axhline(y, color="grey", linestyle="--", linewidth=1)
                    panel.annotate("F16", (0.995, y), xycoords=("axes fraction", "data"), ha="right", va="bottom")
                elif row["kind"] != F16 and y > 0:
                    same.setdefault((row["kind"], row["bytes"] / MIB, y), []).append(name)
            for kind, colour in colours.items():
                points = [point for point in same if point[0] == kind]
                marker = "D" if kind == DBF else "o"
                panel.scatter([p[1] for p in points], [p[2] for p in points], c=colour, marker=marker, s=30, label=kind)
            labels = [
                panel.text(x, y, " = ".join(names), color=colours[kind], fontsize=8)
                for (kind, x, y), names in same.items()
            ]
            for axis, marks in ((panel.xaxis, range(1, 10)), (panel.yaxis, (1, 2, 3, 5))):
                axis.set_major_locator(LogLocator(subs=tuple(marks)))
                axis.set_major_formatter("{x:g}")
                axis.set_minor_locator(NullLocator())
            panel.margins(0.1)
            panel.grid(which="both", linewidth=0.3)
            panel.legend(loc="upper right")
            if labels:
                x, y = [point[1] for point in same], [point[2] for point in same]
                lines = {"arrowstyle": "-", "color": "grey", "linewidth": 0.5}
                room = {"expand": (1.25, 1.7), "force_text": (0.6, 0.9), "force_static": (0.3, 0.6), "iter_lim": 3000}
                adjust_text(labels, x=x, y=y, ax=panel, arrowprops=lines, min_arrow_len=2, **room)
    figure.savefig(path, dpi=100)
    plt.close(figure)


# --- the command


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and those for `convert` behind `--`."""
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Options after -- go to convert.")
    parser.add_argument("model", help="as for dbf-gguf convert")
    parser.add_argument("--dbf", type=Path, action="append", help="a DBF GGUF of the model; may be given repeatedly")
    parser.add_argument("--bits", nargs="+", type=float, help=f"DBF files to make (default without --dbf: {BITS})")
    parser.add_argument("--types", nargs="*", help="types of llama-quantize (default: all)")
    parser.add_argument("--text", action="append", help=f"{' or '.join(TEXTS)} or a text file (default: both)")
    parser.add_argument("--chunks", type=int, default=40, help="windows of each text (default: %(default)s)")
    parser.add_argument("--calib", help="calibration text (default: the recipe's)")
    parser.add_argument(
        "--imatrix-chunks", type=int, default=256, help="windows of it for the importance matrix (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: what each program takes)")
    parser.add_argument("--out", type=Path, help="folder for all files (default: quality/MODEL)")
    arguments, convert_options = parser.parse_args(argv[:cut]), argv[cut + 1 :]
    known = llama_cpp_types()
    arguments.types = known if arguments.types is None else [name.upper() for name in arguments.types]
    for name in arguments.types:
        if name not in known:
            raise DBFError(f"llama-quantize has no type {name}: there are {', '.join(known)}")
    if "--calib" in convert_options:
        raise DBFError("give --calib before the --: llama.cpp's types get the same text")
    arguments.dbf = arguments.dbf or []
    arguments.bits = arguments.bits or ([] if arguments.dbf else list(BITS))
    arguments.text = arguments.text or list(TEXTS)
    return arguments, convert_options


def main(argv: list[str]) -> int:
    try:
        arguments, convert_options = parse_arguments(argv)
        missing = [name for name in ("matplotlib", "adjustText") if importlib.util.find_spec(name) is None]
        if missing:
            raise DBFError(f"{' and '.join(missing)} missing: pip install -e '.[bench]'")
        bench = Bench(arguments, convert_options)
        candidates = bench.candidates()
        for candidate in candidates:
            bench.measure(candidate)
        bench.clean()
    except (DBFError, StepFailed) as error:
        print(f"bench/quality.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    rows, texts = bench.rows(candidates), list(bench.texts)
    lines, good = verdict(rows, texts)
    bench.store.data |= {"n_ctx": N_CTX, "chunks": bench.chunks, "calib": bench.calib, "rows": rows, "verdict": lines}
    bench.store.save()
    picture = bench.out / "quality.png"
    plot(rows, texts, f"{bench.model}, {bench.chunks} windows of {N_CTX} tokens", picture)
    for text in texts:
        heading(f"{bench.model} on {text}, {bench.chunks} windows of {N_CTX} tokens")
        print(table(rows, text))
    print(f"\nfigures: {bench.store.path}, picture: {picture}")
    for row in rows:
        if "refused" in row:
            print(f"{row['name']}: llama-quantize makes no such file of this model ({row['refused']})")
    print("\n".join(lines), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`dbf-gguf inspect`: what a GGUF file holds, per tensor and in all."""

import json
from pathlib import Path

import click

MIB = 2**20


def summarize(file) -> dict:
    """Everything `inspect` shows, as plain data: `linears`, `tensors`, `totals`, `metadata`; sizes in bytes."""
    from ..gguf_file import PARTS
    from ..verify import bits_per_weight

    linears = []
    in_linear = set()
    for base, parts in file.linears().items():
        if set(parts) != set(PARTS) or any(len(parts[p].ne) != 2 for p in ("dbf_a", "dbf_b")):
            continue  # shown among the other tensors; `verify` says what is wrong with it
        n_in, k = parts["dbf_b"].ne
        n_out, n_bytes = parts["dbf_a"].ne[1], sum(part.nbytes for part in parts.values())
        in_linear.update(part.name for part in parts.values())
        linears.append(
            {"name": base, "n_out": n_out, "n_in": n_in, "k": k, "bits": 8 * n_bytes / (n_out * n_in), "bytes": n_bytes}
        )
    others = [
        {"name": t.name, "type": t.type_name, "shape": list(t.shape), "bytes": t.nbytes}
        for t in file.tensors.values()
        if t.name not in in_linear
    ]
    in_linears = sum(entry["n_out"] * entry["n_in"] for entry in linears)
    weights = in_linears + sum(t.n_elements for t in file.tensors.values() if t.name not in in_linear)
    # as F16 file: 2 bytes for every weight of a matrix, 4 for vectors, the same metadata
    f16 = file.data_start + 2 * in_linears
    f16 += sum((2 if len(t.ne) > 1 else 4) * t.n_elements for t in file.tensors.values() if t.name not in in_linear)
    keys = [key for key in file.metadata if key in ("general.architecture", "general.name") or key.startswith("dbf.")]
    each = [entry["bits"] for entry in linears] or [0.0]
    return {
        "linears": linears,
        "tensors": others,
        "totals": {
            "linears": len(linears),
            "budget": _budget(file),
            "linear_bits_range": [min(each), max(each)],
            "linear_weights": in_linears,
            "linear_bytes": sum(entry["bytes"] for entry in linears),
            "linear_bits_per_weight": bits_per_weight(file),
            "weights": weights,
            "file_bits_per_weight": 8 * file.size / weights if weights else 0.0,
            "file_bytes": file.size,
            "f16_bytes": f16,
        },
        "metadata": {key: file.get(key) for key in keys},
    }


def _budget(file) -> str | None:
    """How the bits were divided among the linears, where the file says it."""
    try:
        budget = json.loads(file.get("dbf.settings")).get("budget")
    except (TypeError, ValueError, AttributeError):
        return None
    return budget if isinstance(budget, str) else None


def show(summary: dict) -> None:
    """The summary as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if summary["linears"]:
        table = Table(title="DBF linears", box=None, title_justify="left")
        for heading, justify in (("name", "left"), *((h, "right") for h in ("n_out x n_in", "k", "bits", "MiB"))):
            table.add_column(heading, justify=justify)
        for e in summary["linears"]:
            row = (f"{e['n_out']}x{e['n_in']}", str(e["k"]), f"{e['bits']:.3f}", f"{e['bytes'] / MIB:.3f}")
            table.add_row(e["name"], *row)
        console.print(table)
    table = Table(title="Other tensors", box=None, title_justify="left")
    for heading, justify in (("name", "left"), ("type", "left"), ("shape", "right"), ("MiB", "right")):
        table.add_column(heading, justify=justify)
    for e in summary["tensors"]:
        table.add_row(e["name"], e["type"], "x".join(map(str, e["shape"])), f"{e['bytes'] / MIB:.3f}")
    console.print(table)
    for key, value in summary["metadata"].items():
        console.print(f"{key} = {value}", markup=False, highlight=False, soft_wrap=True)
    t = summary["totals"]
    low, high = t["linear_bits_range"]
    console.print(
        f"\n{t['linears']} DBF linears: {t['linear_bits_per_weight']:.3f} bits per weight "
        f"({low:.3f} to {high:.3f}, budget {t['budget'] or 'unknown'}), {t['linear_bytes'] / MIB:.1f} MiB\n"
        f"whole file: {t['file_bits_per_weight']:.3f} bits per weight, {t['file_bytes'] / MIB:.1f} MiB; "
        f"as F16 {t['f16_bytes'] / MIB:.1f} MiB ({t['f16_bytes'] / t['file_bytes']:.2f} times as large)",
        highlight=False,
        soft_wrap=True,
    )


@click.command(
    epilog="""\b
Example:
  dbf-gguf inspect smollm2.gguf --json"""
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON (sizes in bytes) instead of tables.")
def command(file: Path, as_json: bool) -> None:
    """Show what a DBF GGUF holds: k, bits and size of each linear, the other tensors, totals, metadata."""
    from ..gguf_file import GGUFFile

    with GGUFFile(file) as gguf:
        summary = summarize(gguf)
    if as_json:
        click.echo(json.dumps(summary, indent=1))
    else:
        show(summary)

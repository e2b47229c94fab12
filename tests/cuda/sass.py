"""What the machine code of the CUDA kernels costs: registers, spills, 16-byte loads, instructions for 32 signs.

    python tests/cuda/sass.py                   # the decode kernels, every architecture
    python tests/cuda/sass.py --arch 89 --all   # every kernel of one

nvcc compiles dbf.cu with the flags of ggml-cuda's own build, cuobjdump and nvdisasm (from wheels, see toolchain.py)
read the result, and this module counts. No GPU takes part. That a kernel is fast does not follow from the counts, but
that it cannot be does: spills and instructions are time that no card gives back.

How the instructions are counted
- `kernels` splits the disassembly into basic blocks and finds the natural loops: a branch back to a block through which
  every way into the loop leads.
- The main loop is the one with most multiply-accumulate instructions, of those that have none such inside. Its length
  is that of the longest way from head to branch: of an if and an else the longer one counts.
- How many signs one trip handles is read from those instructions, never from the source, so that unrolling needs no
  attention: an IMMA.16832 multiplies 16 rows of 32 signs, an IMMA.8816 8 rows of 16, a thread's IDP.4A 4 signs. Divided
  by `repeats`, the times that a kernel uses the same signs: once for each column tile, or for each int8 plane with IDP.
- A warp's instruction is 32 threads' instructions. The figures are a thread's instructions for 32 signs: a trip of N
  instructions and S signs costs 32 N / (S / 32).
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import toolchain

from dbf_gguf.errors import DBFError

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)

# Signs that one instruction of a warp multiplies, by the start of its name.
SIGNS = {
    "IMMA.16832": 16 * 32,
    "IMMA.16816": 16 * 16,
    "IMMA.8816": 8 * 16,
    "HMMA.16816": 16 * 16,
    "HMMA.1688": 16 * 8,
    "IDP.4A": 32 * 4,
}

STREAM = r"LDG\.E\.EF\.128"  # EF: evict first, which is what __ldcs becomes

# What a multiprocessor has: warps, KiB of shared memory. Registers are 64 K on all, in four parts.
LIMITS = {
    75: (32, 64),
    80: (64, 164),
    86: (48, 100),
    89: (48, 100),
    90: (64, 228),
    100: (64, 228),
    120: (48, 100),
}

_RESERVED = 1024  # bytes of shared memory for each block that the driver takes, from sm_80 on

# The pipe that executes an instruction, by the start of its name; ALU is what is left. FMA also has the int8 dot
# product (IDP) and integer multiplication, which is how the compiler likes to move registers.
_PIPES = (
    ("tensor", r"[IHB]MMA|MOVM"),
    ("FMA", r"IMAD|IDP|FFMA|FMUL|FADD|HFMA2|HMUL2|HADD2|FSWZADD"),
    ("LSU", r"LDG|LDS|LDL|LD\.|STG|STS|STL|ST\.|ATOM|RED|SHFL|LDGSTS|LDSM|MATCH|CCTL"),
    ("special", r"MUFU|POPC|FLO|BREV|I2F(?!P)|F2I(?!P)|F2F|S2R|CS2R|VOTE"),
    ("uniform", r"U(?!NDEF)[A-Z]|R2UR|S2UR|LDCU|LDC|VOTEU"),
    ("control", r"BRA|BRX|EXIT|RET|CALL|BSSY|BSYNC|BREAK|WARPSYNC|NOP|BAR|DEPBAR|YIELD|MEMBAR|ERRBAR|BMOV|ENDCOLL"),
)
PIPES = ("ALU", *(name for name, _ in _PIPES))


@dataclass(frozen=True)
class Instruction:
    """One line of the disassembly: "@!P0 BRA `(.L_x_3)" has the guard "!P0", the name "BRA", a target ".L_x_3"."""

    guard: str
    name: str
    operands: str

    @property
    def pipe(self) -> str:
        return next((pipe for pipe, names in _PIPES if re.match(names, self.name)), "ALU")

    @property
    def target(self) -> str | None:
        match = re.search(r"`\((\.L_\w+)\)", self.operands)
        return match[1] if match and re.match(r"BRA|CALL\.REL", self.name) else None

    @property
    def falls_through(self) -> bool:
        if self.guard:
            return True
        if self.name.startswith("BRA"):  # "BRA P1, `(...)", "BRA.U !UP0, `(...)", "BRA.DIV ~URZ, `(...)" may not jump
            return not self.operands.lstrip().startswith("`")
        return not re.match(r"EXIT|RET|BRX|JMP", self.name)


@dataclass
class Loop:
    """Its longest way from head to branch. A loop inside, that copies something, is gone through once."""

    instructions: list[Instruction]

    @property
    def signs(self) -> int:
        """That one warp multiplies in one trip, counted once for every use."""
        return sum(SIGNS.get(multiplier(i.name) or "", 0) for i in self.instructions)

    @property
    def pipes(self) -> Counter:
        return Counter(i.pipe for i in self.instructions)


@dataclass
class Kernel:
    """A kernel of one cubin, and what the driver is told that it needs."""

    arch: int
    name: str  # demangled, without parameters: "dbf_decode<4, float>"
    registers: int
    stack: int  # bytes of local memory for a thread: 0 without spills and without arrays that are indexed
    shared: int  # bytes, static ones alone
    instructions: list[Instruction] = field(repr=False)
    loops: list[Loop] = field(repr=False)

    @property
    def spills(self) -> int:
        """Instructions that read or write local memory."""
        return sum(bool(re.match(r"(LDL|STL)\b", i.name)) for i in self.instructions)

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, i.name)) for i in self.instructions)

    @property
    def wide_loads(self) -> int:
        """16-byte loads from global memory."""
        return self.count(r"^LDG\b.*\.128\b")

    @property
    def ahead(self) -> int:
        """Bytes of signs that a warp has asked for when its main loop begins, by 16-byte loads that bypass the caches.

        Every trip asks for as many as it uses, so that these stay under way.
        """
        loop = self.main_loop
        inside = sum(bool(re.match(STREAM, i.name)) for i in loop.instructions) if loop else 0
        return (self.count(STREAM) - inside) * 32 * 16

    @property
    def main_loop(self) -> Loop | None:
        return max(self.loops, key=lambda loop: loop.signs, default=None)

    def per_32_signs(self, repeats: int) -> dict[str, float]:
        """A thread's instructions for 32 signs by pipe, in the main loop."""
        loop = self.main_loop
        assert loop, f"sm_{self.arch} {self.name}: no loop multiplies signs"
        return {pipe: n * 32 * 32 * repeats / loop.signs for pipe, n in loop.pipes.items()}


def repeats(kernel: str) -> int:
    """How often a kernel of dbf.cu multiplies with the same signs; 0 if it has nothing to do with signs."""
    name, *arguments = re.findall(r"\w+", kernel)
    if name == "dbf_decode":  # <warps, words in a load, tensor cores?>, which take both planes at once
        return 1 if arguments[2] == "true" else 2
    return int(arguments[0]) if name == "dbf_gemm" else 0  # <tiles of columns, ...>


def multiplier(name: str) -> str | None:
    """The key of SIGNS for an instruction."""
    return next((start for start in SIGNS if name.startswith(start)), None)


# --- the disassembly


def _blocks(lines: list[str]) -> list[tuple[set[str], list[Instruction]]]:
    """Basic blocks in order: the labels at their start and their instructions."""
    blocks: list[tuple[set[str], list[Instruction]]] = [(set(), [])]
    for line in lines:
        if label := re.match(r"(\.L_\w+):", line):
            if blocks[-1][1]:
                blocks.append((set(), []))
            blocks[-1][0].add(label[1])
            continue
        if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            match = re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@(!?U?P[T\d]+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line)
            assert match, f"what is this instruction? {line}"
            instruction = Instruction(match[1] or "", match[2], match[3])
            blocks[-1][1].append(instruction)
            if instruction.target or not instruction.falls_through:
                blocks.append((set(), []))
    return blocks


def _loops(blocks: list[tuple[set[str], list[Instruction]]]) -> list[Loop]:
    """The natural loops that multiply signs and have no loop inside that does."""
    where = {label: i for i, (labels, _) in enumerate(blocks) for label in labels}
    after: list[set[int]] = []
    for i, (_, instructions) in enumerate(blocks):
        last = instructions[-1] if instructions else None
        follow = {i + 1} if i + 1 < len(blocks) and (last is None or last.falls_through) else set()
        if last is not None and last.target in where:
            follow.add(where[last.target])
        after.append(follow)
    before: list[set[int]] = [set() for _ in blocks]
    for i, follow in enumerate(after):
        for j in follow:
            before[j].add(i)

    everything = set(range(len(blocks)))
    dominators = [{0}] + [everything] * (len(blocks) - 1)  # of unreachable blocks: everything
    changed = True
    while changed:
        changed = False
        for i in range(1, len(blocks)):
            new = {i}.union(set.intersection(*(dominators[j] for j in before[i])) if before[i] else everything)
            if new != dominators[i]:
                dominators[i], changed = new, True

    bodies: dict[int, set[int]] = {}  # head -> blocks
    reachable = {i for i in everything if dominators[i] != everything or i == 0}
    for i in reachable:
        for head in after[i] & dominators[i]:
            body = bodies.setdefault(head, {head})
            todo = [i]
            while todo:
                block = todo.pop()
                if block not in body:
                    body.add(block)
                    todo += before[block] & reachable
    forward = [follow - dominators[i] for i, follow in enumerate(after)]
    found = []
    for head, body in bodies.items():
        latches = {i for i in body if head in after[i]}
        blocks_on_way = _longest_way(head, latches, [follow & body for follow in forward], blocks)
        inside = frozenset(other for other in bodies if other in body and other != head)
        found.append((head, inside, Loop([i for block in blocks_on_way for i in blocks[block][1]])))
    multiply = {head for head, _, loop in found if loop.signs}
    return [loop for head, inside, loop in found if head in multiply and not inside & multiply]


def _longest_way(head: int, latches: set[int], forward: list[set[int]], blocks) -> list[int]:
    """Blocks from the head of a loop to a branch back to it, the way with most instructions. `forward` has no cycle."""
    best: dict[int, tuple[int, list[int]]] = {}

    def way(i: int) -> tuple[int, list[int]]:
        if i not in best:
            ways = [(0, [])] if i in latches else []
            ways += [found for found in map(way, forward[i]) if found[0] >= 0]
            length, rest = max(ways, default=(-1, []))
            best[i] = (length + len(blocks[i][1]), [i, *rest]) if length >= 0 else (-1, [])
        return best[i]

    length, blocks_on_way = way(head)
    assert length >= 0, "a loop that does not close"
    return blocks_on_way


def resident(arch: int, registers: int, threads: int, shared: int) -> int:
    """Blocks that a multiprocessor holds at a time; `shared` is what a block asks for, static and dynamic, in bytes."""
    warps, kib = LIMITS[arch]
    a_warp = -(-registers * 32 // 256) * 256  # registers are handed out in lots of 256
    by_registers = 4 * (16384 // a_warp) // (threads // 32)
    reserved = _RESERVED if arch >= 80 else 0
    by_shared = (kib << 10) // (shared + reserved) if shared + reserved else 32
    return min(by_registers, by_shared, warps // (threads // 32))


def _run(*command) -> str:
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert run.returncode == 0, f"{' '.join(map(str, command))}\n{run.stdout[-2000:]}{run.stderr[-2000:]}"
    return run.stdout


def demangle(name: str) -> str:
    """"void dbf_decode<4>(unsigned int const *)" without what stands around the name."""
    plain = _run("c++filt", name).strip().removeprefix("void ").replace("(anonymous namespace)::", "")
    depth = 0
    for i, letter in enumerate(plain):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0 and i > 0:
            return plain[:i]
    return plain


def kernels(root: Path, cubin: Path) -> list[Kernel]:
    """The kernels of a cubin of one architecture; `root` is a CUDA toolkit."""
    usage = {}
    for name, rest in re.findall(
        r"Function (\S+):\s*\n\s*(.*)", _run(root / "bin/cuobjdump", "--dump-resource-usage", cubin)
    ):
        usage[name] = dict(re.findall(r"([A-Z]+):(\d+)", rest))
    code: dict[str, list[str]] = {}
    arch, lines = 0, []
    for line in _run(root / "bin/nvdisasm", "-c", cubin).splitlines():
        if match := re.match(r"\s*\.target\s+sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.match(r"\.text\.(\S+):", line):
            lines = code.setdefault(match[1], [])
        elif line.startswith("//---"):
            lines = []  # another section
        else:
            lines.append(line)
    found = []
    for name, u in usage.items():
        blocks = _blocks(code[name])
        instructions = [instruction for _, block in blocks for instruction in block]
        assert instructions, f"sm_{arch} {name}: nvdisasm shows no instructions"
        memory = int(u["STACK"]) + int(u["LOCAL"])
        driver = _RESERVED if arch >= 90 else 0  # from there on it is counted
        found.append(
            Kernel(arch, demangle(name), int(u["REG"]), memory, int(u["SHARED"]) - driver, instructions, _loops(blocks))
        )
    return sorted(found, key=lambda kernel: kernel.name)


def cubins(root: Path, file: Path, folder: Path) -> list[Path]:
    """The machine code that an object file holds: one cubin for an architecture, unpacked into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    run = subprocess.run([root / "bin/cuobjdump", "--extract-elf", "all", file], cwd=folder, capture_output=True)
    assert run.returncode == 0, run.stderr.decode(errors="replace")
    return sorted(folder.glob("*.cubin"))


def table(kernels: list[Kernel]) -> str:
    """Markdown: what was counted."""
    cells = [["sm", "kernel", "registers", "spills", "static shared", "16-byte loads", "ahead", *PIPES, "all"]]
    for k in kernels:
        row = [str(k.arch), k.name, str(k.registers), str(k.spills), str(k.shared), str(k.wide_loads), str(k.ahead)]
        if times := repeats(k.name):
            counts = k.per_32_signs(times)
            row += [f"{counts.get(pipe, 0):.1f}" for pipe in PIPES] + [f"{sum(counts.values()):.1f}"]
        else:
            row += [""] * (len(PIPES) + 1)
        cells.append(row)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rows = [cells[0], ["-" * w for w in widths], *cells[1:]]
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default=",".join(map(str, ARCHITECTURES)), help="75,89 for instance")
    parser.add_argument("--all", action="store_true", help="every kernel, not only those for one token")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        try:
            root = toolchain.toolkit_root(cublas=True)
            file, _ = toolchain.Backend(root, folder / "build", arguments.arch).compile("dbf.cu")
        except DBFError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        found = [kernel for cubin in cubins(root, file, folder / "cubins") for kernel in kernels(root, cubin)]
    chosen = [kernel for kernel in found if arguments.all or kernel.name.startswith("dbf_decode")]
    print("A thread's instructions for 32 signs by pipe, in the main loop; `ahead` in bytes for a warp.\n")
    print(table(sorted(chosen, key=lambda kernel: (kernel.arch, kernel.name))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

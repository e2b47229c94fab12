"""What the machine code of the CUDA kernels costs: registers, spills, 16-byte loads, instructions for 32 signs.

    python tests/cuda/sass.py                   # the decode kernels, every architecture
    python tests/cuda/sass.py --arch 89 --all   # every kernel of one

nvcc compiles dbf.cu with the flags of ggml-cuda's own build, cuobjdump and nvdisasm (from wheels, see toolchain.py)
read the result, and this module counts. No GPU takes part. That a kernel is fast does not follow from the counts, but
that it cannot be does: spills and instructions are time that no card gives back.

How the instructions are counted
- `kernels` splits the disassembly into basic blocks and finds the natural loops: a branch back to a block through which
  every way into the loop leads.
- The main loop is the innermost one with most multiply-accumulate instructions of the kernel. Its length is that of its
  longest way from head to branch: of an if and an else the longer one counts, as it does for a warp.
- How many signs one trip handles is read from those instructions, never from the source, so that unrolling needs no
  attention: an IMMA.16832 multiplies 16 rows of 32 signs, an IMMA.8816 8 rows of 16, a thread's IDP.4A 4 signs. Divided
  by `repeats`, the times that a kernel uses the same signs: once for each column tile, or for each int8 plane with IDP.
- A warp's instruction is 32 threads' instructions. The figures are a thread's instructions for 32 signs: a trip of N
  instructions and S signs costs 32 N / (S / 32).
"""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

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
        return match[1] if match and self.name.startswith("BRA") else None

    @property
    def falls_through(self) -> bool:
        if self.guard:
            return True
        if self.name.startswith("BRA"):  # "BRA P1, `(...)", "BRA.U !UP0, `(...)", "BRA.DIV ~URZ, `(...)" may not jump
            return not self.operands.lstrip().startswith("`")
        return not re.match(r"EXIT|RET|BRX|JMP", self.name)


@dataclass
class Loop:
    """A loop without loops: its longest way from head to branch."""

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
    def main_loop(self) -> Loop | None:
        loops = [loop for loop in self.loops if loop.signs]
        return max(loops, key=lambda loop: loop.signs, default=None)

    def per_32_signs(self, repeats: int) -> dict[str, float]:
        """A thread's instructions for 32 signs by pipe, in the main loop."""
        loop = self.main_loop
        assert loop, f"sm_{self.arch} {self.name}: no loop multiplies signs"
        return {pipe: n * 32 * 32 * repeats / loop.signs for pipe, n in loop.pipes.items()}


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
    """The innermost natural loops."""
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
    innermost = [
        (head, body) for head, body in bodies.items() if not any(other in body for other in bodies if other != head)
    ]
    return [Loop(_longest_way(head, body, after, blocks)) for head, body in innermost]


def _longest_way(head: int, body: set[int], after, blocks) -> list[Instruction]:
    """From the head to a branch back to it; an innermost loop has no other ways back."""
    best: dict[int, list[int] | None] = {}

    def way(i: int) -> list[int] | None:
        if i not in best:
            best[i] = None  # on the way itself: a cycle that is no natural loop
            ways = [[i]] if head in after[i] else []
            ways += [[i, *rest] for j in after[i] if j in body and j != head and (rest := way(j)) is not None]
            best[i] = max(ways, key=lambda w: sum(len(blocks[b][1]) for b in w), default=None)
        return best[i]

    found = way(head)
    assert found is not None, "a loop that does not close"
    return [instruction for block in found for instruction in blocks[block][1]]


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
        found.append(
            Kernel(arch, demangle(name), int(u["REG"]), memory, int(u["SHARED"]), instructions, _loops(blocks))
        )
    return sorted(found, key=lambda kernel: kernel.name)


def cubins(root: Path, file: Path, folder: Path) -> list[Path]:
    """The machine code that an object file holds: one cubin for an architecture, unpacked into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    run = subprocess.run([root / "bin/cuobjdump", "--extract-elf", "all", file], cwd=folder, capture_output=True)
    assert run.returncode == 0, run.stderr.decode(errors="replace")
    return sorted(folder.glob("*.cubin"))

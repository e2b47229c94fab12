"""PTX as nvcc emitted it, translated to C++ that runs on the fibers of cuhost.h.

    python tests/cuda/ptx_to_cpp.py kernels.ptx > kernels_ptx.cpp

What is tested that way is not the kernel's source but what the compiler made of it: inline assembly, the branches for
one architecture, unrolling, address arithmetic, contraction to fma, flushed denormals and approximate division.

A kernel becomes a C++ function of the same (mangled) name and the same parameters. So a program that was compiled
against the declarations of the kernels links with either: with g++'s object of their source or with this.

    PTX                                             C++
    .reg .b32 %r<9>;                                uint32_t r_r1 = POISON, ..., r_r8 = POISON;
    @%p1 bra $L__BB0_2;                             if (r_p1) { goto L__BB0_2; }
    mul.wide.u32 %rd4, %r1, 4;                      write(r_rd4, ptx::mul_wide<uint32_t>(read<uint32_t>(r_r1), 4));
    ld.global.cs.v4.u32 {%r5,%r6,%r7,%r8}, [%rd4];  four reads through ptx::at<load, uint32_t, 4>(address), which checks
                                                    alignment and bounds
    mma.sync.aligned.m16n8k32...                    cuhost::mma_u8s8_m16n8k32(...)

Registers are untyped in PTX, an instruction says how it takes them: read and write copy bits. Shared addresses are
offsets from the block's shared memory. The arithmetic itself is in ptx_runtime.h.

An instruction, modifier or operand that is not known here is an error that names it: nothing is skipped over.
"""

import re
import sys
from pathlib import Path

C_TYPES = {
    "pred": "bool",
    "f32": "float",
    "f16": "uint16_t",
    "f16x2": "uint32_t",
    **{f"{kind}{bits}": f"{'' if kind == 's' else 'u'}int{bits}_t" for kind in "bus" for bits in (8, 16, 32, 64)},
}
SPECIAL = {f"%{ptx}.{axis}": f"{cuda}.{axis}" for ptx, cuda in
           (("tid", "threadIdx"), ("ctaid", "blockIdx"), ("ntid", "blockDim"), ("nctaid", "gridDim")) for axis in "xyz"}
SPECIAL["%laneid"] = "cuhost::lane()"

# set in a load or store and without effect on its value
CACHING = {"nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "weak", "volatile", "relaxed", "gpu", "cta", "sys"}
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
           "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
MMA = {
    "m16n8k32.row.col.s32.u8.s8.s32": ("mma_u8s8_m16n8k32", "int32_t"),
    "m8n8k16.row.col.s32.u8.s8.s32": ("mma_u8s8_m8n8k16", "int32_t"),
    "m16n8k16.row.col.f32.f16.f16.f32": ("mma_f16_m16n8k16", "float"),
    "m16n8k8.row.col.f32.f16.f16.f32": ("mma_f16_m16n8k8", "float"),
}


class Unknown(Exception):
    """PTX that this translator does not know."""


def split(text: str) -> list[str]:
    """Operands, at the commas outside of braces and brackets."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,])+", text)]


def register(name: str) -> str:
    return "r_" + re.sub(r"[%$]", "", name)


class Kernel:
    """One .entry: its symbols, and the translation of its statements."""

    def __init__(self, name: str, params: list[str], shared: dict[str, int]):
        self.name = name
        self.shared = shared  # symbol -> offset in the block's shared memory
        self.params = {}  # symbol -> C++ name
        self.arguments = []
        for i, text in enumerate(params):
            match = re.fullmatch(r"\.param\s+\.align\s+(\d+)\s+\.b8\s+(\S+)\[(\d+)\]", text)
            if match:
                align, symbol, size = match.groups()
                c_type = f"ptx::parameter<{size}, {align}>"
            else:
                match = re.fullmatch(r"\.param\s+\.(\w+)\s+(?:\.ptr(?:\s+\.\w+)*\s+(?:\.align\s+\d+\s+)?)?(\S+)", text)
                if not match:
                    raise Unknown(f"parameter {text!r}")
                c_type, symbol = C_TYPES[match[1]], match[2]
            self.params[symbol] = f"p{i}"
            self.arguments.append(f"{c_type} p{i}")

    # --- operands

    def read(self, operand: str, kind: str) -> str:
        """C++ for the value of an operand, taken as the PTX type `kind`."""
        c_type = C_TYPES[kind]
        if operand in SPECIAL:
            return f"({c_type}) {SPECIAL[operand]}"
        if operand == "%clock" or operand.startswith("WARP_SZ"):
            raise Unknown(f"operand {operand!r}")
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", operand):
            return f"ptx::read<{c_type}>((uint32_t) 0x{operand[2:]})"
        if re.fullmatch(r"-?\d+U?|-?0[xX][0-9a-fA-F]+U?", operand):
            if kind == "f32":
                raise Unknown(f"integer operand {operand!r} of a floating-point instruction")
            digits = operand.rstrip("U")
            return f"({c_type}) {digits}{'ll' if int(digits, 0) < 2**63 else 'ull'}"
        if operand in self.shared:
            return f"({c_type}) {self.shared[operand]}"
        if kind == "pred" and operand.startswith("!"):
            return "!" + self.read(operand[1:], kind)
        if re.fullmatch(r"%?[A-Za-z_]\w*", operand):
            return f"ptx::read<{c_type}>({register(operand)})"
        raise Unknown(f"operand {operand!r}")

    def write(self, operand: str, kind: str, value: str) -> str:
        if operand == "_":
            return f"(void) ({value});"
        return f"ptx::write<{C_TYPES[kind]}>({register(operand)}, {value});"

    def address(self, operand: str, space: str) -> str:
        match = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if not match:
            raise Unknown(f"address {operand!r}")
        base, offset = match[1], match[2] or "0"
        if space == "param":
            return f"(uint64_t) &{self.params[base]} + {offset}"
        if space == "shared":
            return f"ptx::shared({self.read(base, 'u32')} + {offset})"
        return f"{self.read(base, 'u64')} + {offset}"

    # --- instructions

    def instruction(self, opcode: str, args: list[str]) -> str:
        name, *mods = opcode.split(".")
        kind = mods[-1] if mods else ""
        translate = getattr(self, f"op_{name}", None)
        if translate is None:
            raise Unknown("instruction")
        return translate(args, mods, kind)

    def _take(self, mods: list[str], *known: str) -> set[str]:
        """The modifiers before the type, all of which must be known."""
        present = set(mods[:-1])
        if not present <= set(known):
            raise Unknown(f"modifier {sorted(present - set(known))}")
        return present

    def _call(self, function: str, args: list[str], kind: str, n: int, result: str | None = None) -> str:
        """args[0] = function<type>(args[1], ..., args[n])"""
        if len(args) != n + 1:
            raise Unknown("operands")
        values = ", ".join(self.read(a, kind) for a in args[1:])
        return self.write(args[0], result or kind, f"ptx::{function}<{C_TYPES[kind]}>({values})")

    def _float(self, function: str, args: list[str], mods: list[str], n: int) -> str:
        """Floating-point arithmetic, rounded to nearest, with denormals flushed to zero where `ftz` says so."""
        present = self._take(mods, "rn", "ftz")
        flush = "ptx::flush" if "ftz" in present else "ptx::keep"
        values = ", ".join(f"{flush}({self.read(a, 'f32')})" for a in args[1:])
        if len(args) != n + 1 or mods[-1] != "f32":
            raise Unknown("operands")
        return self.write(args[0], "f32", f"{flush}(ptx::{function}({values}))")

    def _arithmetic(self, function, args, mods, kind, n=2):
        if kind == "f32":
            return self._float(function, args, mods, n)
        self._take(mods)
        if kind[0] not in "us":
            raise Unknown("type")
        return self._call(function, args, kind, n)

    def op_add(self, args, mods, kind):
        return self._arithmetic("add", args, mods, kind)

    def op_sub(self, args, mods, kind):
        return self._arithmetic("sub", args, mods, kind)

    def op_neg(self, args, mods, kind):
        return self._arithmetic("neg", args, mods, kind, 1)

    def op_abs(self, args, mods, kind):
        return self._arithmetic("abs", args, mods, kind, 1)

    def _min_max(self, name, args, mods, kind):
        if kind == "f32" and "NaN" in mods:
            return self._float(name + "_nan", args, [m for m in mods if m != "NaN"], 2)
        return self._arithmetic(name, args, mods, kind)

    def op_min(self, args, mods, kind):
        return self._min_max("min", args, mods, kind)

    def op_max(self, args, mods, kind):
        return self._min_max("max", args, mods, kind)

    def op_mul(self, args, mods, kind):
        if kind == "f32":
            return self._float("mul", args, mods, 2)
        return self._product("mul", args, mods, kind)

    def op_mad(self, args, mods, kind):
        return self._product("mad", args, mods, kind)

    def _product(self, name, args, mods, kind):
        which = self._take(mods, "lo", "hi", "wide")
        if len(which) != 1:
            raise Unknown("which half of the product")
        part = which.pop()
        wide = f"{kind[0]}{2*int(kind[1:])}" if part == "wide" else kind
        product = f"ptx::mul_{part}<{C_TYPES[kind]}>({self.read(args[1], kind)}, {self.read(args[2], kind)})"
        if name == "mad":
            product = f"ptx::add<{C_TYPES[wide]}>({product}, {self.read(args[3], wide)})"
        return self.write(args[0], wide, product)

    def op_fma(self, args, mods, kind):
        return self._float("fma", args, mods, 3)

    def op_div(self, args, mods, kind):
        if kind != "f32":
            return self._arithmetic("div", args, mods, kind)
        if "rn" in mods:
            return self._float("div", args, mods, 2)
        how = "approx" if "approx" in mods else "full"
        return self._float(f"div_{how}", args, [m for m in mods if m != how], 2)

    def op_rcp(self, args, mods, kind):
        return self._float("rcp_approx", args, [m for m in mods if m != "approx"], 1) if "approx" in mods else (
            self._float("rcp", args, mods, 1))

    def op_rem(self, args, mods, kind):
        self._take(mods)
        return self._call("rem", args, kind, 2)

    def _bitwise(self, name, args, mods, kind, n=2):
        self._take(mods)
        return self._call(f"bit_{name}", args, kind, n)

    def op_and(self, args, mods, kind):
        return self._bitwise("and", args, mods, kind)

    def op_or(self, args, mods, kind):
        return self._bitwise("or", args, mods, kind)

    def op_xor(self, args, mods, kind):
        return self._bitwise("xor", args, mods, kind)

    def op_not(self, args, mods, kind):
        return self._bitwise("not", args, mods, kind, 1)

    def _shift(self, name, args, mods, kind):
        self._take(mods)
        value, count = self.read(args[1], kind), self.read(args[2], "u32")
        return self.write(args[0], kind, f"ptx::{name}<{C_TYPES[kind]}>({value}, {count})")

    def op_shl(self, args, mods, kind):
        return self._shift("shl", args, mods, kind)

    def op_shr(self, args, mods, kind):
        return self._shift("shr", args, mods, kind)

    def op_shf(self, args, mods, kind):
        direction, mode, _ = mods
        values = ", ".join(self.read(a, "u32") for a in args[1:])
        return self.write(args[0], "u32", f"ptx::funnel_{direction}_{mode}({values})")

    def op_bfe(self, args, mods, kind):
        self._take(mods)
        position = ", ".join(self.read(a, "u32") for a in args[2:])
        return self.write(args[0], kind, f"ptx::bit_field<{C_TYPES[kind]}>({self.read(args[1], kind)}, {position})")

    def op_bfi(self, args, mods, kind):
        self._take(mods)
        values = ", ".join([self.read(a, kind) for a in args[1:3]] + [self.read(a, "u32") for a in args[3:]])
        return self.write(args[0], kind, f"ptx::bit_field_insert<{C_TYPES[kind]}>({values})")

    def op_lop3(self, args, mods, kind):
        self._take(mods)
        return self.write(args[0], "u32", f"ptx::lop3({', '.join(self.read(a, 'u32') for a in args[1:])})")

    def op_prmt(self, args, mods, kind):
        self._take(mods)
        return self.write(args[0], "u32", f"ptx::prmt({', '.join(self.read(a, 'u32') for a in args[1:])})")

    def op_popc(self, args, mods, kind):
        return self.write(args[0], "u32", f"(uint32_t) __builtin_popcountll({self.read(args[1], kind)})")

    def op_dp4a(self, args, mods, kind):
        if mods not in (["s32", "s32"], ["u32", "u32"]):
            raise Unknown(f"types {mods}")
        c_type = "int" if kind == "s32" else "unsigned"
        return self.write(args[0], kind, f"__dp4a({', '.join(f'({c_type}) {self.read(a, kind)}' for a in args[1:])})")

    def op_mov(self, args, mods, kind):
        self._take(mods)
        target, source = args
        if source.startswith("{"):  # several registers to one
            parts = split(source[1:-1])
            bits = int(kind[1:]) // len(parts)
            shifted = (f"(uint64_t) {self.read(p, f'u{bits}')} << {i*bits}" for i, p in enumerate(parts))
            return self.write(target, kind, f"({C_TYPES[kind]}) ({' | '.join(shifted)})")
        if target.startswith("{"):  # and back
            parts = split(target[1:-1])
            bits = int(kind[1:]) // len(parts)
            whole = self.read(source, kind)
            shifted = (f"(uint{bits}_t) ({whole} >> {i*bits})" for i in range(len(parts)))
            return " ".join(self.write(p, f"u{bits}", value) for p, value in zip(parts, shifted, strict=True))
        return self.write(target, kind, self.read(source, kind))

    def op_cvta(self, args, mods, kind):
        """Global addresses are generic addresses; shared ones are offsets from the block's memory."""
        if "global" in mods:
            value = self.read(args[1], "u64")
        elif "shared" in mods and "to" in mods:
            value = f"{self.read(args[1], 'u64')} - ptx::shared(0)"
        elif "shared" in mods:
            value = f"ptx::shared({self.read(args[1], 'u64')})"
        else:
            raise Unknown(f"address space {mods}")
        return self.write(args[0], "u64", value)

    def op_setp(self, args, mods, kind):
        compare, *rest = mods[:-1]
        floating = kind == "f32"
        flush = "ptx::flush" if "ftz" in rest else "ptx::keep"
        rest = [m for m in rest if m != "ftz"]
        if kind[0] == "b":
            kind = "u" + kind[1:]
        a, b = (f"{flush}({self.read(x, kind)})" if floating else self.read(x, kind) for x in args[1:3])
        if floating and compare == "num":
            value = f"!ptx::unordered({a}, {b})"
        elif floating and compare == "nan":
            value = f"ptx::unordered({a}, {b})"
        elif floating and compare[:-1] in COMPARE and compare.endswith("u"):
            value = f"(ptx::unordered({a}, {b}) || {a} {COMPARE[compare[:-1]]} {b})"
        elif floating and compare == "ne":  # the ordered one, unlike !=
            value = f"(!ptx::unordered({a}, {b}) && {a} != {b})"
        elif compare in COMPARE:
            value = f"({a} {COMPARE[compare]} {b})"
        else:
            raise Unknown(f"comparison {compare!r}")
        if rest:
            combine = {"and": "&", "or": "|", "xor": "^"}.get(rest[0])
            if combine is None or len(rest) != 1:
                raise Unknown(f"modifier {rest}")
            value = f"({value} {combine} {self.read(args[3], 'pred')})"
        if "|" in args[0]:
            raise Unknown("two results")
        return self.write(args[0], "pred", value)

    def op_selp(self, args, mods, kind):
        self._take(mods)
        yes, no, condition = self.read(args[1], kind), self.read(args[2], kind), self.read(args[3], "pred")
        return self.write(args[0], kind, f"{condition} ? {yes} : {no}")

    def op_cvt(self, args, mods, kind):
        target, source = mods[-2:]
        present = set(mods[:-2])
        flush = "ptx::flush" if "ftz" in present else "ptx::keep"
        present.discard("ftz")
        rounding = present.pop() if present else ""
        if present:
            raise Unknown(f"modifier {present}")
        integers = [t for t in (target, source) if t[0] in "us" and t in C_TYPES]
        if len(integers) == 2 and not rounding:
            return self.write(args[0], target, f"({C_TYPES[target]}) {self.read(args[1], source)}")
        if source == "f32" and target in ("s32", "u32") and rounding in ("rni", "rzi", "rmi", "rpi"):
            value = f"{flush}({self.read(args[1], 'f32')})"
            return self.write(args[0], target, f"ptx::to_integer<{C_TYPES[target]}>(ptx::{rounding}({value}))")
        if target == "f32" and len(integers) == 1 and rounding == "rn":
            return self.write(args[0], "f32", f"(float) {self.read(args[1], source)}")
        if (target, source) == ("f32", "f32") and rounding in ("rni", "rzi", "rmi", "rpi", ""):
            value = f"{flush}({self.read(args[1], 'f32')})"
            return self.write(args[0], "f32", f"ptx::{rounding}({value})" if rounding else value)
        if (target, source) == ("f32", "f16") and not rounding:
            return self.write(args[0], "f32", f"ptx::from_half({self.read(args[1], 'u16')})")
        if (target, source) == ("f16", "f32") and rounding == "rn":
            return self.write(args[0], "u16", f"ptx::to_half({self.read(args[1], 'f32')})")
        if (target, source) == ("f16x2", "f32") and rounding == "rn":
            high, low = (f"(uint32_t) ptx::to_half({self.read(a, 'f32')})" for a in args[1:])
            return self.write(args[0], "u32", f"{high} << 16 | {low}")
        raise Unknown("conversion")

    # --- memory

    def _access(self, mods):
        """(address space, elements of the vector) of a load or store; cache hints are dropped."""
        space, elements = "generic", 1
        for mod in mods[:-1]:
            if mod in ("global", "shared", "param"):
                space = mod
            elif mod in ("v2", "v4"):
                elements = int(mod[1])
            elif mod not in CACHING and not re.fullmatch(r"L[12]::(no_allocate|evict_\w+|\d+B)", mod):
                raise Unknown(f"modifier {mod!r}")
        return space, elements

    def op_ld(self, args, mods, kind):
        space, n = self._access(mods)
        address = self.address(args[1], space)
        targets = split(args[0][1:-1]) if n > 1 else [args[0]]
        loads = " ".join(self.write(r, kind, f"a[{i}]") for i, r in enumerate(targets))
        if space == "param":
            return f"const auto a = (const {C_TYPES[kind]} *) ({address}); {loads}"
        return f"const auto a = ptx::at<ptx::access::load, {C_TYPES[kind]}, {n}>({address}); {loads}"

    def op_st(self, args, mods, kind):
        space, n = self._access(mods)
        address = self.address(args[0], space)
        sources = split(args[1][1:-1]) if n > 1 else [args[1]]
        stores = " ".join(f"a[{i}] = {self.read(r, kind)};" for i, r in enumerate(sources))
        return f"const auto a = ptx::at<ptx::access::store, {C_TYPES[kind]}, {n}>({address}); {stores}"

    def op_prefetch(self, args, mods, kind):
        return ";"

    # --- collectives and control flow

    def op_bar(self, args, mods, kind):
        if mods == ["warp", "sync"]:
            return f"__syncwarp({self.read(args[0], 'u32')});"
        if mods == ["sync"] and args == ["0"]:
            return "__syncthreads();"
        raise Unknown("barrier")

    def op_barrier(self, args, mods, kind):
        return self.op_bar(args, [m for m in mods if m != "aligned"], kind)

    def op_shfl(self, args, mods, kind):
        sync, mode, _ = mods
        if sync != "sync" or mode not in ("bfly", "idx", "up", "down"):
            raise Unknown("shuffle")
        target, _, valid = args[0].partition("|")
        value, lane, clamp, mask = (self.read(a, "u32") for a in args[1:])
        shuffle = f"ptx::shuffle(ptx::shuffle_mode::{mode}, {value}, {lane}, {clamp}, {mask}, valid)"
        writes = self.write(target, "u32", "v") + (self.write(valid, "pred", "valid") if valid else "")
        return f"bool valid; const uint32_t v = {shuffle}; {writes}"

    def op_vote(self, args, mods, kind):
        votes = {"ballot": "__ballot_sync", "any": "__any_sync", "all": "__all_sync"}
        if mods[0] != "sync" or mods[1] not in votes:
            raise Unknown("vote")
        value = f"{votes[mods[1]]}({self.read(args[2], 'u32')}, {self.read(args[1], 'pred')})"
        return self.write(args[0], "u32" if kind == "b32" else "pred", value)

    def op_mma(self, args, mods, kind):
        if mods[:2] != ["sync", "aligned"] or ".".join(mods[2:]) not in MMA:
            raise Unknown("tile or type")
        function, c_type = MMA[".".join(mods[2:])]
        kind = "f32" if c_type == "float" else "s32"
        d, a, b, c = (split(x.strip("{}")) for x in args)

        def values(operands, kind):
            return ", ".join(self.read(x, kind) for x in operands)

        fragments = f"{c_type} c[] = {{ {values(c, kind)} }}; "
        fragments += f"const uint32_t a[] = {{ {values(a, 'u32')} }}, b[] = {{ {values(b, 'u32')} }};"
        ab = "a[0], b[0]" if len(a) == 1 else "a, b"
        results = " ".join(self.write(x, kind, f"c[{i}]") for i, x in enumerate(d))
        return f"{fragments} cuhost::{function}(c, {ab}); {results}"

    def op_griddepcontrol(self, args, mods, kind):
        if mods == ["wait"]:
            return "cuhost::wait_for_previous_grid();"
        if mods == ["launch_dependents"]:  # lets the next grid begin; what it may see is up to its own wait
            return ";"
        raise Unknown("form")

    def op_bra(self, args, mods, kind):
        if mods not in ([], ["uni"]):
            raise Unknown("branch")
        return f"goto {args[0].lstrip('$')};"

    def op_ret(self, args, mods, kind):
        return "return;"

    op_exit = op_ret

    def op_trap(self, args, mods, kind):
        return 'cuhost::fail("trap");'

    # --- statements

    def statement(self, text: str) -> str:
        guard = re.match(r"@(!?)(%\w+)\s+", text)
        body = text[guard.end():] if guard else text
        opcode, _, operands = body.partition(" ")
        if opcode == ".reg":
            return self.declare(operands)
        if opcode in (".pragma", ".loc", ".file"):
            return ""
        try:
            code = self.instruction(opcode, split(operands))
        except Unknown as reason:
            raise Unknown(f"{self.name}: unknown PTX `{text}`: {reason}") from None
        except (ValueError, IndexError, KeyError) as error:
            raise Unknown(f"{self.name}: unknown form of PTX `{text}`: {error!r}") from None
        condition = f"if ({guard[1]}{self.read(guard[2], 'pred')}) " if guard else ""
        return f"{condition}{{ {code} }}"

    def declare(self, text: str) -> str:
        """.reg .b32 %r<9>; and .reg .pred p, q; All begin with a value that nothing should depend on."""
        kind, _, names = text.strip().partition(" ")
        if kind[1:] not in C_TYPES:
            raise Unknown(f"{self.name}: registers of type {kind}")
        c_type = C_TYPES[kind[1:]]
        registers = []
        for name in names.split(","):
            match = re.fullmatch(r"([%\w$]+)<(\d+)>", name.strip())
            registers += [f"{match[1]}{i}" for i in range(1, int(match[2]))] if match else [name.strip()]
        poison = {"bool": "true", "float": "NAN"}.get(c_type, f"({c_type}) 0xdeaddeaddeaddeadull")
        declared = ", ".join(f"{register(r)} = {poison}" for r in registers)
        return f"[[maybe_unused]] {c_type} {declared};" if registers else ""

    def translate(self, body: str) -> list[str]:
        """Statements end in a semicolon; labels in a colon; braces open and close scopes in both languages."""
        lines = []
        for match in re.finditer(r"\s*([{}]|\$?\w+:(?!:)|[^;]*;)", self._hide_vectors(body)):
            text = " ".join(match[1].replace("\1", "{").replace("\2", "}").split())
            if text in "{}":
                lines.append(text)
            elif text.endswith(":"):
                lines.append(f"{text.lstrip('$')};")
            else:
                code = self.statement(text[:-1].strip())
                lines += [code] if code else []
        return lines

    @staticmethod
    def _hide_vectors(body: str) -> str:
        """Braces that hold a vector of registers are no scopes: {%r1, %r2} as opposed to { mov ...; }"""
        return re.sub(r"\{([^{};]*)\}", "\1\\1\2", body)


def shared_symbols(ptx: str) -> dict[str, int]:
    """Offsets in shared memory. All of it is dynamic in these kernels: `extern` arrays, which all begin at 0."""
    if re.search(r"(?<!\.extern )\.shared\s+\.(align|b8|b32|b64)", re.sub(r"\s+", " ", ptx)):
        raise Unknown("static shared memory")
    return {name: 0 for name in re.findall(r"\.extern\s+\.shared\s+[^;]*?(\w+)\s*\[\s*\]\s*;", ptx)}


def translate(ptx: str) -> str:
    """C++ source for all kernels of a PTX file. Raises Unknown."""
    ptx = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.S)
    for directive in (".func", ".const", ".local"):
        if re.search(rf"(?<!\w){re.escape(directive)}\b", ptx):
            raise Unknown(f"{directive} (a function call, a constant table or an array that is not in registers)")
    shared = shared_symbols(ptx)
    out = ['#include "ptx_runtime.h"', ""]
    for match in re.finditer(r"\.entry\s+(\w+)\s*\((.*?)\)[^{]*", ptx, re.S):
        params = [" ".join(p.split()) for p in match[2].split(",") if p.strip()]
        kernel = Kernel(match[1], params, shared)
        depth, end = 0, match.end()
        while True:  # the body's closing brace
            depth += {"{": 1, "}": -1}.get(ptx[end], 0)
            end += 1
            if depth == 0:
                break
        lines = kernel.translate(ptx[match.end() + 1 : end - 1])
        out += [f'extern "C" void {kernel.name}({", ".join(kernel.arguments)}) {{', *lines, "}", ""]
    return "\n".join(out)


if __name__ == "__main__":
    try:
        print(translate(Path(sys.argv[1]).read_text()))
    except Unknown as error:
        sys.exit(str(error))

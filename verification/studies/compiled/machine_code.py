"""What the assembler made of a kernel: resources, and whether it waits for what runs asynchronously.

`wgmma`: until a wait retires it, its accumulator and its left operand, if that lies in registers, belong to it; PTX
leaves the rest to the compiler. Here the machine code itself is read: a loop's body twice over, so that what is in
flight at its end meets its beginning, and then what follows.

`cp.async`: a loop that fills a ring waits in each turn until at most w groups of copies are in flight, and starts c
more. It reads the oldest c, so w + c must have been started before the first turn. What they wrote the tensor cores see
behind a fence only; boxes that the copy engine fetches complete a barrier instead. On an idle GPU a copy that nobody
waits for has nearly always arrived, so that no result tells.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import triton

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_HGMMA = re.compile(r"HGMMA\.64x(\d+)x16\.F32\S*\s+R(\d+),\s*(R\d+|gdesc)")


@dataclass(frozen=True)
class Resources:
    """Registers a thread, and stack bytes, which is where spills go."""

    registers: int
    stack: int


@dataclass
class _Group:
    """Registers of the products that one wait retires together."""

    accumulators: set[int] = field(default_factory=set)
    operands: set[int] = field(default_factory=set)


def resources(cubin: bytes) -> Resources:
    """The assembler's own account."""
    report = _cuobjdump(cubin, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no resource usage:\n{report}")
    return Resources(int(found[1]), int(found[2]))


def disassemble(cubin: bytes) -> str:
    """SASS, as cuobjdump prints it."""
    return _cuobjdump(cubin, "-sass")


def accesses(sass: str) -> dict[str, Counter[int]]:
    """How many loads ("LDG") and stores ("STG") of global memory there are in the code, by their bytes a thread."""
    counts = {"LDG": Counter[int](), "STG": Counter[int]()}
    for _, opcode, _ in _instructions(sass):
        name, *modifiers = opcode.split(".")
        if name in counts:
            bits = next((int(found[1]) for m in modifiers if (found := re.fullmatch(r"[US]?(8|16|64|128)", m))), 32)
            counts[name][bits // 8] += 1
    return counts


KINDS = {
    "LOP3, shifts": ("LOP3", "SHF", "SGXT"),
    "PRMT": ("PRMT",),
    "IMAD": ("IMAD",),
    "HMUL2": ("HMUL2",),
    "LDS": ("LDS", "LDSM"),
    "LDG, STS": ("LDG", "STS"),
    "LDGSTS": ("LDGSTS",),
    "HGMMA": ("HGMMA",),
    "waits": ("WARPGROUP", "BAR", "LDGDEPBAR", "DEPBAR", "SYNCS", "WARPSYNC", "FENCE"),
}
"""Opcodes by what an inner loop needs them for."""


def inner_loops(sass: str) -> list[tuple[str, Counter[str]]]:
    """Of each innermost loop with wgmma, its shape, and the loop's instructions by KINDS; the rest is "else"."""
    code, found = _instructions(sass), list[tuple[str, Counter[str]]]()
    kind_of = {name: kind for kind, names in KINDS.items() for name in names}
    for first, last in _innermost(code, _is_product):
        opcodes = [opcode.split(".") for _, opcode, _ in code[first : last + 1]]
        shape = next(modifiers[0] for name, *modifiers in opcodes if name == "HGMMA")
        found.append((shape, Counter(kind_of.get(name, "else") for name, *_ in opcodes)))
    return found


def hazards(sass: str, waits_by_hand: bool) -> list[str]:
    """What makes results wrong, if only now and then, in words.

    Args:
        sass: a kernel's machine code.
        waits_by_hand: its source starts the copies and waits for them, not the compiler.
    """
    found = []
    if touched := touched_in_flight(sass):
        found.append(f"touches registers of a wgmma in flight: {touched[0]}")
    if waits_by_hand and (unwaited := unwaited_copies(sass)):
        found.append(f"reads copies that it has not waited for: {unwaited[0]}")
    if waits_by_hand and (unseen := unseen_copies(sass)):
        found.append(f"multiplies copies that it may not see yet: {unseen[0]}")
    if lasting := lasting_barriers(sass):
        found.append(f"never invalidates {lasting} of its barriers")
    return found


def touched_in_flight(sass: str) -> list[str]:
    """Instructions that write to a register of a wgmma in flight, or read its accumulator; empty when all is well."""
    code = _instructions(sass)
    found: dict[str, None] = {}
    for first, last in _innermost(code, _is_product):
        found |= dict.fromkeys(_conflicts([*code[first : last + 1], *code[first:]]))
    return list(found)


def unwaited_copies(sass: str) -> list[str]:
    """Waits in loops that leave too many groups of `cp.async` in flight; empty when all is well.

    For kernels that wait before they start the next copies, and read what they waited for last.
    """
    code, found = _instructions(sass), []
    for first, last in _innermost(code, lambda opcode: opcode == "LDGDEPBAR"):
        body, start = code[first : last + 1], first
        while start and _left_in_flight(code[start - 1]) != 0:
            start -= 1
        ahead = _commits(code[start:first])
        found += [
            _text(instruction)
            for instruction in body
            if (left := _left_in_flight(instruction)) is not None and left + _commits(body) > ahead
        ]
    return found


def unseen_copies(sass: str) -> list[str]:
    """Products in loops that multiply copies started there before they are sure to see them; empty when all is well.

    The first product of a turn needs a barrier's completion before it where the loop fetches boxes, and a fence where
    `cp.async` alone fills the ring.
    """
    code, found = _instructions(sass), []
    for first, last in _innermost(code, _is_product):
        opcodes = [opcode for _, opcode, _ in code[first : last + 1]]
        product = next(i for i, opcode in enumerate(opcodes) if _is_product(opcode))
        needed = "SYNCS.PHASECHK" if any(map(_is_box, opcodes)) else "FENCE.VIEW.ASYNC"
        if any(map(_is_copy, opcodes)) and not any(opcode.startswith(needed) for opcode in opcodes[:product]):
            found.append(f"{_text(code[first + product])}, no {needed} before it")
    return found


def lasting_barriers(sass: str) -> int:
    """Barriers that are initialised and never invalidated, as PTX asks before their memory serves another purpose."""
    opcodes = [opcode for _, opcode, _ in _instructions(sass)]
    made, ended = (sum(map(kind.__eq__, opcodes)) for kind in ("SYNCS.EXCH.64", "SYNCS.CCTL.IV"))
    return made - ended


_Instruction = tuple[int, str, str]
"""Address, opcode, operands."""


def _instructions(sass: str) -> list[_Instruction]:
    return [(int(m[1], 16), m[2], m[3]) for m in map(_INSTRUCTION.match, sass.splitlines()) if m]


def _loops(code: list[_Instruction]) -> list[tuple[int, int]]:
    """The first and the last instruction of each loop: a branch back, and where it goes."""
    index = {address: i for i, (address, _, _) in enumerate(code)}
    targets = [re.search(r"0x([0-9a-f]+)", operands) if opcode == "BRA" else None for _, opcode, operands in code]
    return [
        (index[int(target[1], 16)], last)
        for last, target in enumerate(targets)
        if target is not None and int(target[1], 16) < code[last][0]
    ]


def _innermost(code: list[_Instruction], holds: Callable[[str], bool]) -> list[tuple[int, int]]:
    """The loops that have such an opcode, without those around another of them."""
    loops = [(first, last) for first, last in _loops(code) if any(holds(op) for _, op, _ in code[first : last + 1])]
    return [
        (first, last)
        for first, last in loops
        if not any((first, last) != inner and first <= inner[0] and inner[1] <= last for inner in loops)
    ]


def _is_product(opcode: str) -> bool:
    return opcode.startswith("HGMMA")


def _is_box(opcode: str) -> bool:
    return opcode.startswith("UTMALDG")


def _is_copy(opcode: str) -> bool:
    return opcode.startswith("LDGSTS") or _is_box(opcode)


def _text(instruction: _Instruction) -> str:
    address, opcode, operands = instruction
    return f"{address:#x} {opcode} {operands.strip()}"


def _commits(code: list[_Instruction]) -> int:
    """Groups of copies that are closed here."""
    return sum(opcode == "LDGDEPBAR" for _, opcode, _ in code)


def _left_in_flight(instruction: _Instruction) -> int | None:
    """How many groups of copies a wait leaves in flight; None for what is no such wait."""
    _, opcode, operands = instruction
    waits = re.match(r"SB0, 0x([0-9a-f]+)", operands) if opcode == "DEPBAR.LE" else None
    return int(waits[1], 16) if waits else None


def _conflicts(code: list[_Instruction]) -> list[str]:
    flight, conflicts = [_Group()], list[str]()  # the last is open, nothing waits for it yet
    for instruction in code:
        _, opcode, operands = instruction
        if product := _HGMMA.match(f"{opcode} {operands}"):
            first, left = int(product[2]), product[3]
            flight[-1].accumulators |= set(range(first, first + int(product[1]) // 2))
            if left != "gdesc":
                flight[-1].operands |= set(range(int(left[1:]), int(left[1:]) + 4))
            if "gsb0" in operands:
                flight.append(_Group())
        elif opcode.startswith("WARPGROUP.DEPBAR"):
            keep = int(operands.split(",")[-1], 16)
            flight = flight[-1 - keep :]
        else:
            written, read = _written(opcode, operands), _read(opcode, operands)
            if any(written & (g.accumulators | g.operands) or read & g.accumulators for g in flight):
                conflicts.append(_text(instruction))
    return conflicts


def _read(opcode: str, operands: str) -> set[int]:
    """The registers that an instruction names besides the one that it writes."""
    named = [int(register) for register in re.findall(r"\bR(\d+)", operands)]
    return set(named[1:] if _written(opcode, operands) else named)


def _written(opcode: str, operands: str) -> set[int]:
    """The registers that an instruction writes: its first operand, as wide as the opcode says."""
    first = re.match(r"(?:U?P\w+, )?R(\d+)", operands)
    if first is None or opcode.startswith(("ST", "LDGSTS", "RED", "BAR", "BRA")):
        return set()
    width = 4 if ".128" in opcode else 2 if re.search(r"\.64|\.WIDE|CS2R", opcode) and ".32" not in opcode else 1
    return set(range(int(first[1]), int(first[1]) + width))


def _cuobjdump(cubin: bytes, what: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout

"""What the assembler made of a kernel: resources, and whether anything writes to a register that a tensor core reads.

`wgmma` runs asynchronously. Until a wait retires it, its accumulator and its left operand, if that lies in registers,
belong to it; PTX leaves the rest to the compiler. Here the machine code itself is read: a loop's body twice over, so
that what is in flight at its end meets its beginning.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import triton

__all__ = ["Resources", "disassemble", "overwritten_operands", "resources"]

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_HGMMA = re.compile(r"HGMMA\.64x(\d+)x16\.F32\S*\s+R(\d+),\s*(R\d+|gdesc)")


@dataclass(frozen=True)
class Resources:
    """Registers a thread, and stack bytes, which is where spills go."""

    registers: int
    stack: int


@dataclass
class _InFlight:
    """Registers that issued and not yet retired groups of wgmma own, oldest group first."""

    groups: list[set[int]] = field(default_factory=list)
    open: set[int] = field(default_factory=set)

    def owned(self) -> set[int]:
        return self.open.union(*self.groups)


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


def overwritten_operands(sass: str) -> list[str]:
    """Instructions that write to a register while a wgmma in flight owns it; empty when all is well."""
    code = [(int(m[1], 16), m[2], m[3]) for m in map(_INSTRUCTION.match, sass.splitlines()) if m]
    index = {address: i for i, (address, _, _) in enumerate(code)}
    found: dict[str, None] = {}
    for end, (address, opcode, operands) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", operands)
        if opcode != "BRA" or target is None or int(target[1], 16) >= address:
            continue
        body = code[index[int(target[1], 16)] : end + 1]
        found |= dict.fromkeys(_conflicts([*body, *body]))
    return list(found)


def _conflicts(code: list[tuple[int, str, str]]) -> list[str]:
    flight, conflicts = _InFlight(), []
    for address, opcode, operands in code:
        text = f"{opcode} {operands}"
        if product := _HGMMA.match(text):
            first, left = int(product[2]), product[3]
            flight.open |= set(range(first, first + int(product[1]) // 2))
            if left != "gdesc":
                flight.open |= set(range(int(left[1:]), int(left[1:]) + 4))
            if "gsb0" in operands:
                flight.groups.append(flight.open)
                flight.open = set()
        elif opcode.startswith("WARPGROUP.DEPBAR"):
            keep = int(operands.split(",")[-1], 16)
            flight.groups = flight.groups[len(flight.groups) - keep :] if keep else []
        elif _written(opcode, operands) & flight.owned():
            conflicts.append(f"{address:#x} {text.strip()}")
    return conflicts


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

"""The reader of machine code, on the Hopper kernel: its loops are clean, and it sees a wait that is missing."""

from __future__ import annotations

from uninterpreted import run_python

SCRIPT = """
from mxref.kernels import aot, machine_code
unit = next(u for u in aot.units("sm_90") if u.kernel == "packed_matmul_kernel" and ("HEIGHTS", (16,)) in u.constants)
assert not aot.compile_unit(unit).violations
sass = machine_code.disassemble(aot.build(unit).asm["cubin"])
assert "HGMMA" in sass and not machine_code.overwritten_operands(sass)
lines = sass.splitlines()
waits = [i for i, line in enumerate(lines) if "WARPGROUP.DEPBAR.LE gsb0, 0x1" in line]
assert len(waits) == 2
for wait in waits:
    found = machine_code.overwritten_operands("\\n".join(lines[:wait] + lines[wait + 1 :]))
    assert found, lines[wait]
hasty = sass.replace("DEPBAR.LE SB0, 0x1 ;", "DEPBAR.LE SB0, 0x2 ;")
assert hasty != sass and machine_code.unwaited_copies(hasty) and not machine_code.unwaited_copies(sass)
print("seen")
"""


def test_a_missing_wait_is_seen() -> None:
    done = run_python("-c", SCRIPT)
    assert done.stdout.strip() == "seen", done.stdout + done.stderr

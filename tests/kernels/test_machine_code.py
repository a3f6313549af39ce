"""The reader of machine code, on the Hopper kernel: its loops are clean, and it sees a wait that is missing."""

from __future__ import annotations

from uninterpreted import run_python

SCRIPT = """
from mxref.verification.studies.compiled import ahead_of_time as aot
from mxref.verification.studies.compiled import machine_code
hopper = [u for u in aot.units("sm_90") if u.kernel == "packed_matmul_kernel"]
unit = next(u for u in hopper if ("HEIGHTS", (16,)) in u.arguments)
boxed = next(u for u in hopper if dict(u.arguments).get("rows_box"))
assert not aot.compile_unit(unit).violations
sass = machine_code.disassemble(unit.build().asm["cubin"])
assert "HGMMA" in sass and not machine_code.touched_in_flight(sass)
last = "WARPGROUP.DEPBAR.LE gsb0, 0x0 "
assert machine_code.touched_in_flight(sass.replace(last, last.replace("0x0", "0x1")))
lines = sass.splitlines()
waits = [i for i, line in enumerate(lines) if "WARPGROUP.DEPBAR.LE gsb0, 0x1" in line]
assert len(waits) == 2
for wait in waits:
    found = machine_code.touched_in_flight("\\n".join(lines[:wait] + lines[wait + 1 :]))
    assert found, lines[wait]
hasty = sass.replace("DEPBAR.LE SB0, 0x1 ;", "DEPBAR.LE SB0, 0x2 ;")
assert hasty != sass and machine_code.unwaited_copies(hasty) and not machine_code.unwaited_copies(sass)
assert machine_code.unseen_copies(sass.replace("FENCE.VIEW.ASYNC", "NOP")) and not machine_code.unseen_copies(sass)
boxes = machine_code.disassemble(boxed.build().asm["cubin"])
assert "UTMALDG" in boxes and not aot.compile_unit(boxed).violations
assert machine_code.unseen_copies(boxes.replace("SYNCS.PHASECHK", "NOP"))
assert machine_code.lasting_barriers(boxes.replace("SYNCS.CCTL.IV", "NOP")) == 3
((shape, kinds),) = machine_code.inner_loops(sass)
assert shape == "64x16x16" and kinds["HGMMA"] == 8 and kinds["waits"] >= 3
product = lines[waits[0]].replace("WARPGROUP.DEPBAR.LE gsb0, 0x1", "HMUL2 R1, R1, R2")
longer = "\\n".join([*lines[: waits[0]], product, *lines[waits[0] :]])
assert machine_code.inner_loops(longer) == [(shape, kinds + machine_code.Counter(HMUL2=1))]
print("seen")
"""


def test_a_missing_wait_is_seen() -> None:
    done = run_python("-c", SCRIPT)
    assert done.stdout.strip() == "seen", done.stdout + done.stderr

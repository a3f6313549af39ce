"""The activation's machine code: each necessary byte is moved once, 16 at a time; no spills; clamps keep NaN."""

from __future__ import annotations

from uninterpreted import run_python

SCRIPT = """
import re
from mxref.verification.studies.compiled import ahead_of_time as aot
from mxref.verification.studies.compiled import machine_code
from mxref.kernels.device.activation import COLS, ROWS
seen = set()
for architecture in ("sm_80", "sm_90", "sm_100"):
    for label, launch in aot._of_activations(architecture):
        unit = aot.Unit.of(architecture, label, launch)
        if label.endswith("float16") and "bfloat16" not in label:
            continue
        cubin = unit.build().asm["cubin"]
        assert machine_code.resources(cubin).stack == 0
        sass = machine_code.disassemble(cubin)
        assert not machine_code.hazards(sass, waits_by_hand=False)
        minima = set(re.findall(r"FMNMX[.0-9A-Z]*", sass))
        assert minima == ({"FMNMX.NAN"} if "interleaved" in label else minima & {"FMNMX.NAN"}), minima
        size = 4 if label.endswith("float32") else 2
        backward = unit.kernel == "activation_backward_kernel"
        necessary = {"LDG": 3 if backward else 2, "STG": 2 if backward else 1}
        for kind, found in machine_code.accesses(sass).items():
            assert set(found) == {16}, (architecture, label, unit.kernel, kind, found)
            moved = found[16] * 16 * 32 * dict(unit.options)["num_warps"]
            assert moved == necessary[kind] * ROWS * COLS * size, (label, unit.kernel, kind, moved)
        seen.add((architecture, label, backward))
print(len(seen))
"""


def test_no_byte_is_moved_twice_and_none_alone() -> None:
    done = run_python("-c", SCRIPT)
    assert done.stdout.strip() == "18", done.stdout + done.stderr

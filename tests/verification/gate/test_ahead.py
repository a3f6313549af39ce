"""What a GPU will be asked to start is compiled before, here for one that is not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from uninterpreted import run_python

from mxref.verification.gate.order import Order
from mxref.verification.gate.own import ahead
from mxref.verification.gate.process import Numbers

ASK = """
import json, sys
import torch, triton

sys.path.insert(0, sys.argv[1])
import pretended_gpu as gpu
from mxref.verification.candidates.shipped import shipped
from mxref.verification.cases.call import Call
from mxref.verification.cases.case import Case
from mxref.verification.gate.own import ahead
from mxref.verification.gate.order import Order
from mxref.verification.gate.process import Numbers
from mxref.verification.gate.plan import plan, plan_cases
from mxref.verification.cases.scope import Scope

bf16 = dict(dtype=torch.bfloat16, K=64, N=64)
cases = [
    Case("more of it", data="integer", grouped_out=True, bias=True, tokens=37, **bf16),
    Case("gates", data="balanced", gate_slots=2, use_fused_dX=True, **bf16),
    Case("offset", data="balanced", **bf16,
         call=Call(x="offset", ids="offset", rows="offset", ends="offset", A="offset", B="offset")),
]
candidate, cpu = shipped(torch.device("cpu")), torch.device("cpu")
items = plan_cases(cases, cpu, 0)
ready = []
gpu.without_code()
ahead.compile_items(candidate, items, "sm_90", ready.append, jobs=2)
gpu.pretend()
new = []
triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: cache_hit or new.append(src.fn.__name__)
started = [gpu.started(lambda: candidate.run(item.sample)) for item in items]
compiled, (other,) = len(new), plan_cases([Case("another rank", data="balanced", rank=72, **bf16)], cpu, 0)
candidate.run(other.sample)
first = {}
for item in plan(Scope("quick", "cuda", 0, interpreted=False), own=True):
    first.setdefault(item.checks[0].name, item)
foreseen = {name: len(ahead.launches_of(candidate, item, "sm_90")) for name, item in first.items()}
again = []
ahead.compile_items = lambda candidate, items, architecture, ready: again.extend(item.name for item in items)
ahead._apart(Order("shipped", "cuda", patterns=("integer, k 8, bf16",)), "sm_90", Numbers([]))
print(json.dumps({"started": started, "new": new[:compiled], "others": len(new) - compiled, "foreseen": foreseen,
                  "apart": again, "ready": ready}))
"""

FORESEE = """
import json
from dataclasses import replace
import torch
from mxref.kernels.compiled.units import units_of
from mxref.kernels.device.launch import recording
from mxref.verification.candidates.shipped import shipped
from mxref.verification.cases.draw import draw
from mxref.verification.cases.scope import Scope
from mxref.verification.gate.own import ahead
from mxref.verification.gate.plan import plan

candidate = shipped(torch.device("cpu"))
covered, chosen = set(), []
for item in plan(Scope("quick", "cuda", 0, interpreted=False), own=True):
    classes = getattr(item.case, "covers", ())
    how = ("saved", "autocast", "algorithms", "default", "layout", "storage")
    ways = {each for each in classes if each[0].split()[0] in how}
    if item.name.startswith("pairs") and item.case.rows < 4096 and not ways <= covered:
        covered |= ways
        chosen.append(item)


def keys(launches):
    return {(unit.kernel, unit.key) for unit in units_of("sm_90", (("", launch) for launch in launches))}


missed, started = {}, 0
for item in chosen:
    foreseen, call = keys(ahead.launches_of(candidate, item, "sm_90")), replace(item.case.call, threads="one")
    with recording("sm_90") as recorder:
        item.checks[0].ask(candidate, draw(replace(item.case, call=call)))
    there = keys(replace(each, arguments=ahead._placed(each.arguments)) for each in recorder.launches)
    started += len(there)
    if there - foreseen:
        missed[item.name] = sorted(kernel for kernel, _ in there - foreseen)
print(json.dumps({"missed": missed, "started": started, "items": len(chosen)}))
"""


def test_what_is_asked_is_compiled_before(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """One test, for one cache: what the items start, wherever their operands begin, and under which configurations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        done = run_python("-c", ASK, str(request.config.rootpath / "tests" / "support"))
    assert done.returncode == 0, done.stderr[-3000:]
    asked = json.loads(done.stdout)
    assert all("packed_matmul_kernel" in started for started in asked["started"])
    assert asked["new"] == []
    assert asked["ready"] == [1, 2, 3]
    assert asked["others"] > 0, "a compilation would have been seen"
    assert all(count > 0 for count in asked["foreseen"].values()), "something of every check is foreseen"
    assert asked["foreseen"]["configurations"] > 2 * asked["foreseen"]["integer"], "under every configuration"
    assert asked["apart"], "the process of its own is given the order's items"
    assert all(name.startswith("integer, k 8, bf16") for name in asked["apart"])


def test_what_tensors_with_memory_start_is_foreseen() -> None:
    """However operands lie, and whatever surrounds the call; no kernel is compiled here."""
    done = run_python("-c", FORESEE)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["missed"] == {}
    assert told["items"] > 10
    assert told["started"] > 3 * told["items"]


def test_items_wait_for_their_kernels_while_those_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_apart", _two_ready)
    monkeypatch.setattr(ahead, "this_gpu", lambda: "sm_90")
    numbers, waited = Numbers(range(4)), list[str]()
    with ahead.compiling_ahead(Order("shipped", "cuda"), numbers):
        taken = numbers.taken(lambda: waited.append("for its kernels"))
        assert next(taken) == 0, "as soon as it is ready"
        assert waited
        assert list(taken) == [1, 2, 3], "the process that compiles has ended, and nobody waits for it"


def _two_ready(order: Order, architecture: str, numbers: Numbers) -> None:
    assert (order.kernel, architecture) == ("shipped", "sm_90")
    numbers.ready(2)

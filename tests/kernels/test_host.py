"""What the host does for a step: its launches, and which of them Triton has to look at. No kernel runs."""

from __future__ import annotations

import json
from math import copysign
from typing import Any

import pytest
import torch
from uninterpreted import run_python

from mxref import MXWeights
from mxref.kernels import Config, Routing, parallel_linear_lora
from mxref.kernels.device.launch import Recorder, recording
from mxref.weights import MXLayout

REPORT = """
import json, sys
from unittest.mock import patch

import torch
import triton
from triton.runtime.jit import JITFunction

sys.path.insert(0, sys.argv[1])
import pretended_gpu as gpu
from mxref import MXWeights
from mxref.kernels import Config, parallel_linear_lora
from mxref.kernels.device import slots
from mxref.kernels.device.launch import recording, stream_of
from mxref.kernels.device.schedule import Routing
from mxref.kernels.models.adapters import LoRA
from mxref.kernels.models.routed import Projection, routed_experts
from mxref.weights import MXLayout

gpu.pretend()
through_triton = []
run = JITFunction.run


def counted(self, *args, **kwargs):
    through_triton.append(self.fn.__name__)
    return run(self, *args, **kwargs)


def step_report(**sizes):
    step = gpu.Step(E=4, K=64, N=96, M=8, k=2, **sizes)
    first = gpu.started(step)
    through_triton.clear()
    return {"first": first, "second": gpu.started(step), "through Triton": list(through_triton)}


def block():
    E, H, M, k, r = 4, 64, 8, 2, 16
    index, gates = torch.zeros(M, k, dtype=torch.int64), torch.ones(M, k, dtype=torch.bfloat16)
    x = torch.ones(M, H, dtype=torch.bfloat16, requires_grad=True)
    codes, scales = (torch.zeros(E, H, H // d, dtype=torch.uint8) for d in (2, 32))
    adapter = LoRA(torch.ones(E * r, H, requires_grad=True), torch.ones(H, E * r), 1.0)
    both = [Projection(codes, scales, None, adapter)] * 2
    return gpu.started(lambda: routed_experts(x, index, gates, *both, torch.relu).sum().backward())


def codes_by_alignment():
    '''The code that `combine` starts for rows at several places in memory, and what Triton would start.'''
    routing, out = Routing(torch.zeros(8, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)), torch.zeros(4, 48)
    memory = {dtype: torch.zeros(8 * 48 + 16, dtype=dtype) for dtype in (torch.float32, torch.float16)}
    ours, theirs = [], []
    for dtype, first in [(torch.float32, 0), (torch.float32, 1), (torch.float32, 4), (torch.float16, 0),
                         (torch.float16, 4), (torch.float16, 8), (torch.float32, 3), (torch.float32, 0)]:
        rows = memory[dtype][first : first + 8 * 48].view(8, 48)
        routing.inverse()
        gpu.started(lambda: slots.combine(stream_of(out), rows, routing, out))
        ours += gpu.STARTED
        grid = slots.combine_kernel[(1,)]
        gpu.started(lambda: grid(out, rows, routing.inverse(), None, 4, 2, 48, 16, 128, num_warps=4, num_stages=1,
                                 enable_fp_fusion=False))
        theirs += gpu.STARTED
    return {"ours": ours, "theirs": theirs}


def codes_by_dtype():
    '''The code that steps start that differ in one dtype alone: of the indices, of the adapters, of neither.'''
    found = {}
    for name, index, adapter in [("plain", torch.int64, torch.bfloat16), ("index", torch.int32, torch.bfloat16),
                                 ("adapter", torch.int64, torch.float32), ("again", torch.int64, torch.bfloat16)]:
        step = gpu.Step(E=4, K=64, N=96, M=8, k=2)
        step.routing = [x.to(index) for x in step.routing]
        step.leaves[1:] = [x.detach().to(adapter).requires_grad_() for x in step.leaves[1:]]
        step()
        gpu.started(step)
        found[name] = list(gpu.STARTED)
    return found


def seen_by_a_profiler():
    step, seen = gpu.Step(E=4, K=64, N=96, M=8, k=2), []
    step()
    hook = lambda metadata: seen.append(metadata.get()["name"])
    triton.knobs.runtime.launch_enter_hook.add(hook)
    names = gpu.started(step)
    triton.knobs.runtime.launch_enter_hook.remove(hook)
    step()
    return {"started": names, "seen": seen}


def box_of_one_row():
    '''Strides of the box that fetches a row whose own stride between rows is 1.'''
    row, K, N = torch.empty(256, 1, dtype=torch.bfloat16, device="meta").T, 256, 256
    weights = MXWeights(*(torch.empty(1, N, K // d, dtype=torch.uint8, device="meta") for d in (2, 32)), K, N)
    one = torch.empty(1, dtype=torch.int64, device="meta")
    tallest = Config(256, 128, 128, num_warps=8, num_stages=3, hopper=True)
    with recording("sm_90") as recorder:
        parallel_linear_lora(row, weights, 1, one, one, one, grouped_in=True, config=tallest)
    return [launch.arguments["rows_box"].strides for launch in recorder.launches if "rows_box" in launch.arguments]


with patch.object(JITFunction, "run", counted):
    print(json.dumps({"plain": step_report(), "gates": step_report(gates=True),
                      "fragments": step_report(layout=MXLayout.FRAGMENTS), "block": block(),
                      "alignment": codes_by_alignment(), "dtypes": codes_by_dtype(),
                      "profiler": seen_by_a_profiler(), "box": box_of_one_row()}))
"""


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest) -> Any:
    done = run_python("-c", REPORT, str(request.config.rootpath / "tests" / "support"))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


FORWARD = ["tables_kernel", "grouped_matmul_kernel", "packed_matmul_kernel"]
BACKWARD = ["grouped_matmul_kernel", "packed_matmul_kernel", "combine_kernel", "grouped_outer_kernel"]


def test_the_launches_of_a_step(report: Any) -> None:
    """Tables once, Z, Y; V, D, the sum over slots, and dA with dB."""
    assert report["plain"]["first"] == [*FORWARD, *BACKWARD]
    assert report["gates"]["first"] == [*FORWARD, "combine_kernel", "spread_kernel", *BACKWARD]
    own = {"packed_matmul_kernel": "fragments_matmul_kernel"}
    assert report["fragments"]["first"] == [own.get(name, name) for name in (*FORWARD, *BACKWARD)]


@pytest.mark.parametrize("case", ["plain", "gates", "fragments"])
def test_a_step_like_one_before_passes_triton_by(report: Any, case: str) -> None:
    assert report[case]["second"] == report[case]["first"]
    assert report[case]["through Triton"] == []


def test_a_block_makes_its_tables_once(report: Any) -> None:
    assert report["block"].count("tables_kernel") == 1
    assert report["block"].count("packed_matmul_kernel") == 4


def test_known_launches_start_the_code_that_triton_would(report: Any) -> None:
    """Tensors that begin elsewhere than at multiples of 16 bytes, or have another dtype, have code of their own."""
    ours, theirs = report["alignment"].values()
    assert ours == theirs
    assert len(set(ours)) == 4


def test_calls_that_differ_in_a_dtype_alone_start_other_code(report: Any) -> None:
    """All kernels but the sum over slots read indices; of fp32 adapters only the gradients differ."""
    codes, names = report["dtypes"], [*FORWARD, *BACKWARD]
    same = {case: list(map(str.__eq__, codes["plain"], codes[case])) for case in ("index", "adapter", "again")}
    assert same["index"] == [name == "combine_kernel" for name in names]
    assert same["adapter"] == [name != "grouped_outer_kernel" for name in names]
    assert all(same["again"])


def test_a_profiler_is_told_of_known_launches(report: Any) -> None:
    assert report["profiler"]["seen"] == report["profiler"]["started"] == [*FORWARD, *BACKWARD]


def test_the_box_of_one_row_has_the_strides_of_its_shape(report: Any) -> None:
    """A dimension of one has whatever stride it had; a box wants multiples of 16 bytes."""
    assert report["box"] == [[256, 1]]


def recorded(k: Any = 1, scaling: Any = 1.0, layout: MXLayout = MXLayout.FWD, **keywords: Any) -> Recorder:
    E, K, N, M, r = 2, 64, 96, 8, 4
    weights = MXWeights(*(torch.empty(E, N, K // d, dtype=torch.uint8, device="meta") for d in (2, 32)), K, N, layout)
    ids = torch.empty(M, dtype=torch.int64, device="meta")
    x, A, B = (torch.empty(shape, device="meta", requires_grad=True) for shape in ((M, K), (E * r, K), (N, E * r)))
    with recording("sm_90") as recorder:
        parallel_linear_lora(x, weights, k, ids, ids, ids[:E], A, B, scaling, **keywords).sum().backward()
    return recorder


def test_a_zero_keeps_its_sign_in_a_known_call() -> None:
    for scaling in (0.0, -0.0, 0.0):
        factors = [launch.arguments["s"] for launch in recorded(scaling=scaling).launches if "s" in launch.arguments]
        used = [s for s in factors if s != 1.0]
        assert len(used) == 3, "Y, D, and dA with dB"
        assert {copysign(1, s) for s in used} == {copysign(1, scaling)}


def test_a_known_call_is_refused_what_a_new_one_is() -> None:
    recorded()
    with pytest.raises(TypeError, match="k is True"):
        recorded(k=True)
    with pytest.raises(TypeError, match="scaling is True"):
        recorded(scaling=True)
    with pytest.raises(TypeError, match=r"k is \[1\]"):
        recorded(k=[1])
    with pytest.raises(TypeError, match="config is tuple"):
        recorded(config=(16, 32, 32))
    with pytest.raises(ValueError, match="grouped_in"):
        recorded(k=2, grouped_in=True)


def test_calls_that_differ_in_their_tiling_alone_are_told_apart() -> None:
    for tiling in (Config(16, 32, 32), Config(32, 32, 32), None):
        tables = [launch for launch in recorded(config=tiling).launches if "tiles" in launch.arguments]
        assert {launch.arguments["BLOCK_M"] for launch in tables} == {tiling.BLOCK_M if tiling else 32}


def test_calls_that_differ_in_their_layout_alone_are_told_apart() -> None:
    for layout in (MXLayout.FWD, MXLayout.FRAGMENTS, MXLayout.FWD):
        packed = [launch for launch in recorded(layout=layout).launches if launch.arguments.get("WEIGHT_DTYPE")]
        assert [launch.arguments["FRAGMENTS"] for launch in packed] == [layout == MXLayout.FRAGMENTS] * len(packed)
        assert packed


def test_a_routing_must_be_the_calls_own() -> None:
    positions, offsets = torch.zeros(8, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    weights = MXWeights(*(torch.zeros(2, 96, 64 // d, dtype=torch.uint8) for d in (2, 32)), 64, 96)
    experts = torch.zeros(8, dtype=torch.int64)
    ends, order = torch.tensor([8, 8]), torch.arange(8)

    def call(routing: Any, positions: torch.Tensor = order) -> torch.Tensor:
        return parallel_linear_lora(torch.ones(8, 64), weights, 1, experts, positions, ends, routing=routing)

    assert torch.equal(call(Routing(order, ends)), call(None))
    with pytest.raises(TypeError, match="routing is tuple"):
        call((order, ends))
    with pytest.raises(ValueError, match="another tensor than sorted_scattered_idxs"):
        call(Routing(positions, ends))
    with pytest.raises(ValueError, match="another tensor than expert_offsets"):
        call(Routing(order, offsets))
    strided = torch.stack([order, order], 1)[:, 0]
    with pytest.raises(ValueError, match="not contiguous"):
        call(Routing(strided, ends), strided)

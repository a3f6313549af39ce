"""The first call of packed experts compiles in threads what its step starts; for a GPU that is not there.

Cases whose kernels must be new have a rank, a dtype or a class of rows of their own.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
import torch
from uninterpreted import run_python

from mxref.kernels.compiled import threads
from mxref.kernels.device.launch import INTERPRETED
from mxref.kernels.models import routed
from mxref.kernels.models.routed import Projection, routed_experts

REPORT = """
import json, sys, threading
from unittest.mock import patch

import torch
import triton
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, sys.argv[1])
import pretended_gpu as gpu
from mxref.kernels.models import routed
from mxref.kernels.models.experts import PackedExperts
from mxref.kernels.models.routed import Activation
from mxref.swiglu import GPT_OSS
from mxref.weights import MXWeights

gpu.pretend()
E, H, I, M, k = 4, 64, 96, 16, 2
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
calls, compiled = [], []
in_threads = routed.compile_in_threads


def counted(*arguments):
    done = in_threads(*arguments)
    calls.append(len(compiled))
    return done


routed.compile_in_threads = counted


def note(*, src, cache_hit, **_):
    compiled.append((src.fn.__name__, threading.current_thread() is threading.main_thread()))


triton.knobs.compilation.listener = note


def weights(N, K):
    return MXWeights(*(torch.zeros(E, N, K // d, dtype=torch.uint8) for d in (2, 32)), K, N)


def packed(rank, dtype=bf16, activation=Activation(None, GPT_OSS)):
    biases = {"gate_up_proj": torch.zeros(E, 2 * I, dtype=dtype), "down_proj": torch.zeros(E, H, dtype=dtype)}
    experts = PackedExperts(weights(2 * I, H), weights(H, I), activation, biases)
    experts.add_lora(rank)
    return experts


def operands(dtype=bf16, tokens=M, trains=True):
    x, index = torch.zeros(tokens, H, dtype=dtype), torch.zeros(tokens, k, dtype=torch.int64)
    gates = torch.zeros(tokens, k, dtype=dtype)
    return x.requires_grad_(trains), index, gates.requires_grad_(trains)


def told(call):
    '''What a call starts and compiles, by name, what of it not in threads, and what was compiled after each time that
    something was to be compiled in threads.'''
    calls.clear(), compiled.clear()
    started = gpu.started(call)
    names, late = [name for name, _ in compiled], [name for name, by_launch in compiled if by_launch]
    return {"started": started, "compiled": names, "late": late, "calls": list(calls)}


def step(experts, *given):
    experts(*given).sum().backward()


def raised(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


report, experts = {}, packed(16)
report["first"] = told(lambda: step(experts, *operands()))
report["threads"] = threading.active_count()
report["second"] = told(lambda: step(experts, *operands()))
report["more rows of the kind"] = told(lambda: step(experts, *operands(tokens=32)))
layer, taller = packed(16), {"tokens": 48}
report["two layers"] = told(lambda: step(layer, layer(*operands(**taller, trains=False)), *operands(**taller)[1:]))
report["own function"] = told(lambda: step(packed(32, activation=lambda gate_up: gate_up[:, ::2]), *operands()))
report["no grad"] = told(lambda: torch.no_grad()(packed(32, fp16))(*operands(fp16, trains=False)))
for name, reentrant, given in (("checkpointed", False, (64, bf16)), ("checkpointed again", True, (16, fp16))):
    layer, x = packed(*given), operands(given[1])
    report[name] = told(lambda: checkpoint(layer, *x, use_reentrant=reentrant).sum().backward())

layer = packed(9, fp16)
with patch("torch.cuda.is_initialized", lambda: True), patch("torch.cuda.is_current_stream_capturing", lambda: True):
    report["captured"] = told(lambda: step(layer, *operands(fp16)))
report["after a capture"] = told(lambda: step(layer, *operands(fp16)))
report["compiled by torch"] = told(lambda: step(torch.compile(packed(15), backend="aot_eager"), *operands()))
report["meta"] = told(lambda: packed(17).to("meta")(*(x.to("meta") for x in operands())))
with FakeTensorMode(allow_non_fake_inputs=True) as mode:
    report["fake"] = told(lambda: packed(18)(*map(mode.from_tensor, operands())))

layer = packed(16, fp32)
x, index, gates = operands(fp32)
compiled.clear()
report["refused"] = {"raised": raised(lambda: layer(x[:, :32], index, gates)), "compiled": len(compiled)}


def fail(*, src, **_):
    if src.fn.__name__ == "spread_kernel":
        raise RuntimeError("no registers left")


triton.knobs.compilation.listener = fail
started = []
report["failed"] = {"raised": raised(lambda: started.extend(gpu.started(lambda: layer(*operands(fp32))))),
                    "started": len(gpu.STARTED), "mode": str(triton.runtime._async_compile.active_mode.get())}
triton.knobs.compilation.listener = note
report["after a failure"] = told(lambda: step(layer, *operands(fp32)))
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        done = run_python("-c", REPORT, str(request.config.rootpath / "tests" / "support"))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_every_kernel_of_a_first_step_is_compiled_before_it_starts(report: Any) -> None:
    first = report["first"]
    assert first["late"] == []
    assert set(first["started"]) == set(first["compiled"])
    assert {"tables_kernel", "packed_matmul_kernel", "grouped_outer_kernel"} < set(first["started"])
    assert report["threads"] == 1, "no thread is left"


@pytest.mark.parametrize("case", ["second", "more rows of the kind"])
def test_later_steps_do_nothing(report: Any, case: str) -> None:
    assert report[case] == {"started": report["first"]["started"], "compiled": [], "late": [], "calls": []}


@pytest.mark.parametrize("case", ["two layers", "own function", "no grad", "checkpointed", "checkpointed again"])
def test_no_launch_compiles(report: Any, case: str) -> None:
    """Whatever the caller's thread has set: hooks on saved tensors, grad mode."""
    assert report[case]["compiled"] != []
    assert report[case]["late"] == []


def test_without_gradients_the_forward_pass_alone_is_compiled(report: Any) -> None:
    assert "grouped_outer_kernel" not in report["no grad"]["compiled"]


def test_a_first_layer_compiles_for_those_behind_it(report: Any) -> None:
    """In front of it nothing trains: all is compiled before anything starts, in spite of that."""
    compiled = len(report["two layers"]["compiled"])
    assert report["two layers"]["calls"] == [compiled, compiled]


@pytest.mark.parametrize("case", ["checkpointed", "checkpointed again"])
def test_a_checkpointed_forward_pass_compiles_for_the_backward_pass(report: Any, case: str) -> None:
    """Which computes it again; one kind of checkpoint turns grad mode off before."""
    assert report[case]["calls"] == [len(report[case]["compiled"])]


@pytest.mark.parametrize("case", ["captured", "compiled by torch", "meta", "fake"])
def test_where_nothing_is_compiled_ahead(report: Any, case: str) -> None:
    assert report[case]["calls"] == []
    assert report[case]["late"] == report[case]["compiled"]


def test_a_kind_met_while_a_graph_was_captured_is_still_new(report: Any) -> None:
    assert report["captured"]["late"] != []
    assert len(report["after a capture"]["calls"]) == 1


def test_a_race_of_the_parser_is_not_an_error_of_the_kernel() -> None:
    """Python's, where several threads parse; other errors are raised at once."""
    asked = list[str]()

    def compile_fn() -> str:
        asked.append("again")
        try:
            if len(asked) < 3:
                raise SystemError("AST constructor recursion depth mismatch (before=106, after=108)")
        except SystemError as error:
            raise ValueError(repr(error)) from None
        return "kernel"

    assert threads._compiled(compile_fn) == "kernel"
    assert len(asked) == 3
    for error, times in ((SystemError("AST constructor recursion depth mismatch"), 10), (SystemError("another"), 1)):
        asked.clear()
        with pytest.raises(SystemError, match=str(error)):
            threads._compiled(partial(_raise, asked, error))
        assert len(asked) == times


def _raise(asked: list[str], error: Exception) -> None:
    asked.append("again")
    raise error


def test_refused_operands_are_refused_by_the_call(report: Any) -> None:
    assert report["refused"]["raised"].startswith("ValueError: ")
    assert "meta" not in report["refused"]["raised"]
    assert report["refused"]["compiled"] == 0


def test_an_error_of_the_compiler_is_raised_and_leaves_nothing_behind(report: Any) -> None:
    assert report["failed"] == {"raised": "RuntimeError: no registers left", "started": 0, "mode": "None"}
    assert report["after a failure"]["late"] == []
    assert {"spread_kernel", "grouped_outer_kernel"} < {*report["after a failure"]["compiled"]}


@pytest.mark.skipif(not INTERPRETED, reason="a GPU compiles")
def test_the_interpreter_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routed, "compile_in_threads", lambda *_: pytest.fail("nothing is to be compiled"))
    weight, index = torch.zeros(2, 32, 32), torch.zeros(4, 1, dtype=torch.int64)
    both = [Projection(weight), Projection(weight)]
    assert routed_experts(torch.zeros(4, 32), index, torch.ones(4, 1), *both, torch.relu).shape == (4, 32)

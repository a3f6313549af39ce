"""What a caller holds, and what it may do with what is returned: operands that are gone, tensors nobody may write."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import warnings
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from judging import ask
from torch import Tensor

import mxref
from mxref.verification.candidates.answer import UnusableAnswerError
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.global_state import GlobalState
from mxref.verification.candidates.shipped import golden, torch_composite
from mxref.verification.cases.call import Call
from mxref.verification.cases.case import Case
from mxref.verification.cases.draw import draw

SMALL = Case("small", 2, 64, 96, 9, 2, 4, bias=True, gate_slots=2, data="integer", scaling=0.5)


class _Watch(torch.autograd.Function):
    """The identity; its backward pass notes which of the watched objects are there."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, watched: dict[str, weakref.ref[Any]], alive: list[set[str]]) -> Tensor:
        ctx.watched, ctx.alive = watched, alive
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.alive.append({name for name, there in ctx.watched.items() if there() is not None})
        return grad, None, None


def watching(names: tuple[str, ...], alive: list[set[str]]) -> Candidate:
    def call(**operands: Any) -> Tensor:
        watched = {name: weakref.ref(operands[name]) for name in names}
        y = _Watch.apply(mxref.parallel_linear_lora(**operands), watched, alive)  # type: ignore[no-untyped-call]
        watched["Y"] = weakref.ref(y)
        return y  # type: ignore[no-any-return]

    return Candidate("watching", call)


@pytest.mark.parametrize(("output", "left"), [("kept", {"Y", "expert_weights"}), ("dropped", set())])
def test_what_a_caller_drops_is_gone_before_the_backward_pass(output: Any, left: set[str]) -> None:
    alive: list[set[str]] = []
    sample = draw(replace(SMALL, call=Call(output=output, owner="computed")))
    found = watching(("expert_weights",), alive).run(sample)
    assert alive == [left]
    expected = golden().run(sample)
    assert all(torch.equal(found[name], x) for name, x in expected.items() if x is not None)  # type: ignore[arg-type]


def test_activations_of_inference_are_made_there() -> None:
    seen: dict[str, bool] = {}

    def call(**operands: Any) -> Tensor:
        seen.update({name: x.is_inference() for name, x in operands.items() if isinstance(x, Tensor)})
        return mxref.parallel_linear_lora(**operands)

    Candidate("", call).run(draw(replace(SMALL, call=Call(mode="inference"))))
    assert seen.pop("lora_A") is seen.pop("lora_B") is seen.pop("expert_biases") is False
    assert set(seen.values()) == {True}


def _in_inference(**operands: Any) -> Tensor:
    with torch.inference_mode():
        return mxref.parallel_linear_lora(**operands)


def _alike(**operands: Any) -> Tensor:
    return mxref.parallel_linear_lora(**operands)[:1].expand(9, -1)


def _to_and_fro(**operands: Any) -> Tensor:
    packed = operands["expert_weights"].packed
    packed ^= 0x88
    packed ^= 0x88
    return mxref.parallel_linear_lora(**operands)


def _unfreezes(**operands: Any) -> Tensor:
    y = mxref.parallel_linear_lora(**operands)
    operands["lora_A"].requires_grad_()
    return y


def _any_algorithms() -> None:
    torch.use_deterministic_algorithms(False)


def _fp32_by_default() -> None:
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("where", "mode", "how"),
    [
        ("forward", _any_algorithms, Call(algorithms="deterministic")),
        ("backward", _any_algorithms, Call(algorithms="deterministic")),
        ("forward", _fp32_by_default, Call(default_dtype=torch.bfloat16)),
        ("backward", _fp32_by_default, Call(default_dtype=torch.bfloat16)),
        ("forward", lambda: torch.set_autocast_enabled("cpu", False), Call(autocast="both passes")),
        ("forward", lambda: torch.set_grad_enabled(True), Call(mode="no_grad")),
    ],
)
def test_modes_of_the_caller_that_are_left_otherwise_are_told(where: str, mode: Any, how: Call) -> None:
    """They end with what the caller has around the call, so that nobody sees it afterwards."""

    def call(**operands: Any) -> Tensor:
        y = mxref.parallel_linear_lora(**operands)
        if where == "forward":
            mode()
        else:
            y.register_hook(lambda dOut: mode())  # type: ignore[no-untyped-call]
        return y

    before = GlobalState.now()
    with pytest.raises(UnusableAnswerError, match=f"its {where} pass leaves other modes than it was called under"):
        Candidate("", call).run(draw(replace(SMALL, call=how)))
    assert GlobalState.now().changes(before) == {}


def _changing(change: Any) -> Any:
    def call(**operands: Any) -> Tensor:
        change(operands)
        return mxref.parallel_linear_lora(**operands)

    return call


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (_unfreezes, "sets lora_A.requires_grad"),
        (_in_inference, "returned an inference tensor outside inference_mode"),
        (_alike, "returned rows or columns that share memory"),
        (lambda **o: mxref.parallel_linear_lora(**o).requires_grad_(), "requires a gradient, though no operand does"),
        (_to_and_fro, "changes packed in place"),
        (
            _changing(lambda o: object.__setattr__(o["expert_weights"], "packed", o["expert_weights"].packed.clone())),
            "puts another tensor in the place of packed",
        ),
        (_changing(lambda o: setattr(o["lora_A"], "data", o["lora_A"].data.clone())), "gives lora_A other memory"),
        (_changing(lambda o: setattr(o["lora_A"], "grad", torch.ones_like(o["lora_A"]))), "changes lora_A.grad"),
    ],
)
def test_what_nobody_could_go_on_with_is_told(call: Any, told: str) -> None:
    sample = draw(replace(SMALL, call=Call(needs=())))
    with pytest.raises(UnusableAnswerError, match=told):
        Candidate("", call).run(sample)


def test_plain_pytorch_passes_whatever_surrounds_it() -> None:
    everything = Call(
        autocast="forward pass to fp16", algorithms="strictly deterministic", saved="reentrant checkpoint",
        default_dtype=torch.bfloat16, backward="accumulated",
    )  # fmt: skip
    sample = draw(replace(SMALL, call=everything))
    assert [str(finding) for finding in ask("integer", torch_composite(), sample) if not finding.ok] == []


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda: setattr(torch.backends.cudnn, "benchmark", True), "cuDNN's choice by time"),
        (lambda: setattr(torch.backends.cudnn, "deterministic", True), "cuDNN's deterministic mode"),
        (lambda: torch.set_autocast_cache_enabled(False), "cache of autocast"),
        (lambda: setattr(torch.utils.deterministic, "fill_uninitialized_memory", False), "filling of memory"),
        (lambda: torch._C._set_multithreading_enabled(False), "threads of backward passes"),
        (lambda: torch.set_warn_always(True), "repeated warnings"),
        (lambda: torch.backends.mkldnn.set_flags(False), "oneDNN"),
        (lambda: torch.backends.cuda.enable_flash_sdp(False), "attention"),
        (lambda: torch.set_printoptions(precision=2), "print options"),
        (lambda: np.seterr(all="ignore"), "NumPy's errors"),
        (gc.disable, "garbage collection"),
        (lambda: warnings.simplefilter("ignore"), "filters of warnings"),
        (lambda: os.environ.update(CUDA_LAUNCH_BLOCKING="1"), "environment"),
        (lambda: logging.disable(logging.CRITICAL), "logging"),
        (lambda: sys.setrecursionlimit(12345), "recursion limit"),
        (lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN), "signals"),
        (lambda: setattr(torch.nn.functional, "softmax", torch.softmax), "functions of torch"),
    ],
)
def test_every_setting_is_seen_and_put_back(change: Any, name: str) -> None:
    before = GlobalState.now()
    change()
    assert set(GlobalState.now().changes(before)) == {name}
    before.restore()
    assert GlobalState.now().changes(before) == {}


def test_filters_that_an_import_adds_for_its_own_module_are_no_change() -> None:
    before = GlobalState.now()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="imported")
        warnings.simplefilter("once", type("ItsOwnWarning", (DeprecationWarning,), {}))
        assert GlobalState.now().changes(before) == {}


def test_global_state_is_put_back() -> None:
    before = GlobalState.now()
    torch._C._autograd._push_saved_tensors_default_hooks(lambda x: x, lambda x: x)
    torch.set_autocast_dtype("cpu", torch.float16)
    torch.autograd.set_detect_anomaly(True)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction ^= True
    changed = set(GlobalState.now().changes(before))
    assert changed == {"hooks of saved tensors", "autocast", "anomaly mode", "sums in 16 bits"}
    before.restore()
    assert GlobalState.now().changes(before) == {}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda: torch.set_float32_matmul_precision("high"), "fp32 products"),
        (lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"), "fp32 products"),
        (lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True), "fp32 products"),
        (lambda: setattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", True), "sums in 16 bits"),
    ],
)
def test_precisions_are_seen_through_either_interface_and_put_back(change: Any, name: str) -> None:
    before = GlobalState.now()
    change()
    assert set(GlobalState.now().changes(before)) == {name}
    before.restore()
    assert GlobalState.now().changes(before) == {}
    assert torch.get_float32_matmul_precision() == "highest", "what is mixed cannot be read"

"""A case in words: the problem behind a failure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import torch

from mxref.verification.cases.call import Call
from mxref.verification.cases.case import Case, Sample
from mxref.verification.cases.weights_behind import weight_at, weights_behind
from mxref.verification.checks.finding import Finding
from mxref.weights import MXLayout, MXWeights

_LAYOUTS = {
    "x": "layout of x",
    "A": "layout of A",
    "B": "layout of B",
    "biases": "layout of biases",
    "gates": "layout of gates",
    "weights": "layout of weights",
    "ids": "layout of expert ids",
    "rows": "layout of positions",
    "ends": "layout of offsets",
    "dOut": "layout of dOut",
    "storage": "storage",
    "index": "indices",
    "positions": "positions",
    "offsets": "offsets",
    "owner": "operands",
    "arguments": "arguments",
    "needs": "gradients",
    "backward": "backward pass",
    "mode": "gradient mode",
    "autocast": "autocast",
    "algorithms": "algorithms",
    "saved": "saved tensors",
    "default_dtype": "default dtype",
    "default_device": "default device",
    "threads": "threads",
    "output": "output",
}
_OPTIONS = {
    "parameter_dtype": "parameters",
    "adapter_dtype": "adapters in",
    "own_dtypes": "A, B, biases and gates in",
    "routing": "routing",
    "position_order": "order of positions",
    "data": "values",
    "special": "special",
    "bias": "biases",
    "gate_slots": "gates a token",
    "gate_exponent": "gates times 2^",
    "gate_values": "gates",
    "adapter_values": "adapters",
    "fan_out": "rows an input row feeds",
    "nan_bias": "NaN in a bias",
    "grouped_in": "grouped_in",
    "grouped_out": "grouped_out",
    "use_fused_dX": "use_fused_dX",
    "use_fused_gather": "use_fused_gather",
    "dense": "dense weights",
    "off_grid_weights": "weights off the grid of MXFP4",
    "layout": "packed in",
    "quantised_from": "quantised from",
    "scale_bytes": "scale bytes",
}


def problem_of(case: Case, seed: int) -> dict[str, str | int | float]:
    """Sizes, dtype, scaling, seed, and what differs from an ordinary call."""
    told: dict[str, str | int | float] = {
        "E": case.experts, "K": case.K, "N": case.N, "M": case.tokens, "k": case.top_k, "r": case.rank,
        "dtype": _plain(case.dtype), "scaling": case.scaling, "seed": seed,
    }  # fmt: skip
    for words, thing in ((_OPTIONS, case), (_LAYOUTS, case.call)):
        usual = {field.name: field.default for field in fields(Case if thing is case else Call)}
        told |= {
            word: _plain(getattr(thing, name)) for name, word in words.items() if getattr(thing, name) != usual[name]
        }
    return told | ({"classes": ", ".join(f"{d}={c}" for d, c in case.covers)} if case.covers else {})


def problem_text(problem: Mapping[str, str | int | float]) -> str:
    """The same in one line, without class names."""
    sizes = " ".join(f"{name}={problem[name]}" for name in ("E", "K", "N", "M", "k", "r") if name in problem)
    others = [
        _said(name, value) for name, value in problem.items() if name not in ("E", "K", "N", "M", "k", "r", "classes")
    ]
    return ", ".join(filter(None, [sizes, *others]))


def weights_of(sample: Sample, finding: Finding) -> tuple[str, ...]:
    """The packed weights behind a counterexample, in words, where they are few."""
    example = finding.counterexample
    if example is None or not (sample.case.exact or finding.tensor == "W"):
        return ()
    if finding.tensor == "W":
        expert, n, k = example.coordinate
        weights = sample.problem.expert_weights
        assert isinstance(weights, MXWeights)
        return (str(weight_at(weights, expert, k, n)),)
    return tuple(map(str, weights_behind(sample.to("cpu"), finding.tensor, example.coordinate)))


def _said(name: str, value: object) -> str:
    return str(value) if name == "dtype" else name if value == "yes" else f"{name} {value}"


def _plain(value: object) -> str | int | float:
    if value is True:
        return "yes"
    if isinstance(value, MXLayout):
        return value.name
    if isinstance(value, int | float | str):
        return value
    if isinstance(value, tuple):
        return " ".join(str(_plain(each)) for each in value) or "none"
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else str(value)

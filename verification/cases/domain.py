"""The domain: every dimension along which a legal call may vary, and its classes, as data.

Read off the layer's contract and the public docstrings. A suite covers every legal pair of classes, or every triple
(see `covering`), so that nothing passes because no case asked for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

StandsIn = Literal["cheap", "interpreted"]
Expense = Literal["any", "cheap", "interpreted"]
"""What a suite may cost: anything; on a CPU, plain PyTorch in the quick suite; interpreted kernels in any suite."""

_GRADIENTS = ("dX", "dA", "dB", "dbias", "dgates")


@dataclass(frozen=True)
class Class:
    """One class of a dimension.

    Attributes:
        name: in words, unique within its dimension.
        case: fields of `Case` that it sets; "gated" stands for a gate a slot, "rows" for so many routed rows or more.
        call: fields of `Call` that it sets.
        cost: seconds that such a case takes where `stand_in` takes its place.
        stand_in: fields of `Case` in place of a costly class, just past the same boundary of an implementation's tiles.
        stands_in: where: for interpreted kernels alone, or wherever the quick suite runs on a CPU too.
    """

    name: str
    case: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    cost: float = 0.0
    stand_in: Mapping[str, Any] | None = None
    stands_in: StandsIn = "cheap"


@dataclass(frozen=True)
class Dimension:
    """One way in which calls vary; the first class is the ordinary one."""

    name: str
    classes: tuple[Class, ...]


@dataclass(frozen=True)
class Exclusion:
    """Classes of two dimensions that no call can have together, and why."""

    first: str
    classes: tuple[str, ...]
    second: str
    others: tuple[str, ...]
    why: str


def _of(name: str, **classes: Mapping[str, Any]) -> Dimension:
    """A dimension whose classes set fields of `Case` only."""
    return Dimension(name, tuple(Class(each.replace("_", " "), fields) for each, fields in classes.items()))


def _how(name: str, field_name: str, *values: str) -> Dimension:
    """A dimension of a field of `Call`, a class a value."""
    return Dimension(name, tuple(Class(value, call={field_name: value}) for value in values))


DIMENSIONS: tuple[Dimension, ...] = (
    Dimension(
        "rows",
        (
            Class("few", {"tokens": 9}),
            Class("none", {"tokens": 0}),
            Class("one token", {"tokens": 1}),
            Class("a tile and a tail", {"tokens": 37}),
            Class("hundreds an expert", {"tokens": 300}, cost=10.0, stand_in={"tokens": 48}),
            Class("more than 2^16", {"rows": 70_000, "data": "balanced"}, cost=200.0, stand_in={"tokens": 70}),
        ),
    ),
    Dimension(
        "experts",
        (
            Class("few", {"experts": 4}),
            Class("one", {"experts": 1}),
            Class("hundreds", {"experts": 260}, cost=3.0, stand_in={"experts": 17}, stands_in="interpreted"),
        ),
    ),
    Dimension(
        "K",
        (
            Class("two blocks", {"K": 64}),
            Class("one block", {"K": 32}),
            Class("a step and a tail", {"K": 96}),
            Class("2880", {"K": 2880}, cost=20.0, stand_in={"K": 160}),
        ),
    ),
    Dimension(
        "N",
        (
            Class("96", {"N": 96}),
            Class("one", {"N": 1}),
            Class("odd, below a tile", {"N": 33}),
            Class("odd, a tile and a tail", {"N": 161}),
            Class("5760", {"N": 5760}, cost=20.0, stand_in={"N": 288}),
        ),
    ),
    _of("rank", four={"rank": 4}, one={"rank": 1}, three={"rank": 3}, twenty={"rank": 20}, largest={"rank": 128}),
    _of(
        "slots", two={"top_k": 2}, one={"top_k": 1}, three={"top_k": 3}, four={"top_k": 4}, eight={"top_k": 8}
    ),
    _of("dtype", fp32={"dtype": torch.float32}, bf16={"dtype": torch.bfloat16}, fp16={"dtype": torch.float16}),
    _of(
        "parameters",
        as_activations={}, fp32={"parameter_dtype": torch.float32}, bf16={"parameter_dtype": torch.bfloat16},
    ),
    Dimension(
        "weights",
        (
            Class("packed"),
            Class("dense", {"dense": True}),
            Class("dense, contiguous", {"dense": True}, {"weights": "transposed"}),
            Class("dense, sliced", {"dense": True}, {"weights": "sliced"}),
        ),
    ),
    Dimension("indices", (Class("int64"), Class("int32", call={"index": torch.int32}))),
    _of("input order", by_token={}, by_expert={"grouped_in": True}),
    _of("output order", by_position={}, by_expert={"grouped_out": True}),
    _of("use_fused_dX", false={}, true={"use_fused_dX": True}),
    _of("use_fused_gather", false={}, true={"use_fused_gather": True}),
    _of("biases", none={}, there={"bias": True}),
    _of(
        "gates",
        none={}, positive={"gated": True}, negative={"gated": True, "gate_values": "negative"},
        some_zero={"gated": True, "gate_values": "some zero"},
    ),
    _of(
        "scaling",
        power_of_two={"scaling": 0.5}, zero={"scaling": 0.0}, negative={"scaling": -2.0}, a_third={"scaling": 1 / 3},
    ),
    _of(
        "adapters",
        ordinary={}, none={"rank": 0}, B_zero={"zero_B": True}, far_above={"data": "lora"},
    ),
    _of(
        "routing",
        uniform={}, empty_experts={"routing": "empty_experts"}, one_takes_all={"routing": "one_expert"},
        an_expert_twice={"routing": "duplicates"}, descending_positions={"routing": "descending"},
        sentinels={"routing": "sentinels"}, all_sentinels={"routing": "all_sentinels"},
        sentinels_far_above={"routing": "far_sentinels"},
    ),
    _how("layout of x", "x", "contiguous", "transposed", "sliced", "offset"),
    _how("layout of A and B", "adapters", "contiguous", "transposed", "sliced", "offset"),
    _how("layout of biases and gates", "others", "contiguous", "transposed", "sliced"),
    _how("layout of dOut", "dOut", "contiguous", "transposed", "sliced", "offset", "expanded"),
    Dimension(
        "gradients",
        (
            Class("all"),
            Class("all but dX", call={"needs": _GRADIENTS[1:]}),
            Class("dX alone", call={"needs": ("dX",)}),
            Class("dA alone", call={"needs": ("dA",)}),
            Class("dB alone", call={"needs": ("dB",)}),
            Class("dX and dB", call={"needs": ("dX", "dB")}),
            Class("biases and gates", call={"needs": ("dbias", "dgates")}),
        ),
    ),
    _how("gradient mode", "mode", "grad", "no_grad", "inference"),
    _how("context", "context", "plain", "autocast", "deterministic", "checkpoint"),
    _of(
        "values",
        exact={}, ordinary={"data": "balanced"}, off_every_grid={"data": "off_grid"}, subnormal={"data": "subnormal"},
        scales_far_apart={"data": "wide"}, scales_at_both_ends={"data": "boundary"},
        NaN_in_a_row={"special": "nan row"}, inf_in_a_row={"special": "inf row"}, NaN_in_dOut={"special": "nan dOut"},
        NaN_expert={"special": "nan expert"}, NaN_in_A={"special": "nan A"}, NaN_gate={"special": "nan gate"},
        NaN_in_a_remote_row={"special": "nan remote"},
    ),
)  # fmt: skip

_DRAWN = ("ordinary", "off every grid", "subnormal", "scales far apart", "scales at both ends")

EXCLUDED: tuple[Exclusion, ...] = (
    Exclusion("gates", ("positive", "negative", "some zero"), "output order", ("by expert",),
              "the gated sum needs rows by position"),
    Exclusion("adapters", ("far above",), "values", tuple(c for c in _DRAWN if c != "ordinary"),
              "both choose the kind of numbers"),
    Exclusion("values", ("off every grid",), "dtype", ("bf16", "fp16"), "16-bit activations lie on a grid"),
    Exclusion("values", ("NaN gate",), "gates", ("none",), "there is no gate"),
    Exclusion("values", ("NaN gate",), "output order", ("by expert",), "gates need rows by position"),
    Exclusion("values", ("off every grid",), "parameters", ("fp32",), "the same as the activations' dtype"),
    Exclusion("values", ("NaN in A",), "adapters", ("none",), "there is no adapter"),
    Exclusion("values", ("NaN in a remote row",), "routing",
              ("uniform", "empty experts", "one takes all", "an expert twice", "descending positions"),
              "no row is remote"),
    Exclusion("values", ("NaN in a row", "inf in a row", "NaN in dOut", "NaN gate", "NaN in a remote row"), "rows",
              ("none",), "there is no row"),
    Exclusion("parameters", ("fp32",), "dtype", ("fp32",), "the same as the activations' dtype"),
    Exclusion("parameters", ("bf16",), "dtype", ("bf16",), "the same as the activations' dtype"),
    Exclusion("experts", ("one",), "routing", ("empty experts",), "all rows would be nobody's"),
    Exclusion("experts", ("hundreds",), "K", ("2880",), "weights of 10 GB and more; the full suite has real shapes"),
    Exclusion("experts", ("hundreds",), "N", ("5760",), "weights of 10 GB and more; the full suite has real shapes"),
    Exclusion("gradient mode", ("no_grad", "inference"), "gradients",
              ("all but dX", "dX alone", "dA alone", "dB alone", "dX and dB", "biases and gates"),
              "no gradient is asked for"),
    Exclusion("gradient mode", ("no_grad", "inference"), "context", ("checkpoint",), "there is no backward pass"),
    Exclusion("gradient mode", ("no_grad", "inference"), "layout of dOut",
              ("transposed", "sliced", "offset", "expanded"), "there is no backward pass"),
    Exclusion("values", ("NaN in dOut",), "layout of dOut", ("expanded",), "all rows are the same"),
    Exclusion("rows", ("more than 2^16",), "N", ("5760",), "3 GB a tensor in the golden model's fp64"),
    Exclusion("rows", ("more than 2^16",), "K", ("2880",), "2 GB a tensor in the golden model's fp64"),
    Exclusion("adapters", ("none",), "gradients", ("dA alone", "dB alone"), "there is no adapter"),
)  # fmt: skip
"""Pairs of classes that are no legal call, or no different one."""


def dimensions_for(dtypes: Sequence[torch.dtype], expense: Expense) -> list[Dimension]:
    """The domain where only some activation dtypes are judged, at some expense, see `Class.stands_in`."""
    replaced: dict[Expense, tuple[str, ...]] = {"any": (), "cheap": ("cheap",), "interpreted": ("cheap", "interpreted")}
    found = []
    for dimension in DIMENSIONS:
        classes = dimension.classes
        if dimension.name == "dtype":
            classes = tuple(each for each in classes if each.case["dtype"] in dtypes)
        classes = tuple(
            Class(each.name, each.stand_in, each.call)
            if each.stand_in is not None and each.stands_in in replaced[expense]
            else each
            for each in classes
        )
        found.append(Dimension(dimension.name, classes))
    return living(found)


def living(dimensions: Sequence[Dimension]) -> list[Dimension]:
    """The dimensions without classes that no call can have, because all of another dimension exclude them."""
    forbidden = {frozenset(((e.first, a), (e.second, b))) for e in EXCLUDED for a in e.classes for b in e.others}

    def lives(dimension: Dimension, each: Class) -> bool:
        own = (dimension.name, each.name)
        others = [other for other in dimensions if other.name != dimension.name]
        return all(any(frozenset((own, (o.name, c.name))) not in forbidden for c in o.classes) for o in others)

    return [Dimension(d.name, tuple(each for each in d.classes if lives(d, each))) for d in dimensions]

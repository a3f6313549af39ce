"""The domain: every dimension along which a legal call may vary, and its classes, as data.

Read off the layer's contract and the public docstrings. A suite covers every legal pair of classes, or every triple
(see `covering`), so that nothing passes because no case asked for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Literal

import numpy as np
import torch

from mxref.verification.cases.exclusions import EXCLUDED

Fields = Mapping[str, Any]
Expense = Literal["any", "cheap", "interpreted"]
"""What a suite may cost: anything; on a CPU, plain PyTorch in the quick suite; interpreted kernels in any suite."""

_STRIDED = ("contiguous", "transposed", "sliced", "padded", "offset", "overlapping", "expanded")
_GRADIENTS = ("dX", "dA", "dB", "dbias", "dgates")
SUBSETS: dict[str, tuple[str, ...]] = {
    "all but dX": ("dA", "dB", "dbias", "dgates"), "dX alone": ("dX",), "dA alone": ("dA",), "dB alone": ("dB",),
    "dA and dB": ("dA", "dB"), "dX and dA": ("dX", "dA"), "dX, dA and dB": ("dX", "dA", "dB"),
    "all but dbias": ("dX", "dA", "dB", "dgates"), "biases and gates": ("dbias", "dgates"),
}  # fmt: skip
"""Gradients that are asked for more often than other subsets are."""


@dataclass(frozen=True)
class Class:
    """One class of a dimension.

    Attributes:
        name: in words, unique within its dimension.
        case: fields of `Case` that it sets; "gated" stands for a gate a slot (or for another number of gates a token,
            see `domain_cases.slots_of`), "rows" for so many routed rows or more, "apart" for the parameter whose dtype
            is another one, fp32 or, beside fp32, bf16.
        call: fields of `Call` that it sets.
        others: what takes the place of `case`, or of `call` in a class without it, in turn, so that a suite has several
            numbers of a class.
        cost: seconds that such a case takes where there are stand-ins.
        stand_ins: in place of a costly class, just past the same boundaries of an implementation's tiles: fields of
            `Case` in turn, by expense.
    """

    name: str
    case: Fields = field(default_factory=dict)
    call: Fields = field(default_factory=dict)
    others: tuple[Fields, ...] = ()
    cost: float = 0.0
    stand_ins: Mapping[Expense, Sequence[Fields]] = field(default_factory=dict)

    @property
    def own(self) -> Fields:
        """`case`, or `call` in a class without it: what `others` take the place of."""
        return self.case or self.call

    @property
    def turns(self) -> tuple[Class, ...]:
        """The class with each of its numbers alone."""
        return tuple(self.of([fields]) for fields in (self.own, *self.others))

    def of(self, turns: Sequence[Fields]) -> Class:
        """The class with these numbers alone."""
        fields, others = turns[0], tuple(turns[1:])
        return replace(self, case=fields, others=others) if self.case else replace(self, call=fields, others=others)

    def at(self, expense: Expense) -> Class:
        """The class, or what stands in for it."""
        return replace(self.of(turns), cost=0.0) if (turns := self.stand_ins.get(expense)) else self


@dataclass(frozen=True)
class Dimension:
    """One way in which calls vary; the first class is the ordinary one."""

    name: str
    classes: tuple[Class, ...]


def _of(name: str, **classes: Mapping[str, Any]) -> Dimension:
    """A dimension whose classes set fields of `Case` only."""
    return Dimension(name, tuple(Class(each.replace("_", " "), fields) for each, fields in classes.items()))


def _numbers(name: str, field_name: str, *numbers: float, **costs: Any) -> Class:
    """A class of one field, which has these numbers in turn; `costs`: numbers in their place by expense, and `cost`."""
    cost = costs.pop("cost", 0.0)
    stand_ins = {expense: [{field_name: n} for n in own] for expense, own in costs.items()}
    first, *others = ({field_name: n} for n in numbers)
    return Class(name, first, others=tuple(others), cost=cost, stand_ins=stand_ins)  # type: ignore[arg-type]


def _tokens(name: str, *numbers: int, interpreted: Sequence[int] = (), **costs: Any) -> Class:
    """A class of so many tokens; interpreted, of so many routed rows, or others, whatever the slots."""
    tokens = _numbers(name, "tokens", *numbers, **costs)
    return replace(tokens, stand_ins={**tokens.stand_ins, "interpreted": [{"rows": n} for n in interpreted or numbers]})


def _subsets(name: str, fits: Callable[[tuple[str, ...]], bool]) -> Class:
    """A class of all subsets of the gradients, but for none, all and `SUBSETS`, that fit."""
    every = (needs for size in range(1, len(_GRADIENTS)) for needs in combinations(_GRADIENTS, size))
    first, *others = ({"needs": needs} for needs in every if fits(needs) and needs not in SUBSETS.values())
    return Class(name, call=first, others=tuple(others))


def _how(name: str, field_name: str, *values: str) -> Dimension:
    """A dimension of a field of `Call`, a class a value."""
    return Dimension(name, tuple(Class(value, call={field_name: value}) for value in values))


DIMENSIONS: tuple[Dimension, ...] = (
    Dimension(
        "rows",
        (
            _numbers("few", "tokens", 9, 14, 11, 23, 5, 2, 7, 8, 16),
            _numbers("none", "tokens", 0),
            _numbers("one token", "tokens", 1),
            _tokens("a tile and a tail", 37, 65, 32, 127, 64, 21, 129),
            _tokens("hundreds an expert", 300, 420, cost=10.0, cheap=(150, 260), interpreted=(150,)),
            Class("more than 2^16", {"rows": 70_000, "data": "balanced"}, cost=200.0,
                  stand_ins={"cheap": ({"tokens": 70},), "interpreted": ({"rows": 240},)}),
        ),
    ),
    Dimension(
        "experts",
        (
            _numbers("few", "experts", 4, 6, 5, 7),
            _numbers("one", "experts", 1),
            _numbers("a warp", "experts", 32, 40, 64, 96, 24, 48, 60, 72, 80, cost=1.0, interpreted=(8, 12)),
            _numbers("hundreds", "experts", 260, 128, 160, 144, 192, 100, cost=3.0, interpreted=(17, 20)),
        ),
    ),
    Dimension(
        "K",
        (
            _numbers("an odd number of two blocks", "K", 64, 192, 320, 448, cheap=(64, 192, 320),
                     interpreted=(64,)),
            _numbers("one block", "K", 32),
            _numbers("a step and a tail", "K", 96, 160, 224, 288, 352, 480, cheap=(96, 160, 224, 288),
                     interpreted=(96, 160, 224)),
            _numbers("no whole block", "K", 40, 33, 200, 66, 16, 100),
            _numbers("whole tiles", "K", 128, 384, 256, 640, interpreted=(128, 384, 256)),
            _numbers("long", "K", 2880, 1408, 1536, 1152, 896, 1280, cost=20.0,
                     cheap=(576, 704, 768, 896, 1152), interpreted=(160,)),
        ),
    ),
    Dimension(
        "N",
        (
            _numbers("blocks and no whole tile", "N", 96, 160, 224, 288, 352, interpreted=(96, 160, 224)),
            _numbers("32", "N", 32),
            _numbers("eight or sixteen times an odd number", "N", 112, 40, 208, 264, 24, 48, 8),
            _numbers("one", "N", 1),
            _numbers("odd, below a tile", "N", 63, 3, 51, 127),
            _numbers("twice an odd number", "N", 98, 6, 134, 262),
            _numbers("four times an odd number", "N", 100, 12, 108, 260),
            _numbers("odd, a tile and a tail", "N", 161, 129, 203, 315),
            _numbers("whole tiles", "N", 128, 384, 256, 640, interpreted=(128, 384, 256)),
            _numbers("long", "N", 5760, 1536, 1024, 896, 1408, cost=20.0,
                     cheap=(576, 520, 768, 896, 1024), interpreted=(288,)),
        ),
    ),
    Dimension(
        "rank",
        (
            _numbers("four times an odd number", "rank", 4, 12, 20, 36, 44, 28, 52, 60, 76,
                     interpreted=(4, 12, 20, 36, 44, 28)),
            _numbers("one", "rank", 1),
            _numbers("odd", "rank", 3, 17, 7, 33, 5, 19, 21, 23, 49, 51, 63, 65, interpreted=(3, 17, 7, 33)),
            _numbers("twice an odd number", "rank", 6, 10, 18, 34, 22, 26, 50, 54, 58, 62, 70,
                     interpreted=(6, 10, 18, 34)),
            _numbers("eight", "rank", 8),
            _numbers("eight times an odd number", "rank", 40, 72, 24, 56, 104, 88, 120,
                     interpreted=(40, 72, 24, 56, 104)),
            _numbers("sixteen", "rank", 16),
            _numbers("sixteen times an odd number", "rank", 48, 80, 112),
            _numbers("thirty two", "rank", 32),
            _numbers("sixty four", "rank", 64, 96),
            _numbers("largest", "rank", 128),
        ),
    ),
    Dimension(
        "slots",
        (
            _numbers("two", "top_k", 2),
            _numbers("one", "top_k", 1),
            _numbers("odd", "top_k", 3, 5, 7, 9),
            _numbers("four", "top_k", 4),
            _numbers("six", "top_k", 6),
            _numbers("eight", "top_k", 8),
            _numbers("ten", "top_k", 10, 14),
            _numbers("seventeen", "top_k", 17, 16, 22),
        ),
    ),
    _of("dtype", fp32={"dtype": torch.float32}, bf16={"dtype": torch.bfloat16}, fp16={"dtype": torch.float16}),
    _of(
        "parameters",
        as_activations={}, fp32={"parameter_dtype": torch.float32}, bf16={"parameter_dtype": torch.bfloat16},
        fp16={"parameter_dtype": torch.float16}, adapters_in_fp32={"adapter_dtype": torch.float32},
        A_of_another={"apart": 0}, B_of_another={"apart": 1}, biases_of_another={"apart": 2},
        gates_of_another={"apart": 3},
    ),
    Dimension(
        "weights",
        (
            Class("packed"),
            Class("packed, from fp32", {"quantised_from": torch.float32}),
            Class("packed, from fp16", {"quantised_from": torch.float16}),
            Class("dense", {"dense": True}),
            Class("dense, off every grid", {"dense": True, "off_grid_weights": True}),
        ),
    ),
    _how(
        "layout of weights", "weights",
        "contiguous", "offset", "transposed", "sliced", "padded", "apart", "expanded", "innermost",
    ),
    Dimension(
        "indices",
        (
            Class("int64"),
            Class("int32", call={"index": torch.int32}),
            Class("int32, offsets int64", call={"index": torch.int32, "offsets": torch.int64}),
            Class("int64, others int32", call={"positions": torch.int32, "offsets": torch.int32}),
            Class("int32, positions int64", call={"index": torch.int32, "positions": torch.int64}),
            Class("int64, offsets int32", call={"offsets": torch.int32}),
            Class("int64, positions int32", call={"positions": torch.int32}),
            Class("int32, others int64", call={"index": torch.int32, "positions": torch.int64, "offsets": torch.int64}),
        ),
    ),
    _of("input order", by_token={}, by_expert={"grouped_in": True}),
    _of("fan out", a_row_a_token={}, a_row_a_slot={"fan_out": 1}),
    _of("output order", by_position={}, by_expert={"grouped_out": True}),
    _of("use_fused_dX", false={}, true={"use_fused_dX": True}),
    _of("use_fused_gather", false={}, true={"use_fused_gather": True}),
    _of("biases", none={}, there={"bias": True}, one_NaN={"bias": True, "nan_bias": True}),
    _of(
        "gates",
        none={}, another_number_a_token={"gated": "other"}, positive={"gated": True},
        negative={"gated": True, "gate_values": "negative"},
        some_zero={"gated": True, "gate_values": "some zero"}, one_a_row={"gated": True, "gate_slots": 1},
        across_tokens={"gated": "across"}, **{"all_a_token's": {"gated": "all"}},
        one_NaN={"gated": True, "gate_values": "one NaN"}, subnormal_in_fp16={"gated": True, "gate_exponent": -16},
    ),
    Dimension(
        "scaling",
        (
            _numbers("power of two", "scaling", 0.5, 4.0, 16.0, 8.0),
            _numbers("two", "scaling", 2.0),
            _numbers("zero", "scaling", 0.0, 0),
            _numbers("negative", "scaling", -2.0),
            _numbers("a third", "scaling", 1 / 3, 0.1, 1.5),
            _numbers("an int", "scaling", -3, 3),
            _numbers("sixteen thirds", "scaling", -16 / 3, 16 / 3),
            _numbers("beyond fp16", "scaling", 1e5),
            _numbers("tiny", "scaling", 2.0**-26),
            _numbers("one", "scaling", 1.0, 1),
            _numbers("of numpy", "scaling", np.float64(0.25)),
        ),
    ),
    _of(
        "adapters",
        ordinary={}, none={"rank": 0}, B_zero={"adapter_values": "zero B"}, NaN_in_A={"adapter_values": "nan A"},
        NaN_in_B={"adapter_values": "nan B"},
        **{"B_zero,_NaN_in_A": {"adapter_values": "nan A, zero B"}},
        Z_beyond_fp16={"adapter_values": "Z overflows"}, V_beyond_fp16={"adapter_values": "V overflows"},
        A_zero={"adapter_values": "zero A"}, **{"one_expert's_zero": {"adapter_values": "zero expert"}},
    ),
    _of(
        "routing",
        uniform={}, empty_experts={"routing": "empty_experts"}, one_takes_all={"routing": "one_expert"},
        an_expert_twice={"routing": "duplicates"}, sentinels={"routing": "sentinels"},
        all_sentinels={"routing": "all_sentinels"}, sentinels_far_above={"routing": "far_sentinels"},
    ),
    _of(
        "order of positions",
        ascending={}, descending={"position_order": "descending"}, shuffled={"position_order": "shuffled"},
    ),
    _how("layout of expert ids", "ids", "contiguous", "sliced", "offset", "expanded"),
    _how("layout of positions", "rows", "contiguous", "sliced", "offset"),
    _how("layout of offsets", "ends", "contiguous", "sliced", "offset", "expanded"),
    _how("layout of x", "x", *_STRIDED, "one column"),
    _how("layout of A", "A", *_STRIDED),
    _how("layout of B", "B", *_STRIDED),
    _how("layout of biases", "biases", *_STRIDED),
    _how("layout of gates", "gates", *_STRIDED, "one row"),
    _how("layout of dOut", "dOut", *_STRIDED, "one column", "one number"),
    _how("storage", "storage", "its own", "shared"),
    _how("operands", "owner", "leaf", "parameter", "computed"),
    _how("arguments", "arguments", "spelled out", "defaults left out"),
    Dimension(
        "gradients",
        (
            Class("all"),
            Class("none", call={"needs": ()}),
            *(Class(name, call={"needs": needs}) for name, needs in SUBSETS.items()),
            _subsets("dX and others", lambda needs: "dX" in needs),
            _subsets("others", lambda needs: "dX" not in needs),
        ),
    ),
    _how("gradient mode", "mode", "grad", "no_grad", "inference"),
    _how("backward pass", "backward", "at once", "one by one", "create_graph", "accumulated"),
    _how("autocast", "autocast", "off", "forward pass", "forward pass to fp16", "backward pass to fp16", "both passes"),
    _how("algorithms", "algorithms", "any", "deterministic", "strictly deterministic"),
    _how("saved tensors", "saved", "kept", "copied", "checkpoint", "reentrant checkpoint"),
    Dimension(
        "default dtype",
        (
            Class("fp32"),
            Class("bf16", call={"default_dtype": torch.bfloat16}),
            Class("fp32, on meta", call={"default_device": "meta"}),
        ),
    ),
    _how("threads", "threads", "one", "another", "another in backward"),
    _how("output", "output", "kept", "overwritten", "dropped"),
    _of(
        "values",
        exact={}, ordinary={"data": "balanced"}, off_every_grid={"data": "off_grid"}, subnormal={"data": "subnormal"},
        scales_far_apart={"data": "wide"}, scales_at_both_ends={"data": "boundary"}, LoRA_far_above={"data": "lora"},
        subnormal_LoRA={"data": "tiny lora"},
    ),
    _of(
        "not finite",
        nothing={}, NaN_in_a_row={"special": "nan row"}, inf_in_a_row={"special": "inf row"},
        NaN_in_a_row_without_dOut={"special": "nan row, zero dOut"},
        NaN_in_dOut={"special": "nan dOut"}, inf_in_dOut={"special": "inf dOut"}, NaN_expert={"special": "nan expert"},
        NaN_in_a_remote_row={"special": "nan remote"},
    ),
)  # fmt: skip


def dimensions_for(dtypes: Sequence[torch.dtype], expense: Expense) -> list[Dimension]:
    """The domain where only some activation dtypes are judged, at some expense, see `Class.stand_ins`."""
    found = []
    for dimension in DIMENSIONS:
        classes = dimension.classes
        if dimension.name == "dtype":
            classes = tuple(each for each in classes if each.case["dtype"] in dtypes)
        found.append(Dimension(dimension.name, tuple(each.at(expense) for each in classes)))
    return living(found)


def living(dimensions: Sequence[Dimension]) -> list[Dimension]:
    """The dimensions without classes that no call can have, because all of another dimension exclude them."""
    forbidden = {frozenset(((e.first, a), (e.second, b))) for e in EXCLUDED for a in e.classes for b in e.others}

    def lives(dimension: Dimension, each: Class) -> bool:
        own = (dimension.name, each.name)
        others = [other for other in dimensions if other.name != dimension.name]
        return all(any(frozenset((own, (o.name, c.name))) not in forbidden for c in o.classes) for o in others)

    return [Dimension(d.name, tuple(each for each in d.classes if lives(d, each))) for d in dimensions]

"""Classes of the domain's dimensions that no call can have together, as data."""

from __future__ import annotations

from dataclasses import dataclass

from mxref.verification.cases.call import REPEATED


@dataclass(frozen=True)
class Exclusion:
    """Classes of two dimensions that no call can have together, and why."""

    first: str
    classes: tuple[str, ...]
    second: str
    others: tuple[str, ...]
    why: str


_DRAWN = (
    "ordinary", "off every grid", "subnormal", "scales far apart", "scales at both ends", "LoRA far above",
    "subnormal LoRA",
)  # fmt: skip
_UNDERFLOWING = ("subnormal", "scales far apart", "scales at both ends", "subnormal LoRA")
_NO_ROW = (
    "NaN in a row", "NaN in a row without dOut", "inf in a row", "NaN in dOut", "inf in dOut", "NaN in a remote row",
)  # fmt: skip
_GATES = (
    "another number a token", "positive", "negative", "some zero", "one a row", "across tokens", "all a token's",
    "one NaN", "subnormal in fp16",
)  # fmt: skip
_PACKED = ("packed", "packed, from fp32", "packed, from fp16")
_APART = ("scales far apart", "scales at both ends")
_COLUMNS_DIFFER = "columns differ by more than the range of a sum"
_SHARED = ("overlapping", "expanded")
_SHARED_GATES = (*_SHARED, "one row")
_ROWS_SHARE = "all rows are the same, or share elements"
_OVERFLOWING = ("Z beyond fp16", "V beyond fp16")
_TO_FP16 = ("forward pass to fp16", "backward pass to fp16")
_PROMOTED = "where autocast is to fp16, torch's own operations that promote, cat and others, refuse bf16"
_WITHOUT_BACKWARD: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("backward pass", ("one by one", "create_graph", "accumulated")),
    ("autocast", ("backward pass to fp16", "both passes")),
    ("saved tensors", ("copied", "checkpoint", "reentrant checkpoint")),
    ("threads", ("another in backward",)), ("output", ("overwritten", "dropped")),
    ("layout of dOut", ("transposed", "sliced", "padded", "offset", *REPEATED)),
)  # fmt: skip

EXCLUDED: tuple[Exclusion, ...] = (
    Exclusion("gates", _GATES, "output order", ("by expert",), "the gated sum needs rows by position"),
    Exclusion("weights", _PACKED, "layout of weights",
              ("transposed", "sliced", "padded", "apart", "expanded", "innermost"), "packed weights are contiguous"),
    Exclusion("weights", _PACKED, "K", ("no whole block",), "packed weights have whole blocks"),
    Exclusion("adapters", ("none",), "values", ("LoRA far above", "subnormal LoRA"), "there is no adapter"),
    Exclusion("not finite", ("inf in a row", "inf in dOut"), "values", _UNDERFLOWING,
              "what rounding may make zero would meet infinity"),
    Exclusion("adapters", _OVERFLOWING, "values", _DRAWN, "rounding to infinity is judged where sums are exact"),
    Exclusion("adapters", _OVERFLOWING, "scaling", ("a third", "an int", "tiny", "sixteen thirds", "beyond fp16"),
              "no exact sum"),
    Exclusion("adapters", _OVERFLOWING, "weights", ("dense, off every grid",), "no exact sum"),
    Exclusion("adapters", _OVERFLOWING, "gates", ("all a token's",), "no exact sum"),
    Exclusion("adapters", _OVERFLOWING, "layout of x", (*_SHARED, "one column"), "no exact sum"),
    Exclusion("adapters", _OVERFLOWING, "layout of A", _SHARED, "no exact sum"),
    Exclusion("adapters", _OVERFLOWING, "layout of B", _SHARED, "no exact sum"),
    Exclusion("adapters", _OVERFLOWING, "layout of biases", ("overlapping",), "no exact sum"),
    Exclusion("adapters", _OVERFLOWING, "layout of gates", ("overlapping",), "no exact sum"),
    Exclusion("adapters", _OVERFLOWING, "layout of dOut", REPEATED, "no exact sum"),
    Exclusion("values", ("off every grid",), "dtype", ("bf16", "fp16"), "16-bit activations lie on a grid"),
    Exclusion("values", ("off every grid",), "parameters", ("fp32", "adapters in fp32"),
              "the same as the activations' dtype"),
    Exclusion("not finite", ("NaN in a remote row",), "routing",
              ("uniform", "empty experts", "one takes all", "an expert twice"), "no row is remote"),
    Exclusion("not finite", ("NaN in a remote row",), "layout of expert ids", ("expanded",), "all rows are remote"),
    Exclusion("not finite", ("NaN in a remote row",), "layout of offsets", ("expanded",), "all rows are remote"),
    Exclusion("not finite", _NO_ROW, "rows", ("none",), "there is no row"),
    Exclusion("not finite", ("NaN in a row", "NaN in a row without dOut", "inf in a row", "NaN in a remote row"),
              "layout of x",
              (*_SHARED, "one column"), "all rows or columns are the same, or share elements"),
    Exclusion("not finite", ("NaN in dOut", "NaN in a row without dOut", "inf in dOut", "NaN in a remote row"),
              "layout of dOut",
              REPEATED, "all rows or columns are the same, or share elements"),
    Exclusion("not finite", ("NaN in a remote row",), "layout of gates", _SHARED_GATES, _ROWS_SHARE),
    Exclusion("values", _APART, "layout of x", ("overlapping", "one column"), _COLUMNS_DIFFER),
    Exclusion("values", _APART, "layout of dOut", ("overlapping", "one column", "one number"), _COLUMNS_DIFFER),
    Exclusion("values", _APART, "layout of biases", ("overlapping",), _COLUMNS_DIFFER),
    Exclusion("values", _APART, "layout of A", _SHARED, "columns of A differ likewise"),
    Exclusion("values", _APART, "layout of B", _SHARED, "rows of B differ likewise"),
    Exclusion("adapters", ("NaN in A", "B zero, NaN in A", "one expert's zero"), "layout of A", _SHARED, _ROWS_SHARE),
    Exclusion("adapters", ("NaN in B", "one expert's zero"), "layout of B", _SHARED, _ROWS_SHARE),
    Exclusion("biases", ("one NaN",), "layout of biases", _SHARED, _ROWS_SHARE),
    Exclusion("adapters", ("one expert's zero",), "layout of biases", _SHARED, _ROWS_SHARE),
    Exclusion("gates", ("some zero", "negative", "one NaN"), "layout of gates", _SHARED_GATES, _ROWS_SHARE),
    Exclusion("layout of expert ids", ("expanded",), "routing",
              ("uniform", "empty experts", "an expert twice", "sentinels", "sentinels far above"),
              "rows have different experts"),
    Exclusion("layout of offsets", ("expanded",), "routing",
              ("uniform", "empty experts", "an expert twice", "sentinels", "sentinels far above"),
              "experts have different offsets"),
    Exclusion("not finite", ("NaN expert",), "layout of weights", ("expanded",), "all experts are the same"),
    Exclusion("parameters", ("fp32", "adapters in fp32"), "dtype", ("fp32",), "the same as the activations' dtype"),
    Exclusion("parameters", ("bf16",), "dtype", ("bf16",), "the same as the activations' dtype"),
    Exclusion("parameters", ("fp16",), "dtype", ("fp16",), "the same as the activations' dtype"),
    Exclusion("input order", ("by expert",), "fan out", ("a row a slot",), "it is so in expert order"),
    Exclusion("experts", ("one",), "routing", ("empty experts",), "all rows would be nobody's"),
    Exclusion("experts", ("a warp",), "K", ("long",), "weights of 1 GB and more; the full suite has real shapes"),
    Exclusion("experts", ("a warp",), "N", ("long",), "weights of 1 GB and more; the full suite has real shapes"),
    Exclusion("experts", ("hundreds",), "K", ("long",), "weights of 10 GB and more; the full suite has real shapes"),
    Exclusion("experts", ("hundreds",), "N", ("long",), "weights of 10 GB and more; the full suite has real shapes"),
    Exclusion("experts", ("hundreds",), "rank", ("largest",), "adapters of 30,000 rows; a named case has them"),
    Exclusion("gradient mode", ("no_grad", "inference"), "gradients",
              ("all but dX", "dX alone", "dA alone", "dB alone", "dA and dB", "dX and dA", "dX, dA and dB",
               "all but dbias", "biases and gates", "dX and others", "others"),
              "no gradient is asked for"),
    *(Exclusion(first, none, dimension, classes, "there is no backward pass")
      for first, none in (("gradient mode", ("no_grad", "inference")), ("gradients", ("none",)))
      for dimension, classes in _WITHOUT_BACKWARD),
    Exclusion("saved tensors", ("reentrant checkpoint",), "backward pass", ("at once", "one by one", "create_graph"),
              "torch refuses torch.autograd.grad there"),
    Exclusion("rows", ("more than 2^16",), "N", ("long",), "3 GB a tensor in the golden model's fp64"),
    Exclusion("rows", ("more than 2^16",), "K", ("long",), "2 GB a tensor in the golden model's fp64"),
    Exclusion("adapters", ("none",), "gradients", ("dA alone", "dB alone", "dA and dB"), "there is no adapter"),
    Exclusion("autocast", _TO_FP16, "dtype", ("bf16",), _PROMOTED),
    Exclusion("autocast", _TO_FP16, "parameters",
              ("bf16", "A of another", "B of another", "biases of another", "gates of another"), _PROMOTED),
)  # fmt: skip
"""Pairs of classes that are no legal call, or no different one."""

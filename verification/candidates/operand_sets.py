"""Sets of operands that the calls of a sequence are made on."""

from __future__ import annotations

import torch

from mxref.verification.cases.call import lay_out
from mxref.verification.cases.case import Sample
from mxref.verification.cases.tokens import without
from mxref.weights import MXWeights, decode_mxfp4

SETS = "abcdef"
"""Those that occur in any order; the others are variants of a, told by what they differ in."""
_TURNED = ("inputs", "lora_A", "gates", "grad_out")
"""Operands whose signs b has otherwise than a."""


def operand_sets(sample: Sample) -> dict[str, Sample]:
    """The sets by name, for an integer fixture of at least four tokens, its rows of x by token.

    a: the sample. b: the same shapes with other signs, another scaling and, without gates, another order of rows.
    c: the first tokens of a alone, whose rows of x lie where those of a do. d: a with other signs. e, f: a where its
    operands begin elsewhere in a larger buffer, between multiples of 16 bytes, and where they have other
    strides, but for packed bytes, which are contiguous.

    Others are a itself but for one thing: s of the other sign; int32 indices; decoded weights; no adapters; neither
    biases nor gates; x row by row, by position, and in expert order, which has the same shape.
    """
    a = sample.mapped(lambda _, x: x.clone())
    b, d = (sample.mapped(lambda name, x: -x if name in _TURNED else x.clone()) for _ in range(2))
    order = sample.problem.gates is None and not sample.problem.grouped_out
    b = b.changed(scaling=-2 * sample.problem.scaling, grouped_out=order)
    first = torch.arange(sample.case.tokens // 2, device=sample.problem.device)
    c = without(a, first)
    c = c.changed(inputs=a.problem.inputs[: c.problem.inputs.shape[0]])
    e = a.mapped(lambda _, x: lay_out(x, "offset"))
    f = a.mapped(lambda _, x: lay_out(x, "contiguous" if x.dtype == torch.uint8 else "transposed"))
    return dict(zip(SETS, (a, b, c, d, e, f), strict=True)) | _variants(a)


def _variants(a: Sample) -> dict[str, Sample]:
    """Calls with a's own tensors that differ in one thing, by what that is."""
    problem, weights = a.problem, a.problem.expert_weights
    names = ("sorted_expert_idxs", "sorted_scattered_idxs", "expert_offsets")
    found = {
        "other s": a.changed(scaling=-problem.scaling),
        "int32": a.changed(**{name: getattr(problem, name).int() for name in names}),
        "no adapters": a.changed(lora_A=None, lora_B=None),
        "row by row": a.changed(inputs=problem.inputs.repeat_interleave(problem.k, 0), k=1),
        "in expert order": a.changed(inputs=problem.inputs[problem.row_sources()], k=1, grouped_in=True),
    }
    if isinstance(weights, MXWeights):
        found["decoded"] = a.changed(expert_weights=decode_mxfp4(weights, problem.dtype).mT)
    if problem.gates is not None:
        dOut = a.grad_out.repeat_interleave(problem.gates.shape[1], 0)
        found["no gates"] = a.changed(dOut, expert_biases=None, gates=None)
    return found

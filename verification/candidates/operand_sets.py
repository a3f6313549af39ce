"""Sets of operands that the calls of a sequence are made on, and how they change in between."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxref.problem import Problem
from mxref.verification.cases.call import Layout, lay_out
from mxref.verification.cases.case import Sample
from mxref.verification.cases.tokens import without
from mxref.weights import MXWeights, decode_mxfp4

SETS = "abcdefg"
"""Those that occur in any order; the others are variants of a, told by what they differ in."""
CHANGED = (
    "lora_A", "lora_B", "inputs", "gates", "expert_biases", "packed", "scales", "expert_weights",
    "sorted_scattered_idxs", "routing", "experts",
)  # fmt: skip
"""What is changed in place: an optimiser's operands, streamed weights, routing that is drawn into the same memory, and
experts that change places."""
CHANGES = "in place", "in place, through .data", ".data is another tensor"
"""How: as autograd counts it, behind its back in the same memory, or in other memory, where a matrix is transposed."""
_LAYOUTS = ("x", "A", "B", "biases", "gates", "ids", "rows", "ends", "dOut")
_TURNED = ("inputs", "lora_A", "gates", "grad_out")
"""Operands whose signs b has otherwise than a."""


class _Subclass(Tensor):
    """Tensors as libraries mark theirs."""


def operand_sets(sample: Sample) -> dict[str, Sample]:
    """The sets by name, for an integer fixture of at least four tokens, its rows of x by token.

    a: the sample. b: the same shapes with other signs, another scaling and, without gates, another order of rows.
    c, g: the first and the last tokens of a alone, whose rows of x lie where those of a do. d: a with other signs.
    e, f: a whose operands begin between multiples of 16 bytes of a larger buffer, or have other strides, but for packed
    bytes. Others are a itself but for what their name says. The case of each says what is asked, as far as the domain
    has words for it.
    """
    a = sample.mapped(lambda _, x: x.clone())
    b, d = (sample.mapped(lambda name, x: -x if name in _TURNED else x.clone()) for _ in range(2))
    order = sample.problem.gates is None and not sample.problem.grouped_out
    b = _asked(b.changed(scaling=-2 * sample.problem.scaling, grouped_out=order), grouped_out=order)
    halves = torch.arange(sample.case.tokens, device=sample.problem.device).chunk(2)
    c, g = (without(a, tokens).changed(inputs=x) for tokens, x in zip(halves, a.problem.inputs.chunk(2), strict=True))
    e = a.mapped(lambda _, x: lay_out(x, "offset")).called(**dict.fromkeys(_LAYOUTS, "offset"), weights="offset")
    f = a.mapped(lambda _, x: strided(x, "sliced")).called(**dict.fromkeys(_LAYOUTS, "sliced"))
    return dict(zip(SETS, (a, b, c, d, e, f, g), strict=True)) | _variants(a)


def _variants(a: Sample) -> dict[str, Sample]:
    """Calls with a's own tensors that differ in one thing, by what that is."""
    problem, weights = a.problem, a.problem.expert_weights
    names = ("sorted_expert_idxs", "sorted_scattered_idxs", "expert_offsets")
    found = {
        "other s": a.changed(scaling=-problem.scaling),
        "int32": a.changed(**{name: getattr(problem, name).int() for name in names}).called(index=torch.int32),
        "no adapters": _asked(a.changed(lora_A=None, lora_B=None), rank=0),
        "row by row": _asked(a.changed(inputs=problem.inputs.repeat_interleave(problem.k, 0), k=1), fan_out=1),
        "one storage": _in_one_storage(a).called(storage="shared"),
        "a subclass": a.mapped(lambda _, x: x.clone().as_subclass(_Subclass)),
        "signs put off": a.mapped(lambda _, x: torch._neg_view(-x) if x.is_floating_point() else x),
        "in expert order": _asked(
            a.changed(inputs=problem.inputs[problem.row_sources()], k=1, grouped_in=True), grouped_in=True
        ),
        "another dtype": _in_another_dtype(a),
        "no rows": _asked(
            a.changed(
                sorted_expert_idxs=torch.full_like(problem.sorted_expert_idxs, problem.E),
                expert_offsets=torch.zeros_like(problem.expert_offsets),
            ),
            routing="all_sentinels",
        ),
    }
    if a.case.call.needs is None:
        alone = a.called(needs=("dX",))
        found["dX alone"] = alone.mapped(lambda _, x: x.detach() if x.is_floating_point() else x)
    if problem.lora_A is not None and problem.lora_B is not None and problem.rank > 1:
        A, B = problem.lora_A.reshape(problem.E, problem.rank, -1), problem.lora_B.reshape(-1, problem.E, problem.rank)
        other_rank = a.changed(lora_A=A[:, :-1].flatten(0, 1), lora_B=B[..., :-1].flatten(1))
        found["another rank"] = _asked(other_rank, rank=problem.rank - 1)
    if isinstance(weights, MXWeights):
        decoded = decode_mxfp4(weights, problem.dtype).mT
        dense = _asked(a, dense=True).called(weights="sliced")
        found["decoded"] = dense.changed(expert_weights=strided(decoded, "sliced"))
        found["decoded, signs put off"] = dense.changed(expert_weights=torch._neg_view(strided(-decoded, "sliced")))
    if problem.gates is not None:
        dOut = a.grad_out.repeat_interleave(problem.gates.shape[1], 0)
        found["no gates"] = _asked(a.changed(dOut, expert_biases=None, gates=None), gate_slots=0, bias=False)
    other = found.get("no gates", a)
    order = not other.problem.grouped_out
    found["other order of Y"] = _asked(other.changed(grouped_out=order), grouped_out=order)
    found["other flags"] = _asked(other, use_fused_dX=True, use_fused_gather=True)
    return found


def _asked(sample: Sample, **fields: Any) -> Sample:
    """The sample with a case that says so."""
    return replace(sample, case=replace(sample.case, **fields))


def _in_another_dtype(a: Sample) -> Sample:
    """In bf16, or in fp32 with an x that 16 bits do not hold, though sums stay exact; packed weights are the same."""
    dtype = torch.bfloat16 if a.problem.dtype == torch.float32 else torch.float32
    other = a.mapped(lambda _, x: x.detach().to(dtype) if x.is_floating_point() else x)
    other = _asked(other, dtype=dtype, parameter_dtype=None, adapter_dtype=None, own_dtypes=())
    return other if dtype == torch.bfloat16 else other.changed(inputs=other.problem.inputs * (1 + 2.0**-12))


def strided(x: Tensor, layout: Layout) -> Tensor:
    """A copy that lies in memory as a layout says; bytes, which are packed, as they are."""
    return lay_out(x, "contiguous" if x.dtype == torch.uint8 else layout)


def _in_one_storage(sample: Sample) -> Sample:
    """The sample's tensors one behind the other, each from a multiple of 16 bytes on."""
    tensors: dict[str, Tensor] = {}
    sample.mapped(tensors.setdefault)
    sizes = [-(-x.nbytes // 16) * 16 for x in tensors.values()]
    places = iter(torch.split(sample.grad_out.new_empty(sum(sizes), dtype=torch.uint8), sizes))
    return sample.mapped(lambda _, x: next(places)[: x.nbytes].view(x.dtype).view(x.shape).copy_(x))


def changed(problem: Problem, operand: str, again: bool) -> list[tuple[Tensor, Tensor]]:
    """Tensors of a problem, and what they hold after a change; `again`: one that takes an earlier one back."""
    weights = problem.expert_weights
    if operand == "routing":  # the experts change places
        live, E = problem.sorted_expert_idxs < problem.E, problem.E
        experts = torch.where(live, E - 1 - problem.sorted_expert_idxs, problem.sorted_expert_idxs).sort().values
        counts = torch.diff(problem.expert_offsets, prepend=problem.expert_offsets.new_zeros(1)).flip(0)
        return [(problem.sorted_expert_idxs, experts), (problem.expert_offsets, counts.cumsum(0))]
    if operand == "experts":
        stacks = (weights.packed, weights.scales) if isinstance(weights, MXWeights) else (weights,)
        return [(stack, stack.flip(0)) for stack in stacks]
    if operand == "sorted_scattered_idxs":
        return [(problem.sorted_scattered_idxs, problem.sorted_scattered_idxs.flip(0))]
    if operand == "packed" and isinstance(weights, MXWeights):
        codes, part = weights.packed.clone(), slice(-1) if again else slice(-1, None)  # the last expert's alone first
        codes[part] ^= 0x88  # the sign bits of both codes
        return [(weights.packed, codes)]
    if operand == "scales" and isinstance(weights, MXWeights):
        scales = weights.scales.clone()
        scales[-1] += 1 - 2 * again  # the last expert's weights are doubled, and halved again
        return [(weights.scales, scales)]
    x = getattr(problem, operand, None)
    if not isinstance(x, Tensor):
        return []
    new, part = x.detach().clone(), slice(-1) if again else slice(-1, None)  # the last row's alone first
    new[part] *= -1
    return [(x, new)]

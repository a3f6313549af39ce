"""Sets of operands that the calls of a sequence are made on, and how they change in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxref.formats import E8M0_BIAS
from mxref.problem import Problem
from mxref.verification.cases.call import Layout, lay_out
from mxref.verification.cases.case import Sample
from mxref.verification.cases.domain import SUBSETS
from mxref.verification.cases.tokens import without
from mxref.weights import MXWeights, decode_mxfp4

SETS = "abcdefg"
"""Those that occur in any order; the others are variants of a, told by what they differ in."""
CHANGED = (
    "lora_A", "lora_B", "inputs", "gates", "expert_biases", "packed", "scales", "expert_weights",
    "sorted_scattered_idxs", "routing", "one expert", "experts",
)  # fmt: skip
"""What is changed in place: an optimiser's operands, streamed weights, routing that is drawn into the same memory, once
all to one expert, and experts that change places."""
CHANGES = "in place", "in place, through .data", ".data is another tensor"
"""How: as autograd counts it, behind its back in the same memory, or in other memory, where a matrix is transposed."""
_LAYOUTS = ("x", "A", "B", "biases", "gates", "ids", "rows", "ends", "dOut")
_TURNED = ("inputs", "lora_A", "gates", "grad_out")
"""Operands whose signs b has otherwise than a."""
_COLUMNS = {"packed": 1, "scales": 1, "expert_weights": 2, "lora_B": 0, "expert_biases": 1, "grad_out": 1}
"""The dimension that is N, of operands that have it."""
_NEEDED = ("dX alone", "dA alone", "dB alone", "all but dX")
"""Gradients that variants need, as the domain names them."""


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
    a = _owned(sample)
    b, d = (_owned(sample.mapped(lambda name, x: -x if name in _TURNED else x)) for _ in range(2))
    order = sample.problem.gates is None and not sample.problem.grouped_out
    b = _asked(b.changed(scaling=-2 * sample.problem.scaling, grouped_out=order), grouped_out=order)
    halves = torch.arange(sample.case.tokens, device=sample.problem.device).chunk(2)
    c, g = (without(a, tokens).changed(inputs=x) for tokens, x in zip(halves, a.problem.inputs.chunk(2), strict=True))
    e = a.mapped(lambda _, x: lay_out(x, "offset")).called(**dict.fromkeys(_LAYOUTS, "offset"), weights="offset")
    f = a.mapped(lambda _, x: strided(x, "sliced")).called(**dict.fromkeys(_LAYOUTS, "sliced"))
    return dict(zip(SETS, (a, b, c, d, e, f, g), strict=True)) | _variants(a)


def _owned(sample: Sample) -> Sample:
    """A copy as the case's call has it; its parameters hold a gradient already."""
    call = sample.case.call

    def owned(name: str, x: Tensor) -> Tensor:
        x = call.lay_out(name, x)
        if call.owner == "parameter" and name in ("lora_A", "lora_B", "expert_biases"):
            x = torch.nn.Parameter(x, requires_grad=False)
            x.grad = torch.ones_like(x)
        return x

    return sample.mapped(owned)


def _variants(a: Sample) -> dict[str, Sample]:
    """Calls with a's own tensors that differ in one thing, by what that is.

    Where all signs are put off, those that are read wrongly may cancel each other; where x's is, they cannot.
    """
    problem, weights = a.problem, a.problem.expert_weights
    names = ("sorted_expert_idxs", "sorted_scattered_idxs", "expert_offsets")
    found = {
        "other s": a.changed(scaling=-problem.scaling),
        "int32": a.changed(**{name: getattr(problem, name).int() for name in names}).called(index=torch.int32),
        "no adapters": _asked(a.changed(lora_A=None, lora_B=None), rank=0),
        "row by row": _asked(a.changed(inputs=problem.inputs.repeat_interleave(problem.k, 0), k=1), fan_out=1),
        "one storage": _in_one_storage(a).called(storage="shared"),
        "a subclass": a.mapped(lambda _, x: x.clone().as_subclass(_Subclass)),
        "x a subclass": a.changed(inputs=problem.inputs.clone().as_subclass(_Subclass)),
        "weights a module's": a.mapped(_as_parameter),
        "signs put off": a.mapped(lambda _, x: torch._neg_view(-x) if x.is_floating_point() else x),
        "sign of x put off": a.changed(inputs=torch._neg_view(-problem.inputs)),
        "in expert order": _asked(
            a.changed(inputs=problem.inputs[problem.row_sources()], k=1, grouped_in=True), grouped_in=True
        ),
        "another dtype": _in_another_dtype(a),
        "fewer columns": _of_columns(a, problem.N // 2),
        "no rows": _asked(
            a.changed(
                sorted_expert_idxs=torch.full_like(problem.sorted_expert_idxs, problem.E),
                expert_offsets=torch.zeros_like(problem.expert_offsets),
            ),
            routing="all_sentinels",
        ),
    }
    if a.case.call.needs is None:
        for name in _NEEDED:
            found[name] = a.called(needs=SUBSETS[name]).mapped(lambda _, x: x.detach() if x.is_floating_point() else x)
    if problem.lora_A is not None and problem.lora_B is not None and problem.rank > 1:
        A, B = problem.lora_A.reshape(problem.E, problem.rank, -1), problem.lora_B.reshape(-1, problem.E, problem.rank)
        other_rank = a.changed(lora_A=A[:, :-1].flatten(0, 1), lora_B=B[..., :-1].flatten(1))
        found["another rank"] = _asked(other_rank, rank=problem.rank - 1)
    if problem.E > 1:
        found["fewer experts"] = _of_experts(a, problem.E - 1)
    if isinstance(weights, MXWeights):
        decoded = decode_mxfp4(weights, problem.dtype).mT
        dense = _asked(a, dense=True).called(weights="sliced")
        found["decoded"] = dense.changed(expert_weights=strided(decoded, "sliced"))
        found["decoded, signs put off"] = dense.changed(expert_weights=torch._neg_view(strided(-decoded, "sliced")))
    if problem.gates is not None and problem.expert_biases is not None:
        found["no biases"] = _asked(a.changed(expert_biases=None), bias=False)
    for name in ("lora_A", "lora_B", "gates"):
        if getattr(problem, name) is not None:
            found[f"{name} in another dtype"] = _with_parameter_in_another_dtype(a, name)
    if problem.gates is not None:
        g = problem.gates.shape[1]
        other_g = 1 if g > 1 else problem.k
        dOut = a.grad_out.repeat_interleave(g, 0)  # of each row that the gates sum
        found["other gates a token"] = _asked(
            a.changed(dOut[::other_g].contiguous(), gates=problem.gates.reshape(-1, other_g)), gate_slots=other_g
        )
        found["no gates"] = _asked(a.changed(dOut, expert_biases=None, gates=None), gate_slots=0, bias=False)
    other = found.get("no gates", a)
    order = not other.problem.grouped_out
    found["other order of Y"] = _asked(other.changed(grouped_out=order), grouped_out=order)
    found["other flags"] = _asked(other, use_fused_dX=True, use_fused_gather=True)
    return found


def _asked(sample: Sample, **fields: Any) -> Sample:
    """The sample with a case that says so."""
    return replace(sample, case=replace(sample.case, **fields))


def _of_columns(a: Sample, N: int) -> Sample:
    """The first columns of Y alone, in copies."""
    ends = {name: (dimension, N) for name, dimension in _COLUMNS.items()}
    return _asked(_narrowed(a, ends, lambda x: strided(x, "contiguous"), N=N), N=N)


def _of_experts(a: Sample, count: int) -> Sample:
    """The first experts alone: the others' rows are sentinels."""
    ranks, stacks = count * a.problem.rank, ("packed", "scales", "expert_weights", "expert_biases", "expert_offsets")
    ends = dict.fromkeys(stacks, (0, count)) | {"lora_A": (0, ranks), "lora_B": (1, ranks)}
    return _asked(_narrowed(a, ends, lambda x: x, num_experts=count), experts=count, routing="sentinels")


def _narrowed(
    a: Sample, ends: Mapping[str, tuple[int, int]], place: Callable[[Tensor], Tensor], **sizes: Any
) -> Sample:
    """The first elements of operands alone: by name the dimension, and how many; `sizes`: of packed weights then."""
    parts: dict[str, Any] = {}

    def first(name: str, x: Tensor) -> Tensor:
        if name in ends:
            dimension, length = ends[name]
            parts[name] = place(x.narrow(dimension, 0, length))
        return x

    weights = a.mapped(first).problem.expert_weights
    if isinstance(weights, MXWeights):
        parts["expert_weights"] = replace(weights, packed=parts.pop("packed"), scales=parts.pop("scales"), **sizes)
    return a.changed(parts.pop("grad_out", None), **parts)


def _with_parameter_in_another_dtype(a: Sample, name: str) -> Sample:
    """A parameter in fp32, or in bf16 where it has fp32: small integers fit both."""
    other = torch.bfloat16 if a.case.dtypes[name] == torch.float32 else torch.float32
    changed = a.changed(**{name: getattr(a.problem, name).detach().to(other)})
    own = tuple((a.case.dtypes | {name: other}).values())
    return _asked(changed, parameter_dtype=None, adapter_dtype=None, own_dtypes=own)


def _as_parameter(name: str, x: Tensor) -> Tensor:
    """Weights as the frozen parameters of a module."""
    frozen = name in ("packed", "scales", "expert_weights")
    return torch.nn.Parameter(x.detach(), requires_grad=False) if frozen else x


def _in_another_dtype(a: Sample) -> Sample:
    """In bf16, or in fp32 with an x that 16 bits do not hold, though sums stay exact; packed weights are the same."""
    dtype = torch.bfloat16 if a.problem.dtype == torch.float32 else torch.float32
    other = a.mapped(lambda _, x: x.detach().to(dtype) if x.is_floating_point() else x)
    other = _asked(other, dtype=dtype, parameter_dtype=None, adapter_dtype=None, own_dtypes=())
    return other if dtype == torch.bfloat16 else other.changed(inputs=other.problem.inputs * (1 + 2.0**-12))


def signs_alone(sample: Sample) -> Sample:
    """Numbers that are 0 or ±1, a little more in x, and scales of 1: sums over results stay exact, and Y is rounded."""

    def plain(name: str, x: Tensor) -> Tensor:
        if name == "scales":
            return torch.full_like(x, E8M0_BIAS)
        sign = x.detach().sign() if x.is_floating_point() else x
        return sign * (1 + 2.0**-7) if name == "inputs" else sign

    return sample.mapped(plain)


def strided(x: Tensor, layout: Layout) -> Tensor:
    """A copy that lies in memory as a layout says; bytes, which are packed, as they are."""
    return lay_out(x.detach(), "contiguous" if x.dtype == torch.uint8 else layout)


def _in_one_storage(sample: Sample) -> Sample:
    """The sample's tensors one behind the other, each from a multiple of 16 bytes on, and with a version of its own."""
    tensors: dict[str, Tensor] = {}
    sample.mapped(tensors.setdefault)
    sizes = [-(-x.nbytes // 16) * 16 for x in tensors.values()]
    places = iter(torch.split(sample.grad_out.new_empty(sum(sizes), dtype=torch.uint8), sizes))
    return sample.mapped(lambda _, x: next(places)[: x.nbytes].view(x.dtype).view(x.shape).copy_(x).data)


def changed(problem: Problem, operand: str, times: int) -> list[tuple[Tensor, Tensor]]:
    """Tensors of a problem, and what they hold after a change; `times`: how often that operand was changed before.

    The last row, or expert, changes alone first, then one element in the middle, then all but the last.
    """
    weights, live = problem.expert_weights, problem.sorted_expert_idxs < problem.E
    if operand in ("routing", "one expert"):  # the experts change places, or one of them gets all rows
        last, ids, ends = problem.E - 1, problem.sorted_expert_idxs, problem.expert_offsets
        experts = last - ids if operand == "routing" else torch.full_like(ids, times % 2 * last)
        experts = torch.where(live, experts, ids).sort().values
        return [(ids, experts), (ends, torch.searchsorted(experts, torch.arange(len(ends)).to(ids), right=True))]
    if operand == "experts":
        stacks = (weights.packed, weights.scales) if isinstance(weights, MXWeights) else (weights,)
        return [(stack, stack.flip(0)) for stack in stacks]
    if operand == "sorted_scattered_idxs":
        order = problem.sorted_scattered_idxs
        return [(order, torch.cat([order[:1], order[1:-1].flip(0), order[-1:]]) if times % 2 else order.flip(0))]
    if operand == "scales" and isinstance(weights, MXWeights):
        scales = weights.scales.clone()
        scales[(-1, len(scales) // 2)[times // 2 % 2]] += 1 - 2 * (times % 2)  # one expert's are doubled, and halved
        return [(weights.scales, scales)]
    x = getattr(weights if operand == "packed" else problem, operand, None)
    if not isinstance(x, Tensor):
        return []
    new = x.detach().clone()
    places = (new & 0x77 if operand == "packed" else new).nonzero()  # codes but for their sign bits
    part = (slice(-1, None), tuple(places[len(places) // 2]) if len(places) else (), slice(-1))[times % 3]
    new[part] = new[part] ^ 0x88 if operand == "packed" else -new[part]
    return [(x, new)]

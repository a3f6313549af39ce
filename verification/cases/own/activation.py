"""What lies between the projections, asked on its own: forms, sizes with tails, and what is special about numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mxref.activation import columns
from mxref.swiglu import GPT_OSS, SILU, SwiGLU
from mxref.verification.cases.call import Layout, lay_out
from mxref.verification.cases.scope import Scope

__all__ = ["ActivationCase", "ActivationSample", "activation_cases"]


@dataclass(frozen=True)
class ActivationCase:
    """One call of the activation and its gradient.

    Attributes:
        name: in words.
        rows: P.
        width: I; gate_up is [P, 2I].
        form: which activation.
        dtype: of gate_up and of dH.
        data: "drawn", over many powers of two, with gates and ups at both bounds of a clamp and beside them; or
            "special", every pair of zeros, bounds and their neighbours, small and large numbers, infinities and NaN, in
            rows of 16.
        layout: of gate_up and dH in memory.
    """

    name: str
    rows: int
    width: int
    form: SwiGLU
    dtype: torch.dtype
    data: Literal["drawn", "special"] = "drawn"
    layout: Layout = "contiguous"

    def sample(self, device: torch.device, seed: int) -> ActivationSample:
        """The operands, drawn on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        if self.data == "special":
            gate_up, grad = _special(self.form, self.dtype)
        else:
            gate_up, grad = _drawn(self, generator)
        gate_up, grad = (lay_out(x.to(self.dtype).to(device), self.layout) for x in (gate_up, grad))
        return ActivationSample(self, gate_up, grad)


@dataclass(frozen=True)
class ActivationSample:
    """gate_up [P, 2I] and dH [P, I] on a device."""

    case: ActivationCase
    gate_up: Tensor
    grad: Tensor


def activation_cases(scope: Scope) -> list[ActivationCase]:
    """Every form in every dtype that is judged here; on a GPU in the full suite gpt-oss' own size too."""
    cases = []
    for dtype in scope.dtypes:
        tag = "" if len(scope.dtypes) == 1 else f", {str(dtype).removeprefix('torch.')}"
        gpt_oss = ActivationCase(f"gpt-oss{tag}", 19, 130, GPT_OSS, dtype)
        silu = replace(gpt_oss, name=f"SiLU{tag}", form=SILU)
        limited = replace(gpt_oss, name=f"limited{tag}", form=SwiGLU(limit=10.0), rows=1, width=257)
        halves = replace(silu, name=f"halves, offset{tag}", form=replace(GPT_OSS, interleaved=False))
        cases += [gpt_oss, silu, limited, halves]
        cases += [replace(case, name=f"special, {case.name}", data="special") for case in (gpt_oss, silu, limited)]
        if dtype == scope.dtypes[0]:
            cases += [
                replace(gpt_oss, name="sliced", layout="sliced"),
                replace(silu, name="transposed", layout="transposed"),
                replace(gpt_oss, name="no rows", rows=0),
                replace(gpt_oss, name="one element", rows=1, width=1),
                replace(gpt_oss, name="wide indices", rows=140, width=96),
                replace(silu, name="wide indices, halves", rows=140, width=96),
            ]
        if scope.suite == "full" and scope.device_type == "cuda":
            cases.append(replace(gpt_oss, name=f"gpt-oss-20b{tag}", rows=16_384, width=2880))
    return cases


def _drawn(case: ActivationCase, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    shape = case.rows, case.width
    normal = torch.randn(case.rows, 2 * case.width, generator=generator)
    spread = torch.exp2(torch.randint(-8, 4, normal.shape, generator=generator))
    gate_up = (normal * spread).to(case.dtype)
    if case.form.limit is not None:
        near = _neighbours(case.form.limit, case.dtype)
        chosen = near[torch.randint(len(near), normal.shape, generator=generator)]
        gate_up = torch.where(torch.rand(normal.shape, generator=generator) < 0.1, chosen, gate_up)
    return gate_up, torch.randn(shape, generator=generator)


def _neighbours(limit: float, dtype: torch.dtype) -> Tensor:
    """The bound with either sign, and the next numbers of `dtype` inside and outside."""
    bound = torch.tensor([limit, -limit], dtype=dtype)
    return torch.cat([bound, torch.nextafter(bound, 2 * bound), torch.nextafter(bound, 0 * bound)])


def _special(form: SwiGLU, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    tiny, huge = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max / 4
    ordinary = [0.0, -0.0, 0.75, -0.75, -1.28, 20.0, -20.0, 80.0, -80.0, tiny, -tiny, tiny / 4, huge, -huge]
    beyond = [float("inf"), -float("inf"), float("nan")]
    values = torch.cat([torch.tensor(ordinary + beyond, dtype=dtype), _neighbours(form.limit or 7.0, dtype)])
    pairs = torch.cartesian_prod(values, values)
    pairs = torch.cat([pairs, pairs[: -len(pairs) % 16]]).view(-1, 16, 2)
    grad = torch.tensor([1.5, -0.75, 0.0, 2.0**-10], dtype=dtype).repeat(pairs.shape[0], 4)
    return columns(pairs[..., 0], pairs[..., 1], form), grad

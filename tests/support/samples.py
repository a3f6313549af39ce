"""Calls drawn from small integers, so that fp32 is exact in any order, and what is right for them in plain fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxref import MXWeights, Problem, decode_mxfp4, flatten_sort_count
from mxref.formats import pack_codes


@dataclass(frozen=True)
class Spec:
    """One call to draw; `routing`: "uniform", "sentinels", "empty" (expert 0 idles), "one" (expert 1 has all)."""

    E: int = 3
    K: int = 96
    N: int = 160
    M: int = 20
    k: int = 2
    rank: int | None = 3
    routing: str = "uniform"
    bias: bool = False
    gates: bool = False
    grouped_in: bool = False
    grouped_out: bool = False


@dataclass(frozen=True)
class Sample:
    """A problem with its output's gradient; leaves require a gradient."""

    problem: Problem
    grad_out: Tensor

    def leaves(self) -> dict[str, Tensor]:
        names = ("inputs", "lora_A", "lora_B", "expert_biases", "gates")
        return {name: x for name in names if (x := getattr(self.problem, name)) is not None}

    def run(self, layer: Callable[..., Tensor], **options: Any) -> dict[str, Tensor]:
        """Output and gradients by name."""
        y = layer(**{**self.problem.arguments(), **options})
        gradients = torch.autograd.grad(y, list(self.leaves().values()), self.grad_out.to(y.dtype))
        return {"y": y.detach(), **dict(zip(self.leaves(), gradients, strict=True))}


def route(spec: Spec, generator: torch.Generator) -> Tensor:
    """Expert ids [M, k]."""
    shape = (spec.M, spec.k)
    if spec.routing == "one":
        return torch.ones(shape, dtype=torch.int64)
    low, high = {"uniform": (0, spec.E), "sentinels": (-1, spec.E + 1), "empty": (1, spec.E)}[spec.routing]
    return torch.randint(low, high, shape, generator=generator)


def draw(spec: Spec, device: torch.device, seed: int = 0) -> Sample:
    """Small integers and weights in quarters: sums stay below 2^24 quarters, so fp32 is exact in any order."""
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape: int, low: int = -1, high: int = 2, leaf: bool = True) -> Tensor:
        x = torch.randint(low, high, shape, generator=generator).float()
        return x.to(device).requires_grad_(leaf)

    E, K, N, P = spec.E, spec.K, spec.N, spec.M * spec.k
    codes = torch.randint(0, 16, (E, N, K), generator=generator, dtype=torch.uint8)
    scales = torch.randint(126, 129, (E, N, K // 32), generator=generator, dtype=torch.uint8)
    weights = MXWeights(pack_codes(codes), scales, K, N).to(device)
    problem = Problem(
        integers(P if spec.grouped_in else spec.M, K),
        weights,
        1 if spec.grouped_in else spec.k,
        *flatten_sort_count(route(spec, generator).to(device), E),
        lora_A=integers(E * spec.rank, K) if spec.rank else None,
        lora_B=integers(N, E * spec.rank) if spec.rank else None,
        scaling=0.5,
        expert_biases=integers(E, N, low=-4, high=5) if spec.bias else None,
        gates=integers(spec.M, spec.k, low=1, high=3) if spec.gates else None,
        grouped_in=spec.grouped_in,
        grouped_out=spec.grouped_out,
    )
    return Sample(problem, integers(spec.M if spec.gates else P, N, leaf=False))


def plain(problem: Problem) -> Tensor:
    """The layer as differentiable fp64 operations on whole tensors; sentinels' slots are left out."""
    p, E = problem, problem.E
    owned = p.sorted_expert_idxs < E
    e, position = p.sorted_expert_idxs[owned].long(), p.sorted_scattered_idxs[owned].long()
    W = p.expert_weights
    dense = (decode_mxfp4(W, torch.float64).mT if isinstance(W, MXWeights) else W.double())[e]
    row = torch.arange(p.P, device=p.device)[owned]
    x = p.inputs.double()[row if p.grouped_in else position // p.k]
    y = torch.einsum("pk,pkn->pn", x, dense)
    if p.lora_A is not None and p.lora_B is not None:
        z = torch.einsum("pk,prk->pr", x, p.lora_A.double().unflatten(0, (E, -1))[e])
        y = y + p.scaling * torch.einsum("pr,npr->pn", z, p.lora_B.double().unflatten(1, (E, -1))[:, e])
    if p.expert_biases is not None:
        y = y + p.expert_biases.double()[e]
    if p.gates is not None:
        gated = p.gates.double().flatten()[position, None] * y
        return gated.new_zeros(p.gates.shape[0], p.N).index_add(0, position // p.gates.shape[1], gated)
    return y.new_zeros(p.P, p.N).index_put((row if p.grouped_out else position,), y)


def reference(sample: Sample) -> dict[str, Tensor]:
    return sample.run(lambda **arguments: plain(Problem(**arguments)))

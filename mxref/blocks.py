"""Whole MoE blocks as references: a router, two expert projections with LoRA, and what lies between them.

Both families share one shape. A router picks k experts and k gates for each token; the gate-up projection leaves its
rows in expert order, the activation works on them there, and the down projection applies the gates and sums the slots
of each token:

    experts, gates = router(x)
    out = down(activation(gate_up(x, experts)), experts, gates)  [+ shared expert(x)]

The activation is `mxref.activation`'s; the router and the shared expert's products are plain PyTorch in the dtype of x.
So fp64 operands give the exact mathematics, and bf16 operands the contract's rounding points in the projections and
between them; gradients reach x, the adapters, the biases and, through the gates, the router. Expert weights are frozen.

Sources: gpt-oss (openai/gpt-oss, transformers' `modeling_gpt_oss.py`), DeepSeek-V3 (arXiv 2412.19437, section 2.1.2)
and DeepSeek-V4 (transformers' `modeling_deepseek_v4.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mxref.activation import gated
from mxref.autograd import parallel_linear_lora
from mxref.routing import flatten_sort_count
from mxref.swiglu import SwiGLU
from mxref.weights import MXWeights

Linear = Callable[..., Tensor]
"""`parallel_linear_lora`, golden or production."""

SCORE_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
}
"""DeepSeek-V3 scores experts with a sigmoid, released DeepSeek-V4 configurations with sqrt(softplus)."""


@dataclass(frozen=True, eq=False)
class ExpertLinear:
    """One projection of all experts: frozen base weights and, optionally, an adapter and a bias.

    Attributes:
        weight: `MXWeights`, or dense [E, K, N] in the activation dtype.
        lora_A: [E·r, K]; given with `lora_B` or not at all.
        lora_B: [N, E·r].
        scaling: factor of the adapter's product.
        bias: [E, N].
    """

    weight: MXWeights | Tensor
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0
    bias: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.weight.E if isinstance(self.weight, MXWeights) else self.weight.shape[0]

    def operands(self) -> dict[str, Any]:
        """This projection's share of the arguments of `parallel_linear_lora`."""
        return {
            "expert_weights": self.weight,
            "lora_A": self.lora_A,
            "lora_B": self.lora_B,
            "scaling": self.scaling,
            "expert_biases": self.bias,
        }


def routed_experts(
    x: Tensor,
    experts: Tensor,
    gates: Tensor,
    gate_up: ExpertLinear,
    down: ExpertLinear,
    activation: Callable[[Tensor], Tensor],
    linear: Linear = parallel_linear_lora,
) -> Tensor:
    """Σ over each token's slots of gate · down(activation(gate_up(x))).

    Args:
        x: [M, H].
        experts: integer [M, k]; ids outside 0..E−1 contribute nothing.
        gates: [M, k].
        gate_up: H -> 2I.
        down: I -> H.
        activation: [P, 2I] -> [P, I], row by row.
        linear: the implementation of both projections.

    Returns:
        [M, H] in the dtype of x.
    """
    order = flatten_sort_count(experts, gate_up.num_experts)
    indices = dict(zip(("sorted_expert_idxs", "sorted_scattered_idxs", "expert_offsets"), order, strict=True))
    hidden = linear(x, k=experts.shape[1], grouped_out=True, **gate_up.operands(), **indices)
    return linear(activation(hidden), k=1, grouped_in=True, gates=gates, **down.operands(), **indices)


def gpt_oss_router(x: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits, softmax among them alone: x [M, H], weight [E, H], bias [E] -> experts, gates [M, k]."""
    top = torch.topk(F.linear(x, weight, bias), top_k, dim=-1)
    return top.indices, torch.softmax(top.values, dim=-1)


def gpt_oss_activation(gate_up: Tensor, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """(up + 1) · gate · σ(α·gate), gate ≤ limit and |up| ≤ limit; columns alternate gate, up: [.., 2I] -> [.., I]."""
    return gated(gate_up, SwiGLU(interleaved=True, alpha=alpha, limit=limit, offset=1.0))


@dataclass(frozen=True, eq=False)
class GptOssBlock:
    """The MoE block of gpt-oss.

    Attributes:
        router_weight: [E, H].
        router_bias: [E].
        gate_up: H -> 2I, gate and up columns interleaved, with biases.
        down: I -> H, with biases.
        top_k: experts a token.
        alpha: slope inside the sigmoid.
        limit: clamp of gate and up.
    """

    router_weight: Tensor
    router_bias: Tensor
    gate_up: ExpertLinear
    down: ExpertLinear
    top_k: int
    alpha: float = 1.702
    limit: float = 7.0

    def __call__(self, x: Tensor, linear: Linear = parallel_linear_lora) -> Tensor:
        """[M, H] -> [M, H]."""
        experts, gates = gpt_oss_router(x, self.router_weight, self.router_bias, self.top_k)

        def activation(hidden: Tensor) -> Tensor:
            return gpt_oss_activation(hidden, self.alpha, self.limit)

        return routed_experts(x, experts, gates, self.gate_up, self.down, activation, linear)


def deepseek_router(
    x: Tensor,
    weight: Tensor,
    correction_bias: Tensor,
    top_k: int,
    routed_scaling: float = 1.0,
    score: str = "sigmoid",
) -> tuple[Tensor, Tensor]:
    """Independent scores; a bias that balances the load chooses the experts and leaves their gates alone.

    Args:
        x: [M, H].
        weight: [E, H].
        correction_bias: [E], added to the scores for the choice only; it takes no gradient.
        top_k: experts a token.
        routed_scaling: factor of the normalised gates.
        score: a name in `SCORE_FUNCTIONS`.

    Returns:
        experts and gates, both [M, k]; a token's gates sum to `routed_scaling`. The choice is over all experts:
        group-limited routing (`n_group` > 1 in DeepSeek-V3) is not part of this block.

    Raises:
        ValueError: `score` is unknown.
    """
    if score not in SCORE_FUNCTIONS:
        raise ValueError(f"score is {score!r}; expected one of {', '.join(SCORE_FUNCTIONS)}")
    scores = SCORE_FUNCTIONS[score](F.linear(x, weight))
    experts = torch.topk(scores.detach() + correction_bias.detach(), top_k, dim=-1).indices
    chosen = scores.gather(-1, experts)
    return experts, routed_scaling * chosen / (chosen.sum(dim=-1, keepdim=True) + 1e-20)


def swiglu(gate_up: Tensor, limit: float | None = None) -> Tensor:
    """silu(gate) · up, gate in the first half of the columns: [.., 2I] -> [.., I].

    `limit` (10 in DeepSeek-V4, none in V3) clamps gate from above and up on both sides, before the product.
    """
    return gated(gate_up, SwiGLU(limit=limit))


@dataclass(frozen=True, eq=False)
class SharedExpert:
    """The dense SwiGLU expert that every token passes: `gate_up` [2I, H], gate rows first, and `down` [H, I]."""

    gate_up: Tensor
    down: Tensor

    def __call__(self, x: Tensor, limit: float | None = None) -> Tensor:
        """[M, H] -> [M, H]."""
        return F.linear(swiglu(F.linear(x, self.gate_up), limit), self.down)


@dataclass(frozen=True, eq=False)
class DeepSeekBlock:
    """The MoE block of DeepSeek-V3 and V4: scored routing with a correction bias, and a shared expert.

    Attributes:
        router_weight: [E, H].
        correction_bias: [E].
        gate_up: H -> 2I, gate columns first.
        down: I -> H.
        shared: the shared expert.
        top_k: experts a token.
        routed_scaling: factor of the normalised gates.
        score: a name in `SCORE_FUNCTIONS`.
        limit: clamp in every SwiGLU, None for none.
    """

    router_weight: Tensor
    correction_bias: Tensor
    gate_up: ExpertLinear
    down: ExpertLinear
    shared: SharedExpert
    top_k: int
    routed_scaling: float = 1.0
    score: str = "sigmoid"
    limit: float | None = None

    def __call__(self, x: Tensor, linear: Linear = parallel_linear_lora) -> Tensor:
        """[M, H] -> [M, H]."""
        experts, gates = deepseek_router(
            x, self.router_weight, self.correction_bias, self.top_k, self.routed_scaling, self.score
        )

        def activation(hidden: Tensor) -> Tensor:
            return swiglu(hidden, self.limit)

        routed = routed_experts(x, experts, gates, self.gate_up, self.down, activation, linear)
        return routed + self.shared(x, self.limit)

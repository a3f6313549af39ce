"""What lies between an expert's two projections, as data: the gated activations of the MoE families.

    H = (u + offset) · g·σ(alpha·g)        g = min(gate, limit), u = min(max(up, −limit), limit)

SiLU(gate) · up is alpha 1, offset 0 and no limit. Sources: gpt-oss (openai/gpt-oss), DeepSeek-V4, MiniMax-M3 and
others, as transformers has them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["GPT_OSS", "SILU", "SwiGLU"]


@dataclass(frozen=True)
class SwiGLU:
    """One gated activation, from gate_up [.., 2I] to H [.., I].

    Attributes:
        interleaved: columns of gate_up alternate gate, up; otherwise gate is the first half and up the second.
        alpha: slope inside the sigmoid.
        limit: clamp of gate from above and of up on both sides; None for none.
        offset: what is added to up.

    Raises:
        ValueError: a number is not finite, or `limit` is not positive.
    """

    interleaved: bool = False
    alpha: float = 1.0
    limit: float | None = None
    offset: float = 0.0

    def __post_init__(self) -> None:
        for name in ("alpha", "offset"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; expected a finite number")
        if self.limit is not None and not 0 < self.limit < math.inf:
            raise ValueError(f"limit is {self.limit}; expected a positive number, or None for no clamp")

    def for_dtype(self, dtype: torch.dtype) -> SwiGLU:
        """With numbers as arithmetic on operands of `dtype` holds them: in fp32, but for fp64."""
        if dtype == torch.float64:
            return self
        limit = None if self.limit is None else _fp32(self.limit)
        return replace(self, alpha=_fp32(self.alpha), limit=limit, offset=_fp32(self.offset))

    def check(self, gate_up: Tensor) -> None:
        """Whether this activation can take `gate_up`.

        Raises:
            TypeError: it is no floating-point tensor.
            ValueError: it has no columns, or an odd number of them.
        """
        if not isinstance(gate_up, Tensor) or not gate_up.is_floating_point():
            found = gate_up.dtype if isinstance(gate_up, Tensor) else type(gate_up).__name__
            raise TypeError(f"gate_up is {found}; expected a floating-point tensor")
        if gate_up.ndim == 0 or gate_up.shape[-1] % 2:
            raise ValueError(f"gate_up has shape {tuple(gate_up.shape)}; expected [.., 2I], a gate and an up each")


def _fp32(number: float) -> float:
    return float(torch.tensor(number, dtype=torch.float32, device="cpu"))


GPT_OSS = SwiGLU(interleaved=True, alpha=1.702, limit=7.0, offset=1.0)
"""(up + 1) · gate · σ(1.702·gate), clamped at 7, columns interleaved."""

SILU = SwiGLU()
"""SiLU(gate) · up, gate in the first half of the columns."""

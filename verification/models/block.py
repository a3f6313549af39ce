"""One MoE block of a model, from its router to the sum over slots, beside the limit of its products.

It runs as in training: forward, and backward with the forward computed again, LoRA on both projections.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mxref.kernels.models.experts import PackedExperts
from mxref.kernels.models.sizes import Batch
from mxref.kernels.models.stacks import PROJECTIONS
from mxref.verification.bench.timing import Ceilings, Clock, measure_ceilings
from mxref.verification.bench.workloads import PACKED_BYTES

__all__ = ["Block", "Product", "block_limit", "products", "time_block"]


@dataclass(frozen=True)
class Block:
    """A block's device time. Times in seconds.

    Attributes:
        batch: as text.
        rows: routed rows.
        median: forward, forward again and backward.
        mode: "graph" or "eager"; an eager time includes gaps in which the device waits for the host.
        limit: that no implementation of its products beats, see `block_limit`.
        matmul, copy: the ceilings of the same process, FLOP/s and bytes/s.
    """

    batch: str
    rows: int
    median: float
    mode: str
    limit: float
    matmul: float
    copy: float

    def __str__(self) -> str:
        return f"MoE block, {self.batch}: {self.median / self.limit:.2f} times the limit of its products"


@dataclass(frozen=True)
class Product:
    """One projection of the block: E experts, W_e [K, N], with an adapter; `rows_in` rows are read, P multiplied."""

    E: int
    K: int
    N: int
    rank: int
    rows_in: int
    P: int

    def seconds(self, ceilings: Ceilings) -> float:
        """The least time of forward, forward again and backward.

        A forward multiplies by W, A and B and reads each of these once; a backward multiplies by their transposes and
        makes dA and dB of two products more. Rows are bf16 and cross once each; adapters' gradients are bf16.
        """
        base, lora = 2.0 * self.P * self.K * self.N, 2.0 * self.P * self.rank * (self.K + self.N)
        adapters = 2.0 * self.E * self.rank * (self.K + self.N)
        rows = 2.0 * (self.rows_in * self.K + self.P * self.N)
        forward_bytes = self.E * self.K * self.N * PACKED_BYTES + adapters + rows
        backward_bytes = forward_bytes + 2.0 * self.rows_in * self.K + adapters
        return 2 * ceilings.seconds(base + lora, forward_bytes) + ceilings.seconds(base + 2 * lora, backward_bytes)


def products(block: nn.Module, rank: int, tokens: int, slots: int) -> list[Product]:
    """Both projections of a block with packed experts, for so many tokens; the second reads what the first writes."""
    experts = next(module for module in block.modules() if isinstance(module, PackedExperts))
    P = tokens * slots
    (E, K, N), (_, inner, hidden) = (experts.shape(name) for name in PROJECTIONS)
    return [Product(E, K, N, rank, tokens, P), Product(E, inner, hidden, rank, P, P)]


def block_limit(parts: list[Product], ceilings: Ceilings) -> float:
    """Seconds that a block's products take at the machine's ceilings, every expert having rows."""
    return sum(part.seconds(ceilings) for part in parts)


def time_block(
    block: nn.Module,
    parts: list[Product],
    batch: Batch,
    device: torch.device,
    clock: Clock,
    ceilings: Ceilings | None = None,
    samples: int = 20,
) -> Block:
    """Time a block of an adapted model on random hidden states.

    Args:
        block: takes hidden states [sequences, tokens, H].
        parts: its products for so many tokens.
        batch: how many.
        device: where it lies.
        clock: of that device.
        ceilings: of that device; by default they are measured.
        samples: how often it is timed.
    """
    x = torch.randn(batch.sequences, batch.tokens, parts[0].K, device=device, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn_like(x)
    leaves = [x, *(parameter for parameter in block.parameters() if parameter.requires_grad)]

    def run() -> tuple[Tensor, ...]:
        # no random numbers are drawn, and saving their state would synchronise
        out: Any = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
        return torch.autograd.grad(out[0] if isinstance(out, tuple) else out, leaves, gradient)

    run()
    captured = clock.capture(run)
    seconds = statistics.median(clock.sample(captured.replay if captured else run, samples))
    found = ceilings or measure_ceilings(clock, device)
    return Block(
        str(batch),
        parts[0].P,
        seconds,
        "graph" if captured else "eager",
        block_limit(parts, found),
        found.matmul,
        found.copy,
    )

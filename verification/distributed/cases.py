"""What a step is asked: batches over all ranks, and how they are shared out."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

import torch

from mxref.verification.cases.case import Routing

__all__ = ["CASES", "Shares", "StepCase", "StepItem"]

Shares = Literal["even", "uneven", "one empty", "last has all"]


@dataclass(frozen=True)
class StepCase:
    """One question.

    Attributes:
        name: unique; it also seeds the draw.
        exact: small integers: every sum is exact in any order and any partition; otherwise ordinary numbers. Those in
            16 bits have a power of two of tokens, so that a mean's factor rounds nothing, and gates without a router.
        experts, K, N, tokens, top_k, rank: sizes; `tokens` over all ranks. K = N, as of a whole block of experts.
        dtype: activation dtype.
        batches: steps, one a batch.
        shares: tokens of each rank: alike; ever more; none on the second rank; all on the last one.
        routing: see `cases.case`.
        bias: whether there are frozen biases.
        router: whether gates come of a trained router, by a softmax over a token's slots.
        every_byte: weights of the last expert, which has no tokens, hold every byte, NaN's scale too.
        groups: the ranks are dealt to so many groups, which train side by side, each its own model on its own batch.
        repeat: the step is asked twice.
    """

    name: str
    exact: bool = True
    experts: int = 4
    K: int = 64
    N: int = 64
    tokens: int = 16
    top_k: int = 2
    rank: int = 2
    dtype: torch.dtype = torch.float32
    batches: int = 1
    shares: Shares = "even"
    routing: Routing = "uniform"
    bias: bool = False
    router: bool = False
    every_byte: bool = False
    groups: int = 1
    repeat: bool = False

    def seed(self, seed: int) -> int:
        """Seed of this case's own stream."""
        return (zlib.crc32(self.name.encode()) << 16) ^ seed

    def share(self, ranks: int) -> list[int]:
        """Tokens of each of so many ranks."""
        if self.shares == "last has all":
            return [0] * (ranks - 1) + [self.tokens]
        weights = [rank + 1.0 if self.shares == "uneven" else 1.0 for rank in range(ranks)]
        if self.shares == "one empty" and ranks > 1:
            weights[1] = 0.0
        ends = [round(self.tokens * sum(weights[: rank + 1]) / sum(weights)) for rank in range(ranks)]
        return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def dealt(self, ranks: int) -> tuple[tuple[int, ...], ...] | None:
        """The ranks of each group, dealt like cards, as a mesh's columns are; None where they cannot be dealt alike."""
        return None if ranks % self.groups else tuple(tuple(range(g, ranks, self.groups)) for g in range(self.groups))


@dataclass(frozen=True)
class StepItem:
    """One case in a world of so many ranks, drawn with a seed."""

    case: StepCase
    ranks: int
    seed: int

    @property
    def id(self) -> str:
        """Eight digits, the same in every run that asks this."""
        return sha256(f"{self.case} {self.ranks} {self.seed}".encode()).hexdigest()[:8]


CASES: Sequence[StepCase] = (
    StepCase("two steps", batches=2, repeat=True),
    StepCase("uneven tokens", shares="uneven", bias=True),
    StepCase("a rank without tokens", shares="one empty"),
    StepCase("all tokens on one rank", shares="last has all"),
    StepCase("one expert takes all", routing="one_expert"),
    StepCase("an expert twice", routing="duplicates", bias=True),
    StepCase("sentinels", routing="sentinels", bias=True),
    StepCase("experts that ranks do not divide", experts=7, shares="uneven"),
    StepCase("fewer experts than ranks", experts=3, top_k=1),
    StepCase("every byte", experts=7, routing="empty_experts", every_byte=True),
    StepCase("two groups side by side", groups=2),
    StepCase("bfloat16", dtype=torch.bfloat16),
    StepCase("float16", dtype=torch.float16, shares="uneven"),
    StepCase("ordinary numbers", exact=False, tokens=30, shares="uneven", bias=True, repeat=True),
    StepCase("softmax router", exact=False, tokens=30, router=True),
    StepCase(
        "rounded to bfloat16", exact=False, tokens=32, dtype=torch.bfloat16, shares="uneven", bias=True, repeat=True
    ),
    StepCase("rounded to float16", exact=False, tokens=32, top_k=3, dtype=torch.float16, shares="one empty"),
)
"""What every step is asked, in this order."""

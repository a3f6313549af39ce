"""Computed memory and traffic of a rank: `python -m mxref.kernels.parallel.memory [docs/parallel.md]`.

Packed weights take 17/32 byte each, everything else that is frozen 2 bytes (bf16), adapters 16: fp32 value, gradient
and AdamW's two moments. Every decoder layer is checkpointed. Logits, libraries and the allocator are not counted.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MODELS", "Layout", "Memory", "Model", "per_rank", "tables", "traffic"]

PACKED, FROZEN, TRAINED, ADAPTER, ROW = 17 / 32, 2, 16, 4, 2
"""Bytes of a packed weight; of any other; of an adapter's number with its gradient and moments; of that number, or its
gradient, alone; of a number in a token's row."""

RANKS = (1, 2, 4, 8, 16, 32, 64)
NODE = 8
"""Ranks of a node, among which experts are divided at most."""
BEGIN, END = "<!-- memory:begin -->", "<!-- memory:end -->"


@dataclass(frozen=True)
class Model:
    """Sizes of a mixture of experts; `moe_layers` of the layers have experts.

    Attributes:
        others: parameters outside the experts, `vocabulary` among them.
        vocabulary: of embedding and head, which stay gathered.
    """

    name: str
    layers: int
    moe_layers: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    others: float
    vocabulary: float

    @property
    def expert_weights(self) -> int:
        """Of one layer."""
        return self.experts * 3 * self.hidden * self.intermediate

    def adapters(self, rank: int) -> int:
        """Of one layer: A and B of both projections of every expert."""
        return self.experts * rank * (2 * self.hidden + 3 * self.intermediate)


MODELS = (
    Model("gpt-oss-20b", 24, 24, 2880, 2880, 32, 4, 1.80e9, 1.16e9),
    Model("gpt-oss-120b", 36, 36, 2880, 2880, 128, 4, 2.13e9, 1.16e9),
    Model("Qwen3-30B-A3B", 48, 48, 2048, 768, 128, 8, 1.54e9, 0.62e9),
    Model("Qwen3-235B-A22B", 94, 94, 4096, 1536, 128, 8, 7.99e9, 1.24e9),
    Model("DeepSeek-V3", 61, 58, 7168, 2048, 256, 8, 17.1e9, 1.85e9),
)
"""By the configurations that their makers publish; `others` is what is left of the published number of parameters."""


@dataclass(frozen=True)
class Layout:
    """How many ranks divide experts (`ep`), and how many shard each slice further (`fsdp`)."""

    fsdp: int
    ep: int = 1

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.fsdp * self.ep


@dataclass(frozen=True)
class Memory:
    """Bytes, see `per_rank`."""

    state: float
    gathered: float
    activations: float

    @property
    def total(self) -> float:
        """Their sum."""
        return self.state + self.gathered + self.activations


def per_rank(model: Model, layout: Layout, rank: int = 16, tokens: int = 8192) -> Memory:
    """One rank's memory in training.

        state        (17/32 · experts + 2 · others + 16 · adapters) / ranks
        gathered     two layers, of experts a slice or, where that is not sharded, nothing; and the vocabulary
        activations  H for every token and layer; in one layer 3I + H for every routed row, 2H more where rows travel,
                     and as much again for gradients

    Args:
        rank: of the adapters.
        tokens: of this rank, balanced among experts.
    """
    weights, adapters = model.expert_weights, model.adapters(rank)
    state = PACKED * weights * model.moe_layers + FROZEN * model.others + TRAINED * adapters * model.moe_layers
    gathered = 0.0
    if layout.fsdp > 1:
        gathered += 2 * (PACKED * weights + 2 * ADAPTER * adapters) / layout.ep
    if layout.ranks > 1:
        gathered += FROZEN * (2 * (model.others - model.vocabulary) / model.layers + model.vocabulary)
    row = 3 * model.intermediate + model.hidden * (3 if layout.ep > 1 else 1)
    activations = ROW * tokens * (model.layers * model.hidden + 2 * model.top_k * row)
    return Memory(state / layout.ranks, gathered, activations)


def traffic(model: Model, layout: Layout, rank: int = 16, tokens: int = 8192) -> float:
    """Bytes that one rank receives a step: layers for both passes, adapters' gradients, rows that travel.

    Rows travel there and back in the forward pass, its repetition and the backward pass. Arguments as `per_rank`.
    """
    layer = 2 * PACKED * model.expert_weights + 3 * ADAPTER * model.adapters(rank)
    received = layer * model.moe_layers / layout.ep * (layout.fsdp - 1) / layout.fsdp
    received += FROZEN * (2 * model.others - model.vocabulary) * (layout.ranks - 1) / layout.ranks
    rows = 6 * tokens * model.top_k * model.hidden * ROW * model.moe_layers
    return received + rows * (layout.ep - 1) / layout.ep


def tables() -> str:
    """Both as Markdown, in GB: FSDP2 alone, and experts divided within a node."""
    lines = []
    for title, figure in (("Memory of a rank, GB", _memory), ("Received by a rank in a step, GB", _traffic)):
        lines += [f"**{title}**; FSDP2 alone / experts in parallel", ""]
        lines += ["| model | " + " | ".join(_ranks(n) for n in RANKS) + " |", "|---|" + "---:|" * len(RANKS)]
        lines += [f"| {m.name} | " + " | ".join(figure(m, n) for n in RANKS) + " |" for m in MODELS] + [""]
    return "\n".join(lines)


def _layouts(ranks: int) -> tuple[Layout, ...]:
    ep = min(ranks, NODE)
    return (Layout(ranks),) if ranks == 1 else (Layout(ranks), Layout(ranks // ep, ep))


def _memory(model: Model, ranks: int) -> str:
    return " / ".join(f"{per_rank(model, layout).total / 1e9:.0f}" for layout in _layouts(ranks))


def _traffic(model: Model, ranks: int) -> str:
    return " / ".join(f"{traffic(model, layout) / 1e9:.0f}" for layout in _layouts(ranks))


def _ranks(ranks: int) -> str:
    return "1 rank" if ranks == 1 else f"{ranks}" if ranks <= NODE else f"{ranks} ({NODE} × {ranks // NODE})"


def main(arguments: list[str]) -> None:
    """Print the tables, or write them into the named file."""
    if not arguments:
        print(tables())
        return
    path = Path(arguments[0])
    before, begun, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (begun and ended):
        raise ValueError(f"{path} has no lines {BEGIN} and {END}, between which the tables go")
    path.write_text(f"{before}{BEGIN}\n{tables()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

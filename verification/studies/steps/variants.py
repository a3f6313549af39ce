"""Honest steps that go about it otherwise, each truly declared: no check may reject one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import ProcessGroup

from mxref.verification.studies.steps.collectives import gathered, size_of, summed
from mxref.verification.studies.steps.honest import Exchanged, Masked, Replicated, Results

__all__ = ["VARIANTS"]

_BUCKET = 37
"""Elements; neither a gradient's size nor a rank's share of it is a multiple."""


class Mean(Replicated):
    """The loss is a mean over all tokens."""

    mxref_loss = "mean"


class Bf16(Replicated):
    """Gradients are summed in bf16, and declared so."""

    mxref_reduction = "bfloat16"

    def reduced(self, partial: Tensor) -> Tensor:
        return summed(partial.bfloat16(), self.group).float()


class Sequence(Replicated):
    """In bf16, from rank 0 up."""

    mxref_reduction = "bfloat16, sequence"

    def reduced(self, partial: Tensor) -> Tensor:
        total, *others = gathered(partial.bfloat16(), self.group)
        for part in others:
            total = total + part
        return total.float()


class Tree(Replicated):
    """In bf16, by halves."""

    mxref_reduction = "bfloat16, tree"

    def reduced(self, partial: Tensor) -> Tensor:
        return self.half(gathered(partial.bfloat16(), self.group)).float()

    def half(self, parts: list[Tensor]) -> Tensor:
        """The sum of some ranks' parts."""
        middle = (len(parts) + 1) // 2
        return parts[0] if len(parts) == 1 else self.half(parts[:middle]) + self.half(parts[middle:])


class Backwards(Replicated):
    """From the last rank down."""

    def reduced(self, partial: Tensor) -> Tensor:
        *others, total = gathered(partial, self.group)
        for part in reversed(others):
            total = total + part
        return total


class Buckets(Replicated):
    """In small buckets."""

    def reduced(self, partial: Tensor) -> Tensor:
        parts = [summed(part, self.group) for part in torch.split(partial.flatten(), _BUCKET)]
        return torch.cat(parts).view_as(partial)


class Scattered(Replicated):
    """Each rank sums a part, and all gather the parts, as fully sharded data parallelism does."""

    def reduced(self, partial: Tensor) -> Tensor:
        own = -(-partial.numel() // self.size)
        padded = partial.new_zeros(own * self.size)
        padded[: partial.numel()] = partial.flatten()
        mine = torch.empty(own, device=partial.device)
        dist.reduce_scatter_single(mine, padded, group=self.group)
        return torch.cat(gathered(mine[:, None], self.group)).flatten()[: partial.numel()].view_as(partial)


class MicroBatches(Replicated):
    """A rank's tokens in three parts, whose gradients are added up before the ranks'."""

    def layer(self, x: Tensor, experts: Tensor, gates: Tensor, dOut: Tensor) -> Results:
        self.whole_batch = False
        thirds = (torch.tensor_split(each, 3) for each in (x, experts, gates, dOut))
        parts = [super(MicroBatches, self).layer(*third) for third in zip(*thirds, strict=True)]
        self.whole_batch = True
        found = {name: torch.cat([part[name] for part in parts]) for name in ("Y", "dX", "dgates")}
        return found | {name: self.reduced(torch.stack([p[name] for p in parts]).sum(0)) for name in ("dA", "dB")}

    def reduced(self, partial: Tensor) -> Tensor:
        return super().reduced(partial) if self.whole_batch else partial


class ExchangedMean(Exchanged):
    """Experts' ranks never see a gradient that is not their own."""

    mxref_loss = "mean"


class Mesh(Exchanged):
    """Experts over the ranks of one dimension of a mesh, replicas of them over the other; each has two ranks or one."""

    inner: ProcessGroup | None = None

    def dimension(self) -> int:
        """Ranks of the dimension of the experts."""
        return 2 if self.whole_size % 2 == 0 else 1

    def layer(self, x: Tensor, experts: Tensor, gates: Tensor, dOut: Tensor) -> Results:
        whole, rank, self.whole_size = self.group, self.rank, size_of(self.group)
        members, side = dist.get_process_group_ranks(whole), self.dimension()
        row = members[rank // side * side : (rank // side + 1) * side]
        column = members[rank % side :: side]
        if self.inner is None:
            self.inner = dist.new_group(row, use_local_synchronization=True)
            self.outer = dist.new_group(column, use_local_synchronization=True)
        kept = self.packed, self.scales, self.own
        self.group, self.rank, self.size = self.inner, rank % side, side
        self.own = self.owned(self.rank)
        self.packed, self.scales = self.model.packed[self.own], self.model.scales[self.own]
        found = super().layer(x, experts, gates, dOut)
        self.packed, self.scales, self.own = kept
        self.group, self.rank, self.size = whole, rank, self.whole_size
        return found

    def over_replicas(self, gradient: Tensor) -> Tensor:
        return summed(gradient, self.outer)


class FlatMesh(Mesh):
    """The dimension of the experts is the whole world, that of replicas one rank."""

    def dimension(self) -> int:
        return self.whole_size


class TallMesh(Mesh):
    """Every rank owns all experts."""

    def dimension(self) -> int:
        return 1


VARIANTS = (
    Replicated, Exchanged, Masked, Mean, Bf16, Sequence, Tree, Backwards, Buckets, Scattered,
    MicroBatches, ExchangedMean, Mesh, FlatMesh, TallMesh,
)  # fmt: skip
"""Partitions, orders, bucket sizes, mesh shapes, dtypes of sums, sums and means."""

"""Honest training steps in plain PyTorch, whose parts can be replaced, one a planted mistake.

`Replicated`: every rank computes its own tokens with the gathered weights of all experts, and gradients are summed over
ranks, as fully sharded data parallelism does. `Exchanged`: each rank owns some experts, and tokens travel to them and
back. `Masked`: each rank owns some experts, sees all tokens with the others' ids as sentinels, and results are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import ProcessGroup

from mxref.problem import Problem
from mxref.routing import flatten_sort_count
from mxref.verification.candidates.starting_point import layer as plain_layer
from mxref.verification.distributed.protocol import Batch, Model, Saved, Step, Trained
from mxref.verification.studies.steps.collectives import exchanged, gathered, size_of, summed
from mxref.weights import MXWeights

__all__ = ["Exchanged", "Masked", "Replicated", "Results", "Runtime"]

Results = dict[str, Tensor]
"""By "Y", "dX", "dgates" of this rank's tokens, "dA", "dB" whole and over all ranks."""


class Runtime:
    """A training step; each call has an instance of its own.

    Attributes:
        mxref_loss, mxref_reduction, mxref_outputs: declared, see `distributed.protocol`.
        model, group: as given.
        A, B, router: trained, whole.
        own: the experts whose packed weights this rank keeps.
        packed, scales: of these.
    """

    mxref_loss = "sum"
    mxref_reduction = "float32, any"
    mxref_outputs = "whole"

    def __call__(self, model: Model, batches: Sequence[Batch], group: ProcessGroup, folder: Path) -> Trained:
        """See `distributed.protocol`."""
        self.model, self.group = model, group
        self.rank, self.size = dist.get_rank(group), size_of(group)
        self.A, self.B, self.router = model.lora_A, model.lora_B, model.router
        self.experts = model.packed.shape[0]
        self.own = self.owned(self.rank)
        self.packed, self.scales = model.packed[self.own].clone(), model.scales[self.own].clone()
        steps = tuple(self.step(batch) for batch in batches)
        self.save(folder)
        return Trained(steps, self.A, self.B, *self.whole(), self.router)

    def owned(self, rank: int) -> slice:
        """The experts of a rank: as many as of any other, or one more."""
        return slice(rank * self.experts // self.size, (rank + 1) * self.experts // self.size)

    def whole(self) -> tuple[Tensor, Tensor]:
        """Packed weights and scales of all experts."""
        return torch.cat(gathered(self.packed, self.group)), torch.cat(gathered(self.scales, self.group))

    def step(self, batch: Batch) -> Step:
        """Forward, backward, update."""
        gates = batch.gates if self.router is None else self.routed(batch)
        assert gates is not None
        scale = self.scale(batch)
        dOut = batch.targets * scale
        found = self.layer(batch.x, batch.experts, gates, dOut)
        loss = self.loss(found["Y"], batch, scale)
        drouter, dgates = None, found["dgates"]
        if self.router is not None:
            dlogits = self.through_softmax(gates, dgates)
            rows = self.router[batch.experts]
            found["dX"] = found["dX"] + (dlogits[..., None] * rows).sum(1)
            per_slot = dlogits[..., None] * batch.x[:, None]
            partial = torch.zeros_like(self.router).index_add(0, batch.experts.flatten(), per_slot.flatten(0, 1))
            drouter = self.reduced_router(partial)
        self.update(found["dA"], found["dB"], drouter)
        return Step(
            loss, found["Y"], found["dX"], found["dA"], found["dB"], None if drouter is not None else dgates, drouter
        )

    def routed(self, batch: Batch) -> Tensor:
        """Gates of a softmax over each token's slots."""
        assert self.router is not None
        return torch.softmax((self.router[batch.experts] * batch.x[:, None]).sum(-1), -1)

    def through_softmax(self, gates: Tensor, dgates: Tensor) -> Tensor:
        """The gradient of the softmax's logits."""
        return gates * (dgates - (gates * dgates).sum(-1, keepdim=True))

    def scale(self, batch: Batch) -> float:
        """What the loss multiplies ⟨Y, targets⟩ with."""
        if self.mxref_loss == "sum":
            return 1.0
        return 1.0 / float(summed(torch.tensor(float(batch.x.shape[0]), device=batch.x.device), self.group))

    def loss(self, Y: Tensor, batch: Batch, scale: float) -> Tensor:
        """Over all ranks."""
        return scale * summed((Y.float() * batch.targets.float()).sum(), self.group)

    def layer(self, x: Tensor, experts: Tensor, gates: Tensor, dOut: Tensor) -> Results:
        """The layer's two passes."""
        raise NotImplementedError

    def reduced(self, partial: Tensor) -> Tensor:
        """A gradient over all ranks."""
        return summed(partial, self.group)

    def reduced_router(self, partial: Tensor) -> Tensor:
        """The router's."""
        return self.reduced(partial)

    def update(self, dA: Tensor, dB: Tensor, drouter: Tensor | None) -> None:
        """Plain SGD."""
        rate = self.model.learning_rate
        self.A, self.B = self.A - rate * dA, self.B - rate * dB
        if self.router is not None and drouter is not None:
            self.router = self.router - rate * drouter

    def save(self, folder: Path) -> None:
        """Each rank the packed weights of its experts, the first one what all have."""
        torch.save({"packed": self.packed, "scales": self.scales}, folder / f"experts-{self.rank:05}.pt")
        if self.rank == 0:
            torch.save(self.trained(), folder / "adapters.pt")

    def trained(self) -> dict[str, Tensor | None]:
        """The adapters as they are saved."""
        return {"lora_A": self.A, "lora_B": self.B, "router": self.router}

    @staticmethod
    def mxref_load(folder: Path) -> Saved:
        """What `save` wrote, by any number of ranks."""
        parts = [torch.load(file, map_location="cpu") for file in sorted(folder.glob("experts-*.pt"))]
        packed, scales = (torch.cat([part[name] for part in parts]) for name in ("packed", "scales"))
        return Saved(packed=packed, scales=scales, **torch.load(folder / "adapters.pt", map_location="cpu"))

    def linear(
        self, x: Tensor, experts: Tensor, gates: Tensor | None, weights: tuple[Tensor, ...], biases: Tensor | None
    ) -> Tensor:
        """The layer on this rank alone: `weights` are packed, scales, A and B of the experts that `experts` counts."""
        packed, scales, A, B = weights
        if not packed.shape[0]:  # a rank without experts computes nothing, and yet takes part in both passes
            leaves = (x, A, B) if gates is None else (x, A, B, gates)
            nothing = 0 * torch.stack([leaf.sum().to(x.dtype) for leaf in leaves]).sum()
            return x.new_zeros(x.shape[0], packed.shape[1]) + nothing
        order = flatten_sort_count(experts, packed.shape[0])
        held = MXWeights(packed, scales, x.shape[1], packed.shape[1])
        problem = Problem(x, held, experts.shape[1], *order, A, B, self.model.scaling, biases, gates)
        return plain_layer(**problem.arguments())

    def biases(self, own: slice) -> Tensor | None:
        """Of some experts."""
        return None if self.model.biases is None else self.model.biases[own]

    def adapters(self, own: slice) -> tuple[Tensor, Tensor]:
        """A and B of some experts, as leaves of a graph."""
        r = self.A.shape[0] // self.experts
        rows = slice(own.start * r, own.stop * r)
        return self.A[rows].clone().requires_grad_(), self.B[:, rows].clone().requires_grad_()

    def of_all(self, dA: Tensor, dB: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of all experts from those of each rank's own."""
        return torch.cat(gathered(dA, self.group)), torch.cat(gathered(dB.mT, self.group)).mT.contiguous()


class Replicated(Runtime):
    """Every rank computes its own tokens."""

    def layer(self, x: Tensor, experts: Tensor, gates: Tensor, dOut: Tensor) -> Results:
        """With all experts' weights, gathered."""
        every = slice(0, self.experts)
        x, gates = x.clone().requires_grad_(), gates.clone().requires_grad_()
        A, B = self.adapters(every)
        Y = self.linear(x, experts, gates, (*self.whole(), A, B), self.biases(every))
        dX, dgates, dA, dB = torch.autograd.grad(Y, (x, gates, A, B), dOut)
        return {"Y": Y.detach(), "dX": dX, "dgates": dgates, "dA": self.reduced(dA), "dB": self.reduced(dB)}


class Exchanged(Runtime):
    """Tokens travel to the ranks that own their experts, and back."""

    def layer(self, x: Tensor, experts: Tensor, gates: Tensor, dOut: Tensor) -> Results:
        """A row a slot travels; gates stay at home."""
        tokens, k = experts.shape
        slots, counts = self.order(experts)
        received = self.received(counts)
        rows = exchanged(x[slots // k], counts, received, self.group)
        ids = exchanged(experts.flatten()[slots][:, None], counts, received, self.group) - self.own.start
        rows.requires_grad_()
        A, B = self.adapters(self.own)
        y = self.linear(rows, ids, None, (self.packed, self.scales, A, B), self.biases(self.own))
        home = self.returned(exchanged(y.detach(), received, counts, self.group), slots, tokens * k)
        home = home.view(tokens, k, y.shape[1])
        Y = (gates[..., None].float() * home.float()).sum(1).to(x.dtype)
        dgates = (home.float() * dOut[:, None].float()).sum(-1).to(gates.dtype)
        dY = (gates[..., None] * dOut[:, None]).flatten(0, 1)[slots]
        drows, dA, dB = torch.autograd.grad(y, (rows, A, B), exchanged(dY, counts, received, self.group))
        dX = self.returned(exchanged(drows, received, counts, self.group), slots, tokens * k)
        dX = dX.view(tokens, k, x.shape[1]).float().sum(1).to(x.dtype)
        dA, dB = self.of_all(self.over_replicas(dA), self.over_replicas(dB))
        return {"Y": Y, "dX": dX, "dgates": dgates, "dA": dA, "dB": dB}

    def order(self, experts: Tensor) -> tuple[Tensor, list[int]]:
        """The slots that travel in the order of their experts, and how many go to each rank."""
        ids, slots = experts.flatten().sort(stable=True)
        real = (ids >= 0) & (ids < self.experts)
        ids, slots = ids[real], slots[real]
        ends = [int((ids < self.owned(rank).stop).sum()) for rank in range(self.size)]
        return slots, [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def received(self, counts: list[int]) -> list[int]:
        """How many rows come from each rank."""
        sent = torch.tensor(counts, device=self.packed.device)[:, None]
        return exchanged(sent, [1] * len(counts), [1] * len(counts), self.group)[:, 0].tolist()

    def returned(self, rows: Tensor, slots: Tensor, count: int) -> Tensor:
        """Rows that came back at their slots, zero where none travelled."""
        return rows.new_zeros(count, rows.shape[1]).index_copy(0, slots, rows)

    def over_replicas(self, gradient: Tensor) -> Tensor:
        """Over ranks that own the same experts; here nobody does."""
        return gradient


class Masked(Runtime):
    """Tokens of all ranks on every rank."""

    mxref_outputs = "summed"

    def layer(self, x: Tensor, experts: Tensor, gates: Tensor, dOut: Tensor) -> Results:
        """Ids of other ranks' experts are sentinels, whose results are zero; the sum over ranks fills them in."""
        parts = [gathered(each, self.group) for each in (x, experts, gates, dOut)]
        start = sum(part.shape[0] for part in parts[0][: self.rank])
        mine = slice(start, start + x.shape[0])
        every = [torch.cat(part) for part in parts]
        xs, gs = every[0].requires_grad_(), every[2].requires_grad_()
        A, B = self.adapters(self.own)
        weights = (self.packed, self.scales, A, B)
        Y = self.linear(xs, self.masked(every[1]), gs, weights, self.biases(self.own))
        gradients = torch.autograd.grad(Y, (xs, gs, A, B), every[3])
        Y, dX, dgates = (summed(each.detach(), self.group)[mine] for each in (Y, *gradients[:2]))
        dA, dB = self.of_all(*gradients[2:])
        return {"Y": Y, "dX": dX, "dgates": dgates, "dA": dA, "dB": dB}

    def masked(self, experts: Tensor) -> Tensor:
        """Ids counted from the first own expert; E, and so none, where another rank's."""
        own = (experts >= self.own.start) & (experts < self.own.stop)
        return torch.where(own, experts - self.own.start, self.experts)

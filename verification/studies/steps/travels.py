"""Mistakes on the way: tokens to their experts' ranks and back; and ranks that do not come back themselves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mxref.verification.distributed.protocol import Batch, Model, Trained
from mxref.verification.studies.steps.collectives import gathered
from mxref.verification.studies.steps.fault import fault
from mxref.verification.studies.steps.honest import Exchanged, Masked, Replicated, Results


@fault("rows back in the experts' order", "forgets to undo the sort behind the return exchange",
       check="gradients", case="two steps")  # fmt: skip
class NotUnsorted(Exchanged):
    """A permutation of the right rows."""

    def returned(self, rows: Tensor, slots: Tensor, count: int) -> Tensor:
        return super().returned(rows, slots.sort().values, count)


@fault("sort undone twice", "applies the order once more where it should apply its inverse",
       check="gradients", case="uneven tokens", ranks=4)  # fmt: skip
class Inverse(Exchanged):
    """Right for orders that are their own inverse."""

    def returned(self, rows: Tensor, slots: Tensor, count: int) -> Tensor:
        return rows[slots] if rows.shape[0] == count else super().returned(rows, slots, count)


@fault("ids of another rank", "subtracts the first expert of the neighbour",
       check="gradients", case="experts that ranks do not divide")  # fmt: skip
class OtherIds(Exchanged):
    """Rows land on an expert one off, or on none."""

    def linear(
        self, x: Tensor, experts: Tensor, gates: Tensor | None, weights: tuple[Tensor, ...], biases: Tensor | None
    ) -> Tensor:
        off = self.own.start - self.owned((self.rank + 1) % self.size).start
        moved = (experts + off) % max(1, weights[0].shape[0])
        return super().linear(x, moved, gates, weights, biases)


@fault("offsets of the sent rows", "cuts the received rows by experts where it cut those it sent",
       check="gradients", case="uneven tokens")  # fmt: skip
class SentOffsets(Exchanged):
    """Right where all ranks route alike."""

    def layer(self, x: Tensor, experts: Tensor, gates: Tensor, dOut: Tensor) -> Results:
        slots, _ = self.order(experts)
        self.sent = experts.flatten()[slots]
        return super().layer(x, experts, gates, dOut)

    def linear(
        self, x: Tensor, experts: Tensor, gates: Tensor | None, weights: tuple[Tensor, ...], biases: Tensor | None
    ) -> Tensor:
        mine = self.sent[(self.sent >= self.own.start) & (self.sent < self.own.stop)] - self.own.start
        ids = torch.zeros_like(experts[:, 0])
        ids[: mine.shape[0]] = mine[: ids.shape[0]]
        return super().linear(x, ids[:, None], gates, weights, biases)


@fault("sentinels not masked", "indexes by −1, which is the last expert", check="gradients", case="sentinels")
class Unmasked(Replicated):
    """A slot that is nobody's counts for somebody."""

    def layer(self, x: Tensor, experts: Tensor, gates: Tensor, dOut: Tensor) -> Results:
        return super().layer(x, torch.where(experts < 0, experts + self.experts, experts), gates, dOut)


@fault("sentinels clamped", "clamps ids into range", check="gradients", case="sentinels", ranks=4)
class ClampedIds(Exchanged):
    """No index is out of range any more."""

    def layer(self, x: Tensor, experts: Tensor, gates: Tensor, dOut: Tensor) -> Results:
        return super().layer(x, experts.clamp(0, self.experts - 1), gates, dOut)


@fault("capacity", "sends each rank its fair number of rows, and drops the rest",
       check="gradients", case="one expert takes all", ranks=4)  # fmt: skip
class Capacity(Exchanged):
    """Right until the router prefers somebody."""

    def order(self, experts: Tensor) -> tuple[Tensor, list[int]]:
        slots, counts = super().order(experts)
        most = -(-experts.numel() // self.size)
        kept = [part[:most] for part in torch.split(slots, counts)]
        return torch.cat(kept), [part.shape[0] for part in kept]


@fault("neighbours' padding computed", "gathers tokens padded to the longest rank, and never cuts the padding off",
       check="gradients", case="uneven tokens")  # fmt: skip
class PaddedTokens(Masked):
    """Rows that are nobody's tokens have targets."""

    def layer(self, x: Tensor, experts: Tensor, gates: Tensor, dOut: Tensor) -> Results:
        most = max(part.shape[0] for part in gathered(x, self.group))
        rows = x.shape[0]

        def padded(each: Tensor, value: float) -> Tensor:
            return torch.cat([each, each.new_full((most - rows, *each.shape[1:]), value)])

        found = super().layer(padded(x, 1.0), padded(experts, 0), padded(gates, 1.0), padded(dOut, 1.0))
        return found | {name: found[name][:rows] for name in ("Y", "dX", "dgates")}


@fault("gates on both sides", "weights rows before they return and again at home", check="gradients", case="two steps")
class GatesOnBothSides(Exchanged):
    """Gates squared."""

    def layer(self, x: Tensor, experts: Tensor, gates: Tensor, dOut: Tensor) -> Results:
        return super().layer(x, experts, gates, dOut) | {"Y": super().layer(x, experts, gates * gates, dOut)["Y"]}


@fault("tokens in bf16 on the way", "halves what the exchange has to carry", check="interval", case="ordinary numbers")
class NarrowTokens(Exchanged):
    """Rows of fp32 activations come back rounded."""

    def returned(self, rows: Tensor, slots: Tensor, count: int) -> Tensor:
        return super().returned(rows.bfloat16().to(rows.dtype), slots, count)


class _Returned(Exchanged):
    """Keeps the rows that came back: outputs, then gradients."""

    def layer(self, x: Tensor, experts: Tensor, gates: Tensor, dOut: Tensor) -> Results:
        self.home = list[Tensor]()
        return super().layer(x, experts, gates, dOut)

    def returned(self, rows: Tensor, slots: Tensor, count: int) -> Tensor:
        self.home.append(super().returned(rows, slots, count))
        return self.home[-1]


@fault("gates before the way back", "weights rows where their experts are, and rounds them for the way",
       check="interval", case="rounded to bfloat16")  # fmt: skip
class GatesAway(_Returned):
    """One rounding a slot more."""

    def layer(self, x: Tensor, experts: Tensor, gates: Tensor, dOut: Tensor) -> Results:
        found = super().layer(x, experts, gates, dOut)
        weighted = gates[..., None] * self.home[0].view(*experts.shape, dOut.shape[1])
        return found | {"Y": weighted.float().sum(1).to(x.dtype)}


@fault("slots added up in fp16", "adds each row that came back to its token's gradient, in the activation dtype",
       check="interval", case="rounded to float16")  # fmt: skip
class SlotBySlot(_Returned):
    """Rounds behind every slot."""

    def layer(self, x: Tensor, experts: Tensor, gates: Tensor, dOut: Tensor) -> Results:
        found = super().layer(x, experts, gates, dOut)
        total = torch.zeros_like(x)
        for row in self.home[1].view(*experts.shape, x.shape[1]).unbind(1):
            total = total + row
        return found | {"dX": total}


@fault("second slot to the first one's rank", "sends a token once, to the rank of its first expert",
       check="gradients", case="an expert twice", ranks=4)  # fmt: skip
class SentOnce(Exchanged):
    """A token's other expert lives elsewhere."""

    def layer(self, x: Tensor, experts: Tensor, gates: Tensor, dOut: Tensor) -> Results:
        first = experts[:, :1] * self.size // self.experts
        here = experts * self.size // self.experts == first
        return super().layer(x, torch.where(here, experts, -1), gates, dOut)


@fault("a rank without tokens skips the sum", "returns early where there is nothing to do",
       check="ends", case="a rank without tokens", ranks=4)  # fmt: skip
class Skips(Replicated):
    """The others wait for it."""

    def layer(self, x: Tensor, experts: Tensor, gates: Tensor, dOut: Tensor) -> Results:
        if x.shape[0]:
            return super().layer(x, experts, gates, dOut)
        self.whole()
        return {
            "Y": dOut, "dX": x, "dgates": gates, "dA": torch.zeros_like(self.A), "dB": torch.zeros_like(self.B)
        }  # fmt: skip

    def loss(self, Y: Tensor, batch: Batch, scale: float) -> Tensor:
        return super().loss(Y, batch, scale) if batch.x.shape[0] else torch.zeros(())


@fault("one rank dies", "runs out of memory, or of luck", check="ends", case="two steps")
class Dies(Replicated):
    """By an exit that no exception tells of."""

    def update(self, dA: Tensor, dB: Tensor, drouter: Tensor | None) -> None:
        if self.rank == 1:
            os._exit(7)
        super().update(dA, dB, drouter)


@fault("one rank raises", "checks its own batch alone", check="ends", case="a rank without tokens", ranks=4)
class Raises(Replicated):
    """The others wait in a collective."""

    def layer(self, x: Tensor, experts: Tensor, gates: Tensor, dOut: Tensor) -> Results:
        if not x.shape[0]:
            raise RuntimeError("the batch is empty")
        return super().layer(x, experts, gates, dOut)


@fault("one rank leaves in good order", "ends the process with exit code 0", check="ends", case="two steps")
class Leaves(Exchanged):
    """A launcher takes it for success."""

    def __call__(self, model: Model, batches: Sequence[Batch], group: ProcessGroup, folder: Path) -> Trained:
        if torch.distributed.get_rank(group) == 0:
            os._exit(0)
        return super().__call__(model, batches, group, folder)


@fault("collectives in another order", "visits parameters in the order of a set, which each process has its own of",
       check="gradients", case="two steps")  # fmt: skip
class OtherOrder(Replicated):
    """One rank sums A where the other one sums B: the sizes happen to be the same."""

    def layer(self, x: Tensor, experts: Tensor, gates: Tensor, dOut: Tensor) -> Results:
        found = super().layer(x, experts, gates, dOut)
        names = ("dA", "dB") if self.rank else ("dB", "dA")
        return found | {name: self.reduced(found[name]) / self.size for name in names}

"""Mistakes in sums over ranks: of gradients, losses, routers; and in updates."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch import distributed as dist

from mxref.verification.distributed.protocol import Batch
from mxref.verification.studies.steps.collectives import gathered, size_of, summed
from mxref.verification.studies.steps.fault import fault
from mxref.verification.studies.steps.honest import Exchanged, Masked, Replicated, Results


@fault("no sum over ranks", "never reduces the adapters' gradients", check="replicas", case="uneven tokens")
class NoSum(Replicated):
    """Each rank trains an adapter of its own."""

    def reduced(self, partial: Tensor) -> Tensor:
        return partial


@fault("no sum for B", "reduces the gradients of one list of parameters, in which B is missing",
       check="gradients", case="two steps", ranks=4)  # fmt: skip
class NoSumOfB(Replicated):
    """Half of the adapter."""

    def layer(self, x: Tensor, experts: Tensor, gates: Tensor, dOut: Tensor) -> Results:
        self.calls = 0
        return super().layer(x, experts, gates, dOut)

    def reduced(self, partial: Tensor) -> Tensor:
        self.calls += 1
        return partial if self.calls == 2 else super().reduced(partial)


@fault("summed twice", "reduces in a hook, and again before the update", check="once", case="two steps")
class SummedTwice(Replicated):
    """Ranks times the gradient."""

    def reduced(self, partial: Tensor) -> Tensor:
        return summed(summed(partial, self.group), self.group)


@fault("summed over owners", "sums what only one rank owns, gathered before, over all ranks",
       check="once", case="experts that ranks do not divide", ranks=4)  # fmt: skip
class OwnersSummed(Exchanged):
    """The whole gradient is on every rank already."""

    def of_all(self, dA: Tensor, dB: Tensor) -> tuple[Tensor, Tensor]:
        dA, dB = super().of_all(dA, dB)
        return summed(dA, self.group), summed(dB, self.group)


@fault("averaged", "divides by the ranks, as data parallelism does, though the loss is declared a sum",
       check="once", case="uneven tokens")  # fmt: skip
class Averaged(Replicated):
    """1/ranks of the gradient."""

    def reduced(self, partial: Tensor) -> Tensor:
        return super().reduced(partial) / self.size


@fault("mean of means", "takes the mean over its own tokens and averages over ranks, which have unlike many",
       check="gradients", case="uneven tokens")  # fmt: skip
class MeanOfMeans(Replicated):
    """Right where all ranks have the same number of tokens."""

    mxref_loss = "mean"

    def scale(self, batch: Batch) -> float:
        return 1.0 / (max(1, batch.x.shape[0]) * self.size)


@fault("loss of its own tokens", "logs the local loss as the step's", check="replicas", case="two steps")
class LocalLoss(Replicated):
    """A loss curve a rank."""

    def loss(self, Y: Tensor, batch: Batch, scale: float) -> Tensor:
        return scale * (Y.float() * batch.targets.float()).sum()


@fault("sum over the whole world", "leaves out `group` in one collective", check="gradients",
       case="two groups side by side", ranks=4)  # fmt: skip
class WholeWorld(Replicated):
    """The default group is another one as soon as a mesh has two dimensions."""

    def reduced(self, partial: Tensor) -> Tensor:
        total = partial.clone()
        dist.all_reduce(total)
        return total


@fault("sum over the wrong dimension", "reduces over the ranks that share the experts' parts, not over the replicas",
       check="gradients", case="two steps", ranks=4)  # fmt: skip
class WrongDimension(Replicated):
    """Two of four ranks are summed."""

    def reduced(self, partial: Tensor) -> Tensor:
        members = dist.get_process_group_ranks(self.group)
        half = members[: self.size // 2] if self.rank < self.size // 2 else members[self.size // 2 :]
        return summed(partial, dist.new_group(half, use_local_synchronization=True))


@fault("bf16 declared as fp32", "sums in bf16, and declares nothing", check="interval", case="ordinary numbers")
class Narrow(Replicated):
    """Exact where the numbers are small integers."""

    def reduced(self, partial: Tensor) -> Tensor:
        return summed(partial.bfloat16(), self.group).float()


@fault("parts in bf16", "hands gradients to the sum in the dtype of the activations",
       check="interval", case="rounded to bfloat16")  # fmt: skip
class NarrowParts(Replicated):
    """The sum itself is in fp32, as declared."""

    def reduced(self, partial: Tensor) -> Tensor:
        return super().reduced(partial.bfloat16().float())


@fault("outputs summed in bf16", "adds up rounded parts of Y and dX over ranks, and declares them whole",
       check="interval", case="rounded to bfloat16")  # fmt: skip
class UndeclaredSum(Masked):
    """One rounding more than one process has."""

    mxref_outputs = "whole"


@fault("fp16 declared as bf16", "sums in fp16, whose small numbers are gone, and declares bf16",
       check="interval", case="softmax router", ranks=4)  # fmt: skip
class Underflow(Replicated):
    """A loss scale that was forgotten: what is small underflows."""

    mxref_reduction = "bfloat16, any"

    def reduced(self, partial: Tensor) -> Tensor:
        return 2.0**23 * summed((partial * 2.0**-23).half(), self.group).float()


@fault("sums in order of arrival", "adds parts as they come in", check="repeat", case="ordinary numbers", ranks=4)
class Arrival(Replicated):
    """All ranks agree, and the next run does not."""

    def reduced(self, partial: Tensor) -> Tensor:
        chance = torch.tensor(list(os.urandom(7)), dtype=torch.uint8)
        dist.broadcast(chance, group=self.group, group_src=0)
        draw = torch.Generator().manual_seed(int.from_bytes(bytes(chance.tolist()), "little"))
        parts = gathered(partial, self.group)
        flat = torch.stack(parts).flatten(1)
        order = torch.rand(flat.shape, generator=draw).argsort(0)
        total = torch.zeros_like(flat[0])
        for part in flat.gather(0, order):
            total = total + part
        return total.view_as(partial)


@fault("router not reduced", "leaves the router, which is not one of the adapters, to every rank",
       check="replicas", case="softmax router")  # fmt: skip
class LocalRouter(Replicated):
    """Routers drift apart."""

    def reduced_router(self, partial: Tensor) -> Tensor:
        return partial


@fault("router without its softmax's term", "takes gate · dgate as the logits' gradient",
       check="interval", case="softmax router")  # fmt: skip
class NoSoftmaxTerm(Replicated):
    """The loss is right."""

    def through_softmax(self, gates: Tensor, dgates: Tensor) -> Tensor:
        return gates * dgates


@fault("router detached", "computes gates under no_grad", check="interval", case="softmax router")
class Detached(Exchanged):
    """Neither the router nor x hears of the gates."""

    def through_softmax(self, gates: Tensor, dgates: Tensor) -> Tensor:
        return torch.zeros_like(gates)


@fault("dgates summed over replicas", "sums a gradient that every rank has whole already",
       check="gradients", case="a rank without tokens")  # fmt: skip
class GatesTwice(Masked):
    """Ranks times the gradient of the gates."""

    def layer(self, x: Tensor, experts: Tensor, gates: Tensor, dOut: Tensor) -> Results:
        found = super().layer(x, experts, gates, dOut)
        return found | {"dgates": found["dgates"] * self.size}


@fault("biases on every rank", "adds all biases on each rank, though results are summed",
       check="gradients", case="an expert twice")  # fmt: skip
class BiasesTwice(Masked):
    """Ranks times the bias."""

    def biases(self, own: slice) -> Tensor | None:
        biases = super().biases(own)
        return None if biases is None else biases * self.size


@fault("gradients of the last step kept", "never zeroes them", check="gradients", case="two steps")
class Accumulated(Replicated):
    """The second step moves by the first one's gradient too."""

    kept: Tensor | None = None

    def reduced(self, partial: Tensor) -> Tensor:
        total = super().reduced(partial)
        if partial.shape == self.A.shape:
            total = total if self.kept is None else total + self.kept
            self.kept = total
        return total


@fault("only rank 0 updates", "guards the optimiser by `if rank == 0`", check="replicas", case="two steps")
class RankZero(Replicated):
    """The other replicas stay as they were."""

    def update(self, dA: Tensor, dB: Tensor, drouter: Tensor | None) -> None:
        if self.rank == 0:
            super().update(dA, dB, drouter)


@fault("rounded by a seed of its own", "rounds stochastically, each rank with its own seed",
       check="replicas", case="two steps")  # fmt: skip
class OwnSeed(Replicated):
    """Replicas that differ by their last bits."""

    def update(self, dA: Tensor, dB: Tensor, drouter: Tensor | None) -> None:
        super().update(dA, dB, drouter)
        draw = torch.Generator().manual_seed(self.rank)
        self.A = self.A + 2.0**-20 * torch.randint(-1, 2, self.A.shape, generator=draw)


@fault("learning rate times ranks", "scales the learning rate with the world", check="update", case="two steps")
class ScaledRate(Replicated):
    """The gradients are right, and not what is applied."""

    def update(self, dA: Tensor, dB: Tensor, drouter: Tensor | None) -> None:
        super().update(self.size * dA, self.size * dB, drouter)


@fault("clipped by its own norm", "clips each rank's part by that part's norm",
       check="gradients", case="uneven tokens")  # fmt: skip
class OwnNorm(Replicated):
    """The sum of clipped parts is no clipped sum."""

    def reduced(self, partial: Tensor) -> Tensor:
        return super().reduced(partial / max(1.0, float(size_of(self.group) * partial.norm())))

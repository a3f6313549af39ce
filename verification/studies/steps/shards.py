"""Mistakes with shards: which experts are a rank's, gathering them, saving them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist

from mxref.verification.distributed.protocol import Saved
from mxref.verification.studies.steps.fault import fault
from mxref.verification.studies.steps.honest import Exchanged, Masked, Replicated, Results


@fault("slice of the next rank", "counts ranks from 1", check="gradients", case="two steps")
class NextSlice(Exchanged):
    """Tokens meet another expert's weights."""

    def linear(
        self, x: Tensor, experts: Tensor, gates: Tensor | None, weights: tuple[Tensor, ...], biases: Tensor | None
    ) -> Tensor:
        other = self.owned((self.rank + 1) % self.size)
        held = (self.model.packed[other], self.model.scales[other], *weights[2:])
        return super().linear(x, experts, gates, held, biases)


@fault("slice by the global rank", "asks for its rank without the group", check="packed",
       case="two groups side by side", ranks=4)  # fmt: skip
class GlobalRank(Replicated):
    """Ranks 2 and 3 are 1 of their groups."""

    def owned(self, rank: int) -> slice:
        return super().owned(dist.get_rank())


@fault("remainder dropped", "gives each rank E // ranks experts", check="packed",
       case="experts that ranks do not divide")  # fmt: skip
class Remainder(Masked):
    """The last expert is nobody's; its rows are zero, as a sentinel's are."""

    def owned(self, rank: int) -> slice:
        each = self.experts // self.size
        return slice(rank * each, (rank + 1) * each)

    def of_all(self, dA: Tensor, dB: Tensor) -> tuple[Tensor, Tensor]:
        dA, dB = super().of_all(dA, dB)
        A, B = torch.zeros_like(self.A), torch.zeros_like(self.B)
        A[: dA.shape[0]], B[:, : dB.shape[1]] = dA, dB
        return A, B


@fault("padding kept", "pads shards to one size, gathers, and never cuts the padding off",
       check="packed", case="experts that ranks do not divide")  # fmt: skip
class Padded(Replicated):
    """Every expert behind the first rank's is one place off."""

    def whole(self) -> tuple[Tensor, Tensor]:
        most = -(-self.experts // self.size)
        kept = self.packed, self.scales
        short = most - self.packed.shape[0]
        self.packed = torch.cat([self.packed, self.packed.new_full((short, *self.packed.shape[1:]), 0xAB)])
        self.scales = torch.cat([self.scales, self.scales.new_full((short, *self.scales.shape[1:]), 127)])
        packed, scales = super().whole()
        self.packed, self.scales = kept
        return packed[: self.experts], scales[: self.experts]


@fault("NaN bytes canonicalised", "gathers packed bytes as bf16 numbers, which a cast makes one NaN of",
       check="packed", case="every byte")  # fmt: skip
class Canonical(Replicated):
    """As a policy of mixed precision does with whatever it takes for a number."""

    def whole(self) -> tuple[Tensor, Tensor]:
        packed, scales = super().whole()
        numbers = packed.view(torch.bfloat16)
        canonical = torch.where(numbers.isnan(), torch.full_like(numbers, torch.nan), numbers)
        return canonical.view(torch.uint8), scales


@fault("scales clamped", "takes 255 for out of range", check="packed", case="every byte")
class Clamped(Exchanged):
    """NaN becomes the largest scale; no token sees it."""

    def whole(self) -> tuple[Tensor, Tensor]:
        packed, scales = super().whole()
        return packed, scales.clamp(max=254)


@fault("gathered in the order of arrival", "joins shards in another order than the ranks'",
       check="packed", case="two steps", ranks=4)  # fmt: skip
class ShardOrder(Replicated):
    """All experts are there, elsewhere."""

    def whole(self) -> tuple[Tensor, Tensor]:
        packed, scales = super().whole()
        return packed.roll(1, 0), scales.roll(1, 0)


@fault("stale gather", "computes with adapters that were gathered before the update",
       check="gradients", case="two steps")  # fmt: skip
class Stale(Replicated):
    """Right in the first step."""

    first: tuple[Tensor, Tensor] | None = None

    def adapters(self, own: slice) -> tuple[Tensor, Tensor]:
        if self.first is None:
            self.first = super().adapters(own)
        return self.first


@fault("stale replica in backward", "gathers again for the backward pass, one step behind",
       check="gradients", case="two steps")  # fmt: skip
class StaleBackward(Replicated):
    """The output is right, and the gradients are of another adapter."""

    before: tuple[Tensor, Tensor] | None = None

    def layer(self, x: Tensor, experts: Tensor, gates: Tensor, dOut: Tensor) -> Results:
        now = self.A, self.B
        found = super().layer(x, experts, gates, dOut)
        if self.before is not None:
            self.A, self.B = self.before
            found |= {"dX": super().layer(x, experts, gates, dOut)["dX"]}
        self.A, self.B = self.before = now
        return found


@fault("rank 0's adapters saved for all", "saves without gathering: other ranks' experts are as they began",
       check="saved", case="two steps")  # fmt: skip
class RankZeroSaved(Exchanged):
    """Half of the training is lost, and nothing says so."""

    def trained(self) -> dict[str, Tensor | None]:
        r = self.A.shape[0] // self.experts
        A, B = self.model.lora_A.clone(), self.model.lora_B.clone()
        rows = slice(self.own.start * r, self.own.stop * r)
        A[rows], B[:, rows] = self.A[rows], self.B[:, rows]
        return super().trained() | {"lora_A": A, "lora_B": B}


@fault("rank 0's expert saved for all", "saves the first expert's adapter once for every expert",
       check="saved", case="sentinels")  # fmt: skip
class FirstExpert(Exchanged):
    """The right shape."""

    def trained(self) -> dict[str, Tensor | None]:
        r = self.A.shape[0] // self.experts
        return super().trained() | {"lora_A": self.A[:r].repeat(self.experts, 1)}


@fault("B saved rank by rank", "saves B with experts inside ranks, [N, r·E] for [N, E·r]",
       check="saved", case="two steps")  # fmt: skip
class Interleaved(Replicated):
    """A permutation of the right numbers, of the right shape."""

    def trained(self) -> dict[str, Tensor | None]:
        B = self.B.view(self.B.shape[0], self.experts, -1).mT.flatten(1)
        return super().trained() | {"lora_B": B}


@fault("A and B swapped", "saves one under the other's name", check="saved", case="two steps")
class Swapped(Replicated):
    """As a renaming by position does."""

    def trained(self) -> dict[str, Tensor | None]:
        return super().trained() | {"lora_A": self.B, "lora_B": self.A}


@fault("saved before the update", "saves what the last forward pass gathered", check="saved", case="uneven tokens")
class OneStepBehind(Replicated):
    """One step of training is missing."""

    def trained(self) -> dict[str, Tensor | None]:
        return super().trained() | {"lora_A": self.model.lora_A, "lora_B": self.model.lora_B}


@fault("saved in bf16", "saves fp32 adapters in the activations' dtype", check="saved", case="ordinary numbers")
class SavedNarrow(Replicated):
    """Resumed training starts elsewhere."""

    def trained(self) -> dict[str, Tensor | None]:
        return super().trained() | {"lora_A": self.A.bfloat16().float(), "lora_B": self.B.bfloat16().float()}


@fault("loaded in another order", "reads the shards' files last rank first", check="packed", case="two steps")
class LoadOrder(Replicated):
    """Experts of one rank under the numbers of another."""

    @staticmethod
    def mxref_load(folder: Path) -> Saved:
        saved = Replicated.mxref_load(folder)
        assert saved.packed is not None
        return Saved(saved.lora_A, saved.lora_B, saved.packed.flip(0), saved.scales, saved.router)

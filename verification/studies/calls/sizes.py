"""Bugs of how many there are: rows, experts, columns, ranks, slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mxref.problem import Problem
from mxref.verification.studies.calls.layer import Gradients, Layer, bug
from mxref.verification.studies.calls.values import reading, rows_of


@bug("M = 0 refused", "takes a maximum over the rows", rows="none")
class Empty(Layer):
    """Raises where there is no row."""

    def read(self, problem: Problem) -> Problem:
        assert problem.inputs.shape[0] == 0 or float(problem.inputs.detach().amax()) is not None
        if not problem.inputs.shape[0]:
            problem.inputs.detach().amax()
        return problem


@bug("M = 0 without a graph", "returns fresh zeros early", rows="none")
class EarlyOut(Layer):
    """No gradient reaches the parameters; they should get zeros."""

    def call(self, problem: Problem) -> Tensor:
        y = super().call(problem)
        return y.detach() if not problem.P else y


@bug("all sentinels: an early return without gradients", "returns zeros where no row is its own",
     routing="all sentinels")  # fmt: skip
class NoneOwned(Layer):
    """No gradient reaches the parameters; they should get zeros."""

    def call(self, problem: Problem) -> Tensor:
        y = super().call(problem)
        return y.detach() if problem.P and int(problem.expert_offsets[-1]) == 0 else y


@bug("sentinels other than E not known", "compares ids with E instead of from E on", routing="sentinels far above")
class FarSentinels(Layer):
    """Such rows get the last expert's bias, or one."""

    def forward(self, problem: Problem) -> Tensor:
        y = super().forward(problem)
        if problem.gates is not None:
            return y
        far = problem.sorted_expert_idxs > problem.E
        rows = torch.nonzero(far).flatten() if problem.grouped_out else problem.row_positions()[far]
        y[rows] = 1.0 if problem.expert_biases is None else problem.expert_biases[-1].detach().to(y.dtype)
        return y


@bug("biases on rows of other ranks", "adds biases by clamped ids", routing="sentinels", biases="there")
class BiasedSentinels(Layer):
    """Rows that should be zero hold the last expert's bias."""

    def forward(self, problem: Problem) -> Tensor:
        y = super().forward(problem)
        if problem.gates is not None or problem.expert_biases is None:
            return y
        away = problem.sorted_expert_idxs >= problem.E
        rows = torch.nonzero(away).flatten() if problem.grouped_out else problem.row_positions()[away]
        y[rows] = problem.expert_biases[-1].detach().to(y.dtype)
        return y


@bug("rows of x indexed by +=", "adds to indexed rows, where an index that occurs twice counts once",
     routing="an expert twice")  # fmt: skip
class Twice(Layer):
    """The second slot of a token at the same expert is lost to dX."""

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        found = super().backward(problem, dOut, needs)
        sources, experts = problem.row_sources(), problem.sorted_expert_idxs
        pairs = torch.stack((sources, experts))[:, experts < problem.E]
        _, counts = torch.unique(pairs, dim=1, return_counts=True) if pairs.numel() else (None, torch.ones(1))
        if bool((counts > 1).any()) and (dX := found["dX"]) is not None:
            repeated = torch.unique(pairs, dim=1)[0, counts > 1]
            dX[repeated] = dX[repeated] / 2
        return found


@bug("positions taken as ascending", "sorts positions within each expert", order_of_positions="descending")
class Ascending(Layer):
    """Rows of grouped operands belong to other positions then."""

    def read(self, problem: Problem) -> Problem:
        order = torch.argsort(problem.sorted_expert_idxs.long() * (problem.P + 1) + problem.row_positions())
        return replace(problem, sorted_scattered_idxs=problem.sorted_scattered_idxs[order])


@bug("a capacity an expert", "sizes an expert's buffer as three times the mean", routing="one takes all")
class Capacity(Layer):
    """Rows beyond it stay zero."""

    def forward(self, problem: Problem) -> Tensor:
        y = super().forward(problem)
        if problem.gates is not None:
            return y
        capacity = 3 * -(-problem.P // problem.E)
        for _, start, end in problem.segments():
            rows = torch.arange(start + min(capacity, end - start), end, device=y.device)
            y[rows if problem.grouped_out else problem.row_positions()[rows]] = 0
        return y


@bug("mean over an expert without rows", "divides by an expert's rows and multiplies again", routing="empty experts")
class EmptyExperts(Layer):
    """0/0 in gradients that should be zero."""

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        found = super().backward(problem, dOut, needs)
        empty = rows_of(problem) == 0
        if (dbias := found["dbias"]) is not None:
            found["dbias"] = torch.where(empty[:, None], torch.nan, dbias)
        if (dA := found["dA"]) is not None:
            found["dA"] = torch.where(empty.repeat_interleave(problem.rank)[:, None], torch.nan, dA)
        return found


@bug("one expert: routing not read", "takes a dense path where there is one expert", experts="one", routing="sentinels")
class OneExpert(Layer):
    """Rows of other ranks are computed too."""

    def read(self, problem: Problem) -> Problem:
        if problem.E > 1:
            return problem
        every = torch.zeros_like(problem.sorted_expert_idxs)
        return replace(problem, sorted_expert_idxs=every, expert_offsets=torch.full_like(every[:1], problem.P))


@bug("expert ids in a byte", "packs a tile's expert into eight bits", experts="hundreds")
class Byte(Layer):
    """Expert 256 is expert 0."""

    def read(self, problem: Problem) -> Problem:
        if problem.E <= 256 or problem.lora_B is None:
            return problem
        B = problem.lora_B.detach().clone().view(problem.N, problem.E, problem.rank)
        B[:, 256:] = B[:, : problem.E - 256]
        return replace(problem, lora_B=B.flatten(1))


@bug("rows in 16 bits", "stores row indices as 16-bit integers", rows="more than 2^16")
class Rows(Layer):
    """Row 65536 reads row 0."""

    def forward(self, problem: Problem) -> Tensor:
        y = super().forward(problem)
        y[1 << 16 :] = y[: max(0, len(y) - (1 << 16))].clone()
        return y


@bug("k rounded to a power of two", "divides positions by a shift", slots="odd")
class Shift(Layer):
    """Rows of three slots read other tokens."""

    def read(self, problem: Problem) -> Problem:
        if problem.grouped_in or problem.k & (problem.k - 1) == 0:
            return problem
        sources = torch.arange(problem.P, device=problem.device) >> (problem.k - 1).bit_length()
        x = problem.inputs.detach()[sources]
        return replace(problem, inputs=x[problem.row_positions()], k=1, grouped_in=True)


@bug("slots read off the gates", "takes k from the shape of gates", input_order="by expert", gates="positive")
class Slots(Layer):
    """Where rows come in expert order, k is 1 whatever the gates have."""

    def read(self, problem: Problem) -> Problem:
        if problem.gates is None or not problem.grouped_in:
            return problem
        x = problem.inputs.detach()
        return replace(problem, inputs=x[problem.row_positions() // problem.gates.shape[1]])


@bug("gates skipped at one slot", "takes the gate of a single slot for 1", slots="one", gates="negative")
class OneSlot(Layer):
    """A router that does not renormalise has other gates."""

    def read(self, problem: Problem) -> Problem:
        gates = problem.gates
        return problem if gates is None or gates.shape[1] > 1 else replace(problem, gates=torch.ones_like(gates))


@bug("a rank rounded down to a power of two", "sizes its tile of ranks as a power of two, without a tail", rank="odd")
class Rank(Layer):
    """The last adapter rows do not take part."""

    def read(self, problem: Problem) -> Problem:
        return _ranks(problem, 1 << max(problem.rank.bit_length() - 1, 0))


@bug("64 ranks at most", "has one tile of ranks", rank="largest")
class Ranks(Layer):
    """The rest does not take part."""

    def read(self, problem: Problem) -> Problem:
        return _ranks(problem, 64)


def _ranks(problem: Problem, most: int) -> Problem:
    if problem.lora_B is None or problem.rank <= most:
        return problem
    B = problem.lora_B.detach().clone().view(problem.N, problem.E, problem.rank)
    B[..., most:] = 0
    return replace(problem, lora_B=B.flatten(1))


def _lost_columns(lost: Callable[[int], slice]) -> Callable[[], Layer]:
    class Lost(Layer):
        def forward(self, problem: Problem) -> Tensor:
            y = super().forward(problem)
            y[:, lost(problem.N)] = 0
            return y

    return Lost


odd = bug("columns in pairs", "stores two columns at a time, without a tail", N="odd, below a tile")(
    _lost_columns(lambda N: slice(N // 2 * 2, N))
)
tail = bug("whole tiles of columns", "has no tail of columns behind the first tile", N="odd, a tile and a tail")(
    _lost_columns(lambda N: slice(N // 128 * 128, N) if N > 128 else slice(0, 0))
)


@bug("N = 1 squeezed", "squeezes its output", N="one")
class Squeezed(Layer):
    """[P] instead of [P, 1]."""

    def call(self, problem: Problem) -> Tensor:
        return super().call(problem).squeeze(-1)


K_tail = bug("whole steps of K", "has steps of 64 and no tail", K="a step and a tail")(
    reading(
        lambda p: {
            "inputs": torch.cat((p.inputs.detach()[:, : p.K // 64 * 64], 0 * p.inputs.detach()[:, p.K // 64 * 64 :]), 1)
        }
    )
)

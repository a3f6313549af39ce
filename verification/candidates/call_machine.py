"""The machine that sequences of calls drive: each step is a call, a backward pass, a change, or a look at results."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from torch import Tensor

from mxref.verification.candidates.answer import Answer, Outputs
from mxref.verification.candidates.candidate import Candidate, checkpointed
from mxref.verification.candidates.graphs import GRAPHS, MAY_BE_REFUSED, Ignored
from mxref.verification.candidates.operand_sets import CHANGED, CHANGES, SETS, changed, operand_sets, strided
from mxref.verification.candidates.shipped import golden
from mxref.verification.candidates.turns import in_turns
from mxref.verification.cases.call import Mode
from mxref.verification.cases.case import Sample

_CYCLES = 20_000_000
"""Of a GPU, some 10 ms: before that a call was made and has started what it starts."""


class DifferentError(AssertionError):
    """A result is not what it should be."""

    def __init__(self, answers: tuple[Answer, Answer]) -> None:
        super().__init__(answers[1].circumstance)
        self.answers = answers


@dataclass
class _Pending:
    """A forward pass whose backward pass may still come.

    Attributes:
        name: of the output in the script.
        which: operands it was called with.
        y, leaves: its graph.
        expected: the golden model's results for the operands as they were.
        kept: a copy of y as it came.
        changed: whether an operand was changed in place since.
    """

    name: str
    which: str
    y: Tensor
    leaves: dict[str, Tensor]
    expected: Outputs
    kept: Tensor
    changed: bool = False


class CallMachine(RuleBasedStateMachine):
    """Calls on sets of operands (see `operand_sets`), each the same tensors in every call."""

    def __init__(self, candidate: Candidate, sample: Sample, seen: list[tuple[Answer, Answer]]) -> None:
        super().__init__()
        self.candidate, self.seen, self.script = candidate, seen, list[str]()
        self.pending: list[_Pending] = []
        self.kept: list[tuple[Outputs, Outputs]] = []  # what was returned as it is, and a copy of it as it came
        sets, covers = operand_sets(sample), candidate.covers
        self.samples = {name: each for name, each in sets.items() if name == "a" or covers.holds(each.case)}
        self.expected: dict[str, Outputs] = {}  # as long as the operands are what they are

    @rule(which=st.sampled_from(SETS))
    def forward(self, which: str) -> None:
        """Call, and hold the output against the golden model."""
        which = self._covered(which)
        name = f"y{sum(line.startswith('y') for line in self.script)}"
        self.script.append(f"{name} = layer({which})")
        sample = self.samples[which]
        y, leaves = self.candidate.trace(sample, copy=False)
        pending = _Pending(name, which, y, leaves, self._golden(which), y.detach().clone())
        self.pending.append(pending)
        self._hold({"Y": y.detach()}, pending.expected)

    @rule(which=st.sampled_from(SETS), mode=st.sampled_from(("inference", "no_grad")))
    def evaluate(self, which: str, mode: str = "inference", rows: int | None = None) -> None:
        """Call without a graph and keep the output, or so many rows of it."""
        which = self._covered(which)
        self.script.append(f"layer({which}){f'[:{rows}]' if rows else ''} under {mode}")
        self._keep(self.candidate.trace(self.samples[which].called(mode=mode), copy=False)[0], which, rows)

    def detach(self, which: str) -> None:
        """Call, and keep the output alone, whose graph ends."""
        which = self._covered(which)
        self.script.append(f"layer({which}).detach()")
        self._keep(self.candidate.trace(self.samples[which], copy=False)[0].detach(), which)

    def _keep(self, y: Tensor, which: str, rows: int | None = None) -> None:
        self._hold({"Y": y}, self._golden(which))
        self.kept.append(({"Y": y[:rows]}, {"Y": y[:rows].clone()}))

    def refill(self, which: str) -> None:
        """The same tensor of incoming gradients holds others."""
        which = self._covered(which)
        self.script.append(f"change dOut of {which} in place")
        self.samples[which].grad_out.neg_()
        self.expected.pop(which, None)
        for pending in self.pending:
            if pending.which == which:
                pending.expected = self._golden(which)

    @precondition(lambda self: bool(self.pending))
    @rule(index=st.integers(0, 3), retain=st.booleans())
    def backward(self, index: int, retain: bool) -> None:
        """Gradients of an earlier call, one of several; after a change in place they may be refused."""
        pending = self.pending[index % len(self.pending)]
        retain = retain and not self.candidate.covers.one_backward
        self.script.append(f"gradients({pending.name}{', retain_graph=True' if retain else ''})")
        try:
            gradients = self.candidate.gradients(
                self.samples[pending.which], pending.y, pending.leaves, retain, copy=False
            )
        except RuntimeError:
            if not pending.changed:
                raise
            gradients = {}
        if not retain or not gradients:
            self.pending.remove(pending)
        self._hold(gradients, pending.expected)
        self.kept.append((gradients, _copied(gradients)))

    def in_graph(self, which: str, how: str) -> None:
        """A call in a graph that has more in it, one of GRAPHS, and its gradients, which torch may refuse of some."""
        self.script.append(f"layer({which}) and its gradients, where {how}")
        sample = self.samples[which]
        y, leaves = self.candidate.trace(sample, copy=False)
        self._hold({"Y": y.detach()}, self._golden(which))
        try:
            with GRAPHS[how](y, leaves) as result:
                gradients = self.candidate.gradients(sample, result, leaves, copy=False)
        except RuntimeError:
            if how not in MAY_BE_REFUSED:
                raise
            return
        self._hold(gradients, self._golden(which))

    def ignored(self, which: str) -> None:
        """A call whose output is used by what has no gradient for it: those of the operands are zero, or none."""
        self.script.append(f"layer({which}) and its gradients, where None comes in for dOut")
        y, leaves = self.candidate.trace(self.samples[which], copy=False)
        gradients = self.candidate.gradients(self.samples[which], Ignored.apply(y), leaves, copy=False)
        found = {name: x for name, x in gradients.items() if x is not None}
        self._hold(found, {name: torch.zeros_like(x) for name, x in found.items()})

    def in_region(self, *which: str) -> None:
        """Calls on the same leaves in one checkpointed region that goes on with their outputs, and the gradients."""
        self.script.append(f"layer({') and layer('.join(which)}) in one checkpointed region, and its gradients")
        which = tuple(map(self._covered, which))
        expected = self._region(golden(), which)
        self._hold(self._region(self.candidate, which), expected)

    def _region(self, candidate: Candidate, which: Sequence[str]) -> Outputs:
        """Outputs where they are positive, which the region computes again too, and the gradients of those."""
        leaves: dict[str, Tensor] = {}

        def region() -> Tensor:
            found = [candidate.trace(self.samples[each], copy=False) for each in which]
            leaves.update(found[0][1])
            return torch.cat([y for y, _ in found]).relu()

        y, first = checkpointed(region), self.samples[which[0]]
        sample = first.changed(torch.cat([self.samples[each].grad_out for each in which]))
        return {"Y": y.detach(), **candidate.gradients(sample, y, leaves, copy=False)}

    @precondition(lambda self: bool(self.pending))
    @rule(which=st.sampled_from("ab"), operand=st.sampled_from(CHANGED))
    def update(self, which: str, operand: str, how: str = CHANGES[0]) -> None:
        """Give operands other values: signs, powers of two or order, which leave every sum exact.

        Args:
            which: operands of "a" or "b".
            operand: one of CHANGED; nothing happens where the sample has none.
            how: one of CHANGES; but for the first, which autograd counts, no pass may be pending.
        """
        which = self._covered(which)
        problem = self.samples[which].problem
        again = sum(line.startswith(f"change {which}.{operand} ") for line in self.script) % 2 == 1
        values = changed(problem, operand, again)
        if not values:
            return
        for old, new in values:
            if how == ".data is another tensor":
                old.data = strided(new.detach(), "transposed")
            else:
                (old.detach() if how == "in place" else old.data).copy_(new)
        self.script.append(f"change {which}.{operand} {how}")
        touched = {"b"} if which == "b" else {"a", "c", "g"}
        for each in touched:
            self.expected.pop(each, None)
        for pending in self.pending:
            pending.changed |= pending.which in touched

    @precondition(lambda self: bool(self.kept))
    @rule()
    def overwrite(self) -> None:
        """What was returned, but for outputs whose backward pass may still come, is the caller's to write to."""
        self.script.append("overwrite every gradient, and outputs without a graph")
        for found, _ in self.kept:
            for x in found.values():
                if x is not None and 0 not in x.stride():  # one that autograd expanded cannot be written to
                    with torch.inference_mode():
                        x.fill_(float("nan"))
        self.kept.clear()

    def in_serving(self, which: str) -> None:
        """Operands made under inference_mode, whose versions nobody counts, change between calls."""
        with torch.inference_mode():
            sample = self.samples[which].mapped(lambda _, x: x.clone()).called(mode="inference", needs=())
            self.samples["served"] = sample
            self.evaluate("served")
            for operand in CHANGED:
                for old, new in changed(sample.problem, operand, again=False):
                    old.copy_(new)
                self.script.append(f"change served.{operand} in place")
                self.expected.pop("served", None)
                self.evaluate("served")

    def at_once(self, both: tuple[str, str], mode: Mode = "grad") -> None:
        """Two calls and their gradients, each in a thread of its own; the second under a mode."""
        both = (self._covered(both[0]), self._covered(both[1]))
        self.script.append(
            f"layer({both[0]}) and its gradients, and in another thread layer({both[1]}) under {mode} and its own"
        )

        def call(which: str, mode: Mode = "grad") -> Outputs:
            # What is global is set for both threads.
            return self._run(self.samples[which].called(algorithms="any", default_dtype=torch.float32, mode=mode))

        with self.samples[both[0]].case.call.in_both_passes():
            found = in_turns(lambda: call(both[0]), lambda: call(both[1], mode))
        for which, outputs in zip(both, found, strict=True):
            self._hold(outputs, self._golden(which))

    def on_streams(self, *which: str) -> None:
        """Calls and their gradients, each on a stream of its own, where its operands are filled long after the call."""
        self.script.append(f"layer({') and layer('.join(which)}) and their gradients, each on a stream of its own")
        which = tuple(map(self._covered, which))
        begun = []
        for each in which:
            sample, stream = self.samples[each], torch.cuda.Stream()
            tensors: dict[str, Tensor] = {}
            sample.mapped(tensors.setdefault)
            late = sample.mapped(lambda _, x: torch.zeros_like(x))
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(_CYCLES)
                late.mapped(lambda name, x: x.copy_(tensors[name]))  # noqa: B023
                begun.append((late, self._run(late)))
        torch.cuda.synchronize()
        for each, (_, outputs) in zip(which, begun, strict=True):
            self._hold(outputs, self._golden(each))

    @precondition(lambda self: bool(self.pending or self.kept))
    @rule()
    def look_again(self) -> None:
        """Outputs and gradients that were returned earlier are what they were."""
        self.script.append("look at every output again")
        for pending in self.pending:
            self._hold({"Y": pending.y.detach()}, {"Y": pending.kept})
        for found, copy in self.kept:
            self._hold(found, copy)

    def _covered(self, which: str) -> str:
        """The set, or a where that is not covered."""
        return which if which in self.samples else "a"

    def _run(self, sample: Sample) -> Outputs:
        y, leaves = self.candidate.trace(sample, copy=False)
        return {"Y": y.detach(), **self.candidate.gradients(sample, y, leaves, copy=False)}

    def _golden(self, which: str) -> Outputs:
        """The golden model's results for operands as they are."""
        if which not in self.expected:
            self.expected[which] = golden().run(self.samples[which])
        return self.expected[which]

    def _hold(self, got: Outputs, expected: Outputs) -> None:
        """Keep the answers; raise if a value is wrong."""
        got = _copied(got)
        right = {name: _like(expected.get(name), x) for name, x in got.items()}
        after = f"after «{'; '.join(_counted(self.script))}»"
        self.seen[:] = [(Answer(right), Answer(got, circumstance=after, like=0))]
        if not all(_equal(x, right[name]) for name, x in got.items()):
            raise DifferentError(self.seen[0])


def _counted(script: Iterable[str]) -> Iterator[str]:
    """Each line once, with how many times in a row; outputs are numbered on."""
    for _, alike in groupby(script, lambda line: re.sub(r"^y\d+ = ", "y = ", line)):
        line, *others = alike
        yield f"{line}, {len(others) + 1} times" if others else line


def _copied(outputs: Outputs) -> Outputs:
    return {name: None if x is None else x.clone() for name, x in outputs.items()}


def _like(x: Tensor | None, other: Tensor | None) -> Tensor | None:
    """A value in another one's dtype, and +0 for −0, which a sum may lose."""
    return x if x is None or other is None else x.to(other.dtype) + 0.0


def _equal(x: Tensor | None, right: Tensor | None) -> bool:
    if x is None or right is None:
        return x is right
    return x.shape == right.shape and torch.equal(x, right)

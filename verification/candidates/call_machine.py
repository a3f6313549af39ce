"""The machine that sequences of calls drive: each step is a call, a backward pass, a change, or a look at results."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import Tensor

from mxref.verification.candidates import operand_sets
from mxref.verification.candidates.answer import Answer, Outputs
from mxref.verification.candidates.candidate import Candidate, checkpointed
from mxref.verification.candidates.global_state import modes_unchanged
from mxref.verification.candidates.graphs import GRAPHS, INCOMING, MAY_BE_REFUSED, Ignored
from mxref.verification.candidates.operand_sets import CHANGED, CHANGES, SETS
from mxref.verification.candidates.shipped import golden
from mxref.verification.candidates.turns import in_turns
from mxref.verification.cases.call import Algorithms, Mode
from mxref.verification.cases.case import Sample

_CYCLES = 20_000_000
"""Of a GPU, some 10 ms: before that a call was made and has started what it starts."""


WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"owner": "parameter", "autocast": "both passes"},
    {"owner": "computed"},
)
"""In which all calls of a sequence are made: on leaves, on a module's parameters in one region of autocast, or on what
other operations have computed."""


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
    """Calls on sets of operands (see `operand_sets`), each the same tensors in every call.

    `how`: in which way all calls are made, by the names in `Call`, if the candidate covers it.
    """

    def __init__(self, candidate: Candidate, sample: Sample, seen: list[tuple[Answer, Answer]], **how: Any) -> None:
        super().__init__()
        self.candidate, self.sample, self.seen, self.script = candidate, sample, seen, list[str]()
        self.pending: list[_Pending] = []
        self.kept: list[tuple[Outputs, Outputs]] = []  # what was returned as it is, and a copy of it as it came
        self.held: list[Tensor] = []  # memory that others have taken meanwhile
        self.expected: dict[str, Outputs] = {}  # as long as the operands are what they are
        self.owned(how)

    @cached_property
    def samples(self) -> dict[str, Sample]:
        """The sets that are covered."""
        holds = self.candidate.covers.holds
        sets = operand_sets.operand_sets(self.sample).items()
        return {name: each for name, each in sets if name == "a" or holds(each.case)}

    def make_in_inference(self) -> None:
        """The sets are made under inference_mode: nobody counts their versions."""
        with torch.inference_mode():
            self.script.append(f"make {len(self.samples)} sets of operands under inference_mode")

    @initialize(how=st.sampled_from(WAYS))
    def owned(self, how: dict[str, Any]) -> None:
        """Calls are made in a way, if that is covered."""
        for name, value in how.items():
            asked = self.sample.called(**{name: value})
            if self.candidate.covers.holds(asked.case):
                self.sample = asked
                self.script.append(f"in all calls {name}: {value}")

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
    def evaluate(self, which: str, mode: Mode = "inference", rows: int | None = None) -> None:
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
        times = sum(line.startswith(f"change {which}.{operand} ") for line in self.script)
        values = operand_sets.changed(problem, operand, times)
        for old, new in values:
            with torch.inference_mode(old.is_inference()):
                if how == ".data is another tensor":
                    old.data = operand_sets.strided(new, "transposed")
                else:
                    (old.detach() if how == "in place" else old.data).copy_(new)
        self.script.append(f"change {which}.{operand} {how}")
        self.expected.clear()
        for pending in self.pending:
            pending.changed |= (pending.which == "b") == (which == "b")

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

    def given(self, which: str, how: str) -> None:
        """A call and its gradients for a dOut that came about in a way, one of INCOMING."""
        self.script.append(f"layer({which}) and its gradients, where {how}")
        sample = self.samples[which]
        self._hold(self._run(replace(sample, grad_out=INCOMING[how](sample.grad_out))), self._golden(which))

    def taken_again(self, which: str) -> None:
        """Parameters' memory is given back and taken elsewhere, as where they are sharded between two passes."""
        self.script.append(f"take other memory for the storages of {which}")
        problem = self.samples[which].problem
        for x in (problem.lora_A, problem.lora_B, problem.expert_biases):
            if x is not None:
                values, storage, size = x.detach().clone(), x.untyped_storage(), x.untyped_storage().nbytes()
                storage.resize_(0)
                self.held += [torch.full_like(values, float("nan")) for _ in range(64)]  # one of them where it was
                storage.resize_(size)
                x.data.copy_(values)

    def chained(self) -> None:
        """Two layers, the second on the first one's Y, and dX through both: as if copies were handed over."""
        fits = [each for each in self.samples.values() if each.grad_out.shape == each.problem.inputs.shape]
        for sample in map(operand_sets.signs_alone, fits[:1]):
            self.script.append("Y = layer(x), Z = layer(Y), and dX through both")
            y, leaves = self.candidate.trace(sample, copy=False)
            z, _ = self.candidate.trace(sample.changed(inputs=y), copy=False)
            asked = {"dX": leaves["dX"]} if "dX" in leaves else {}
            gradients = self.candidate.gradients(sample, z, asked, copy=False)
            self._hold({"Y": z.detach(), **gradients}, self._on_copies(sample))

    def _on_copies(self, sample: Sample) -> Outputs:
        y, leaves = self.candidate.trace(sample)
        second = sample.changed(inputs=y.detach().clone())
        outputs = self._run(second)
        dY = outputs.get("dX")
        if dY is None:
            return outputs
        gradients = self.candidate.gradients(sample.changed(dY.clone()), y, leaves)
        return {"Y": outputs["Y"], "dX": gradients["dX"]}

    def refused(self, which: str) -> None:
        """A call whose k does not fit, which may be refused: what is global stays, and later calls are as ever."""
        self.script.append(f"layer({which}) with another k, which may be refused")
        asked = self.samples[which].called(default_dtype=torch.bfloat16, algorithms="deterministic")
        sample = asked if self.candidate.covers.holds(asked.case) else self.samples[which]
        with sample.case.call.in_both_passes(), modes_unchanged("refusal"), suppress(Exception):
            self.candidate.call(**replace(sample.problem, k=sample.problem.k + 1).arguments())

    def at_once(self, *which: str, mode: Mode = "grad", algorithms: Algorithms = "any") -> None:
        """Calls and their gradients, each in a thread of its own; the last under a mode."""
        which = tuple(map(self._covered, which))
        self.script.append(f"layer({') and layer('.join(which)}) and their gradients in threads, the last under {mode}")
        # What is global is set for all threads.
        sample = self.samples["a"].called(algorithms=algorithms)
        surroundings = (sample if self.candidate.covers.holds(sample.case) else self.samples["a"]).case.call

        def call(each: str, mode: Mode = "grad") -> Outputs:
            return self._run(self.samples[each].called(algorithms="any", default_dtype=torch.float32, mode=mode))

        calls = [*(partial(call, each) for each in which[:-1]), partial(call, which[-1], mode)]
        with surroundings.in_both_passes(), modes_unchanged("call in several threads"):
            found = in_turns(*calls)
        for each, outputs in zip(which, found, strict=True):
            self._hold(outputs, self._golden(each))

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

    def told(self) -> str:
        """The sequence so far, in words."""
        return f"after «{'; '.join(_counted(self.script))}»"

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
        self.seen[:] = [(Answer(right), Answer(got, circumstance=self.told(), like=0))]
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

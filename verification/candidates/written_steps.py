"""Steps that chance does not choose: calls within larger graphs, of a particular kind, or several at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mxref.verification.candidates import operand_sets
from mxref.verification.candidates.answer import Outputs
from mxref.verification.candidates.call_machine import CallMachine
from mxref.verification.candidates.candidate import Candidate, checkpointed
from mxref.verification.candidates.global_state import modes_unchanged
from mxref.verification.candidates.graphs import GRAPHS, INCOMING, MAY_BE_REFUSED, Ignored
from mxref.verification.candidates.shipped import golden
from mxref.verification.candidates.turns import in_turns
from mxref.verification.cases.call import Algorithms, Mode
from mxref.verification.cases.case import Sample

_CYCLES = 20_000_000
"""Of a GPU, some 10 ms: before that a call was made and has started what it starts."""


class WrittenSteps(CallMachine):
    """The machine with the steps of sequences that are written out."""

    def make_in_inference(self) -> None:
        """The sets are made under inference_mode: nobody counts their versions."""
        with torch.inference_mode():
            self.script.append(f"make {len(self.samples)} sets of operands under inference_mode")

    def detach(self, which: str) -> None:
        """Call, and keep the output alone, whose graph ends."""
        which = self._covered(which)
        self.script.append(f"layer({which}).detach()")
        self._keep(self.candidate.trace(self.samples[which], copy=False)[0].detach(), which)

    def refill(self, which: str) -> None:
        """The same tensor of incoming gradients holds others."""
        which = self._covered(which)
        self.script.append(f"change dOut of {which} in place")
        self.samples[which].grad_out.neg_()
        self.expected.pop(which, None)
        for pending in self.pending:
            if pending.which == which:
                pending.expected = self._golden(which)

    def in_graph(self, which: str, how: str) -> None:
        """A call in a graph that has more in it, one of GRAPHS, and its gradients, which torch may refuse of some."""
        self.script.append(f"layer({which}) and its gradients, where {how}")
        sample = self.samples[which]
        y, leaves = self.candidate.trace(sample, copy=False)
        self._hold({"Y": y.detach()}, self._golden(which))
        if not leaves:
            return  # there is no graph
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

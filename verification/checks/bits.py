"""How an implementation behaves, whatever it computes: every comparison here is of bits.

    determinism          the same call gives the same bits, run after run, in whatever order programs run
    rows                 a row's bits depend on no other row: not on its values, not on how many there are
    poison               neither what surrounds an operand in memory nor what memory held before reaches a result
    unmutated            operands, and what surrounds them, are left as they were
    second backward      a retained graph gives the first gradients again
    configurations       every configuration that dispatch can reach keeps the contract, and dispatch reaches no other

Each guard is judged on its own and can be used alone. What a candidate raises is a finding; NotImplementedError means
that it does not cover the case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from mxref.routing import flatten_sort_count
from mxref.verification.arithmetic.accumulation import Accumulation
from mxref.verification.arithmetic.thresholds import RUNS
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.memory.program_order import reversed_programs
from mxref.verification.candidates.memory.red_zones import fenced, uninitialised_memory
from mxref.verification.cases.case import Sample
from mxref.verification.checks.exact import attempt, integer_guard, interval_guard, raised
from mxref.verification.checks.finding import Counterexample, ErrorSample, Finding, Status

__all__ = [
    "BEHAVIOURS",
    "configuration_guard",
    "determinism_guard",
    "poison_guard",
    "row_guard",
    "second_backward_guard",
]

Outputs = Mapping[str, Tensor | None]


def determinism_guard(candidate: Candidate, sample: Sample, runs: int = RUNS) -> list[Finding]:
    """The same bits in every one of `runs` runs on fresh copies of the operands.

    Interpreted, every second run takes the programs of each kernel in reverse: two that write the same element show.
    """
    guard, name = "determinism", sample.case.name
    first = attempt(guard, candidate, sample)
    if isinstance(first, Finding):
        return [first]
    findings: dict[str, Finding] = {}
    for run in range(2, runs + 1):
        reverse = run % 2 == 0 and sample.problem.device.type == "cpu"
        with reversed_programs() if reverse else nullcontext():
            again = attempt(guard, candidate, sample)
        if isinstance(again, Finding):
            return [again]
        broken = f"run {run}{', its programs in reverse order,' if reverse else ''} differs from run 1"
        for finding in _compare(guard, name, first, again, broken, f"the same in {runs} runs"):
            if finding.tensor not in findings or findings[finding.tensor].ok:
                findings[finding.tensor] = finding
    return list(findings.values())


def row_guard(candidate: Candidate, sample: Sample) -> list[Finding]:
    """A token's rows of Y, dX and dgates keep their bits when other tokens change their values, and when they leave.

    The second half needs the same configuration for both batches, so it is judged under each one that the candidate
    can be pinned to. Without a pin dispatch may choose by size: rows are then judged at equal shapes only.
    """
    name = sample.case.name
    if candidate.configs is None:
        return _values_of_others(candidate, sample, name, "at equal shapes only: no configuration can be pinned")
    findings = []
    for config in candidate.configs(sample.problem.dtype):
        pinned, place = candidate.pinned(config), f"{name}, {config}"
        findings += _values_of_others(pinned, sample, f"{place}, other values", "under a pinned configuration")
        findings += _fewer_tokens(pinned, sample, f"{place}, fewer rows")
    return findings


def poison_guard(candidate: Candidate, sample: Sample) -> list[Finding]:
    """Fenced operands and poisoned memory change no bit of the results, and no bit of the operands is changed.

    Every operand lies between two zones of NaN (0xFF in packed weights and scales, ids out of range in index tensors),
    and memory that torch hands out uninitialised is filled with NaN.
    """
    guard, name = "poison", sample.case.name
    with uninitialised_memory(poisoned=False):
        clean = attempt(guard, candidate, sample)
    if isinstance(clean, Finding):
        return [clean]
    inside, fences = fenced(sample)
    try:
        with uninitialised_memory(poisoned=True):
            y, leaves = candidate.trace(inside, copy=False)
            poisoned = {"Y": y.detach(), **candidate.gradients(inside, y, leaves)}
    except Exception as error:  # whatever a candidate raises is a finding about it
        return [raised(guard, name, error)]
    findings = _compare(
        guard, name, clean, poisoned,
        "what surrounds an operand, or memory that was never written, reached the result",
        "nothing from outside the operands reached the result",
    )  # fmt: skip
    for operand, fence in fences.items():
        inner, outer = fence.changed()
        reason = "left as it was, and its surroundings too"
        if inner or outer:
            reason = f"{inner} bytes of the operand and {outer} bytes around it were overwritten"
        status = Status.FAIL if inner or outer else Status.PASS
        findings.append(Finding("unmutated", name, operand, status, reason, fence.numel, inner + outer))
    return findings


def second_backward_guard(candidate: Candidate, sample: Sample) -> list[Finding]:
    """A second backward pass over a retained graph gives the first one's bits."""
    guard, name = "second backward", sample.case.name
    try:
        y, leaves = candidate.trace(sample)
        first = candidate.gradients(sample, y, leaves, retain_graph=True)
        first = {tensor: None if x is None else x.clone() for tensor, x in first.items()}
        second = candidate.gradients(sample, y, leaves)
    except Exception as error:  # whatever a candidate raises is a finding about it
        return [raised(guard, name, error)]
    if not first:
        return [Finding(guard, name, "all", Status.NOT_COVERED, "the candidate has no backward pass", 0, 0)]
    return _compare(guard, name, first, second, "the second backward pass differs", "the same in two backward passes")


def configuration_guard(
    candidate: Candidate, samples: Sequence[Sample], accumulation: Accumulation
) -> tuple[list[Finding], list[ErrorSample]]:
    """Every reachable configuration, pinned, computes the samples right; dispatch on its own picks one of them.

    Integer fixtures are judged by bits, other samples by their intervals. What dispatch picked is told by bits too: its
    results must be those of some pinned configuration. Nothing is returned for a candidate without configurations.
    """
    if candidate.configs is None:
        return [], []
    findings: list[Finding] = []
    errors: list[ErrorSample] = []
    for sample in samples:
        chosen = attempt("configurations", candidate, sample)
        if isinstance(chosen, Finding):
            findings.append(chosen)
            continue
        matches = []
        for config in candidate.configs(sample.problem.dtype):
            recorded, place = _Recorded(candidate.pinned(config)), f"{sample.case.name}, {config}"
            if sample.case.data == "integer":
                judged = integer_guard(recorded, sample)
            else:
                points = candidate.points(sample.problem.dtype)
                judged, drawn = interval_guard(recorded, sample, points, accumulation)
                errors += [replace(error, case=place) for error in drawn]
            findings += [replace(finding, guard="configurations", case=place) for finding in judged]
            matches += [config] if _same(chosen, recorded.outputs) else []
        status, reason = Status.PASS, "dispatch gives the bits of a reachable configuration"
        if not matches:
            status, reason = Status.FAIL, "dispatch gives the bits of no reachable configuration: it picked another one"
        findings.append(Finding("configurations", sample.case.name, "dispatch", status, reason, 0, 0))
    return findings, errors


class _Recorded:
    """A candidate whose last outputs are kept."""

    def __init__(self, candidate: Candidate) -> None:
        self.candidate, self.outputs = candidate, dict[str, Tensor | None]()

    def run(self, sample: Sample) -> dict[str, Tensor | None]:
        self.outputs = self.candidate.run(sample)
        return self.outputs


def _values_of_others(candidate: Candidate, sample: Sample, place: str, how: str) -> list[Finding]:
    """Every second token gets other values, a thousand times as large; the rest must not notice."""
    rows, problem = _Rows(sample), sample.problem
    odd = torch.arange(1, sample.case.tokens, 2, device=problem.device)

    def disturbed(x: Tensor, tokens: Tensor, factor: float) -> Tensor:
        return torch.where(torch.isin(tokens, odd)[:, None], x * factor, x)

    gates = None if problem.gates is None else disturbed(problem.gates, rows.of["dgates"], -0.5)
    other = Sample(
        sample.case,
        replace(problem, inputs=disturbed(problem.inputs, rows.of["dX"], -1024.0), gates=gates),
        disturbed(sample.grad_out, rows.of["Y"], -1024.0),
    )
    kept = []
    for each in (sample, other):
        outputs = attempt("rows", candidate, each)
        if isinstance(outputs, Finding):
            return [replace(outputs, case=place)]
        untouched = {tensor: ~torch.isin(tokens, odd) for tensor, tokens in rows.of.items()}
        kept.append({name: x[untouched[name]] for name, x in outputs.items() if name in untouched and x is not None})
    held = f"independent of other rows, {how}"
    return _compare("rows", place, kept[0], kept[1], "bits follow the values of other rows", held)


def _fewer_tokens(candidate: Candidate, sample: Sample, place: str) -> list[Finding]:
    """A third of the tokens by themselves: other companions, other tiles, and on a GPU other places in them.

    Interpreted, a tile's product is NumPy's, whose bits follow a row's place in the tile. The first tokens keep theirs.
    """
    rows, tokens = _Rows(sample), torch.arange(sample.case.tokens, device=sample.problem.device)
    keep = tokens[: -(-len(tokens) // 3)] if tokens.device.type == "cpu" else tokens[1::3]
    whole, part = attempt("rows", candidate, sample), attempt("rows", candidate, rows.only(keep))
    if isinstance(whole, Finding) or isinstance(part, Finding):
        return [replace(output, case=place) for output in (whole, part) if isinstance(output, Finding)]
    expected = {name: rows.select(name, x, keep) for name, x in whole.items() if name in rows.of and x is not None}
    left = {tensor: part.get(tensor) for tensor in expected}
    return _compare("rows", place, expected, left, "bits follow the batch", "the same in a smaller batch")


class _Rows:
    """Which token each row of Y (and dOut), dX (and x) and dgates belongs to, and the sample of a few tokens only."""

    def __init__(self, sample: Sample) -> None:
        problem, top_k = sample.problem, sample.case.top_k
        self.sample, self.top_k = sample, top_k
        by_expert = problem.row_positions() // top_k

        def every(fan: int) -> Tensor:
            return torch.arange(0, problem.P, fan, device=problem.device) // top_k

        slots = sample.case.gate_slots
        self.of = {"Y": by_expert if problem.grouped_out else every(slots or 1)}
        self.of["dX"] = by_expert if problem.grouped_in else every(problem.k)
        if slots:
            self.of["dgates"] = every(slots)
        self.in_expert_order = {"Y": problem.grouped_out, "dX": problem.grouped_in, "dgates": False}

    def _routing(self, keep: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Positions of the kept tokens, and the routing of these tokens alone."""
        problem = self.sample.problem
        positions = (keep[:, None] * self.top_k + torch.arange(self.top_k, device=keep.device)).flatten()
        experts = torch.empty_like(problem.sorted_expert_idxs)
        experts[problem.row_positions()] = problem.sorted_expert_idxs
        return positions, flatten_sort_count(experts[positions].view(-1, self.top_k), problem.E)

    def select(self, tensor: str, rows: Tensor, keep: Tensor) -> Tensor:
        """The kept tokens' rows, in the order that a call on these tokens alone has them."""
        if not self.in_expert_order[tensor]:
            return rows[torch.isin(self.of[tensor], keep)]
        positions, (_, order, _) = self._routing(keep)
        by_position = torch.empty_like(rows)
        by_position[self.sample.problem.row_positions()] = rows
        return by_position[positions][order.long()]

    def only(self, keep: Tensor) -> Sample:
        """The sample of the kept tokens alone."""
        problem = self.sample.problem
        experts, order, offsets = self._routing(keep)[1]
        part = replace(
            problem,
            inputs=self.select("dX", problem.inputs, keep),
            sorted_expert_idxs=experts,
            sorted_scattered_idxs=order,
            expert_offsets=offsets,
            gates=None if problem.gates is None else self.select("dgates", problem.gates, keep),
        )
        case = replace(self.sample.case, tokens=keep.numel())
        return Sample(case, part, self.select("Y", self.sample.grad_out, keep))


def _compare(guard: str, case: str, expected: Outputs, got: Outputs, broken: str, held: str) -> list[Finding]:
    """One finding a tensor: whether both runs gave the same bits."""
    findings = []
    for tensor, x in expected.items():
        again = got.get(tensor)
        if x is None or again is None or x.shape != again.shape or x.dtype != again.dtype:
            same = x is None and again is None
            reason = "no gradient, alike" if same else f"{broken}: one has no such tensor, or of another form"
            findings.append(Finding(guard, case, tensor, Status.PASS if same else Status.FAIL, reason, 0, 0))
            continue
        different = _bits(x) != _bits(again)
        count = int(different.sum())
        if not count:
            findings.append(Finding(guard, case, tensor, Status.PASS, held, x.numel(), 0))
            continue
        where = tuple(int(index) for index in different.nonzero()[0])
        value, other = float(x[where]), float(again[where])
        fresh = int((torch.isnan(again) & ~torch.isnan(x)).sum())
        reason = f"{broken}: {count} of {x.numel()} elements" + (f", {fresh} of them NaN" if fresh else "")
        shown = Counterexample(where, other, value, value, value)
        findings.append(Finding(guard, case, tensor, Status.FAIL, reason, x.numel(), count, counterexample=shown))
    return findings


def _same(a: Outputs, b: Outputs) -> bool:
    return all(finding.ok for finding in _compare("", "", a, b, "", ""))


_BITS: dict[int, torch.dtype] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(_BITS[x.element_size()])


BEHAVIOURS: dict[str, Callable[[Candidate, Sample], list[Finding]]] = {
    "determinism": determinism_guard,
    "rows": row_guard,
    "poison": poison_guard,
    "second backward": second_backward_guard,
}
"""Guards that take one sample, by name; `poison_guard` speaks for "unmutated" too."""

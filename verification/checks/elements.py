"""An output against what is accepted, element by element: shared by the checks of values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from traceback import TracebackException

import numpy as np
import torch
from torch import Tensor

from mxref.formats import MX_BLOCK_SIZE
from mxref.not_covered import NotCovered
from mxref.rounding import round_to
from mxref.verification.arithmetic.interval import Interval
from mxref.verification.arithmetic.metrics import rms, ulp_error
from mxref.verification.candidates.answer import OPERAND_OF, Answer, Outputs, UnusableAnswerError
from mxref.verification.cases.case import Sample
from mxref.verification.checks.expectation import Expectation
from mxref.verification.checks.finding import Counterexample, ErrorSample, Finding, FloatArray, Status
from mxref.verification.checks.patterns import Axis, patterns

_MATRICES = ("Y", "dX", "dA", "dB")
_PLOT_POINTS = 20_000
_HERE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Comparison:
    """An output against its interval, elementwise; fp64 but `inside`."""

    got: Tensor
    interval: Interval
    inside: Tensor
    allowed: Tensor  # accepted distance on the side of `got`
    ulps: Tensor

    def finding(
        self, case: str, tensor: str, status: Status, reason: str, axes: Sequence[Axis] | None = None
    ) -> Finding:
        """Largest and RMS error, share of the bound, the first element outside, and what all those have in common.

        `axes`: see `axes_of`; None where unknown.
        """
        exact, elements = self.interval.exact, self.got.numel()
        violations = elements - int(self.inside.sum())
        counterexample, found = None, list[str]()
        if violations:
            if axes is not None and len(axes) == self.got.ndim:
                found = patterns(~self.inside, self.got, exact, axes)
            reason = "; ".join([*found, f"{violations:,} of {elements:,} elements outside what is accepted"])
            status, counterexample = Status.FAIL, self._first_outside()
        finite = torch.isfinite(self.got) & torch.isfinite(exact)
        ulps, distance = self.ulps[finite], (self.got - exact).abs()[finite]
        share = torch.where(distance == 0, 0.0, distance / self.allowed[finite])
        any_left = bool(finite.any())
        return Finding(
            "", case, tensor, status, reason, elements, violations,
            max_ulp=float(ulps.abs().max()) if any_left else None,
            rms_ulp=rms(ulps) if any_left else None,
            bound_share=float(share.max()) if any_left else None,
            counterexample=counterexample, patterns=tuple(found),
        )  # fmt: skip

    def sample(self, case: str, tensor: str) -> ErrorSample:
        """At most 20,000 finite elements, evenly spaced over the flattened tensor."""
        exact = self.interval.exact
        stride = max(1, -(-exact.numel() // _PLOT_POINTS))

        def thin(x: Tensor) -> FloatArray:
            array: FloatArray = x.flatten()[::stride].cpu().numpy()
            return array

        arrays = [thin(x) for x in (exact.abs(), self.got - exact, self.allowed, self.ulps)]
        keep = np.all([np.isfinite(array) for array in arrays], axis=0)
        return ErrorSample(case, tensor, *(array[keep] for array in arrays))

    def _first_outside(self) -> Counterexample:
        where = tuple(int(index) for index in (~self.inside).nonzero()[0])
        values = (self.got, self.interval.exact, self.interval.low, self.interval.high)
        got, exact, low, high = (float(x[where]) for x in values)
        note = ""
        if np.isnan(got) and not np.isnan(exact):
            note = "NaN where the reference is a number"
        elif not np.isfinite(exact):
            note = "the reference is not finite; the result must be of the same class"
        return Counterexample(where, got, exact, low, high, note)


def compare(got: Tensor, interval: Interval) -> Comparison:
    """An output against its interval; where the reference is NaN or infinite the class decides."""
    value, exact = got.double(), interval.exact
    interval = stored(interval, got.dtype)
    low, high = interval.low, interval.high
    inside = (value >= low) & (value <= high)
    same_class = (value == exact) | (torch.isnan(value) & torch.isnan(exact))
    inside = torch.where(torch.isfinite(exact), inside, same_class)
    allowed = torch.where(value > exact, high - exact, exact - low)
    return Comparison(value, interval, inside, allowed, ulp_error(got, exact, got.dtype))


def stored(interval: Interval, dtype: torch.dtype) -> Interval:
    """The interval of a result in a dtype narrower than declared: one more, monotonic rounding."""
    if dtype not in (torch.bfloat16, torch.float16) or interval.grid == dtype:
        return interval
    return replace(interval, low=round_to(interval.low, dtype), high=round_to(interval.high, dtype), grid=dtype)


def comparable(
    answer: Answer, expected: Expectation, tensor: str, case: str, interval: Interval | None = None
) -> tuple[Tensor, Interval | None] | Finding:
    """An output and its interval, reduced to the rows that count; or a finding if it cannot be compared.

    Undecided elements become the reference's.
    """
    shape, dtypes = _form(expected, tensor)
    elements = int(np.prod(shape))

    def finding(reason: str) -> Finding:
        return Finding("", case, tensor, Status.FAIL, reason, elements, elements)

    if tensor not in answer.outputs:
        return finding("the candidate does not compute it")
    got = answer.outputs[tensor]
    if got is None:
        return finding(f"no gradient reached {OPERAND_OF[tensor]}" if tensor in OPERAND_OF else "no output")
    if tuple(got.shape) != shape:
        return finding(f"has shape {tuple(got.shape)}; expected {shape}")
    if got.dtype not in dtypes:
        return finding(f"is {got.dtype}; expected {dtypes[0]}")
    undecided = None if expected.sample.case.exact else expected.accepted[tensor].undecided
    if undecided is not None:
        got = torch.where(undecided, expected.exact[tensor].to(got.dtype), got)
    rows = answer.rows.get(tensor)
    if rows is None or interval is None:
        return got, interval
    return got[rows], Interval(interval.low[rows], interval.high[rows], interval.exact[rows])


def axes_of(sample: Sample, tensor: str) -> list[Axis]:
    """A result's axes: what its rows and columns are, and which expert's."""
    problem, slots = sample.problem, sample.case.gate_slots
    E, r, device = problem.E, problem.rank, problem.device
    order = problem.sorted_expert_idxs.long()
    experts = torch.where(order < E, order, -1)  # of each routed row, in expert order
    by_position = torch.empty_like(experts).index_copy_(0, problem.row_positions(), experts)
    own = torch.arange(E * r, device=device) // max(1, r)
    column, k_column = Axis("column"), Axis("column", block=MX_BLOCK_SIZE)
    rows = Axis("row", (("expert", experts if problem.grouped_out else by_position),))
    if tensor == "dX":
        of_x = experts if problem.grouped_in else by_position if problem.k == 1 else None
        return [Axis("row", () if of_x is None else (("expert", of_x),)), k_column]
    return {
        "Y": [Axis("token") if slots else rows, column],
        "dA": [Axis("row", (("expert", own),)), k_column],
        "dB": [Axis("row"), Axis("column", (("expert", own),))],
        "dbias": [Axis("expert"), column],
        "dgates": [Axis("token"), Axis("slot")],
        "W": [Axis("expert"), Axis("row"), k_column],
    }.get(tensor, [])


def each_answer(
    answers: Sequence[Answer], sample: Sample, judge: Callable[[Answer, str], Iterable[Finding]]
) -> list[Finding]:
    """What `judge` finds in each answer, given its case's name; of an error, the error."""
    findings: list[Finding] = []
    for answer in answers:
        case = name_of(answer, sample)
        findings += judge(answer, case) if answer.error is None else [raised(answer, case)]
    return findings


def each_tensor(
    answers: Sequence[Answer], expected: Expectation, judge: Callable[[str, str, Tensor, Interval], Finding | None]
) -> list[Finding]:
    """What `judge` finds, given case and tensor, in each comparable Y, dX, dA, dB."""
    findings = []
    for answer in answers:
        case = name_of(answer, expected.sample)
        for tensor in (name for name in _MATRICES if name in expected.accepted and answer.error is None):
            got = comparable(answer, expected, tensor, case)
            if not isinstance(got, Finding):
                finding = judge(case, tensor, got[0], stored(expected.accepted[tensor], got[0].dtype))
                findings += [] if finding is None else [finding]
    return findings


def name_of(answer: Answer, sample: Sample) -> str:
    """An answer's case as findings name it."""
    return f"{sample.case.name}, {answer.label}" if answer.label else sample.case.name


def raised(answer: Answer, case: str) -> Finding:
    """What a candidate raised, as a finding; `NotCovered` declines the case."""
    error = answer.error
    assert error is not None
    if isinstance(error, NotCovered):
        return Finding("", case, "all", Status.NOT_COVERED, str(error) or "NotCovered", 0, 0)
    said = str(error)
    if not isinstance(error, UnusableAnswerError):
        lines = said.strip().splitlines() or [""]
        said = f"raised {type(error).__name__}: {lines[0]}{' …' if len(lines) > 1 else ''}"
    if answer.circumstance:
        said += f", {answer.circumstance}"
    if isinstance(error, NotImplementedError):
        said += " (what is not supported is declined by mxref.NotCovered, or declared by --covers)"
    return Finding("", case, "all", Status.FAIL, said, 0, 0, trace=_trace(error))


def _trace(error: BaseException) -> str:
    """The candidate's traceback, without our frames."""
    told = TracebackException.from_exception(error)
    own = [
        number for number, frame in enumerate(told.stack) if not Path(frame.filename).resolve().is_relative_to(_HERE)
    ]
    told.stack[:] = told.stack[own[0] :] if own else []
    return "".join(told.format()).strip()


def unexpected(outputs: Outputs, case: str, expected: Mapping[str, object]) -> list[Finding]:
    """Gradients of what is frozen or absent."""
    extra = [name for name, output in outputs.items() if name not in expected and output is not None]
    reason = "a gradient that nothing asks for: its operand is frozen or absent"
    return [Finding("", case, name, Status.FAIL, reason, 0, 0) for name in extra]


def _form(expected: Expectation, tensor: str) -> tuple[tuple[int, ...], tuple[torch.dtype, ...]]:
    """Expected shape, and accepted dtypes, the regular one first; on a CPU also wider ones."""
    sample, problem = expected.sample, expected.sample.problem
    operand: Tensor = problem.inputs if tensor == "Y" else getattr(problem, OPERAND_OF[tensor])
    shape = tuple(sample.grad_out.shape if tensor == "Y" else operand.shape)
    wider = (torch.float32, torch.float64) if expected.device.type == "cpu" else ()
    return shape, (operand.dtype, *wider)

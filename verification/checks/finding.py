"""A check's finding: status, numbers, and the first element that contradicts the contract."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


class Status(StrEnum):
    """Outcome of one check on one tensor of one case."""

    PASS = "pass"
    FAIL = "fail"
    WEAK = "weak pass"  # inside an order-free bound only: the accumulation was not declared
    WORSE = "worse than baseline"  # right, but less accurate than accepted for this architecture
    NOT_COVERED = "not covered"  # the candidate declined the case (mxref.NotCovered)


@dataclass(frozen=True)
class Counterexample:
    """The first element outside its interval [`low`, `high`]."""

    coordinate: tuple[int, ...]
    got: float
    expected: float
    low: float
    high: float
    note: str = ""

    def __str__(self) -> str:
        where = ", ".join(str(index) for index in self.coordinate)
        text = f"[{where}]: got {self.got:.9g}, expected {self.expected:.9g} in [{self.low:.9g}, {self.high:.9g}]"
        return f"{text} ({self.note})" if self.note else text


@dataclass
class ErrorSample:
    """Errors of one tensor, thinned for plots. All arrays are 1-D, fp64 and of one length.

    magnitude: |reference|.  error: got - reference (signed).  bound: the accepted distance on that side of the
    reference.  ulp_error: error in ulp of the tensor's dtype at the reference (signed).
    """

    case: str
    tensor: str
    magnitude: FloatArray
    error: FloatArray
    bound: FloatArray
    ulp_error: FloatArray


@dataclass
class DriftMap:
    """Significance of one tensor's drift by stratum.

    rows, columns: labels of the strata; the last of each is all together.
    z: fp64 [rows, columns], the slope of largest |z| in standard errors, signed; NaN without a fit.
    critical: |z| beyond this fails (but for truncation's allowed loss).
    log2_ratio: elements by ⌊log2 |got / reference|⌉, where rounding cannot change it; honest arithmetic has only 0.
    """

    case: str
    tensor: str
    rows: list[str]
    columns: list[str]
    z: FloatArray
    critical: float
    log2_ratio: Mapping[int, int]


@dataclass(frozen=True)
class Finding:
    """One check's verdict on one tensor of one case.

    Errors in ulp are signed distances to the fp64 reference in the tensor's dtype; `bound_share` is the largest
    fraction of its accepted interval that an element used (at most 1 on a pass). All three are None where no element
    could be compared. `details` holds further finite numbers and words by name, `picture` what a plot needs. `id` names
    the item for `mxref gate --rerun`, `problem` is a failed one's, `trace` the candidate's traceback, `patterns` what
    wrong elements have in common, `weights` the packed weights behind the counterexample, in words, where they are few.
    """

    check: str
    case: str
    tensor: str
    status: Status
    reason: str
    elements: int
    violations: int
    max_ulp: float | None = None
    rms_ulp: float | None = None
    bound_share: float | None = None
    counterexample: Counterexample | None = None
    details: Mapping[str, float | str] = field(default_factory=dict, hash=False)
    picture: ErrorSample | DriftMap | None = field(default=None, compare=False, repr=False)
    id: str = ""
    problem: Mapping[str, str | int | float] = field(default_factory=dict, hash=False)
    trace: str = field(default="", repr=False)
    patterns: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing contradicts the contract, as in a declined case."""
        return self.status is not Status.FAIL

    def __str__(self) -> str:
        text = f"{self.check} / {self.case} / {self.tensor}: {self.status}, {self.reason}"
        return f"{text}; first at {self.counterexample}" if self.counterexample is not None else text

    def as_json(self) -> dict[str, Any]:
        """Plain data; numbers that JSON lacks become "nan", "inf" and "-inf"."""
        entry = {key: _plain(value) for key, value in vars(self).items() if key not in ("counterexample", "picture")}
        example = self.counterexample
        shown = None if example is None else {key: _plain(value) for key, value in vars(example).items()}
        return entry | {"counterexample": shown}


def _plain(value: Any) -> Any:
    """A value as strict JSON has it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value

"""How fast: every way to compute the layer, timed beside its reference on the same operands, in rounds that alternate.

The gate comes first, on the ways that this project wrote: what it has not passed is not timed.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from mxref.verification.bench.pairs import Effort, Row, time_shape
from mxref.verification.bench.paths import Path
from mxref.verification.bench.timing import Ceilings, Clock
from mxref.verification.bench.workloads import MEASURES, Measure, Shape
from mxref.verification.candidates.shipped import shipped
from mxref.verification.cases.case import Case
from mxref.verification.cases.scope import Scope
from mxref.verification.cases.small import usual_dtype
from mxref.verification.cases.suites import decode_cases, integer_cases
from mxref.verification.gate.plan import plan_cases
from mxref.verification.gate.result import GateResult
from mxref.verification.gate.run import run_gate
from mxref.weights import decode_mxfp4


@dataclass
class Bench:
    """One run of the benchmark.

    Attributes:
        device: in words.
        gates: the gate's verdict on each of our ways; no row exists unless all pass.
        effort: how much was measured.
        ceilings: the higher of those before and after; `drift` is how far they lie apart.
        rows: the results.
        first_call: seconds of the first training step of a fresh process; None where it was not measured.
        started: UTC, ISO 8601.
        seconds: wall-clock duration.
        commit: of the checkout, "" where there is none.
        peers: what each way of others is, with its version.
    """

    device: str
    gates: list[GateResult]
    effort: Effort
    ceilings: Ceilings = field(default_factory=lambda: Ceilings(0.0, 0.0))
    drift: float = 0.0
    rows: list[Row] = field(default_factory=list)
    first_call: float | None = None
    started: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
    seconds: float = 0.0
    commit: str = field(default_factory=lambda: _commit())
    peers: dict[str, str] = field(default_factory=dict)

    @property
    def green(self) -> bool:
        """Whether the gate lets these ways be timed."""
        return all(result.exit_code == 0 for result in self.gates)

    @property
    def exit_code(self) -> int:
        """0 when the gate is green and each of our ways could be timed; running out of memory is an answer."""
        return int(not self.green or any(row.ours and row.status not in ("ok", "out of memory") for row in self.rows))


def gate_paths(paths: Iterable[Path], device: torch.device, seed: int = 0) -> list[GateResult]:
    """Judge our ways as they will be timed: integer fixtures, and intervals in each class of tiling.

    Decoding, which a way may do alone, is judged once, exhaustively.
    """
    cpu = device.type == "cpu"
    dtype = usual_dtype(device.type)
    classes = {"thin": (8, 24), "medium": (2, 64), "thick": (2, 256)}  # experts, tokens: 6, 64 and 256 rows an expert
    names = {"integer", "integer, no LoRA"} if cpu else {"integer, bf16", "integer, no LoRA, bf16"}
    cases = [case for case in integer_cases("quick", device.type) if case.name in names]
    for name, (experts, tokens) in list(classes.items())[: 1 if cpu else None]:
        K, N = (128, 192) if cpu else (512, 384)
        layer = Case(f"{name} rows", experts, K, N, tokens, 2, 16, dtype, data="balanced")
        cases += [layer, replace(layer, name=f"{name} rows, base", rank=0, grouped_in=True, grouped_out=True)]
    kernels, ours = shipped(device), [path for path in paths if path.ours and "layer" in path.parts]
    judged = [replace(kernels, name=f"path: {path.name}", call=_as_candidate(path), decode=None) for path in ours]
    items = plan_cases(cases, device, seed)
    decoding = plan_cases(decode_cases(Scope("quick", device.type)), device, seed)
    results = [run_gate(each, items, device, suite="benchmark", seed=seed, strict=True) for each in judged]
    return [*results, run_gate(kernels, decoding, device, suite="benchmark", seed=seed, strict=True)]


def _as_candidate(path: Path) -> Callable[..., Tensor]:
    """The way as the gate calls it; which kernels run is the way's own choice."""

    def call(**operands: Any) -> Tensor:
        operands = {name: value for name, value in operands.items() if not name.startswith("use_fused_")}
        weights = operands["expert_weights"]
        dtype = operands["inputs"].dtype
        return path.call(**path.prepare(operands, lambda: decode_mxfp4(weights, dtype).mT.contiguous()))

    return call


def run_benchmark(
    bench: Bench,
    shapes: Sequence[Shape],
    paths: Sequence[Path],
    device: torch.device,
    clock: Clock,
    ceilings: Callable[[], Ceilings],
    on_shape: Callable[[Shape], None] = lambda shape: None,
    measures: Sequence[Measure] = MEASURES,
) -> Bench:
    """Time `paths` on `shapes` into `bench`; nothing is timed unless its gates are green.

    Args:
        bench: with the gates' results.
        shapes: in this order.
        paths: beside the references.
        device: where.
        clock: the device's.
        ceilings: measures them; called before and after.
        on_shape: called before each shape.
        measures: what is timed of each.
    """
    if not bench.green:
        return bench
    begin = time.monotonic()
    before = ceilings()
    for shape in shapes:
        on_shape(shape)
        bench.rows += time_shape(shape, paths, device, clock, bench.effort, measures)
    after = ceilings()
    bench.ceilings, bench.drift = before.best(after), before.drift(after)
    bench.rows = [
        replace(row, limit=bench.ceilings.seconds(row.least_flops, row.least_bytes)) if row.ok else row
        for row in bench.rows
    ]
    bench.seconds = time.monotonic() - begin
    return bench


def _commit() -> str:
    """The checkout's commit, with a + where files differ from it."""
    here = File(__file__).resolve().parent
    try:
        said = [
            subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return ""
    return said[0] + ("+" if said[1] else "")

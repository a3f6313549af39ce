"""One pair at a time: a way to compute the layer beside its reference, the composite, in rounds that alternate.

A ratio is taken within a round, between neighbours in time, so that a clock that drifts moves both sides. Where both
sides can be captured as CUDA graphs the device time is that of the graphs, and the eager time stands beside it.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mxref.verification.bench.paths import Path, reference
from mxref.verification.bench.timing import Captured, Clock, Run
from mxref.verification.bench.workloads import MEASURES, Measure, Shape, Workload
from mxref.verification.cases.small import usual_dtype

AGREEMENT = 2.0**-6
"""Largest ‖path − reference‖ / ‖reference‖ of a tensor. Each side rounds to bf16 a few times, by 2^-9 at most: eight
such roundings fit. It only shows that the right thing was timed, at full size; the gate is the judge."""


@dataclass(frozen=True)
class Effort:
    """How much to measure: alternations between the two sides, samples a round, and seconds that one pair may take."""

    rounds: int = 3
    samples: int = 8
    seconds: float = 0.5


@dataclass(frozen=True)
class Row:
    """One way, one shape, one measure. Times in seconds.

    Attributes:
        shape, measure, path: names.
        reference: the name of the path beside which it was timed.
        ours: whether this project wrote it.
        rows_per_expert: P over the experts that own rows.
        status: "ok", "out of memory", "disagrees …" or "failed: …"; only "ok" has numbers.
        mode: "graph" or "eager": what `samples` and `ratios` are times of.
        samples: round by round.
        ratios: the round's median over the reference's in the same round.
        least_flops, least_bytes: with weights in MXFP4: what the limit is made of.
        limit: seconds that they take at the run's ceilings.
        eager: median of the eager time.
        rows_per_s, flops_per_s, bytes_per_s: achieved, 0 where there is no product; bytes count the weights in the form
            that this way reads.
        extra_bytes: the most memory beyond the operands and the results, which are the output and the gradients; None
            where it is not counted.
    """

    shape: str
    measure: str
    path: str
    reference: str
    ours: bool
    rows_per_expert: float
    status: str = "ok"
    mode: str = ""
    samples: tuple[tuple[float, ...], ...] = ()
    ratios: tuple[float, ...] = ()
    least_flops: float = 0.0
    least_bytes: float = 0.0
    limit: float = 0.0
    eager: float = 0.0
    rows_per_s: float = 0.0
    flops_per_s: float = 0.0
    bytes_per_s: float = 0.0
    extra_bytes: int | None = None

    @property
    def ok(self) -> bool:
        """Whether there are numbers."""
        return self.status == "ok"

    @property
    def median(self) -> float:
        """Of all samples."""
        return statistics.median(_flat(self.samples))

    @property
    def spread(self) -> float:
        """Interquartile range of all samples over their median."""
        low, _, high = statistics.quantiles(_flat(self.samples), n=4)
        return (high - low) / self.median

    @property
    def ratio(self) -> float:
        """Time over the reference's: the median round's."""
        return statistics.median(self.ratios)

    @property
    def limit_ratio(self) -> float:
        """Time over the limit."""
        return self.median / self.limit

    @property
    def limit_ratios(self) -> tuple[float, ...]:
        """Round by round."""
        return tuple(statistics.median(round_) / self.limit for round_ in self.samples)


def time_shape(
    shape: Shape,
    paths: Sequence[Path],
    device: torch.device,
    clock: Clock,
    effort: Effort,
    measures: Sequence[Measure] = MEASURES,
) -> list[Row]:
    """Some measures of one shape, the reference first; limits are left to the caller, who knows the ceilings."""
    contests = [(measure, [path for path in paths if path.covers(measure)]) for measure in measures]
    dtype = usual_dtype(device.type)
    rows: list[Row] = []
    with clock.stream():
        try:
            workload = Workload.draw(shape, device, dtype)
            _ = workload.dense
        except torch.OutOfMemoryError:
            return [row for measure, paths in contests for row in _no_room(shape, measure, paths, 0.0)]
        for measure, covering in contests:
            rows += _time_measure(workload, measure, covering, clock, effort)
            _release()
    del workload
    _release()
    return rows


@dataclass(eq=False)
class _Side:
    """One way, ready to run."""

    run: Run
    captured: Captured | None
    results: Sequence[Tensor]
    extra_bytes: int | None


def _time_measure(
    workload: Workload, measure: Measure, paths: Sequence[Path], clock: Clock, effort: Effort
) -> list[Row]:
    """The reference's row, then one a path; each path alternates with the reference for rounds of its own."""
    mean, beside = workload.shape.rows / workload.active, reference(measure)
    try:
        other = _ready(workload, measure, beside, clock)
    except torch.OutOfMemoryError:
        return _no_room(workload.shape, measure, paths, mean)
    rows = [_row(workload, measure, beside, other, other, clock, effort)]
    for path in paths:
        try:
            side = _ready(workload, measure, path, clock)
            apart = distance(side.results, other.results)
            if not apart <= AGREEMENT:
                status = f"disagrees with the {beside.name} by {apart:.2g}"
                rows.append(_lost(workload.shape, measure, path, mean, status))
            else:
                rows.append(_row(workload, measure, path, side, other, clock, effort))
            del side
        except torch.OutOfMemoryError:
            rows.append(_lost(workload.shape, measure, path, mean, "out of memory"))
        except Exception as error:
            if path.ours:
                raise
            reason = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            rows.append(_lost(workload.shape, measure, path, mean, reason[:120]))
        if not rows[-1].ok:
            _release()
    return rows


def _ready(workload: Workload, measure: Measure, path: Path, clock: Clock) -> _Side:
    """Compile, capture, and keep one result; what comes out of a graph is what its replay computes."""
    run = runnable(workload, measure, path)
    run()
    extra = clock.extra_bytes(run)
    captured = clock.capture(run)
    if captured is None:
        return _Side(run, None, run(), extra)
    captured.replay()
    return _Side(run, captured, captured.outputs, extra)


def runnable(workload: Workload, measure: Measure, path: Path) -> Run:
    """What is timed: a call that returns the output, if `measure` goes forward, and the gradients, if it goes backward.

    For a backward pass alone the forward runs here, once, on the current stream, and its graph is kept.
    """
    operands = workload.operands(measure)
    leaves = workload.leaves_of(operands)
    prepared = path.prepare(operands, lambda: workload.dense)

    def forward() -> Sequence[Tensor]:
        with torch.no_grad():
            return (path.call(**prepared),)

    if not measure.backward:
        return forward

    def step() -> Sequence[Tensor]:
        y = path.call(**prepared)
        return y.detach(), *torch.autograd.grad(y, leaves, workload.grad_out)

    if measure.forward:
        return step
    y = path.call(**prepared)
    return lambda: torch.autograd.grad(y, leaves, workload.grad_out, retain_graph=True)


def _rounds(
    own: Callable[[], object], other: Callable[[], object], clock: Clock, effort: Effort
) -> tuple[list[list[float]], list[list[float]]]:
    """Samples of both, taking turns; two unrecorded calls lead each turn in."""
    probe = sum(clock.sample(own, 2)) / 2 + sum(clock.sample(other, 2)) / 2
    count = max(3, min(effort.samples, int(effort.seconds / (effort.rounds * max(probe, 1e-9))) - 2))
    ours: list[list[float]] = []
    theirs: list[list[float]] = []
    for _ in range(effort.rounds):
        for call, samples in ((other, theirs), (own, ours)):
            samples.append(clock.sample(call, count + 2)[2:])
    return ours, theirs


def _row(
    workload: Workload, measure: Measure, path: Path, side: _Side, other: _Side, clock: Clock, effort: Effort
) -> Row:
    """Time one side beside the other: as graphs where both have one, and eager."""
    eager = own, others = _rounds(side.run, other.run, clock, effort)
    mode = "eager"
    if side.captured is not None and other.captured is not None:
        mode, (own, others) = "graph", _rounds(side.captured.replay, other.captured.replay, clock, effort)
    shape, middle = workload.shape, statistics.median(_flat(own))
    flops, octets = workload.least(measure)
    return replace(
        _lost(shape, measure, path, shape.rows / workload.active, "ok"),
        mode=mode,
        samples=tuple(map(tuple, own)),
        ratios=tuple(statistics.median(a) / statistics.median(b) for a, b in zip(own, others, strict=True)),
        least_flops=flops,
        least_bytes=octets,
        eager=statistics.median(_flat(eager[0])),
        rows_per_s=shape.rows / middle if measure.products else 0.0,
        flops_per_s=workload.flops(measure) / middle,
        bytes_per_s=workload.bytes(measure, path.bytes_per_weight) / middle,
        extra_bytes=side.extra_bytes,
    )


def _lost(shape: Shape, measure: Measure, path: Path, mean: float, status: str) -> Row:
    return Row(shape.name, measure.name, path.name, reference(measure).name, path.ours, mean, status)


def _no_room(shape: Shape, measure: Measure, paths: Sequence[Path], mean: float) -> list[Row]:
    """The rows of a measure whose reference does not fit into memory."""
    return [_lost(shape, measure, path, mean, "out of memory") for path in (reference(measure), *paths)]


def distance(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative distance of a tensor; NaN when one holds a NaN."""
    worst = torch.zeros((), device=expected[0].device)
    for x, y in zip(results, expected, strict=True):
        norm = torch.linalg.vector_norm(y, dtype=torch.float32)
        gap = torch.linalg.vector_norm(x.detach() - y.detach(), dtype=torch.float32)
        worst = torch.maximum(worst, gap / norm)
    return float(worst)


def _flat(rounds: Iterable[Iterable[float]]) -> list[float]:
    return [sample for samples in rounds for sample in samples]


def digits(x: float) -> float:
    """Six significant digits: more is noise."""
    return float(f"{x:.6g}")


def _release() -> None:
    """Give memory back, graphs' pools included, so that the next way meets an empty GPU."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()

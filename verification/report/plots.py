"""Pictures of single elements: signed errors, errors against bounds, and shares of bounds.

Clouds of points are drawn as counted cells, since twenty thousand circles weigh megabytes. Each picture is SVG elements
in text, a panel a tensor, and empty where there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mxref.verification.checks.finding import ErrorSample
from mxref.verification.report.canvas import FAIL, MUTED, SERIES, in_order, picture, squares, title
from mxref.verification.report.output import share_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CELLS = 44
"""Cells along each axis of a cloud."""
_MAX_OFFENDERS = 300
"""Violations drawn one by one in a panel; the worst are kept."""
_LEAST_SHARE = -4.4
"""Shares of a bound are drawn from 10 to this; smaller ones, and exact results, enter at the left edge."""
_MAX_CURVES = 12
"""Failing cases with a curve of their own in a panel."""


def ulp_histogram(samples: Sequence[ErrorSample]) -> str:
    """Share of elements by signed error in ULP of the judged format."""
    return picture("Signed error in units in the last place, by tensor", _histogram, _by_tensor(samples))


def _histogram(axes: Axes, samples: Sequence[ErrorSample]) -> None:
    from matplotlib.ticker import NullLocator

    errors = np.concatenate([np.asarray(s.ulp_error, dtype=np.float64) for s in samples])
    comparable = errors[np.isfinite(errors)]
    bins = _ulp_bin(comparable)
    reach = max(2, int(np.abs(bins).max(initial=0)))
    positions = np.arange(-reach, reach + 1)
    share = np.array([(bins == p).sum() for p in positions]) * 100.0 / max(1, errors.size)
    axes.bar(positions, share, width=0.86, color=SERIES, linewidth=0)
    axes.set_ylim(min(1e-2, 50.0 / max(1, errors.size)), 200)  # before the scale: an all-zero range warns
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    step = max(1, -(-reach // 3))
    ticks = [p for p in positions if p % step == 0]
    axes.set_xticks(ticks, [_ulp_label(int(p)) for p in ticks])
    exact = 100.0 * float((bins == 0).sum()) / max(1, errors.size)
    lost = errors.size - comparable.size
    note = f"{exact:.1f} % within half an ULP" + (f", {lost:,} NaN or inf" if lost else "")
    title(axes, samples[0].tensor, note)
    axes.set_xlabel("signed error, ULP", color=MUTED)


def error_against_bound(samples: Sequence[ErrorSample]) -> str:
    """Error against the derived bound, both relative to the exact value, on logarithmic axes.

    Points above the diagonal are outside the bound, drawn one by one in the failure colour. Relative numbers fit cases
    a hundred binades apart into one picture.
    """
    return picture("Relative error against the derived bound, by tensor", _cloud, _by_tensor(samples))


def _cloud(axes: Axes, samples: Sequence[ErrorSample]) -> None:
    from matplotlib.ticker import MaxNLocator

    error = np.abs(np.concatenate([np.asarray(s.error, dtype=np.float64) for s in samples]))
    bound = np.concatenate([np.asarray(s.bound, dtype=np.float64) for s in samples])
    size = np.concatenate([np.asarray(s.magnitude, dtype=np.float64) for s in samples])
    drawable = np.isfinite(error) & np.isfinite(bound) & (error > 0) & (bound > 0) & (size > 0)
    x, y = np.log10(bound[drawable] / size[drawable]), np.log10(error[drawable] / size[drawable])
    zero = 100.0 * float((error == 0).sum()) / max(1, error.size)
    title(axes, samples[0].tensor, f"{zero:.1f} % of elements have no error at all")
    axes.set_xlabel("bound, relative", color=MUTED)
    axes.set_ylabel("error, relative", color=MUTED)
    if x.size == 0:
        axes.text(0.5, 0.5, "nothing to draw", transform=axes.transAxes, ha="center", color=MUTED)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    x_low, x_high = _padded(x)
    # A few tiny errors would stretch the axis: keep five decades below the smallest bound.
    y_high = max(float(y.max()), x_high)
    y_low = max(float(y.min()), x_low - 5.0) - 0.3
    outside = y > x
    _cells(axes, x[~outside], y[~outside], (x_low, x_high), (y_low, y_high))
    axes.fill_between([x_low, x_high], [x_low, x_high], y_high, color=FAIL, alpha=0.09, linewidth=0)
    axes.plot([x_low, x_high], [x_low, x_high], color=FAIL, linewidth=1.2)
    worst = np.argsort(x[outside] - y[outside])[:_MAX_OFFENDERS]
    axes.scatter(x[outside][worst], y[outside][worst], s=9, color=FAIL, linewidths=0)
    axes.set_xlim(x_low, x_high)
    axes.set_ylim(y_low, y_high)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axis.set_major_formatter(lambda value, _: f"1e{value:.0f}")


def share_of_bound(samples: Sequence[ErrorSample]) -> str:
    """Distribution of error over bound: all cases, and in the failure colour each with an element outside."""
    return picture("Distribution of error over bound, by tensor", _curves, _by_tensor(samples))


def _curves(axes: Axes, samples: Sequence[ErrorSample]) -> None:
    from matplotlib.ticker import MaxNLocator

    shares = [_shares(sample) for sample in samples]
    together = np.concatenate(shares)
    right = min(max(0.4, np.log10(max(1.0, float(together.max()))) + 0.1), 4.0)
    at = np.linspace(_LEAST_SHARE, right, 120)
    outside = int((together > 1).sum())
    axes.axvspan(0, right, color=FAIL, alpha=0.09, linewidth=0)
    axes.axvline(0, color=FAIL, linewidth=1.2)
    for share in sorted(shares, key=lambda share: -float((share > 1).mean()))[:_MAX_CURVES]:
        if (share > 1).any():
            axes.plot(at, _distribution(share, at), color=FAIL, linewidth=0.7, alpha=0.6)
    axes.plot(at, _distribution(together, at), color=SERIES, linewidth=1.8)
    axes.set_xlim(_LEAST_SHARE, right)
    axes.set_ylim(0, 104)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(lambda exponent, _: _share_label(exponent))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    most = share_text(float(together.max())) if together.max() else "nothing"
    note = f"{outside:,} of {together.size:,} beyond" if outside else f"the largest used {most}"
    title(axes, samples[0].tensor, note)
    axes.set_xlabel("error / bound", color=MUTED)


def _shares(sample: ErrorSample) -> NDArray[np.float64]:
    """|error| / bound of each element; 0 for no error, inf for one beyond a bound of 0."""
    error, bound = np.abs(np.asarray(sample.error)), np.asarray(sample.bound)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        share = np.where(error == 0, 0.0, error / bound)
    return np.asarray(np.where(np.isnan(share), np.inf, share), dtype=np.float64)


def _share_label(exponent: float) -> str:
    """Text of a share 10^exponent: per cent, or a multiple far outside."""
    return f"{10.0 ** (exponent + 2):g} %" if exponent < 2 else f"{10.0**exponent:g} ×"


def _distribution(share: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Per cent of `share` that is at most 10^at."""
    below = np.searchsorted(np.sort(share), 10.0**at, side="right")
    return np.asarray(100.0 * below / max(1, share.size), dtype=np.float64)


def _by_tensor(samples: Sequence[ErrorSample]) -> list[list[ErrorSample]]:
    groups: dict[str, list[ErrorSample]] = {}
    for sample in samples:
        if len(sample.error):
            groups.setdefault(sample.tensor, []).append(sample)
    return [groups[name] for name in in_order(groups)]


def _ulp_bin(errors: NDArray[np.float64]) -> NDArray[np.int64]:
    """0 for an error under half an ULP, then ±1, ±2, ... for 1, 2-3, 4-7, ... ULP, rounded to whole ULPs."""
    whole = np.rint(np.abs(errors))
    level = np.where(whole > 0, 1 + np.floor(np.log2(np.maximum(whole, 1))), 0)
    return np.asarray(np.sign(errors) * level, dtype=np.int64)


def _ulp_label(position: int) -> str:
    """Text of a bin, its smallest error: 0, +1, −2, +4, ..."""
    if position == 0:
        return "0"
    size = 2 ** (abs(position) - 1)
    text = f"{size}" if size < 1024 else f"{size >> 10}k" if size < 1 << 20 else f"2^{abs(position) - 1}"
    return ("+" if position > 0 else "−") + text


def _cells(
    axes: Axes,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
) -> None:
    """Draw a cloud as cells, opacity by the logarithm of their count."""
    counts, x_edges, y_edges = np.histogram2d(x, y, bins=_CELLS, range=(x_range, y_range))
    if counts.max(initial=0) == 0:
        return
    size = np.array([x_edges[1] - x_edges[0], y_edges[1] - y_edges[0]])
    levels = np.ceil(5 * np.log1p(counts) / np.log1p(counts.max())).astype(int)
    for level in range(1, 6):
        corners = np.array([(x_edges[i], y_edges[j]) for i, j in zip(*np.nonzero(levels == level), strict=True)])
        squares(axes, corners, size, SERIES, opacity=0.14 + 0.17 * level)


def _padded(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    margin = max(0.25, 0.04 * (high - low))
    return low - margin, high + margin

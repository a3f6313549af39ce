"""The two pictures of a verdict, as inline SVG that follows the page's light or dark colours.

Matplotlib draws with placeholder colours; `_themed` turns each into a CSS variable, so that one picture serves both
themes. Clouds of points are drawn as counted cells: twenty thousand circles would say less and weigh megabytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mxref.verification.bounds import TENSORS
from mxref.verification.verdicts import ErrorSample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["error_against_bound", "ulp_histogram"]

_INK, _MUTED, _GRID, _SERIES, _FAIL = "#010101", "#020202", "#030303", "#040404", "#050505"
_CSS_NAME = {_INK: "--ink", _MUTED: "--muted", _GRID: "--line", _SERIES: "--series", _FAIL: "--fail"}
_CELLS = 44
"""Cells along each axis of a cloud."""
_MAX_OFFENDERS = 300
"""Violations drawn one by one in a panel; the worst are kept."""


def ulp_histogram(samples: Sequence[ErrorSample]) -> str:
    """Share of elements by signed error, in units in the last place of the judged format, one panel a tensor.

    Args:
        samples: what the interval guard kept of each case and tensor.

    Returns:
        An SVG element as text, or an empty string when there is nothing to draw.
    """
    from matplotlib.ticker import NullLocator

    groups = _by_tensor(samples)
    if not groups:
        return ""
    figure, panels = _panels(len(groups))
    for axes, (tensor, members) in zip(panels, groups.items(), strict=True):
        errors = np.concatenate([np.asarray(s.ulp_error, dtype=np.float64) for s in members])
        comparable = errors[np.isfinite(errors)]
        bins = _ulp_bin(comparable)
        reach = max(2, int(np.abs(bins).max(initial=0)))
        positions = np.arange(-reach, reach + 1)
        share = np.array([(bins == p).sum() for p in positions]) * 100.0 / max(1, errors.size)
        axes.bar(positions, share, width=0.86, color=_SERIES, linewidth=0)
        axes.set_ylim(min(1e-2, 50.0 / max(1, errors.size)), 200)  # before the scale: log of an all-zero range warns
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        step = max(1, -(-reach // 3))
        ticks = [p for p in positions if p % step == 0]
        axes.set_xticks(ticks, [_ulp_label(int(p)) for p in ticks])
        exact = 100.0 * float((bins == 0).sum()) / max(1, errors.size)
        lost = errors.size - comparable.size
        note = f"{exact:.1f} % within half an ULP" + (f", {lost:,} NaN or inf" if lost else "")
        _title(axes, tensor, note)
        axes.set_xlabel("signed error, ULP", color=_MUTED)
    return _svg(figure, "Signed error in units in the last place, by tensor")


def error_against_bound(samples: Sequence[ErrorSample]) -> str:
    """Error against the derived bound, both relative to the exact value, on logarithmic axes, one panel a tensor.

    Points on or below the diagonal are inside the bound; those above are drawn one by one in the failure colour.
    Relative numbers bring cases whose scales lie a hundred binades apart into one picture.

    Args:
        samples: what the interval guard kept of each case and tensor.

    Returns:
        An SVG element as text, or an empty string when there is nothing to draw.
    """
    from matplotlib.ticker import MaxNLocator

    groups = _by_tensor(samples)
    if not groups:
        return ""
    figure, panels = _panels(len(groups))
    for axes, (tensor, members) in zip(panels, groups.items(), strict=True):
        error = np.abs(np.concatenate([np.asarray(s.error, dtype=np.float64) for s in members]))
        bound = np.concatenate([np.asarray(s.bound, dtype=np.float64) for s in members])
        size = np.concatenate([np.asarray(s.magnitude, dtype=np.float64) for s in members])
        drawable = np.isfinite(error) & np.isfinite(bound) & (error > 0) & (bound > 0) & (size > 0)
        x, y = np.log10(bound[drawable] / size[drawable]), np.log10(error[drawable] / size[drawable])
        zero = 100.0 * float((error == 0).sum()) / max(1, error.size)
        _title(axes, tensor, f"{zero:.1f} % of elements have no error at all")
        axes.set_xlabel("bound, relative", color=_MUTED)
        axes.set_ylabel("error, relative", color=_MUTED)
        if x.size == 0:
            axes.text(0.5, 0.5, "nothing to draw", transform=axes.transAxes, ha="center", color=_MUTED)
            axes.set_xticks([])
            axes.set_yticks([])
            continue
        x_low, x_high = _padded(x)
        # A handful of tiny errors would stretch the axis for nothing: keep five decades below the smallest bound.
        y_high = max(float(y.max()), x_high)
        y_low = max(float(y.min()), x_low - 5.0) - 0.3
        outside = y > x
        _cells(axes, x[~outside], y[~outside], (x_low, x_high), (y_low, y_high))
        axes.fill_between([x_low, x_high], [x_low, x_high], y_high, color=_FAIL, alpha=0.09, linewidth=0)
        axes.plot([x_low, x_high], [x_low, x_high], color=_FAIL, linewidth=1.2)
        worst = np.argsort(x[outside] - y[outside])[:_MAX_OFFENDERS]
        axes.scatter(x[outside][worst], y[outside][worst], s=9, color=_FAIL, linewidths=0)
        axes.set_xlim(x_low, x_high)
        axes.set_ylim(y_low, y_high)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True))
            axis.set_major_formatter(lambda value, _: f"1e{value:.0f}")
    return _svg(figure, "Relative error against the derived bound, by tensor")


def _by_tensor(samples: Sequence[ErrorSample]) -> dict[str, list[ErrorSample]]:
    """Samples grouped by tensor, in the order of the computation; empty ones dropped."""
    groups: dict[str, list[ErrorSample]] = {}
    for sample in samples:
        if len(sample.error):
            groups.setdefault(sample.tensor, []).append(sample)
    known = [name for name in TENSORS if name in groups]
    return {name: groups[name] for name in known + sorted(set(groups) - set(known))}


def _ulp_bin(errors: NDArray[np.float64]) -> NDArray[np.int64]:
    """0 for an error under half an ULP, then ±1, ±2, ... for 1, 2-3, 4-7, ... ULP, rounded to whole ULPs."""
    whole = np.rint(np.abs(errors))
    level = np.where(whole > 0, 1 + np.floor(np.log2(np.maximum(whole, 1))), 0)
    return np.asarray(np.sign(errors) * level, dtype=np.int64)


def _ulp_label(position: int) -> str:
    """Text of a bin: 0, +1, −2, +4, ... the smallest error in the bin."""
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
    """Draw a cloud as cells whose opacity grows with the logarithm of their count."""
    counts, x_edges, y_edges = np.histogram2d(x, y, bins=_CELLS, range=(x_range, y_range))
    if counts.max(initial=0) == 0:
        return
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    square = np.array([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)], dtype=np.float64)
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    size = np.array([x_edges[1] - x_edges[0], y_edges[1] - y_edges[0]])
    levels = np.ceil(5 * np.log1p(counts) / np.log1p(counts.max())).astype(int)
    for level in range(1, 6):
        corners = np.array([(x_edges[i], y_edges[j]) for i, j in zip(*np.nonzero(levels == level), strict=True)])
        if corners.size:
            outline = (corners[:, None, :] + square * size).reshape(-1, 2)
            path = Path(outline, codes * len(corners))
            opacity = 0.14 + 0.17 * level
            axes.add_patch(PathPatch(path, facecolor=_SERIES, linewidth=0, alpha=opacity, antialiased=False))


def _padded(values: NDArray[np.float64]) -> tuple[float, float]:
    """The range of `values` with a margin, never empty."""
    low, high = float(values.min()), float(values.max())
    margin = max(0.25, 0.04 * (high - low))
    return low - margin, high + margin


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure of `count` small panels, three a row, with quiet axes."""
    from matplotlib.figure import Figure

    columns = min(3, count)
    rows = -(-count // columns)
    width, height = 4.0 * columns, 2.9 * rows
    figure = Figure(figsize=(width, height))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    # Margins in inches, by hand: matplotlib's own layout would cost more time than the drawing.
    figure.subplots_adjust(0.65 / width, 0.5 / height, 1 - 0.1 / width, 1 - 0.3 / height, wspace=0.24, hspace=0.38)
    for axes in grid:
        axes.set_facecolor("none")
        axes.tick_params(colors=_MUTED, labelsize=8, which="both", length=0)
        axes.grid(visible=True, color=_GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(_MUTED)
    for axes in grid[count:]:
        figure.delaxes(axes)
    return figure, list(grid[:count])


def _title(axes: Axes, tensor: str, note: str) -> None:
    """Tensor name in bold at the left, one remark at the right."""
    axes.set_title(tensor, loc="left", color=_INK, fontsize=11, fontweight="bold")
    axes.set_title(note, loc="right", color=_MUTED, fontsize=8)


def _svg(figure: Figure, label: str) -> str:
    """The figure as one SVG element: its colours are CSS variables, its font the page's, its ids unique on a page."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
    for placeholder, name in _CSS_NAME.items():
        text = text.replace(placeholder, f"var({name})")
    # Two pictures on one page would otherwise share ids such as "axes_1".
    prefix = re.sub(r"[^a-z]+", "-", label.lower())
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    # HTML knows SVG's namespaces, and the page decides about the size: of the opening tag only the viewBox stays.
    opening = re.search(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', text, flags=re.DOTALL)
    assert opening is not None
    width = 96 * float(figure.get_size_inches()[0])
    style = f"width:100%;max-width:{width:.0f}px;height:auto"
    return f'<svg role="img" aria-label="{label}" style="{style}" {opening.group(1)}>{text[opening.end() :]}'

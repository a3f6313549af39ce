"""Pictures of strata: significance of drift, and powers of two that results are off by; in the form of `plots`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mxref.verification.checks.finding import DriftMap
from mxref.verification.report.canvas import FAIL, INK, MUTED, SERIES, WEAK, in_order, picture, squares, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PASSING, _FAILING = 3, 6
"""Maps drawn of a run without drift, and of one with it."""
_LEVELS = 12
"""Steps of the colour scale on each side of zero."""
_STRONGEST = 0.6
"""Opacity at the ends of the scale; the numbers on top must stay readable in both themes."""
_SATURATED = 2.0
"""The scale ends at this many limits: beyond, a stratum is wrong, and how wrong is written into it."""
_WRITTEN = 100
"""Strata of a map up to which each one's number is written into it."""
_ROOM = 34
"""Letters of a case's name that fit above a map."""
_LABELS = 10
"""Labels along an axis, about."""
_FARTHEST = 9
"""Powers of two shown on each side of a ratio of one; what lies beyond is counted at the ends."""


def drift_maps(maps: Sequence[DriftMap], failed: Collection[tuple[str, str]] = ()) -> str:
    """z by expert and column tile, one panel a map, each tensor's worst first; only failing ones if any.

    `failed`: (case, tensor) of failed drift findings.
    """
    fitted = [drift for drift in maps if np.isfinite(drift.z).any()]
    bad = [drift for drift in fitted if (drift.case, drift.tensor) in failed]
    ranked = sorted(bad or fitted, key=_largest, reverse=True)
    first = {drift.tensor: drift for drift in reversed(ranked)}
    chosen = sorted(ranked, key=lambda drift: drift is not first[drift.tensor])[: _FAILING if bad else _PASSING]
    return picture("Significance of drift by expert and column tile", _heat, chosen)


def log2_ratios(maps: Sequence[DriftMap]) -> str:
    """How many results are off by which power of two, one panel a tensor; all but 0 in the failure colour."""
    counts: dict[str, Counter[int]] = {}
    for drift in maps:
        if drift.log2_ratio:
            counts.setdefault(drift.tensor, Counter()).update(drift.log2_ratio)
    ordered = [(tensor, counts[tensor]) for tensor in in_order(counts)]
    return picture("Powers of two between result and exact value, by tensor", _octaves, ordered)


def _octaves(axes: Axes, tensor: tuple[str, Counter[int]]) -> None:
    from matplotlib.ticker import NullLocator

    name, counts = tensor
    shown: Counter[int] = Counter()
    for octave, count in counts.items():
        shown[max(-_FARTHEST, min(_FARTHEST, octave))] += count
    reach = max(3, *(abs(octave) for octave in shown))
    octaves = range(-reach, reach + 1)
    colors = [FAIL if octave else SERIES for octave in octaves]
    axes.bar(octaves, [shown[octave] for octave in octaves], width=0.86, color=colors, linewidth=0)
    axes.set_ylim(0.5, 3 * max(shown.values()))
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    step = 1 if reach < 5 else 3
    axes.set_xticks([octave for octave in octaves if octave % step == 0])
    axes.xaxis.set_major_formatter(lambda value, _: _octave_label(round(value)))
    off = counts.total() - counts[0]
    title(axes, name, f"{off:,} of {counts.total():,} beside 0" if off else "all at 0")
    axes.set_xlabel("log2 |result / exact|, rounded", color=MUTED)


def _heat(axes: Axes, drift: DriftMap) -> None:
    """One map: blue below zero, amber above, stronger with |z|, framed beyond the limit."""
    z = np.asarray(drift.z, dtype=np.float64)
    rows, columns = z.shape
    relative = np.nan_to_num(z / (drift.critical * _SATURATED), nan=0.0)
    level = np.rint(np.minimum(np.abs(relative), 1.0) * _LEVELS).astype(int)
    for color, side in ((SERIES, relative < 0), (WEAK, relative > 0)):
        for step in range(1, _LEVELS + 1):
            squares(axes, _corners(side & (level == step)), np.ones(2), color, opacity=_STRONGEST * step / _LEVELS)
    beyond = _corners(np.abs(np.nan_to_num(z)) > drift.critical)
    squares(axes, beyond + 0.03, np.full(2, 0.94), FAIL, outline=True)
    if z.size <= _WRITTEN:
        for row, column in zip(*np.nonzero(np.isfinite(z)), strict=True):
            where, value = (column + 0.5, row + 0.5), _short(z[row, column])
            axes.text(*where, value, ha="center", va="center", fontsize=7, color=INK)
    axes.grid(visible=False)
    axes.axhline(rows - 1, color=MUTED, linewidth=0.6)
    axes.axvline(columns - 1, color=MUTED, linewidth=0.6)
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    for axis, labels in ((axes.xaxis, drift.columns), (axes.yaxis, drift.rows)):
        places = _places(len(labels))
        axis.set_ticks([place + 0.5 for place in places], [_stratum(labels[place]) for place in places])
    axes.set_xlabel("columns from", color=MUTED)
    axes.set_ylabel("expert", color=MUTED)
    case = drift.case if len(drift.case) <= _ROOM else drift.case[: _ROOM - 1] + "…"
    title(axes, drift.tensor, f"{case}, |z| up to {_short(_largest(drift))}")


def _corners(where: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(column, row) of the strata that are set, [n, 2]."""
    return np.argwhere(where)[:, ::-1].astype(np.float64)


def _places(count: int) -> list[int]:
    """Which of `count` strata along an axis get a label; the last always does."""
    step = -(-count // _LABELS)
    return [*range(0, max(1, count - max(1, step // 2)), step), count - 1] if count > 1 else [0]


def _stratum(label: str) -> str:
    """3 of `expert 3`, 64 of `columns 64–127`, all of `all experts`."""
    word, _, rest = label.partition(" ")
    return "all" if word == "all" else rest.partition("–")[0]


def _largest(drift: DriftMap) -> float:
    return float(np.nanmax(np.abs(drift.z)))


def _short(z: float) -> str:
    if round(z, 1) == 0:
        return "0"
    text = f"{z:.1f}" if abs(z) < 100 else f"{z:.0f}" if abs(z) < 1e4 else f"{z:.0e}"
    return re.sub(r"e\+0*", "e", text).replace("-", "−")


def _octave_label(octave: int) -> str:
    """Text of a power of two; the outermost include all beyond."""
    text = f"+{octave}" if octave > 0 else str(octave).replace("-", "−")
    return text if abs(octave) < _FARTHEST else ("≥ " if octave > 0 else "≤ ") + text

"""Panels for the pictures of the gate's page, as inline SVG in the page's colours.

Matplotlib draws with placeholder colours, which become CSS variables for the light and dark themes. It is imported
late, since numbers do without it.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from mxref.verification.arithmetic.bounds import TENSORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

T = TypeVar("T")

INK, MUTED, GRID, SERIES, FAIL, WEAK = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
_CSS_NAME = {INK: "--ink", MUTED: "--muted", GRID: "--line", SERIES: "--series", FAIL: "--fail", WEAK: "--weak"}


def in_order(tensors: Iterable[str]) -> list[str]:
    """Names of tensors, each once, by `tensor_order`."""
    names = set(tensors)
    return [name for name in TENSORS if name in names] + sorted(names - set(TENSORS))


def squares(
    axes: Axes,
    corners: NDArray[np.float64],
    size: NDArray[np.float64],
    color: str,
    *,
    opacity: float = 1.0,
    outline: bool = False,
) -> None:
    """Fill or outline rectangles of one size at corners [n, 2]: one path, as n would weigh megabytes."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    if not corners.size:
        return
    square = np.array([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)], dtype=np.float64)
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    path = Path((corners[:, None, :] + square * size).reshape(-1, 2), codes * len(corners))
    if outline:
        axes.add_patch(PathPatch(path, fill=False, edgecolor=color, linewidth=1.0, alpha=opacity))
    else:
        axes.add_patch(PathPatch(path, facecolor=color, linewidth=0, alpha=opacity, antialiased=False))


def picture(label: str, draw: Callable[[Axes, T], None], contents: Sequence[T]) -> str:
    """A small figure for each of the contents.

    Args:
        label: alternative text; unique on a page.
        draw: fills axes with one of the contents.

    Returns:
        An SVG element a figure, as text, in the page's colours and font, ids unique on a page.
    """
    return "".join(_panel(f"{label} {number}", label, draw, each) for number, each in enumerate(contents))


def _panel(salt: str, label: str, draw: Callable[[Axes, T], None], content: T) -> str:
    from matplotlib.figure import Figure

    width, height = 4.0, 2.9
    figure = Figure(figsize=(width, height))
    axes = figure.subplots()
    # Margins in inches, by hand: matplotlib's layout costs more time than the drawing.
    figure.subplots_adjust(0.65 / width, 0.5 / height, 1 - 0.1 / width, 1 - 0.3 / height)
    axes.set_facecolor("none")
    axes.tick_params(colors=MUTED, labelsize=8, which="both", length=0)
    axes.grid(visible=True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(MUTED)
    draw(axes, content)
    return _svg(figure, label, salt)


def title(axes: Axes, tensor: str, note: str) -> None:
    """Tensor name in bold at the left, a remark at the right."""
    axes.set_title(tensor, loc="left", color=INK, fontsize=11, fontweight="bold")
    axes.set_title(note, loc="right", color=MUTED, fontsize=8)


def _svg(figure: Figure, label: str, salt: str) -> str:
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
    for placeholder, name in _CSS_NAME.items():
        text = text.replace(placeholder, f"var({name})")
    # Two pictures would otherwise share ids such as "axes_1".
    prefix = f"p{zlib.crc32(salt.encode()):x}"
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    # HTML knows SVG's namespaces, and the page sets the size: only the viewBox stays.
    opening = re.search(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', text, flags=re.DOTALL)
    assert opening is not None
    width = 96 * float(figure.get_size_inches()[0])
    style = f"width:100%;max-width:{width:.0f}px;height:auto"
    return f'<svg role="img" aria-label="{label}" style="{style}" {opening.group(1)}>{text[opening.end() :]}'

"""Draws the project's rooms and the imports between them: `python docs/draw_rooms.py` writes docs/rooms.svg.

A room is a folder of modules. What is drawn is read from the imports in the sources, and nothing else: an arrow leads
from a room to one that imports it, so that data walks down the picture. An arrow that follows from others is left out;
an import that runs against `ORDER` is drawn in red.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import networkx as nx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "rooms.svg"

ORDER = {
    "mxref": "the golden model",
    "mxref/checkpoints": "names and layouts on disk",
    "kernels/device": "code that runs on the GPU",
    "kernels/layer": "operands in, gradients out",
    "kernels/compiled": "ahead of time",
    "kernels/models": "experts, PEFT, transformers",
    "kernels/parallel": "several GPUs",
    "verification/arithmetic": "accumulation, bounds",
    "verification/cases": "what is asked",
    "verification/candidates": "who answers",
    "verification/checks": "what must hold",
    "verification/gate": "chooses, adds up",
    "verification/distributed": "steps over several ranks",
    "verification/report": "pages and plots",
    "verification/studies": "is the gate itself right?",
    "verification/bench": "how fast",
    "verification/models": "whole models, trained",
    "verification/records": "what was seen, and where",
    "verification/cli": "the mxref command",
}
"""Every room and what it holds. A room imports only rooms that come before it."""

_COLUMNS = {"kernels": ("#dbe9f6", 0.0), "mxref": ("#e3f1dc", 2.0), "verification": ("#fbe7d3", 3.0)}
_WIDTH, _HEIGHT = 0.86, 0.56  # of a box, where a column is 1 wide and a generation 1 high


def modules() -> dict[str, ast.Module]:
    """Syntax tree by module name, as in `mxref.kernels.device.decode`; links are not followed."""
    found = {}
    for top in ("mxref", "kernels", "verification"):
        for path in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name if top == "mxref" else f"mxref.{name}"] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports() -> nx.DiGraph:
    """The modules, with an edge from each to every one that imports it, inside functions too."""
    trees, graph = modules(), nx.DiGraph()
    graph.add_nodes_from(trees)
    for name, tree in trees.items():
        graph.add_edges_from((imported, name) for imported in _imported(tree, trees) if imported != name)
    return graph


def _imported(tree: ast.Module, known: dict[str, ast.Module]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in known else node.module for name in names)


def room(module: str) -> str | None:
    """The room that a module lies in; None for what is at the top of a package: public names, the way to a clone."""
    top, _, rest = module.removeprefix("mxref.").partition(".")
    if top in ("kernels", "verification"):
        name = f"{top}/{rest.partition('.')[0]}"
        return name if rest and (ROOT / name).is_dir() else None
    return "mxref/checkpoints" if top == "checkpoints" else "mxref"


def arrows() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The arrows between rooms: those that data takes, without what follows from others, and those that run back."""
    places = list(ORDER)
    pairs = {(room(a), room(b)) for a, b in imports().edges}
    between = [(a, b) for a, b in pairs if a is not None and b is not None and a != b]
    back = sorted((a, b) for a, b in between if places.index(a) > places.index(b))
    return sorted(nx.transitive_reduction(nx.DiGraph(set(between) - set(back))).edges), back


def described(forward: list[tuple[str, str]], back: list[tuple[str, str]]) -> str:
    """The picture's content in words; it is kept in the file, and a test compares it with the sources."""
    return "; ".join([f"{a} → {b}" for a, b in forward] + [f"{a} ⇢ {b}" for a, b in back])


def drawn() -> str:
    """What the present file shows."""
    found = re.search(r"<dc:description>(.*?)</dc:description>", PICTURE.read_text(encoding="utf-8"), re.DOTALL)
    return found.group(1) if found else ""


def places(forward: list[tuple[str, str]]) -> dict[str, tuple[float, float]]:
    """The centre of each room's box: a column a package, a line a generation, below what it imports."""
    graph, at = nx.DiGraph(forward), {}
    for y, generation in enumerate(nx.topological_generations(graph)):
        for top, (_, left) in _COLUMNS.items():
            before = {name: [at[room] for room in graph.predecessors(name)] for name in ORDER if name in generation}
            row = [name for name in before if _package(name) == top]
            row.sort(key=lambda name: min((x for x, _ in before[name]), default=left))
            above = [at[room][0] for name in row for room in graph.predecessors(name) if _package(room) == top]
            half = (len(row) - 1) / 2
            centre = max(left + half, sum(above) / len(above)) if above else left + half
            at |= {name: (centre + i - half, -float(y)) for i, name in enumerate(row)}
    return at


def _package(name: str) -> str:
    return name.partition("/")[0]


def draw() -> None:
    """Write the picture."""
    forward, back = arrows()
    at = places(forward)
    right, low = max(x for x, _ in at.values()), min(y for _, y in at.values())
    figure = Figure(figsize=(2.35 * (right + 1.24), 1.05 * (1.5 - low)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.62, right + 0.62), ylim=(low - 0.55, 0.95))
    axes.axis("off")
    for top, (colour, x) in _COLUMNS.items():
        _column(axes, top, colour, x, at, low)
    for arrow in forward:
        _arrow(axes, at, arrow, "#5b6770")
    for arrow in back:
        _arrow(axes, at, arrow, "#c0392b")
    for name, (x, y) in at.items():
        _box(axes, name, x, y)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rooms"}):
        figure.savefig(PICTURE, metadata={"Date": None, "Title": "Rooms", "Description": described(forward, back)})


def _column(axes: Axes, top: str, colour: str, x: float, at: dict[str, tuple[float, float]], low: float) -> None:
    """A package's background and its name."""
    last = max(place for name, (place, _) in at.items() if _package(name) == top)
    axes.add_patch(Rectangle((x - 0.5, low - 0.45), last - x + 1, -low + 1.3, color=colour, alpha=0.45, lw=0))
    axes.text(x - 0.43, 0.62, f"{top}/", fontsize=13, fontweight="bold", color="#333", va="center")


def _box(axes: Axes, name: str, x: float, y: float) -> None:
    colour, _ = _COLUMNS[_package(name)]
    corner, style = (x - _WIDTH / 2, y - _HEIGHT / 2), "round,pad=0,rounding_size=0.06"
    axes.add_patch(FancyBboxPatch(corner, _WIDTH, _HEIGHT, boxstyle=style, fc=colour, ec="#5b6770", lw=1, zorder=3))
    axes.text(x, y + 0.1, name.rpartition("/")[2], fontsize=12, fontweight="bold", ha="center", va="center", zorder=4)
    axes.text(x, y - 0.13, ORDER[name], fontsize=8.5, color="#444", ha="center", va="center", zorder=4)


def _arrow(axes: Axes, at: dict[str, tuple[float, float]], ends: tuple[str, str], colour: str) -> None:
    """From below a box to above another; from afar to its side, past the boxes between."""
    (x, y), (to_x, to_y) = at[ends[0]], at[ends[1]]
    aside = y - to_y > 1 and x != to_x
    begin = (x, y - _HEIGHT / 2)
    end = (to_x + (_WIDTH / 2 if x > to_x else -_WIDTH / 2), to_y) if aside else (to_x, to_y + _HEIGHT / 2)
    bend = 0.5 if y <= to_y else 0.0
    look = {"arrowstyle": "-|>", "mutation_scale": 12, "color": colour, "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(begin, end, connectionstyle=f"arc3,rad={bend}", **look))


if __name__ == "__main__":
    draw()
    print(f"written: {PICTURE}")

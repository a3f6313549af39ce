"""The generated parts of the README: what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from mxref.kernels.models.sizes import MODELS
from mxref.verification.bench.summary import SUSTAINED, milliseconds_and_ratio, summary, sustained_cells
from mxref.verification.checks.registry import BASELINE, CHECKS, STATE
from mxref.verification.clone import EVIDENCE
from mxref.verification.distributed.registry import CHECKS as STEP_CHECKS
from mxref.verification.distributed.registry import ENDS
from mxref.verification.models.report import model_summary
from mxref.verification.records.freshness import State, survey
from mxref.verification.records.record import KINDS
from mxref.verification.report.own.markdown import markdown_table

README = EVIDENCE.parent.parent / "README.md"


def blocks(root: Path = EVIDENCE) -> dict[str, str]:
    """Markdown by name, from the list of checks and the records alone: the same on every machine."""
    states = survey(root)
    parts = {
        "checks": _checks(),
        "steps": _step_checks(),
        "records": _records(states),
        "bench": _speed(states),
        "rows": _rows_and_host(states),
        "models": _models(states),
    }
    return {name: "\n".join(lines).rstrip() for name, lines in parts.items()}


def update_readme(readme: Path = README, root: Path = EVIDENCE) -> Path:
    """Write the generated parts into a README; its path.

    Raises:
        OSError: it cannot be read or written.
        ValueError: see `filled`.
    """
    readme.write_text(filled(readme.read_text(encoding="utf-8"), blocks(root)), encoding="utf-8")
    return readme


def filled(text: str, parts: Mapping[str, str]) -> str:
    """A README with its generated parts replaced.

    Raises:
        ValueError: it lacks a part's markers.
    """
    for name, part in parts.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        head, found, rest = text.partition(begin)
        _, ended, tail = rest.partition(end)
        if not found or not ended:
            raise ValueError(f"the README has no {begin} … {end} to fill")
        text = f"{head}{begin}\n\n{part}\n\n{end}{tail}"
    return text


def _checks() -> Iterator[str]:
    rows = [[check.name, check.why, check.asked] for check in (*CHECKS, STATE, BASELINE)]
    yield from markdown_table(["check", "what it sees", "who is asked"], rows, left=3)


def _step_checks() -> Iterator[str]:
    rows = [[check.name, check.why] for check in (ENDS, *STEP_CHECKS)]
    yield from markdown_table(["check", "what it sees"], rows, left=2)


def _records(states: list[State]) -> Iterator[str]:
    rows = [
        [
            f"[{KINDS[state.kind].about}]({_link(state)})",
            state.folder,
            state.entry["recorded"][:10],
            ", ".join(f"{name} {v[name]}" for name in ("torch", "triton") if name in (v := state.entry["versions"])),
            "yes" if state.fresh else "no" if state.entry["sources"] else "unknown",
        ]
        for state in states
        if not state.damage
    ]
    yield from markdown_table(["what", "where", "date", "versions", "made with these kernels"], rows, left=5)


def _speed(states: list[State]) -> Iterator[str]:
    """Every GPU's summary."""
    measured = [state for state in states if state.kind == "bench" and not state.damage]
    for state in measured:
        if state is not measured[0]:
            yield ""
        yield from summary(state.entry)
        yield from ("", f"Every figure: [bench.md]({_link(state)}).")
    if not measured:
        yield "No GPU has been measured yet."


def _rows_and_host(states: list[State]) -> Iterator[str]:
    """Every GPU's chart over rows per expert, its host times, and what it sustains."""
    kept = [state for state in states if not state.damage]
    for state in (state for state in kept if state.kind == "rows"):
        about = f"Forward and dX over rows per expert, {state.entry['device']}, {state.entry['started'][:10]}"
        yield from (f"![{about}](verification/evidence/{state.folder}/rows.svg)", "")
    for state in (state for state in kept if state.kind == "host"):
        yield from (f"**Host time of one eager step**, {state.entry['device']}, {state.entry['started'][:10]}", "")
        rows = [[row["shape"], *milliseconds_and_ratio([row["composite"], row["ours"]])] for row in state.entry["rows"]]
        yield from (*markdown_table(["shape", "composite, ms", "ours, ms", "ratio"], rows), "")
    for state in (state for state in kept if state.kind == "sustained"):
        yield from (f"**Base products without a pause**, {state.entry['device']}, {state.entry['started'][:10]}", "")
        yield from (*markdown_table(SUSTAINED, sustained_cells(state.entry["rows"]), left=2), "")
    if not any(state.kind in ("rows", "host", "sustained") for state in kept):
        yield "Neither products over rows per expert, nor the host's time, nor what a GPU sustains, are recorded yet."


def _models(states: list[State]) -> Iterator[str]:
    """Every whole model that a GPU has trained."""
    trained = [state for state in states if state.kind in MODELS and not state.damage]
    for state in trained:
        yield from (*model_summary(state.entry), "", f"Every figure: [{state.kind}.md]({_link(state)}).", "")
    if not trained:
        yield "No whole model has been recorded yet."


def _link(state: State) -> str:
    """The page for people where there is one."""
    page = state.path.with_suffix(".md")
    return f"verification/evidence/{state.folder}/{(page if page.is_file() else state.path).name}"

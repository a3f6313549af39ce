"""Which records are of the sources and versions that are here, and which are stale.

A changed kernel needs a fresh record of the gate, of whichever GPU: `problems` says so, and a test fails. Any other
stale record is shown, by `mxref evidence` and in the README, with its date.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mxref.verification.clone import EVIDENCE
from mxref.verification.records.kernel_sources import PACKAGE
from mxref.verification.records.record import KINDS, Entry, read
from mxref.verification.records.sources import digests
from mxref.verification.records.versions import versions

_COMPARED = ("torch", "triton", "ptxas", "cuda", "driver")
"""Versions that decide what a GPU executes."""


@dataclass(frozen=True)
class State:
    """One record, beside the sources and versions that are here.

    Attributes:
        path: its file.
        entry: what it says; empty where it cannot be read.
        changed: sources that differ from those it is of.
        moved: versions that differ, as "torch 2.11.0 → 2.13.0"; only where both are known.
        damage: why it cannot be read; "" where it can.
    """

    path: Path
    entry: Entry = field(default_factory=dict)
    changed: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    damage: str = ""

    @property
    def kind(self) -> str:
        """One of KINDS, by the file's name."""
        return self.path.stem

    @property
    def folder(self) -> str:
        """The device's folder."""
        return self.path.parent.name

    @property
    def fresh(self) -> bool:
        """Whether it is of these sources."""
        return bool(self.entry.get("sources")) and not self.changed

    @property
    def failed(self) -> bool:
        """Whether it records a failure."""
        return self.entry.get("passed") is False


def survey(root: Path = EVIDENCE, texts: Mapping[str, str] | None = None) -> list[State]:
    """Every record below `root` but the benchmarks' history, by device, in the order of KINDS.

    Args:
        root: folder with one folder a device.
        texts: the present sources by name; None for the installed ones.
    """
    here = versions()
    paths = (folder / f"{kind}.json" for folder in sorted(root.glob("*")) for kind in KINDS)
    return [_state(path, texts, here) for path in paths if path.is_file()]


def problems(root: Path = EVIDENCE, texts: Mapping[str, str] | None = None) -> list[str]:
    """What must be mended, a line each, with the command that does it.

    A GPU has a gate record, and the newest is of the present sources. No record is edited by hand or holds a failure.
    Other records may be stale, those of the gate on other GPUs too: `survey` shows it.
    """
    states = survey(root, texts)
    found = [state.damage for state in states if state.damage]
    gates = [state for state in states if state.kind == "gate"]
    newest = max(gates, key=lambda state: str(state.entry.get("recorded", "")), default=None)
    if newest is None:
        found.append(f"no GPU has a record of the gate below {root}; run on one: {KINDS['gate'].command}")
    for state in states:
        where, again = f"{state.folder}/{state.path.name}", f"run on a GPU: {state.entry.get('command')}"
        if state is newest and state.changed:
            found.append(f"{where} is older than {_some(state.changed)}; {again}")
        if state.failed:
            found.append(f"{where} records a failure on {state.entry['device']}; mend it, then {again}")
    return found


def _state(path: Path, texts: Mapping[str, str] | None, here: Mapping[str, str]) -> State:
    try:
        entry = read(path)
    except ValueError as error:
        return State(path, damage=str(error))
    # Whatever the deciding sources import is among them, so a new one shows as a change of the one that imports it.
    present = {name: text for name in entry["sources"] if (text := _text(name, texts)) is not None}
    now = digests(present)
    changed = tuple(name for name, then in entry["sources"].items() if now.get(name) != then)
    moved = tuple(
        f"{name} {was} → {here[name]}"
        for name in _COMPARED
        if _known(was := entry["versions"].get(name)) and _known(here[name]) and _public(was) != _public(here[name])
    )
    return State(path, entry, changed, moved)


def _text(name: str, texts: Mapping[str, str] | None) -> str | None:
    if texts is not None:
        return texts.get(name)
    path = PACKAGE / name
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _some(names: Sequence[str], shown: int = 3) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _known(version: str | None) -> bool:
    return version not in (None, "unknown", "none", "None")


def _public(version: str | None) -> str:
    """Without what a build appends: 2.13.0 of 2.13.0+cpu."""
    return str(version).partition("+")[0]

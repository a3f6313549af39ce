"""Records of what a command found: where, with which versions, of which sources. Every one is written here.

CI has no GPU, so what one saw is kept in the repository: `evidence/<device>/<kind>.json`, one file a command. A record
carries a digest of every source that decides its result and a seal over itself, so that `freshness` can tell when it is
older than the sources and `read` when it was edited by hand. Commands hand plain data to `write`; nothing else writes.

In a file, a list of flat objects is a table: `{"columns": [...], "rows": [[...]]}`, a third of the size. `read` gives
the objects back, with None where one lacked a field.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mxref.kernels.models.sizes import MODELS, TINY
from mxref.verification.clone import EVIDENCE
from mxref.verification.distributed.registry import OWN
from mxref.verification.records.kernel_sources import kernel_sources
from mxref.verification.records.sources import digest, digests
from mxref.verification.records.versions import versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA = "mxref.record/2"

Entry = dict[str, Any]
"""A record as plain data."""


@dataclass(frozen=True)
class Kind:
    """A kind of record: the command that writes it, what it holds, and whether it is worth keeping of a GPU only."""

    command: str
    about: str
    gpu_only: bool = True


_PUBLISHED = [name for name in MODELS if name != TINY.name]
KINDS: dict[str, Kind] = {
    "gate": Kind("mxref gate --require-gpu --record", "the gate's verdict on the kernels"),
    "bench": Kind("mxref bench --large --record", "how fast they are"),
    "history": Kind("mxref bench --large --record", "the ratios of one benchmark, for `mxref history`"),
    "scoreboard": Kind("mxref scoreboard --device cuda --record", "implementations from elsewhere by the same checks"),
    "pytest": Kind("pytest -m gpu --require-gpu --record-evidence", "the tests that need a GPU"),
    "finetune": Kind("python notebooks/04_finetune_gpt_oss.py --record", "training beside the dequantised model"),
    "mutants": Kind("mxref mutants --all --record", "planted bugs and the checks that notice them", gpu_only=False),
    "calls": Kind("mxref calls --record", "planted bugs of how a layer is called", gpu_only=False),
    "sanitize": Kind("mxref sanitize --record", "what compute-sanitizer and ConSan see in the kernels"),
    "ulp_baseline": Kind("mxref gate --accept-baseline", "accepted errors, in ulp", gpu_only=False),
    "rows": Kind("mxref bench --rows --record", "forward and dX over rows per expert"),
    "host": Kind("mxref bench --host --record", "host time of one eager step"),
    "sustained": Kind("mxref bench --sustained --record", "base products without a pause, with clock and power"),
    **{
        name: Kind(f"mxref bench --model {name} {MODELS[name].recorded_with} --record", f"{name} trained whole")
        for name in _PUBLISHED
    },
    **{
        f"{name}-parallel": Kind(
            f"mxref bench --model {name} --parallel fsdp --parallel experts --record",
            f"{name} trained by several ranks",
        )
        for name in _PUBLISHED
    },
    **{
        f"steps-{name}": Kind(
            f"mxref gate --distributed --step {name} --record", f"the gate's verdict on steps, {name}", gpu_only=False
        )
        for name in OWN
    },
}


def write(
    kind: str,
    payload: Mapping[str, Any],
    device: torch.device,
    root: Path = EVIDENCE,
    *,
    command: str | None = None,
    texts: Mapping[str, str] | None = None,
    name: str | None = None,
    page: Callable[[Entry], str] | None = None,
    chart: Callable[[Entry], Figure] | None = None,
) -> Path:
    """Write one record; its path.

    Args:
        kind: of KINDS.
        payload: what the command found, as plain data; fields that every record has are left out of it.
        device: where.
        root: folder with one folder a device.
        command: that writes this record, where it is not the kind's.
        texts: the sources that decide the result, by name relative to the package; None for the kernels' own.
        name: of the file below the device's folder, without its ending; None for the kind's name.
        page: turns the record into Markdown that is written beside it.
        chart: draws the record; the picture is written beside it as SVG and PNG.

    Raises:
        RuntimeError: the kind is of a GPU, and the device is none.
        OSError: the folder cannot be made or written to.
        ValueError: the payload holds NaN or infinity.
    """
    if KINDS[kind].gpu_only and device.type != "cuda":
        raise RuntimeError(f"a {kind} record is what a GPU saw; this ran on {device.type}")
    sources = kernel_sources() if texts is None else texts
    entry: Entry = {
        "schema": SCHEMA,
        "kind": kind,
        "command": command or KINDS[kind].command,
        "device": _words(device),
        "recorded": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "versions": versions(),
        "digest": digest(sources),
        "sources": digests(sources),
    }
    entry |= {field: found for field, found in payload.items() if field not in entry}
    path = record_path(name or kind, device, root)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_sealed(entry), encoding="utf-8")
    if page is not None:
        path.with_suffix(".md").write_text(page(read(path)), encoding="utf-8")
    if chart is not None:
        figure = chart(read(path))
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        figure.savefig(path.with_suffix(".png"), dpi=150)
    return path


def read(path: Path) -> Entry:
    """One record.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is no record, or it was changed after a command wrote it.
    """
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(entry, dict) or entry.get("schema") != SCHEMA:
        raise ValueError(f"{path} is no record of schema {SCHEMA}")
    if entry.pop("seal", None) != _seal(entry):
        raise ValueError(f"{path} was changed by hand; write it again: {entry.get('command', 'mxref gate')}")
    return {field: _objects(value) for field, value in entry.items()}


def record_path(name: str, device: torch.device, root: Path = EVIDENCE) -> Path:
    """Where a device's record lies."""
    return root / folder_name(device) / f"{name}.json"


def folder_name(device: torch.device) -> str:
    """The name of a device's folder: "interpreter-cpu", or the GPU's name as in "nvidia-h200"."""
    if device.type == "cpu":
        return "interpreter-cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def _words(device: torch.device) -> str:
    if device.type == "cpu":
        return f"Triton's interpreter, CPU ({platform.machine()})"
    return torch.cuda.get_device_name(device)


def _sealed(entry: Entry) -> str:
    """The file's text: a line a field, and a line an item where a field has many, so that a diff shows what changed."""
    stored = {field: _table(value) for field, value in entry.items()}
    fields = (f"{_json(field)}: {_lines(value)}" for field, value in (stored | {"seal": _seal(stored)}).items())
    return "{\n" + ",\n".join(fields) + "\n}\n"


def _lines(value: Any) -> str:
    """JSON, each item of a nested list or object on a line of its own."""
    if isinstance(value, dict) and value.keys() == {"columns", "rows"}:
        return f'{{"columns": {_json(value["columns"])}, "rows": {_lines(value["rows"])}}}'
    if isinstance(value, dict) and (len(value) > 8 or any(isinstance(item, dict) for item in value.values())):
        return "{\n" + ",\n".join(f"{_json(name)}: {_json(item)}" for name, item in value.items()) + "\n}"
    if isinstance(value, list) and any(isinstance(item, list | dict) for item in value):
        return "[\n" + ",\n".join(map(_json, value)) + "\n]"
    return _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _table(value: Any) -> Any:
    """A list of flat objects as columns and rows; anything else as it is."""
    if not isinstance(value, list) or len(value) < 2 or not all(map(_is_flat, value)):
        return value
    columns = list(dict.fromkeys(name for item in value for name in item))
    return {"columns": columns, "rows": [[item.get(name) for name in columns] for item in value]}


def _objects(value: Any) -> Any:
    """The inverse of `_table`."""
    if isinstance(value, dict) and value.keys() == {"columns", "rows"}:
        return [dict(zip(value["columns"], row, strict=True)) for row in value["rows"]]
    return value


def _is_flat(item: Any) -> bool:
    return isinstance(item, dict) and not any(isinstance(part, list | dict) for part in item.values())


def _seal(stored: Mapping[str, Any]) -> str:
    """Shows an edit that nobody meant; it is no signature."""
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()

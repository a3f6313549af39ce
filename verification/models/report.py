"""A whole model's record as Markdown: what the README includes and what a terminal shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mxref.verification.report.own.markdown import markdown_table

__all__ = ["as_page", "figures", "model_summary"]

Row = Mapping[str, Any]
_GIB = 2**30


def model_summary(entry: Row) -> list[str]:
    """Markdown, by lines, from a record of one model: where and with what it was seen, then `figures`."""
    v, packages = entry["versions"], entry["packages"]
    said = ", ".join(f"{name} {packages[name]}" for name in ("transformers", "peft"))
    return [
        f"**{entry['model']}**, random weights; {entry['started'][:10]}, {entry['device']}, torch {v['torch']}, triton "
        f"{v['triton']}, {said}, kernels `{entry['digest'][:12]}`. LoRA of rank {entry['rank']} on experts, queries "
        "and values, AdamW, gradient checkpointing.",
        "",
        *figures(entry),
    ]


def as_page(entry: Row) -> str:
    """A record's page: Markdown."""
    return "\n".join([f"# {entry['model']}", "", *model_summary(entry), "", f"Sizes: {entry['source']}."]) + "\n"


def figures(entry: Row) -> list[str]:
    """Markdown, by lines: a table of steps, one of where their time goes, and sentences on what else was seen."""
    lines = [*_steps(entry)]
    if entry["shares"]:
        lines += ["", *_shares(entry["shares"])]
    counts = {f"{row['trainable']:,}" for row in entry["steps"] if row["status"] == "ok"}
    told = [f"Trained parameters: {' or '.join(sorted(counts))}."] if counts else []
    told += [f"{row['side']}, {row['attention']}: {row['status']}." for row in entry["steps"] if ":" in row["status"]]
    told += [f"Interrupted: {side} was not seen to its end." for side in entry["missing"]]
    told += [*_largest(entry["steps"]), *map(_block, entry["blocks"]), *_stored(entry["stored"])]
    return [*lines, "", " ".join(told)] if told else lines


def _steps(entry: Row) -> Iterator[str]:
    columns = ["experts", "batch × tokens", "step, ms", "÷ dense", "tokens/s", "host, ms", "peak, GiB", "model, GiB"]
    rows = [_cells(row, entry) for row in entry["steps"]]
    yield from markdown_table([*columns, "first step, s", "last loss"], rows, left=2)


def _cells(row: Row, entry: Row) -> list[str]:
    side = row["side"] if row["attention"] == "eager" else f"{row['side']}, {row['attention']}"
    if 0 < row["layers"] < entry["of_layers"]:
        side += f", {row['layers']} of {entry['of_layers']} layers"
    named = [side, row["batch"] or "–"]
    if row["status"] != "ok":
        return [*named, row["status"].partition(":")[0], *[""] * 7]
    dense = _dense(row, entry["steps"])
    return [
        *named,
        f"{row['median'] * 1e3:,.0f} ± {row['spread']:.1%}",
        f"{row['median'] / dense['median']:.2f}" if dense else "",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['host'] * 1e3:,.0f}",
        f"{row['peak'] / _GIB:.1f}",
        f"{row['model'] / _GIB:.1f}" if row["model"] else "",
        f"{row['first']:.1f}{' (cold)' if row['fresh'] else ''}",
        f"{row['loss']:.2f}",
    ]


def _dense(row: Row, rows: Sequence[Row]) -> Row | None:
    """The dense row that a packed one may be compared with."""
    alike = ("attention", "batch", "layers", "status")
    found = [r for r in rows if r["side"] == "dense" and all(r[name] == row[name] for name in alike)]
    return found[0] if found and row["side"] != "dense" else None


def _shares(rows: Sequence[Row]) -> Iterator[str]:
    """Milliseconds of one step, a column a kind."""
    yield from ("Device time of one step by kind of work, in ms; ours are this project's kernels", "")
    kinds = [name for name in rows[0] if name not in ("side", "attention", "batch")]
    cells = [
        [f"{row['side']}, {row['attention']}, {row['batch']}", *(f"{row[kind] * 1e3:,.1f}" for kind in kinds)]
        for row in rows
    ]
    yield from markdown_table(["step", *kinds], cells)


def _largest(rows: Sequence[Row]) -> Iterator[str]:
    """Of a side whose last batches were doubled until one did not fit."""
    sides = dict.fromkeys((row["side"], row["attention"]) for row in rows)
    for side, attention in sides:
        own = [row for row in rows if (row["side"], row["attention"]) == (side, attention)]
        if len(own) > 1 and own[-1]["status"] == "out of memory" and own[-2]["status"] == "ok":
            yield f"The largest batch that fits, {side}: {own[-2]['batch']}; {own[-1]['batch']} does not."


def _block(row: Row) -> str:
    took, limit = f"{row['median'] * 1e3:.2f} ms ({row['mode']})", f"{row['limit'] * 1e3:.2f} ms"
    return (
        f"MoE block, {row['rows']:,} routed rows, forward and backward with recomputation: {took}, "
        f"{row['median'] / row['limit']:.2f} times the limit of its products, {limit}."
    )


def _stored(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        device = f", {row['device'] / _GIB:.1f} GiB on the device" if row["device"] else ""
        yield (
            f"Checkpoint of {row['octets'] / _GIB:.1f} GiB {row['what']} in {row['seconds']:.1f} s, peak memory "
            f"{row['host'] / _GIB:.1f} GiB on the host{device}."
        )

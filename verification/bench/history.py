"""Speed over commits, on ratios alone: a time over the reference's and a time over the limit, never a time.

Each benchmark that is kept leaves its ratios in `evidence/<gpu>/history/`. A row that is slower than it was, beyond
the noise of both runs, fails. The noise of a ratio is the range of its rounds over their median; the band is the sum of
both runs' noise, and at least `FLOOR`. The limit's ratio adds how far each run's ceilings moved meanwhile, and how far
apart the two runs' limits are: the same shape's, so only the machines differ.

What a row is held against is the best of all earlier runs, so that many small losses add up to one that shows; a pinned
run replaces it. Only this project's ways are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mxref.verification.bench.benchmark import Bench
from mxref.verification.bench.pairs import Row, digits

FLOOR = 0.05
"""The narrowest band: what the same sources differ by between two machines of one kind."""

Key = tuple[str, str, str]
"""Shape, measure, path."""
Ratio = Literal["ratio", "limit_ratio"]


@dataclass(frozen=True)
class Run:
    """One kept benchmark."""

    gpu: str
    started: str
    commit: str
    digest: str
    drift: float
    rows: dict[Key, dict[str, Any]]

    @property
    def name(self) -> str:
        """Date and commit, or the kernels' digest where no commit is known."""
        return f"{self.started[:10]} {self.commit or self.digest[:8]}"


@dataclass(frozen=True)
class Change:
    """One ratio of one row of the latest run, beside what it is held against.

    Attributes:
        key: shape, measure, path.
        of: "ratio", to the reference, or "limit_ratio".
        now, before: the ratios; `now` is None where the row has no numbers any more, and `why` says so.
        band: relative; slower means now > before · (1 + band).
        since: the name of the run that `before` comes from.
        why: see `now`.
        beside: the reference.
    """

    key: Key
    of: Ratio
    now: float | None
    before: float
    band: float
    since: str
    why: str = ""
    beside: str = "composite"

    @property
    def slower(self) -> bool:
        """Whether this fails."""
        return self.now is None or self.now > self.before * (1 + self.band)

    @property
    def faster(self) -> bool:
        """Whether this is an improvement beyond the same band."""
        return self.now is not None and self.now * (1 + self.band) < self.before

    def __str__(self) -> str:
        shape, measure, path = self.key
        what = self.beside if self.of == "ratio" else "limit"
        if self.now is None:
            return f"{path}, {shape}, {measure}: {self.why}; was {self.before:.3f} × the {what} in {self.since}"
        return (
            f"{path}, {shape}, {measure}: {self.now:.3f} × the {what}, was {self.before:.3f} in {self.since}: "
            f"{self.now / self.before - 1:+.1%}, band ±{self.band:.1%}"
        )


def ratios_of(bench: Bench) -> dict[str, Any]:
    """What the history keeps of a benchmark, as plain data: its own ways' ratios, each with its rounds' range."""
    return {
        "started": bench.started,
        "commit": bench.commit,
        "drift": round(bench.drift, 4),
        "rows": [_ratios(row) for row in bench.rows if row.ours],
    }


def _ratios(row: Row) -> dict[str, Any]:
    named = {name: getattr(row, name) for name in ("shape", "measure", "path", "reference", "status")}
    if not row.ok:
        return named
    numbers = {
        "ratio": row.ratio, "ratio_low": min(row.ratios), "ratio_high": max(row.ratios), "limit": row.limit,
        "limit_ratio": row.limit_ratio, "limit_ratio_low": min(row.limit_ratios),
        "limit_ratio_high": max(row.limit_ratios),
    }  # fmt: skip
    return named | {"mode": row.mode} | {name: digits(number) for name, number in numbers.items()}


def as_entry(kept: Mapping[str, Any]) -> Run:
    """A record of the kind "history", read."""
    rows = {(row["shape"], row["measure"], row["path"]): row for row in kept["rows"]}
    return Run(kept["device"], kept["started"], kept["commit"], kept["digest"], kept["drift"], rows)


def noise(entry: Run, key: Key, of: Ratio) -> float:
    """Relative noise of one ratio within its own run."""
    row = entry.rows[key]
    spread: float = (row[f"{of}_high"] - row[f"{of}_low"]) / row[of]
    return spread + (entry.drift if of == "limit_ratio" else 0.0)


def judge(entries: Sequence[Run], baseline: str | None = None) -> list[Change]:
    """The latest run's changes, one a ratio of each row that an earlier run has too.

    Args:
        entries: of one GPU, oldest first.
        baseline: the start of a date, commit or digest; that run is what the latest is held against. None: the best
            earlier one of each ratio.

    Raises:
        ValueError: no earlier run, or more than one, matches `baseline`.
    """
    *earlier, latest = entries
    if baseline is not None:
        earlier = [pinned(earlier, baseline)]
    changes = []
    for key in latest.rows:
        for of in ("ratio", "limit_ratio"):
            changes += _change(earlier, latest, key, of)
    return changes


def pinned(entries: Sequence[Run], start: str) -> Run:
    """The one run whose date, commit or digest starts so.

    Raises:
        ValueError: none does, or several.
    """
    found = [e for e in entries if any(text.startswith(start) for text in (e.started, e.commit, e.digest))]
    if len(found) != 1:
        known = ", ".join(f"{entry.started} {entry.commit} {entry.digest[:8]}" for entry in entries) or "none"
        raise ValueError(f"{start!r} matches {len(found)} earlier runs; there are: {known}")
    return found[0]


def _change(earlier: Iterable[Run], latest: Run, key: Key, of: Ratio) -> list[Change]:
    row = latest.rows[key]
    mode = row.get("mode")
    comparable = [
        entry
        for entry in earlier
        if key in entry.rows and entry.rows[key]["status"] == "ok" and mode in (None, entry.rows[key]["mode"])
    ]
    if not comparable:
        return []
    best = min(comparable, key=lambda entry: entry.rows[key][of])
    before, since = best.rows[key][of], best.name
    beside = row["reference"]
    if row["status"] != "ok":
        return [Change(key, of, None, before, 0.0, since, row["status"], beside)]
    band = max(FLOOR, noise(best, key, of) + noise(latest, key, of))
    if of == "limit_ratio":
        band += abs(row["limit"] / best.rows[key]["limit"] - 1)
    return [Change(key, of, row[of], before, band, since, beside=beside)]

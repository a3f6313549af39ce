"""What counts as slower: ratios beyond both runs' noise, against the best earlier run; and how the command says it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import pytest
import torch
from benchmarks import GOLDEN, out_of_memory, timed

from mxref.verification.bench import plots
from mxref.verification.bench.history import FLOOR, Run, as_entry, judge, noise, ratios_of
from mxref.verification.bench.paths import Path
from mxref.verification.cli import main
from mxref.verification.cli.own.history import load_history
from mxref.verification.records.record import write

KEY = ("thin", "step", "automatic")


def row(ratio: float, limit: float | None = None, spread: float = 0.0, **changes: Any) -> dict[str, Any]:
    """A row whose rounds lie `spread` apart."""
    limit = 2 * ratio if limit is None else limit
    return {
        "shape": "thin", "measure": "step", "path": "automatic", "reference": "composite", "rows_per_expert": 8.0,
        "status": "ok", "mode": "graph", "median": 1e-3 * ratio, "ratio": ratio, "limit_ratio": limit, "limit": 5e-4,
        "ratio_low": ratio * (1 - spread / 2), "ratio_high": ratio * (1 + spread / 2),
        "limit_ratio_low": limit * (1 - spread / 2), "limit_ratio_high": limit * (1 + spread / 2),
    } | changes  # fmt: skip


def entry(day: int, *rows: dict[str, Any], drift: float = 0.0) -> Run:
    keyed = {(r["shape"], r["measure"], r["path"]): r for r in rows}
    return Run("NVIDIA H200", f"2026-11-{day:02}T00:00:00Z", f"c{day}", f"d{day}" * 8, drift, keyed)


def slower(*entries: Run, baseline: str | None = None) -> list[str]:
    return [change.of for change in judge(entries, baseline) if change.slower]


def test_a_slowdown_beyond_the_band_fails_on_both_ratios() -> None:
    assert slower(entry(1, row(1.0)), entry(2, row(1.06))) == ["ratio", "limit_ratio"]
    assert slower(entry(1, row(1.0)), entry(2, row(1.04))) == []
    assert slower(entry(1, row(1.0, limit=3.0)), entry(2, row(1.0, limit=3.3))) == ["limit_ratio"]


def test_the_band_is_both_runs_noise_and_never_below_the_floor() -> None:
    noisy, calm = entry(1, row(1.0, spread=0.10)), entry(2, row(1.14, spread=0.06))
    assert noise(noisy, KEY, "ratio") == pytest.approx(0.10)
    assert slower(noisy, calm) == []
    assert slower(noisy, entry(2, row(1.18, spread=0.06))) == ["ratio", "limit_ratio"]
    assert {change.band for change in judge([entry(1, row(1.0)), entry(2, row(1.0))])} == {FLOOR}


def test_moving_ceilings_widen_the_limit_s_band_alone() -> None:
    assert slower(entry(1, row(1.0)), entry(2, row(1.08), drift=0.1)) == ["ratio"]


def test_what_two_machines_limits_differ_by_widens_it_too() -> None:
    other = row(1.0, limit=3.2) | {"limit": 5e-4 / 1.03}
    assert slower(entry(1, row(1.0, limit=3.0)), entry(2, row(1.0, limit=3.2))) == ["limit_ratio"]
    assert slower(entry(1, row(1.0, limit=3.0)), entry(2, other)) == []


def test_small_losses_add_up() -> None:
    creeping = [entry(day, row(1.0 * 1.03**day)) for day in range(4)]
    assert slower(*creeping[:2]) == []
    assert slower(*creeping) == ["ratio", "limit_ratio"]


def test_a_pinned_baseline() -> None:
    runs = [entry(1, row(1.2)), entry(2, row(1.0)), entry(3, row(1.15))]
    assert slower(*runs) == ["ratio", "limit_ratio"]
    for start in ("2026-11-01", "c1", "d1d1"):
        assert slower(*runs, baseline=start) == []
    with pytest.raises(ValueError, match="matches 0 earlier runs"):
        judge(runs, "c3")
    with pytest.raises(ValueError, match="matches 2 earlier runs"):
        judge(runs, "2026")


def test_what_is_not_comparable_is_not_judged() -> None:
    assert judge([entry(1, row(1.0))]) == []
    assert judge([entry(1, row(1.0)), entry(2, row(9.0, mode="eager"))]) == []
    assert judge([entry(1), entry(2, row(9.0))]) == []


def test_rows_that_earlier_runs_lack_are_not_judged_and_change_nothing() -> None:
    new = [row(9.0, measure="base dX"), row(9.0, measure="decode", path="dequantize_experts", reference="copy")]
    assert {change.key for change in judge([entry(1, row(1.0)), entry(2, row(1.0), *new)])} == {KEY}
    assert {change.key for change in judge([entry(1, row(1.0), *new), entry(2, row(1.0))])} == {KEY}


def test_the_history_keeps_our_ratios_with_their_rounds_range() -> None:
    bench = timed(GOLDEN, replace(GOLDEN, name="peer", ours=False), Path("large", "", out_of_memory))
    data = ratios_of(bench) | {"device": "a GPU", "digest": "d"}
    entry = as_entry(json.loads(json.dumps(data)))
    ours = [r for r in bench.rows if r.ours]
    assert list(entry.rows) == [(r.shape, r.measure, r.path) for r in ours]
    kept = entry.rows["tiny", "step", "golden"]
    assert (kept["ratio_low"], kept["ratio"], kept["ratio_high"]) == (1.0, 1.0, 1.0)
    assert kept["limit_ratio_low"] <= kept["limit_ratio"] <= kept["limit_ratio_high"]
    assert entry.rows["tiny", "step", "large"]["status"] == "out of memory"
    assert judge([entry, entry])


def test_a_change_names_what_stood_beside() -> None:
    decode = {"measure": "decode", "path": "dequantize_experts", "reference": "copy"}
    of_copy, of_limit = judge([entry(1, row(1.0, **decode)), entry(2, row(1.5, **decode))])
    assert str(of_copy).startswith("dequantize_experts, thin, decode: 1.500 × the copy, was 1.000 in 2026-11-01 c1")
    assert "3.000 × the limit" in str(of_limit)


def test_a_row_that_lost_its_numbers_fails() -> None:
    lost = {name: value for name, value in row(1.0).items() if name in ("shape", "measure", "path", "reference")}
    changes = judge([entry(1, row(1.0)), entry(2, lost | {"status": "out of memory"})])
    assert all(change.slower for change in changes)
    assert str(changes[0]).startswith("automatic, thin, step: out of memory; was 1.000 × the composite")


@pytest.fixture
def kept(tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> File:
    """An evidence folder to fill with `keep`."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    return tmp_path


def keep(root: File, *entries: Run) -> None:
    for each in entries:
        found = {"started": each.started, "commit": each.commit, "drift": each.drift, "rows": list(each.rows.values())}
        write("history", found, torch.device("cuda"), root, name=f"history/{each.commit}")


@pytest.mark.parametrize(("last", "code"), [(1.02, 0), (1.5, 1)])
def test_the_command(kept: File, last: float, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    keep(kept, entry(2, row(last)), entry(1, row(1.0)))
    assert [e.commit for e in load_history(kept)["nvidia-h200"]] == ["c1", "c2"]
    assert main(["history", "--evidence", str(kept), "--plot", str(kept / "plots")]) == code
    out = capsys.readouterr().out
    assert ("2 of 2 ratios slower" in out) == bool(code)
    assert (
        "automatic, thin, step: 1.500 × the composite, was 1.000 in 2026-11-01 c1: +50.0%, band ±5.0%" in out
    ) == bool(code)
    assert (kept / "plots" / "history-nvidia-h200.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_use(kept: File, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: str) -> str:
        assert main(["history", "--evidence", str(kept), *arguments]) == 2
        return capsys.readouterr().err

    assert "no benchmark is recorded" in error()
    keep(kept, entry(1, row(1.0)), entry(2, row(1.0)))
    assert "matches 0 earlier runs" in error("--baseline", "x")
    assert "no benchmark is recorded" in error("--gpu", "b200")
    file = next(kept.glob("*/history/c1.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"commit": "other"}))
    assert "changed by hand" in error()


def series(axes: Any) -> Sequence[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_plots() -> None:
    from matplotlib.figure import Figure

    record = {"rows": [row(1.0, limit=2.0, measure="base"), row(0.5, path="strategy A"), row(1.0, path="strategy B")]}
    roof, cross, over = Figure().subplots(1, 3)
    plots.roofline(roof, record)
    assert series(roof) == ["automatic"]
    assert roof.get_lines()[0].get_ydata().tolist() == [0.5]
    plots.crossover(cross, record)
    assert series(cross) == ["thin"]
    assert cross.get_lines()[0].get_ydata().tolist() == [0.5]
    plots.over_commits(over, [entry(1, row(1.0)), entry(2, row(1.1))])
    assert series(over) == ["thin"]

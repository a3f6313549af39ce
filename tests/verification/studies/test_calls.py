"""Planted bugs of how a layer is called: plain data, an honest layer behind them, and a handful judged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from mxref.verification.arithmetic.accumulation import default_accumulation
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.cases.domain import DIMENSIONS
from mxref.verification.cases.exclusions import EXCLUDED
from mxref.verification.cases.scope import Scope
from mxref.verification.cli import main
from mxref.verification.gate.plan import plan
from mxref.verification.gate.run import judge
from mxref.verification.records.record import read, record_path
from mxref.verification.studies.calls import run
from mxref.verification.studies.calls.catalogue import BUGS
from mxref.verification.studies.calls.layer import Bug, Layer
from mxref.verification.studies.calls.layouts import as_if_contiguous
from mxref.verification.studies.calls.run import HONEST, Judged, judge_bugs, payload

BY_NAME = {bug.name: bug for bug in BUGS}


def test_there_are_enough_of_them_each_with_a_name_and_a_mistake() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 50
    assert all(bug.mistake for bug in BUGS)


def test_the_classes_that_show_a_bug_are_the_domain_s_and_can_be_had_together() -> None:
    named = {dimension.name: {each.name for each in dimension.classes} for dimension in DIMENSIONS}
    excluded = {
        frozenset(((e.first, one), (e.second, other))) for e in EXCLUDED for one in e.classes for other in e.others
    }
    for bug in BUGS:
        assert all(name in named[dimension] for dimension, name in bug.shown_by), bug.name
        assert not any(pair <= set(bug.shown_by) for pair in excluded), bug.name


def test_the_honest_layer_passes_the_smallest_cases() -> None:
    how = default_accumulation(torch.device("cpu"))
    for item in plan(Scope("small", "cpu", interpreted=False), own=False):
        wrong = [str(f) for f in judge(item, Candidate("honest", Layer()), how) if not f.ok]
        assert wrong == [], item.name


def test_memory_read_without_strides() -> None:
    x = torch.arange(6.0).view(2, 3)
    assert torch.equal(as_if_contiguous(x), x)
    assert torch.equal(as_if_contiguous(x.T), x.flatten().view(3, 2))
    assert torch.equal(as_if_contiguous(x[:, ::2]), torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    assert torch.equal(as_if_contiguous(x[1:]), x[1:])


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("x read as contiguous", "integer"),
        ("gates taken as positive", "integer"),
        ("ids clamped in place", "poison"),
        ("gates not saved as autograd saves", "sequences"),
        ("dgates without biases", "subsets"),
        ("A's gradient written over", "poison"),
        ("eight graphs at most", "sequences"),
        ("where x began the first time", "sequences"),
        ("strides that B had the first time", "sequences"),
        ("strides of expert ids taken for all indices", "interval"),
        ("a dOut that begins late taken as dense", "interval"),
        ("a token's gates in one tile", "integer"),
        ("s as fp16 holds it", "interval"),
        ("scratch of the thread of the forward pass", "integer"),
        ("weights known by a weak reference", "integer"),
        ("blocks counted in a byte", "interval"),
        ("positions of other ranks' rows zeroed", "integer"),
        ("autocast followed in backward", "interval"),
        ("dOut noted by a hook", "sequences"),
        ("dX in a node of its own", "sequences"),
        ("blocks of zeros skipped", "integer"),
        ("Z unrounded for one token", "integer"),
        ("half a step of K", "integer"),
        ("long sums in TF32", "integer"),
        ("a frozen A unfrozen", "integer"),
        ("a plan's rank", "sequences"),
        ("zeros kept", "sequences"),
        ("inference tensors that never change", "sequences"),
    ],
)
def test_a_bug_is_rejected(name: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the items that should show it, or of those without classes by a check; `mxref calls` asks all by all."""
    bug = BY_NAME[name]
    every = plan(Scope("quick", "cpu", interpreted=False), own=False)
    items = [item for item in every if run._shows(item, bug)]
    if not bug.shown_by:
        items = [item for item in items if check in {each.name for each in item.checks}]
    ask = run._judge  # the honest layer a few items: `mxref calls` asks it all
    monkeypatch.setattr(run, "plan", lambda *scope, **own: items)
    monkeypatch.setattr(run, "_judge", lambda say, bug, items: ask(say, bug, items[:3] if bug is HONEST else items))
    [judged] = judge_bugs([bug], seed=0, jobs=1)
    assert judged.check in (("integer", "interval") if bug.shown_by else (check,)), judged.finding


def test_a_check_that_rejects_the_honest_layer_ends_everything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its kills would count for nothing."""
    monkeypatch.setattr(
        run, "plan", lambda *scope, **own: plan(Scope("small", "cpu", interpreted=False), own=False)[:9]
    )
    monkeypatch.setattr(run, "HONEST", Bug("honest", "", (), lambda: BY_NAME["B cached by shape"].make()))
    assert main(["calls", "--name", "N = 1 squeezed", "--jobs", "1"]) == 1
    assert "the honest layer is rejected" in capsys.readouterr().err


def test_a_survivor_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody asks for one column here."""
    monkeypatch.setattr(
        run, "plan", lambda *scope, **own: plan(Scope("small", "cpu", interpreted=False), own=False)[:9]
    )
    names = ["--name", "B cached by shape", "--name", "N = 1 squeezed"]
    assert main(["calls", *names, "--jobs", "1", "--out", str(tmp_path)]) == 1
    assert "1 survivors of 2 planted bugs" in capsys.readouterr().out
    entry = json.loads((tmp_path / "calls.json").read_text())
    assert not entry["passed"]
    assert [bug["name"] for bug in entry["bugs"] if not bug["check"]] == ["N = 1 squeezed"]


def test_what_is_kept_is_plain_data() -> None:
    kept = payload([run.Judged(BUGS[0], "integer", "wrong"), run.Judged(BUGS[1])], seed=3)
    assert json.loads(json.dumps(kept)) == kept
    assert (kept["killed"], kept["survived"], kept["passed"]) == (1, 1, False)
    assert kept["kills by check"] == {"integer": 1}


def test_wrong_use() -> None:
    assert main(["calls", "--name", "nobody"]) == 2
    assert main(["calls", "--name", "x read as contiguous", "--record"]) == 2


def test_the_rest_is_what_a_record_has_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()

    def judged(bugs: Sequence[Bug], seed: int, jobs: int, on_judged: object) -> list[Judged]:
        asked.extend(bug.name for bug in bugs)
        alive = BUGS[0].name if len(bugs) > 1 else ""
        return [Judged(bug, "" if bug.name == alive else "integer", "wrong") for bug in bugs]

    monkeypatch.setattr("mxref.verification.cli.own.calls.judge_bugs", judged)
    assert main(["calls", "--rest"]) == 2, "there is no record to go on from"
    assert main(["calls", "--record", str(tmp_path), "--rest"]) == 2
    assert main(["calls", "--record", str(tmp_path)]) == 1
    asked.clear()
    assert main(["calls", "--record", str(tmp_path), "--rest"]) == 0
    assert asked == [BUGS[0].name]
    assert len(read(record_path("calls", torch.device("cpu"), tmp_path))["bugs"]) == len(BUGS)

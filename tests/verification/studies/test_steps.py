"""Planted mistakes in training steps are each named by their check, and honest steps are never rejected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mxref.verification.cli import main
from mxref.verification.distributed.cases import CASES
from mxref.verification.distributed.registry import CHECKS, ENDS
from mxref.verification.studies.steps.catalogue import FAULTS
from mxref.verification.studies.steps.honest import Masked
from mxref.verification.studies.steps.run import Judged, judge_faults, judge_honest, payload
from mxref.verification.studies.steps.variants import VARIANTS, ExchangedMean, Sequence


def test_there_are_enough_of_them_each_with_a_name_a_mistake_and_what_shows_it() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 50
    assert all(fault.mistake for fault in FAULTS)
    assert {fault.case for fault in FAULTS} <= {case.name for case in CASES}
    assert {fault.check for fault in FAULTS} == {check.name for check in (ENDS, *CHECKS)}


@pytest.mark.parametrize("ranks", sorted({fault.ranks for fault in FAULTS}))
def test_every_mistake_is_named_by_its_check(ranks: int) -> None:
    judged = judge_faults([fault for fault in FAULTS if fault.ranks == ranks], seed=0)
    survived = {each.fault.name: [str(other) for other in each.others] for each in judged if not each.killed}
    assert not survived


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_no_honest_step_is_rejected(ranks: int) -> None:
    """Half of them by every case, in one world each; `mxref steps --honest` takes all in each."""
    steps = VARIANTS[ranks // 2 % 2 :: 4] if ranks % 2 == 0 else (Sequence, ExchangedMean, Masked)
    rejected, count = judge_honest(steps, [ranks], [ranks])
    assert not [f"{make.__name__}: {finding}" for make, finding in rejected]
    assert count > 100 * len(steps)


def test_what_is_kept_is_plain_data() -> None:
    kept = payload([Judged(FAULTS[0], None, ())], seed=3)
    assert json.loads(json.dumps(kept)) == kept
    assert (kept["killed"], kept["survived"], kept["passed"]) == (0, 1, False)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["steps", "--name", "averaged", "--out", str(tmp_path)]) == 0
    assert "0 survivors of 1 planted mistakes" in capsys.readouterr().out
    [entry] = json.loads((tmp_path / "steps.json").read_text())["faults"]
    assert entry["check"] == "once"
    assert "1/2 of what it should be" in entry["finding"]
    assert main(["steps", "--list", "--honest"]) == 0
    assert "bfloat16, tree" in capsys.readouterr().out


def test_wrong_use() -> None:
    assert main(["steps", "--name", "nobody"]) == 2
    assert main(["steps", "--seeds", "2"]) == 2

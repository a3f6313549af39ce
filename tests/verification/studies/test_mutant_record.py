"""What a mutation run tells people, and what is kept of it; and the command's wrong use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mxref.verification.cli import main
from mxref.verification.cli.own import mutants as command
from mxref.verification.clone import EVIDENCE
from mxref.verification.records import record as records
from mxref.verification.records.sources import digests
from mxref.verification.studies.mutation.catalogue import catalogue
from mxref.verification.studies.mutation.locate import StaleMutantError
from mxref.verification.studies.mutation.record import judged_before, left_open, payload, texts
from mxref.verification.studies.mutation.session import EQUIVALENT_SHARE, Fate, Judged, Session
from mxref.verification.studies.mutation.sources import read_sources
from mxref.verification.studies.mutation.tables import as_markdown, idle, kills_by_check, kills_by_kind

SOURCES = read_sources()
CPU = torch.device("cpu")
CATALOGUE = {mutant.name: mutant for mutant in catalogue(SOURCES)}


def _recorded() -> Session:
    """Two mutants by hand and two of the sweep, of which the last survived."""
    swept = [name for name, mutant in CATALOGUE.items() if not mutant.by_hand][:2]
    kills = {"bias twice": ["integer", "interval"], "nibbles swapped": ["tables"], swept[0]: ["integer"], swept[1]: []}
    found = Session("cpu", True, ["integer", "tables", "interval"])
    found.judged += [
        Judged(CATALOGUE[name], Fate.KILLED if checks else Fate.SURVIVED, dict.fromkeys(checks, "a reason"))
        for name, checks in kills.items()
    ]
    return found


def test_tables_tell_what_each_check_is_needed_for() -> None:
    found = _recorded()
    assert [row for row in kills_by_check(found) if row[0] in found.checks] == [
        ["integer", "1", "0", "1"], ["tables", "1", "1", "0"], ["interval", "1", "0", "0"],
    ]  # fmt: skip
    assert kills_by_kind(found)[-1] == ["all", "4", "3", "2 (50%)"], "a foreign kernel is not asked for tables"
    assert [*idle(found)] == ["integer", "interval"]


def test_a_record_is_plain_data_and_a_page(tmp_path: Path) -> None:
    found = _recorded()
    mutants = [judged.mutant for judged in found.judged]

    def page(entry: records.Entry) -> str:
        return as_markdown(found, SOURCES, entry)

    path = records.write("mutants", payload(found), CPU, tmp_path, texts=texts(mutants, SOURCES), page=page)
    entry, text = records.read(path), path.with_suffix(".md").read_text()
    assert entry["passed"] is False
    assert entry["killed"]["bias twice"] == ["integer", "interval"]
    assert entry["survived"] == [mutants[-1].name]
    assert entry["killed as a foreign kernel would be"] == 2
    assert "kernels/device/decode.py" in entry["sources"]
    assert left_open(entry, mutants) == mutants[-1:]
    assert [judged.mutant for judged in judged_before(entry, mutants)] == mutants[:-1]
    unjudged = CATALOGUE["sign bit lost"]
    assert left_open(entry, [*mutants, unjudged]) == [mutants[-1], unjudged]
    with pytest.raises(ValueError, match="another catalogue; write it again: mxref mutants --all --record"):
        left_open(entry, mutants[1:])
    assert "3 of 4 mutants killed, 2 as a foreign kernel would be" in text
    assert "- **interval**: Ordinary numbers." in text
    assert mutants[-1].edit(SOURCES[mutants[-1].place.file].text)[1] in text


@pytest.mark.parametrize("path", sorted(EVIDENCE.glob("*/mutants.json")), ids=lambda path: path.parent.name)
def test_what_is_recorded_is_explained(path: Path) -> None:
    """Every mutant by hand is judged; the systematic ones, named by their places, may be judged little by little."""
    entry = records.read(path)
    assert entry["survived"] == []
    on_gpu = path.parent.name != "interpreter-cpu"
    judged = [mutant for mutant in CATALOGUE.values() if mutant.gpu_only == on_gpu]
    if entry["sources"] == digests(texts(judged, SOURCES)):
        by_hand = {name for name, mutant in CATALOGUE.items() if mutant.by_hand and mutant.gpu_only == on_gpu}
        assert by_hand <= {*entry["killed"], *entry["equivalent"]}
    assert len(entry["equivalent"]) <= EQUIVALENT_SHARE * (len(entry["equivalent"]) + len(entry["killed"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gate"], "mutants are always judged by the gate's own checks"),
        (["--record", "--all", "--by-hand"], "leave out what else narrows it"),
        (["--gpu-only", "--device", "cpu"], "torch sees no CUDA GPU"),
        (["--name", "no such mutant"], "no mutant matches"),
    ],
)
def test_wrong_use(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mutants", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_stale_catalogue_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stale(sources: object) -> None:
        raise StaleMutantError("mutant 'x' is stale")

    monkeypatch.setattr(command, "catalogue", stale)
    assert main(["mutants", "--device", "cpu", "--list"]) == 1
    assert capsys.readouterr().err == "mxref: error: mutant 'x' is stale\n"

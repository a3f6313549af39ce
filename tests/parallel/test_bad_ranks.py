"""Ranks that do not fit together, and checkpoints that are not complete: named on every rank."""

from __future__ import annotations

from pathlib import Path

import bad_ranks
import mesh_training
import world
from world import errors

from mxref.kernels.parallel.agreement import WAIT
from mxref.kernels.parallel.sharding import SAVING

DIFFERENCES = {
    "weight": "layers.0.experts.down_proj_blocks: ranks 0 have",
    "adapter": "layers.0.experts.gate_up_proj_lora_A: ranks 0 have",
    "zero": "layers.0.experts.gate_up_proj_lora_A: ranks 0 have",
    "name": "extra: ranks 0 have nothing, ranks 1 have [1] torch.float32 trained",
    "trained": "factor: ranks 0 have [64] torch.float32 trained",
    "version": "version of triton: ranks 0 have",
    "seed": "state of random numbers: ranks 0 have",
}


def test_ranks_that_differ() -> None:
    """Said on both; nothing is said where nothing differs."""
    for said in world.run(bad_ranks.disagreements, 2, [*DIFFERENCES, "nothing"]):
        for error, named in zip(said[:-1], DIFFERENCES.values(), strict=True):
            assert error.startswith("the ranks differ in 1 things: ")
            assert named in error
            assert "ranks 1 have" in error
        assert not said[-1]


def test_ranks_that_differ_end_with_an_error() -> None:
    assert all(error.startswith("ValueError: the ranks differ") for error in errors(bad_ranks.disagree, 2, "weight"))


def test_a_rank_that_stays_away() -> None:
    here, gone = world.run(bad_ranks.stay_away, 2)
    assert here == "ranks [1] of 2 did not come within 3 s; see their own output"
    assert not gone


def test_more_ranks_than_experts() -> None:
    for error in errors(bad_ranks.too_many_ranks, 3):
        assert "2 experts on 3 ranks make slices of [1, 1, 0], which leave rank 2 without an expert" in error


def test_a_mesh_of_two_dimensions_for_experts() -> None:
    assert all("mesh has 2 dimensions; expected" in error for error in errors(bad_ranks.unsharded_dimensions, 2))


def test_a_checkpoint_that_lacks_a_file(tmp_path: Path) -> None:
    """Named by the rank that misses it, and on the others with that rank's number."""
    world.run(mesh_training.train, 2, str(tmp_path), 4, (2,), False, [1.0])
    for error in errors(bad_ranks.resume, 2, str(tmp_path), 5, True):
        assert "Size mismatch between saved torch.Size([4, " in error
    sees, misses = errors(bad_ranks.resume, 2, str(tmp_path), 4, False)
    assert misses.startswith("FileNotFoundError: ")
    assert "lacks __1_0.distcp, of 2 files" in misses
    assert sees.startswith("RuntimeError: rank 1: FileNotFoundError: ")
    (tmp_path / "__0_0.distcp").unlink()
    for error in errors(bad_ranks.resume, 1, str(tmp_path), 4, True):
        assert "lacks __0_0.distcp, of 2 files; copy all ranks' files" in error
    (tmp_path / ".metadata").unlink()
    assert all("holds no .metadata" in error for error in errors(bad_ranks.resume, 1, str(tmp_path), 4, True))


def test_a_rank_that_fails_and_is_not_awaited_keeps_its_error() -> None:
    assert world.run(bad_ranks.alone, 2) == ["OSError('No space left on device')", "nothing"]


def test_rank_0_may_take_longer_to_save_than_ranks_wait_elsewhere() -> None:
    assert SAVING > WAIT
    late, waited = world.run(bad_ranks.slow_disk, 2)
    assert late == "nothing"
    assert waited.startswith("ranks [0] of 2 did not come within 0.5 s")


def test_saving_that_fails_on_rank_0() -> None:
    failed, told = errors(bad_ranks.full_disk, 2)
    assert failed == "OSError: No space left on device"
    assert told == "RuntimeError: rank 0: OSError: No space left on device"

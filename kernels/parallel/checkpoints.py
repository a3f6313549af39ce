"""Resuming on another number of ranks: model and optimiser through PyTorch's distributed checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mxref.kernels.parallel.agreement import failing_together

__all__ = ["load_training", "save_training"]


def save_training(
    directory: str | Path, model: nn.Module, optimiser: torch.optim.Optimizer, group: ProcessGroup | None = None
) -> None:
    """Write parameters, packed bytes, and the optimiser's state; every rank its part.

    Collective over `group`, the ranks that train this model, None for all: several groups with own directories save
    side by side.
    """
    save(_state(model, optimiser), checkpoint_id=str(directory), process_group=group)


def load_training(
    directory: str | Path, model: nn.Module, optimiser: torch.optim.Optimizer, group: ProcessGroup | None = None
) -> None:
    """Read what `save_training` wrote on any number of ranks, in place; every rank its part; gradients are dropped.

    Divided experts (`shard_experts`) and others keep adapters in different layouts and resume on their own kind;
    adapters saved as PEFT's fit any. Collective over `group`, as `save_training`.

    Raises:
        FileNotFoundError: on ranks that miss files; RuntimeError on the others. Nothing has been read then.
        CheckpointException: on every rank, if it does not hold what the model needs.
    """
    directory = Path(directory)
    with failing_together(group=group):
        _check_complete(directory)
    optimiser.zero_grad()  # beside gradients, torch takes an optimiser without state for one that needs none
    state = _state(model, optimiser)
    load(state, checkpoint_id=str(directory), process_group=group)
    set_state_dict(model, optimiser, model_state_dict=state["model"], optim_state_dict=state["optimiser"])


def _state(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    return dict(zip(("model", "optimiser"), get_state_dict(model, optimiser), strict=True))


def _check_complete(directory: Path) -> None:
    if not (directory / ".metadata").is_file():
        raise FileNotFoundError(f"{directory} holds no .metadata; expected the directory of a distributed checkpoint")
    places: Any = FileSystemReader(directory).read_metadata().storage_data
    files = {place.relative_path for place in places.values()}
    if missing := sorted(name for name in files if not (directory / name).is_file()):
        raise FileNotFoundError(f"{directory} lacks {', '.join(missing)}, of {len(files)} files; copy all ranks' files")

"""What runs in a process of its own: one side of one model, from its first byte to its last step.

A process each, so that peak memory and the first step are what a user's own process would see, and what one side leaves
in memory is no other's burden. What a process finds it sends as it comes; a failure is sent as a row.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import peft
import torch

from mxref.kernels.models.loading import load_packed_model, save_packed_model
from mxref.kernels.models.sizes import Batch, Model
from mxref.verification.bench.benchmark import gate_paths
from mxref.verification.bench.paths import our_paths
from mxref.verification.bench.timing import EventClock
from mxref.verification.models.block import products, time_block
from mxref.verification.models.build import adapted, decoder_layers, empty_model, filled, needs
from mxref.verification.models.profile import profiled
from mxref.verification.models.training import (
    Steps,
    finish,
    is_out_of_memory,
    peak_bytes,
    peak_host_bytes,
    release,
    time_steps,
)

__all__ = ["Stored", "Task", "judge", "store", "train"]

Side = Literal["packed", "dense"]
Send = Callable[[Any], None]

_GIB = 2**30
_MOST_SEQUENCES = 4096
"""Where the search for the largest batch ends at the latest."""


@dataclass(frozen=True)
class Task:
    """What one process is to train.

    Attributes:
        model: its sizes.
        side: how its experts are held.
        batches: in this order.
        attention: the implementation of transformers.
        device: "cuda" or "cpu".
        count: measured steps a batch.
        rank: of the adapters.
        largest: after the batches, the last one is doubled until it no longer fits.
        profile: where the time of a step goes, and the MoE block beside its limit.
        folder: of the checkpoint, where it is written to or read from a disk; "" where the model is made in memory.
        room: bytes of the device; None for what it has.
    """

    model: Model
    side: Side
    batches: tuple[Batch, ...]
    attention: str = "eager"
    device: str = "cuda"
    count: int = 5
    rank: int = 16
    largest: bool = False
    profile: bool = False
    folder: str = ""
    room: int | None = None

    @property
    def packed(self) -> bool:
        """Whether its experts are packed."""
        return self.side == "packed"

    @property
    def name(self) -> str:
        """Of the side, for a reader."""
        return f"{self.side}, from disk" if self.folder else self.side

    def row(self, layers: int, status: str = "ok") -> Steps:
        """A row without numbers."""
        return Steps(self.name, self.attention, "", layers, status)


@dataclass(frozen=True)
class Stored:
    """A checkpoint of a random model, written and read again. Times in seconds, memory in bytes.

    Attributes:
        what: "written" or "loaded".
        seconds: that it took.
        octets: of the files.
        host: the process's peak, files that it mapped included.
        device: peak on the device.
    """

    what: str
    seconds: float
    octets: int
    host: int
    device: int

    def __str__(self) -> str:
        return f"checkpoint {self.what} in {self.seconds:.1f} s"


def judge(send: Send, device: str) -> None:
    """The gate on what is about to be timed, in the way of `mxref bench`: sends a list of what is wrong."""
    automatic = [path for path in our_paths() if path.name == "automatic"]
    home = torch.device(device)
    send([str(f) for result in gate_paths(automatic, home) for f in result.findings if not f.ok])


def store(send: Send, task: Task) -> None:
    """Make a packed model and write it as a checkpoint into the task's folder: to the disk itself."""
    device = torch.device(task.device)
    try:
        model = filled(empty_model(task.model.config()), device, packed=True)
        finish(device)
        begin = time.perf_counter()
        save_packed_model(model, task.folder)
        _out_of_the_cache(Path(task.folder))
        send(_stored("written", time.perf_counter() - begin, task, device))
    except Exception as error:
        send(task.row(0, _told(error)))


def _out_of_the_cache(folder: Path) -> None:
    """Write out what the system keeps of these files in memory, and let it go: who reads them waits for the disk."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def train(send: Send, task: Task) -> None:
    """Make the model, or read it, and train it on every batch; a row each.

    The cache of compiled kernels is a new one, so that the first step is that of a first start.
    """
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"TRITON_CACHE_DIR": cache, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        torch.manual_seed(0)
        try:
            _train(send, task)
        except Exception as error:
            send(task.row(0, _told(error)))


def _train(send: Send, task: Task) -> None:
    device = torch.device(task.device)
    layers = task.model.layers if task.folder else _layers(send, task, device)
    if not layers:
        return
    model = _made(send, task, layers, device)
    fitting = list[Batch]()
    for batch in task.batches:
        row = _fitted(model, task, batch, device, fresh=batch is task.batches[0])
        send(row)
        fitting += [batch] if row.ok else []
    if task.largest and fitting[-1:] == [*task.batches[-1:]]:
        _seek_largest(send, model, task, device)
    for batch in fitting if task.profile else ():
        _explain(send, model, task, batch, device)


def _seek_largest(send: Send, model: peft.PeftModel, task: Task, device: torch.device) -> None:
    """Double the last batch until the model as it is, no layer less, does not train on it."""
    batch, layers = task.batches[-1].doubled(), len(decoder_layers(model))
    while batch.sequences <= _MOST_SEQUENCES:
        row = time_steps(model, batch, task.count, device, task.row(layers))
        send(row)
        if not row.ok:
            return
        batch = batch.doubled()


def _layers(send: Send, task: Task, device: torch.device) -> int:
    """How many layers are to be made; 0, and a row that says why, where the model does not fit."""
    room = _room(task, device)
    needed = needs(empty_model(task.model.config(), task.attention), task.model, task.rank, task.packed)
    count = needed.fitting(room)
    if count == task.model.layers or (task.model.as_many_layers and count):
        return count
    words = f"{needed.total / _GIB:.1f} GiB of weights, adapters and AdamW's moments; there are {room / _GIB:.1f}"
    send(task.row(0, f"does not fit: {words}"))
    return 0


def _room(task: Task, device: torch.device) -> int:
    if task.room is not None:
        return task.room
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _made(send: Send, task: Task, layers: int, device: torch.device) -> Any:
    if task.folder:
        begin = time.perf_counter()
        model = load_packed_model(task.folder, rank=0, device=device)
        finish(device)
        send(_stored("loaded", time.perf_counter() - begin, task, device))
        model.set_attn_implementation(task.attention)
    else:
        model = filled(empty_model(task.model.config(layers), task.attention), device, task.packed)
    if not task.packed:
        model.set_experts_implementation("grouped_mm")
    return adapted(model, task.model, task.rank, device, task.packed)


def _fitted(model: peft.PeftModel, task: Task, batch: Batch, device: torch.device, fresh: bool) -> Steps:
    """Train on one batch; of a model that is larger than the card, with fewer layers until it fits."""
    layers = decoder_layers(model)
    while True:
        row = time_steps(model, batch, task.count, device, replace(task.row(len(layers)), fresh=fresh))
        fresh = False
        if row.status != "out of memory" or not task.model.as_many_layers or len(layers) == 1:
            return row
        del layers[-1]
        release(device)


def _explain(send: Send, model: peft.PeftModel, task: Task, batch: Batch, device: torch.device) -> None:
    """Where the time of a step goes; on a GPU also the last MoE block of a packed model, beside its limit.

    What goes wrong here is told, and takes nothing from the steps that were timed.
    """
    layers = decoder_layers(model)
    try:
        send(profiled(model, task.name, task.attention, batch, device))
        release(device)
        if device.type == "cuda" and task.packed:
            parts = products(layers[-1].mlp, task.rank, batch.size, model.config.num_experts_per_tok)
            send(time_block(layers[-1].mlp, parts, batch, device, EventClock(device)))
    except Exception as error:
        send(replace(task.row(len(layers), f"no profile: {_told(error)}"), batch=str(batch)))
    model.zero_grad(set_to_none=True)
    release(device)


def _told(error: Exception) -> str:
    """An error in a line."""
    if is_out_of_memory(error):
        return "out of memory"
    return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _stored(what: str, seconds: float, task: Task, device: torch.device) -> Stored:
    octets = sum(file.stat().st_size for file in Path(task.folder).glob("*.safetensors"))
    return Stored(what, seconds, octets, peak_host_bytes(), peak_bytes(device))

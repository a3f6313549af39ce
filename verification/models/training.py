"""LoRA steps of a whole model: forward, backward and AdamW on the adapters, timed step by step."""

from __future__ import annotations

import gc
import math
import re
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxref.kernels.models.sizes import Batch

__all__ = [
    "Steps", "finish", "is_out_of_memory", "peak_bytes", "peak_host_bytes", "release", "time_steps",
    "training_step",
]  # fmt: skip

_LEAD_IN = 1
"""Steps between the first and those that are measured: they build what later steps reuse."""

_OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")
"""What errors of CUDA and its libraries say when the card is full and PyTorch's allocator was not the one to ask."""


@dataclass(frozen=True)
class Steps:
    """Training steps of one side and batch. Times in seconds, memory in bytes.

    Attributes:
        side: "packed", "dense", or "packed, from disk".
        attention: the implementation of transformers.
        batch: as text.
        layers: that were trained.
        status: "ok", "out of memory", "does not fit: …" or "failed: …"; only "ok" has numbers.
        first: the first step; of a fresh process with an empty Triton cache where `fresh` says so.
        fresh: whether nothing was compiled before it.
        median, spread: of the further steps, and their interquartile range over it.
        host: median time until such a step returned, without waiting for the device.
        tokens_per_second: of the median.
        model: that the model with its adapters takes.
        peak: the most that was allocated on the device while training; of the process where the device is the CPU.
        trainable: parameters of the adapters.
        loss: of the last step.
    """

    side: str
    attention: str
    batch: str
    layers: int
    status: str = "ok"
    first: float = 0.0
    fresh: bool = False
    median: float = 0.0
    spread: float = 0.0
    host: float = 0.0
    tokens_per_second: float = 0.0
    model: int = 0
    peak: int = 0
    trainable: int = 0
    loss: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether there are numbers."""
        return self.status == "ok"

    def __str__(self) -> str:
        seen = f"{self.median * 1e3:,.0f} ms a step" if self.ok else self.status
        return ", ".join(filter(None, (self.side, self.attention, self.batch))) + f": {seen}"


def training_step(model: Any, optimiser: torch.optim.Optimizer, ids: Tensor) -> Tensor:
    """One step on token ids [sequences, tokens], which are their own labels; the loss, not waited for."""
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    torch.autograd.backward(loss)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return loss.detach()


def time_steps(model: Any, batch: Batch, count: int, device: torch.device, about: Steps) -> Steps:
    """Train `count` measured steps, and two before them; `about` with what was seen.

    Every step has token ids of its own. Running out of memory is an answer; so is a loss that is not finite.
    """
    try:
        return _timed(model, batch, count, device, about)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    model.zero_grad(set_to_none=True)  # not in the handler: the error holds the frames, and they what was allocated
    return replace(about, batch=str(batch), status="out of memory")


def _timed(model: Any, batch: Batch, count: int, device: torch.device, about: Steps) -> Steps:
    release(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model_bytes = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    optimiser = torch.optim.AdamW(trained, lr=1e-4, fused=True)  # fused: no temporaries as large as the moments
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    whole: list[float] = []
    host: list[float] = []
    for _ in range(1 + _LEAD_IN + count):
        ids = torch.randint(0, model.config.vocab_size, (batch.sequences, batch.tokens), device=device)
        finish(device)
        begin = time.perf_counter()
        loss = training_step(model, optimiser, ids)
        host.append(time.perf_counter() - begin)
        finish(device)
        whole.append(time.perf_counter() - begin)
    first, further = whole[0], whole[1 + _LEAD_IN :]
    median, last = statistics.median(further), float(loss)
    seen = replace(
        about,
        batch=str(batch),
        first=first,
        median=median,
        spread=_spread(further),
        host=statistics.median(host[1 + _LEAD_IN :]),
        tokens_per_second=batch.size / median,
        model=model_bytes,
        peak=peak_bytes(device) or peak_host_bytes(),
        trainable=sum(parameter.numel() for parameter in trained),
    )
    if not math.isfinite(last):
        return replace(about, batch=str(batch), status=f"failed: the last loss is {last}")
    return replace(seen, loss=last)


def _spread(times: list[float]) -> float:
    if len(times) < 2:
        return 0.0
    low, _, high = statistics.quantiles(times, n=4)
    return (high - low) / statistics.median(times)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device is full."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)


def finish(device: torch.device) -> None:
    """Wait for all that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give memory back that nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_bytes(device: torch.device) -> int:
    """The most that tensors took on a GPU since the last reset; 0 where that is not counted."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def peak_host_bytes() -> int:
    """The most memory that this process has had, files that it mapped included."""
    said = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(said.group(1)) * 1024 if said else 0

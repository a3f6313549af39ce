"""Where the device time of one training step goes, by kind of work: from torch's profiler.

A kernel's kind is told by its name, and by the part of the model that launched it: attention, an MoE block, the experts
in it, the optimiser. A kernel of the backward pass belongs to the part that made its node of the graph, which the
profiler knows by a sequence number; what is computed again under checkpointing belongs where it is computed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from mxref.kernels.models.sizes import Batch
from mxref.verification.models.training import finish, training_step

__all__ = ["ELSE", "KINDS", "Kind", "Shares", "profiled", "shares"]


@dataclass(frozen=True)
class Kind:
    """A kind of work.

    Attributes:
        name: unique.
        kernels: a pattern found in the names of its kernels; "" for any name.
        parts: of the model that launch them; empty for any part.
    """

    name: str
    kernels: str = ""
    parts: tuple[str, ...] = ()

    def holds(self, kernel: str, part: str) -> bool:
        """Whether a kernel that a part of the model launched is of this kind."""
        return (not self.parts or part in self.parts) and re.search(self.kernels, kernel) is not None


KINDS = (
    Kind("our products", r"^(grouped_matmul|packed_matmul|fragments_matmul|grouped_outer)_kernel"),
    Kind("our other kernels", r"^(tables|combine|spread|grouped_sum|dequantize|activation(_backward)?)_kernel"),
    Kind("others' products of the experts", r"(?i)gemm|nvjet|cutlass|aten::\w*mm\b", ("experts",)),
    Kind("self-attention", parts=("attention",)),
    Kind("elementwise of the block", parts=("experts", "block")),
    Kind("optimiser", parts=("optimiser",)),
)
"""The first that holds decides; what none holds is ELSE: embedding, norms, head and loss."""

ELSE = "else"

_PARTS = {"self_attn": "attention", "mlp": "block", "experts": "experts"}
"""Parts by the last name of a module."""
_MARK = "mxref: "
_OPTIMISER = "Optimizer."
_BACKWARD = "autograd::engine::evaluate_function"
_BACKWARD_SCOPE = 1
"""torch's RecordScope of a node of the backward pass."""


@dataclass(frozen=True)
class Shares:
    """Device seconds of one step by kind, `total` among them; on a CPU, the processor's."""

    side: str
    attention: str
    batch: str
    seconds: dict[str, float]

    def __str__(self) -> str:
        return (
            f"{self.side}, {self.attention}, {self.batch}: {self.seconds['total'] * 1e3:,.0f} ms of the device's time"
        )


def profiled(
    model: nn.Module, side: str, attention: str, batch: Batch, device: torch.device, kinds: Sequence[Kind] = KINDS
) -> Shares:
    """Profile one more training step, with moments of the optimiser that are there already."""
    config: Any = model.config
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(0, config.vocab_size, (batch.sequences, batch.tokens), device=device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with _marked(model):
        training_step(model, optimiser, ids)
        finish(device)
        with profile(activities=activities) as profiler:
            training_step(model, optimiser, ids)
            finish(device)
    return Shares(side, attention, str(batch), shares(profiler.events() or (), device.type == "cuda", kinds))


@contextmanager
def _marked(model: nn.Module) -> Iterator[None]:
    """Each part's forward under a mark of its own; a forward that checkpointing breaks off is left as well."""
    parts = [(m, part) for name, m in model.named_modules() if (part := _PARTS.get(name.rpartition(".")[2]))]
    for module, part in parts:
        module.forward = _under(module.forward, part)
    try:
        yield
    finally:
        for module, _ in parts:
            del module.forward


def _under(forward: Any, part: str) -> Any:
    @wraps(forward)
    def marked(*args: Any, **kwargs: Any) -> Any:
        with record_function(_MARK + part):
            return forward(*args, **kwargs)

    return marked


def shares(events: Iterable[Any], on_device: bool, kinds: Sequence[Kind] = KINDS) -> dict[str, float]:
    """Seconds by kind, and their sum as "total".

    Args:
        events: torch's FunctionEvents.
        on_device: count kernels; otherwise what operators take on the processor themselves.
        kinds: the first that holds decides.
    """
    found = dict.fromkeys([*(kind.name for kind in kinds), ELSE], 0.0)
    for kernel, part, microseconds in _launched(list(events)) if on_device else _computed(list(events)):
        kind = next((kind.name for kind in kinds if kind.holds(kernel, part)), ELSE)
        found[kind] += microseconds / 1e6
    return {"total": sum(found.values())} | found


def _computed(events: list[Any]) -> Iterator[tuple[str, str, float]]:
    parts = _parts_of_nodes(events)
    for event in events:
        yield event.name, _part(event, parts), event.self_cpu_time_total


def _launched(events: list[Any]) -> Iterator[tuple[str, str, float]]:
    """Every kernel with the part that launched it; those whose launch the profiler does not know have none."""
    parts, known = _parts_of_nodes(events), Counter[str]()
    spans = {event.name for event in events if event.is_user_annotation}  # shown on the device too, and no kernels
    for event in events:
        for kernel in event.kernels if event.device_type == DeviceType.CPU else ():
            if kernel.name not in spans:
                known[kernel.name] += kernel.duration
                yield kernel.name, _part(event, parts), kernel.duration
    every = Counter[str]()
    for event in events:
        if event.device_type == DeviceType.CUDA and event.name not in spans:
            every[event.name] += event.time_range.elapsed_us()
    for name, microseconds in every.items():
        if (rest := microseconds - known[name]) > 0:
            yield name, "", rest


def _parts_of_nodes(events: list[Any]) -> dict[tuple[int, int], str]:
    """The part that made each node of the graph, by thread and sequence number.

    Operators that make no node show the number of the next one, so the last to show a number is the one that made it.
    """
    parts = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        backward = event.scope == _BACKWARD_SCOPE or event.name.startswith(_BACKWARD)
        if event.device_type == DeviceType.CPU and event.sequence_nr >= 0 and not backward:
            parts[event.thread, event.sequence_nr] = _part(event, {})
    return parts


def _part(event: Any, parts: dict[tuple[int, int], str]) -> str:
    """The innermost part around an event, or that of the node whose gradient it computes."""
    while event is not None:
        if event.name.startswith(_MARK):
            return str(event.name.removeprefix(_MARK))
        if event.name.startswith(_OPTIMISER):
            return "optimiser"
        if event.name.startswith(_BACKWARD):
            return parts.get((event.fwd_thread, event.sequence_nr), "")
        event = event.cpu_parent
    return ""

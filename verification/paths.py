"""The ways to compute the layer that are timed: the composite, ours, and others where they are installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from mxref.verification import outside
from mxref.verification.workloads import PACKED_BYTES, Measure

__all__ = ["COMPOSITE", "Path", "our_paths", "peers"]

Operands = dict[str, Any]
"""Keyword arguments of `parallel_linear_lora`, weights packed."""


def _as_they_are(operands: Operands, dense: Callable[[], Tensor]) -> Operands:
    return operands


def _dense(operands: Operands, dense: Callable[[], Tensor]) -> Operands:
    return operands | {"expert_weights": dense()}


@dataclass(frozen=True)
class Path:
    """One way to compute the layer.

    Attributes:
        name: unique.
        about: one line for a reader.
        layer: what is timed; takes what `prepare` returns, as keywords.
        prepare: not timed: the operands in the form that this way keeps between calls. Its second argument decodes
            the weights, once.
        bytes_per_weight: of the form that a product reads.
        ours: whether the gate judges it before it is timed, and the history after.
        lora, base: the measures that it covers, with adapters and without.
    """

    name: str
    about: str
    layer: Callable[..., Tensor]
    prepare: Callable[[Operands, Callable[[], Tensor]], Operands] = _as_they_are
    bytes_per_weight: float = PACKED_BYTES
    ours: bool = True
    lora: bool = True
    base: bool = True

    def covers(self, measure: Measure) -> bool:
        """Whether this way can compute what `measure` times."""
        return self.lora if measure.lora else self.base


def _composite(*, offs: Tensor | None = None, **operands: Any) -> Tensor:
    if offs is not None:
        return torch._grouped_mm(operands["inputs"], operands["expert_weights"], offs=offs)
    return outside.grouped_mm(**operands, sentinels=False)


def _composite_operands(operands: Operands, dense: Callable[[], Tensor]) -> Operands:
    """Rows in expert order before and after, without adapters, are one bare `torch._grouped_mm`."""
    bare = all(operands[name] is None for name in ("lora_A", "expert_biases", "gates"))
    if bare and operands["grouped_in"] and operands["grouped_out"]:
        return {"inputs": operands["inputs"], "expert_weights": dense(), "offs": operands["expert_offsets"].int()}
    return _dense(operands, dense)


COMPOSITE = Path(
    "composite",
    "torch._grouped_mm on bf16 weights, autograd's backward",
    _composite,
    _composite_operands,
    2.0,
    ours=False,
)


def our_paths() -> list[Path]:
    """This project's kernels. On a CPU, TRITON_INTERPRET=1 must be set before this first imports them."""
    from mxref.kernels import parallel_linear_lora

    fused = partial(parallel_linear_lora, use_fused_dX=True, use_fused_gather=True)
    return [
        Path("dense", "our kernels on bf16 weights", parallel_linear_lora, _dense, 2.0),
        Path("strategy A", "decode the active experts, then our kernels on bf16", _strategy_a, bytes_per_weight=2.0),
        Path("strategy B", "decode inside both products", fused),
        Path("automatic", "parallel_linear_lora with nothing chosen", parallel_linear_lora),
    ]  # fmt: skip


def peers() -> list[Path]:
    """What others wrote, where it is installed."""
    found = []
    for find in (_axolotl, _unsloth):
        try:
            found += find()
        except ImportError:
            continue
    return found


def _strategy_a(
    *, inputs: Tensor, expert_weights: Any, sorted_scattered_idxs: Tensor, expert_offsets: Tensor, **operands: Any
) -> Tensor:
    from mxref.kernels import dequantize_experts, parallel_linear_lora
    from mxref.kernels.dequant import active_or_sentinel
    from mxref.kernels.schedule import Routing

    active = active_or_sentinel(Routing(sorted_scattered_idxs, expert_offsets))
    return parallel_linear_lora(
        inputs,
        dequantize_experts(expert_weights, active, inputs.dtype).mT,
        sorted_scattered_idxs=sorted_scattered_idxs,
        expert_offsets=expert_offsets,
        **operands,
    )


def _axolotl() -> list[Path]:
    """Axolotl's layer. One tiling of its list instead of minutes of tuning a shape."""
    layer, container = outside.load_axolotl()

    def packed(operands: Operands, dense: Callable[[], Tensor]) -> Operands:
        w = operands["expert_weights"]
        return operands | {"expert_weights": container(w.packed, w.scales, w.K, w.N)}

    fused = partial(layer, use_fused_dX=True, use_fused_gather=True)
    return [
        Path("axolotl, bf16", "axolotl ScatterMoE-LoRA on bf16 weights", layer, _dense, 2.0, ours=False, base=False),
        Path("axolotl, MXFP4", "axolotl's fused MXFP4 kernels, one tiling", fused, packed, ours=False, base=False),
    ]


def _unsloth() -> list[Path]:
    """Unsloth-zoo's packed product, which has no adapters. Only its file is loaded, not the patches around it."""
    spec = importlib.util.find_spec("unsloth_zoo")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("unsloth_zoo is not installed")
    file = File(spec.submodule_search_locations[0]) / "mxfp4_gemm.py"
    own = importlib.util.spec_from_file_location("_mxref_unsloth_mxfp4_gemm", file)
    if not file.is_file() or own is None or own.loader is None:
        raise ImportError("this unsloth_zoo has no packed MXFP4 product")
    module = importlib.util.module_from_spec(own)
    sys.modules[own.name] = module
    own.loader.exec_module(module)

    def packed(operands: Operands, dense: Callable[[], Tensor]) -> Operands:
        blocks, scales = operands["expert_weights"].to_gpt_oss()
        ends = operands["expert_offsets"]
        counts = torch.diff(ends, prepend=ends.new_zeros(1)).int()
        return {"x": operands["inputs"], "blocks": blocks, "scales": scales, "counts": counts}

    layer = module.mxfp4_expert_grouped_mm
    return [Path("unsloth, MXFP4", "unsloth-zoo's packed MXFP4 product", layer, packed, ours=False, lora=False)]

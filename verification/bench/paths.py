"""The ways that are timed, and the reference beside which each of them is.

The layer and its base products stand beside the composite. A decoder stands beside a copy of as many bytes. On a CPU,
TRITON_INTERPRET=1 must be set before this module is imported, since it imports the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from mxref.fragments import TILE
from mxref.kernels import dequantize_experts, parallel_linear_lora
from mxref.kernels.device.configs import layout_for
from mxref.kernels.device.dequant import active_or_sentinel
from mxref.kernels.device.launch import architecture
from mxref.kernels.device.schedule import Routing
from mxref.verification.bench.workloads import DECODING_BYTES, PACKED_BYTES, Measure, Part
from mxref.verification.candidates.elsewhere import foreign, packed_products
from mxref.weights import MXLayout, MXWeights

TUNING = 10.0
"""Seconds that another project's autotuner gets by default for each kernel and shape."""

Operands = dict[str, Any]
"""Keyword arguments of `parallel_linear_lora`, weights packed."""


def _as_they_are(operands: Operands, dense: Callable[[], Tensor]) -> Operands:
    return operands


def _dense(operands: Operands, dense: Callable[[], Tensor]) -> Operands:
    return operands | {"expert_weights": dense()}


def _repacked(operands: Operands, dense: Callable[[], Tensor]) -> Operands:
    weights = operands["expert_weights"]
    return operands | {"expert_weights": weights if weights.N % TILE else weights.repack(MXLayout.FRAGMENTS)}


@dataclass(frozen=True)
class Path:
    """One way to compute the layer, or a part of it.

    Attributes:
        name: unique.
        about: one line for a reader.
        call: what is timed; takes what `prepare` returns, as keywords.
        prepare: not timed: the operands in the form that this way keeps between calls. Its second argument decodes
            the weights, once.
        bytes_per_weight: of the form that a product reads.
        ours: whether the gate judges it before it is timed, and the history after.
        parts: what it can compute.
        backward: whether it can be differentiated.
        package: that others wrote it in.
    """

    name: str
    about: str
    call: Callable[..., Tensor]
    prepare: Callable[[Operands, Callable[[], Tensor]], Operands] = _as_they_are
    bytes_per_weight: float = PACKED_BYTES
    ours: bool = True
    parts: tuple[Part, ...] = ("layer", "base")
    backward: bool = True
    package: str = ""

    def covers(self, measure: Measure) -> bool:
        """Whether this way can compute what `measure` times."""
        return measure.part in self.parts and (self.backward or not measure.backward)


def _composite(*, offs: Tensor | None = None, **operands: Any) -> Tensor:
    if offs is not None:
        return torch._grouped_mm(operands["inputs"], operands["expert_weights"], offs=offs)
    return foreign.grouped_mm(**operands, sentinels=False)


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


def _copy(*, source: Tensor, target: Tensor, decoded: Tensor) -> Tensor:
    target.copy_(source)
    return decoded


def _copy_operands(operands: Operands, dense: Callable[[], Tensor]) -> Operands:
    """Half of the bytes are read and half are written. The decoded weights are for a decoder to agree with."""
    weights, ends = operands["expert_weights"], operands["expert_offsets"]
    active = torch.diff(ends, prepend=ends.new_zeros(1)).nonzero()[:, 0]
    half = int(active.numel() * weights.K * weights.N * DECODING_BYTES) // 2
    source = dense().view(-1).view(torch.uint8)[:half]
    return {"source": source, "target": torch.empty_like(source), "decoded": dense().mT[active]}


COPY = Path("copy", "a device copy of as many bytes", _copy, _copy_operands, ours=False, parts=("decode",))

REFERENCES = (COMPOSITE, COPY)


def reference(measure: Measure) -> Path:
    """The way beside which every other is timed."""
    return next(path for path in REFERENCES if path.covers(measure))


def every_path(others: Iterable[Path] = ()) -> list[Path]:
    """All that is timed beside the references; `others`: what others wrote, of `peers`."""
    return [*our_paths(), DEQUANTISED, *others]


def our_paths() -> list[Path]:
    """This project's kernels."""
    fused = partial(parallel_linear_lora, use_fused_dX=True, use_fused_gather=True)
    repacked = Path("repacked", "the same on weights in the layout FRAGMENTS", parallel_linear_lora, _repacked)
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = here.type == "cpu" or layout_for(architecture(here), torch.bfloat16, TILE) == MXLayout.FRAGMENTS
    return [
        Path("dense", "our kernels on bf16 weights", parallel_linear_lora, _dense, 2.0),
        Path("strategy A", "decode the active experts, then our kernels on bf16", _strategy_a, bytes_per_weight=2.0),
        Path("strategy B", "decode inside both products", fused),
        Path("automatic", "parallel_linear_lora with nothing chosen", parallel_linear_lora),
        *([repacked] if loaded else []),  # where no loader has them so, nobody has
        Path("dequantize_experts", "strategy A's decoding alone", _decode, _decode_operands, parts=("decode",)),
    ]  # fmt: skip


def _strategy_a(
    *, inputs: Tensor, expert_weights: Any, sorted_scattered_idxs: Tensor, expert_offsets: Tensor, **operands: Any
) -> Tensor:
    return parallel_linear_lora(
        inputs,
        dequantize_experts(expert_weights, _active(sorted_scattered_idxs, expert_offsets), inputs.dtype).mT,
        sorted_scattered_idxs=sorted_scattered_idxs,
        expert_offsets=expert_offsets,
        **operands,
    )


def _active(positions: Tensor, offsets: Tensor) -> Tensor:
    return active_or_sentinel(Routing(positions, offsets))


def _decode(*, weights: MXWeights, experts: Tensor, active: int, dtype: torch.dtype) -> Tensor:
    return dequantize_experts(weights, experts, dtype)[:active]


def _decode_operands(operands: Operands, dense: Callable[[], Tensor]) -> Operands:
    """Strategy A's list, E ids long; those that own no rows come last, so that what is decoded lies in one piece."""
    weights = operands["expert_weights"]
    experts = _active(operands["sorted_scattered_idxs"], operands["expert_offsets"]).sort().values
    active = int((experts < weights.E).sum())
    return {"weights": weights, "experts": experts, "active": active, "dtype": operands["inputs"].dtype}


class _DecodedProduct(torch.autograd.Function):
    """x·W as one `torch._grouped_mm` on weights decoded for it, and decoded again for dX: none are kept in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: MXWeights, experts: Tensor, ends: Tensor) -> Tensor:
        ctx.weights = weights
        ctx.save_for_backward(experts, ends)
        return torch._grouped_mm(x, dequantize_experts(weights, experts, x.dtype).mT, offs=ends)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        experts, ends = ctx.saved_tensors
        decoded = dequantize_experts(ctx.weights, experts, gradient.dtype)
        return torch._grouped_mm(gradient, decoded, offs=ends), None, None, None


_decoded_product: Callable[..., Tensor] = _DecodedProduct.apply


def _dequantised_operands(operands: Operands, dense: Callable[[], Tensor]) -> Operands:
    experts = _active(operands["sorted_scattered_idxs"], operands["expert_offsets"])
    return {"operands": (operands["inputs"], operands["expert_weights"], experts, operands["expert_offsets"].int())}


DEQUANTISED = Path(
    "dequantise + grouped_mm",
    "decode the active experts before each product, which is one torch._grouped_mm",
    lambda operands: _decoded_product(*operands),
    _dequantised_operands,
    2.0,
    ours=False,
    parts=("base",),
)


def peers(tuning: float = TUNING) -> tuple[list[Path], dict[str, str]]:
    """What others wrote, and why the rest of it cannot be timed, by name.

    `tuning`: seconds that an autotuner gets for each kernel and shape.
    """
    found, absent = list[Path](), dict[str, str]()
    for name, find in (("axolotl", partial(_axolotl, tuning)), ("unsloth", _unsloth), ("humming", _humming)):
        try:
            found += find()
        except ImportError as error:
            absent[name] = f"not timed, {error}"
    return found, absent


def about_peers(paths: Iterable[Path]) -> dict[str, str]:
    """What each way that others wrote is, with the version of its package, by name."""
    others = [path for path in paths if path.package]
    return {path.name: f"{path.package} {metadata.version(path.package)}, {path.about}" for path in others}


def _axolotl(tuning: float) -> list[Path]:
    """Axolotl's layer, tuned by its own autotuner within `tuning` seconds a kernel and shape."""
    layer, container = foreign.load_axolotl(tuning)
    tuned = f"tuned by its own autotuner for at most {tuning:g} s a kernel and shape"

    def packed(operands: Operands, dense: Callable[[], Tensor]) -> Operands:
        w = operands["expert_weights"]
        return operands | {"expert_weights": container(w.packed, w.scales, w.K, w.N)}

    fused = partial(layer, use_fused_dX=True, use_fused_gather=True)
    whole: dict[str, Any] = {"ours": False, "parts": ("layer",), "package": "axolotl"}
    return [
        Path("axolotl, bf16", f"ScatterMoE-LoRA on bf16 weights, {tuned}", layer, _dense, 2.0, **whole),
        Path("axolotl, MXFP4", f"fused MXFP4 kernels, {tuned}", fused, packed, **whole),
    ]


def _unsloth() -> list[Path]:
    """Unsloth-zoo's packed product, which has no adapters."""

    def packed(operands: Operands, dense: Callable[[], Tensor]) -> Operands:
        named = ("inputs", "expert_weights", "expert_offsets")
        return packed_products.unsloth_operands(*(operands[name] for name in named))

    product = packed_products.load_unsloth()
    base: dict[str, Any] = {"ours": False, "parts": ("base",), "package": "unsloth_zoo"}
    return [Path("unsloth, MXFP4", "its packed MXFP4 product", product, packed, **base)]


def _humming() -> list[Path]:
    """Humming's packed product, which has no backward pass. It repacks the weights once and compiles at first use."""
    packed_products.load_humming()

    def packed(operands: Operands, dense: Callable[[], Tensor]) -> Operands:
        x, ends = operands["inputs"], packed_products.humming_ends(operands["expert_offsets"])
        return {"layer": packed_products.humming_layer(operands["expert_weights"], x.dtype), "x": x, "ends": ends}

    product = packed_products.humming_product
    base: dict[str, Any] = {"ours": False, "parts": ("base",), "backward": False, "package": "humming-kernels"}
    return [Path("humming, MXFP4", "its packed MXFP4 product, forward only", product, packed, **base)]

"""Every kernel that a model's experts start in training, compiled into Triton's cache before the first step.

    from mxref.kernels.compiled.units import compile_units
    from mxref.kernels.models.warming import experts_of, step_units
    for unit, new in compile_units(step_units(experts_of(model, rank=16), "sm_90"), jobs=16): ...

The experts' own passes run on meta tensors, and what they would start is compiled: no GPU is needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxref.formats import MXFP4
from mxref.kernels.compiled.units import Unit, units_of
from mxref.kernels.device.configs import layout_for, shape_class
from mxref.kernels.device.launch import INTERPRETED, Launch, generation, recording
from mxref.kernels.layer.activation import gated
from mxref.kernels.models.activation import form_of
from mxref.kernels.models.adapters import LoRA
from mxref.kernels.models.packing import experts_modules, matrix_shape
from mxref.kernels.models.routed import Projection, routed_experts
from mxref.kernels.models.stacks import PROJECTIONS
from mxref.swiglu import SwiGLU
from mxref.weights import MXLayout

__all__ = ["Experts", "experts_of", "step_units"]


@dataclass(frozen=True)
class Experts:
    """What of a layer's packed experts decides which kernels they start.

    Attributes:
        E, k: experts, and how many of them a token has.
        H, I: gate_up is H -> 2I, down I -> H.
        rank: of the adapters of both.
        biased: whether both have biases, in `dtype`.
        form: the activation; None is the model's own function.
        dtype: of the activations.
        lora_dtype: of the adapters and their gradients.
        sharded: bytes keep a checkpoint's layout; otherwise that of `PackedStacks.arrange`, no scale byte above 128.
    """

    E: int
    k: int
    H: int
    I: int  # noqa: E741
    rank: int
    biased: bool = False
    form: SwiGLU | None = None
    dtype: torch.dtype = torch.bfloat16
    lora_dtype: torch.dtype = torch.float32
    sharded: bool = False

    def launches(self, tokens: int, architecture: str) -> list[Launch]:
        """What training steps of `tokens` tokens start, with and without gradients of x and gates.

        Gates are taken in fp32 and in the dtype of x, since routers differ.
        """
        with recording(architecture) as recorder, torch.device("meta"):
            both = self._projection(architecture, self.H, 2 * self.I), self._projection(architecture, self.I, self.H)
            index = torch.empty(tokens, self.k, dtype=torch.int64)
            for of_gates, trains in ((self.dtype, True), (torch.float32, True), (self.dtype, False)):
                x = torch.empty(tokens, self.H, dtype=self.dtype, requires_grad=trains)
                gates = torch.empty(tokens, self.k, dtype=of_gates, requires_grad=trains)
                out = routed_experts(x, index, gates, *both, self._activation)
                out.backward(torch.empty_like(out))
        return recorder.launches

    def numbers_of_tokens(self) -> list[int]:
        """Numbers of tokens whose steps together start what steps of any number from 2 on start.

        Kernels differ by shape class and by whether 16 divides the routed rows.
        """
        found = dict[tuple[str, bool], int]()
        for tokens in range(2, 98 * self.E + 16):
            rows = tokens * self.k
            found.setdefault((shape_class(rows, self.E, self.dtype), rows % 16 == 0), tokens)
        return sorted(found.values(), reverse=True)  # the tallest tiles take longest to compile

    def _projection(self, architecture: str, K: int, N: int) -> Projection:
        shapes = MXFP4.packed_shape(self.E, N, K), MXFP4.scales_shape(self.E, N, K)
        codes, scales = (torch.empty(shape, dtype=torch.uint8) for shape in shapes)
        columns = self.E * self.rank
        A, B = (torch.empty(s, dtype=self.lora_dtype, requires_grad=True) for s in ((columns, K), (N, columns)))
        bias = torch.empty(self.E, N, dtype=self.dtype) if self.biased else None
        layout = MXLayout.FWD if self.sharded else layout_for(architecture, self.dtype, N)
        return Projection(codes, scales, bias, LoRA(A, B, 1.0), layout, layout != MXLayout.FWD)

    def _activation(self, gate_up: Tensor) -> Tensor:
        return gate_up[:, : self.I] if self.form is None else gated(gate_up, self.form)


def experts_of(model: Any, rank: int, lora_dtype: torch.dtype = torch.float32, sharded: bool = False) -> list[Experts]:
    """The experts of a transformers model to be packed, each kind once; weights may be on the meta device.

    `rank`, `lora_dtype` and `sharded` as in `Experts`.

    Raises:
        TypeError, ValueError: as `experts_modules`; also if the configuration has no number of experts a token.
    """
    config = model.config.get_text_config()
    slots = next((k for name in ("num_experts_per_tok", "top_k_experts") if (k := getattr(config, name, None))), None)
    if not isinstance(slots, int):
        raise ValueError(f"the configuration of {type(model).__name__} has no num_experts_per_tok")
    found = []
    for module in experts_modules(model).values():
        (E, H, _), (_, inner, _) = (matrix_shape(module, name) for name in PROJECTIONS)
        biased, dtype = getattr(module, "down_proj_bias", None) is not None, module.down_proj.dtype
        found.append(Experts(E, slots, H, inner, rank, biased, form_of(module), dtype, lora_dtype, sharded))
    return list(dict.fromkeys(found))


def step_units(experts: Iterable[Experts], architecture: str, tokens: Iterable[int] = ()) -> list[Unit]:
    """The compilations of training steps.

    Args:
        experts: of `experts_of`, or by hand.
        architecture: such as "sm_90", the GPU's compute capability.
        tokens: numbers of tokens of a step; by default what any number needs.

    Raises:
        RuntimeError: TRITON_INTERPRET was set when this package was imported.
    """
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set; unset it, interpreted kernels cannot be compiled")
    table, given = generation(int(architecture.removeprefix("sm_"))), list(tokens)
    recorded = (
        (f"{count} tokens", launch)
        for kind in experts
        for count in given or kind.numbers_of_tokens()
        for launch in kind.launches(count, table)
    )
    return list(units_of(architecture, recorded))

"""A model of given sizes with random weights, made on the device layer by layer, with packed or with dense experts.

The model is built without memory for its parameters. Packed experts get random codes and scales, so that no dense
weights of theirs ever exist; everything else is drawn as transformers initialises it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn

from mxref.formats import E8M0_BIAS, MX_BLOCK_SIZE
from mxref.kernels.models import loading
from mxref.kernels.models.packing import experts_modules, matrix_shape, put_packed
from mxref.kernels.models.peft import get_peft_model
from mxref.kernels.models.sizes import EXPERT_TARGETS, Model
from mxref.kernels.models.stacks import PROJECTIONS
from mxref.verification.bench.workloads import PACKED_BYTES
from mxref.weights import MXWeights

__all__ = ["Needs", "adapted", "decoder_layers", "empty_model", "filled", "needs"]

_STD = 0.02
"""Of dense weights; packed ones get .018: codes, whose root mean square is 2.9, times scales of 2^-8 and 2^-7."""

_ADAPTER_BYTES = 16
"""Of one parameter that trains: itself, its gradient and AdamW's two moments, in fp32."""


def empty_model(config: Any, attention: str = "eager") -> Any:
    """The frozen causal language model of a configuration in bf16, on the meta device; its buffers are on the CPU.

    Raises:
        ValueError, ImportError: transformers does not run this model with this attention here.
    """
    return loading.empty_model(config, torch.bfloat16, attn_implementation=attention)


def filled(model: Any, device: torch.device, packed: bool) -> Any:
    """Give an empty model random weights on a device; the same model.

    Args:
        model: of `empty_model`.
        device: where. torch's own generator draws.
        packed: whether its experts are packed; otherwise they are dense in bf16.
    """
    for name in experts_modules(model) if packed else ():
        _pack(model, name, device)
    for module in model.modules():
        empty = [key for key, parameter in module.named_parameters(recurse=False) if parameter.is_meta]
        for key in empty:
            drawn = torch.empty_like(getattr(module, key), device=device).normal_(std=_STD)
            setattr(module, key, nn.Parameter(drawn, requires_grad=False))
        if empty:
            model._init_weights(module)
        _route_by_table(module, device)
    return model.to(device)  # what is left to move are the computed buffers


def _pack(model: Any, name: str, device: torch.device) -> None:
    module, packed, biases = model.get_submodule(name), {}, {}
    for projection in PROJECTIONS:
        E, K, N = matrix_shape(module, projection)
        codes = _octets(0, 256, (E, N, K // 2), device)
        scales = _octets(E8M0_BIAS - 8, E8M0_BIAS - 6, (E, N, K // MX_BLOCK_SIZE), device)
        packed[projection] = MXWeights(codes, scales, K, N)
        if (bias := getattr(module, f"{projection}_bias", None)) is not None:
            biases[projection] = torch.empty_like(bias, device=device).normal_(std=_STD)
    put_packed(model, name, packed, biases)


def _octets(low: int, high: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.uint8, device=device)


def _route_by_table(module: Any, device: torch.device) -> None:
    """A table from token to experts, which DeepSeek-V4's first layers route by and transformers leaves at zero."""
    table = getattr(module, "tid2eid", None)
    if table is not None:
        scores = torch.rand(table.shape[0], module.num_experts, device=device)
        module.tid2eid = scores.topk(table.shape[1]).indices


def adapted(model: Any, description: Model, rank: int, device: torch.device, packed: bool) -> Any:
    """A filled model with PEFT's LoRA of the experts and of what gives queries and values, ready to train.

    Scaling is 2, gradient checkpointing is on, and adapters are in fp32, as PEFT makes them for a bf16 model.
    """
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(description.targets),
        target_parameters=list(EXPERT_TARGETS),
    )
    with torch.device(device):  # draws the adapters there, which a CPU would take many seconds for
        model = get_peft_model(model, config) if packed else peft.get_peft_model(model, config)
    model.config.use_cache = False
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    return model


def decoder_layers(model: nn.Module) -> Any:
    """The list of a causal language model's layers, whatever wraps the model; deleting the last shortens the model."""
    return next(module for name, module in model.named_modules() if name.rpartition(".")[2] == "layers")


@dataclass(frozen=True)
class Needs:
    """Bytes that a model with adapters keeps while it trains: weights, adapters, their gradients, AdamW's moments.

    Attributes:
        fixed: outside the layers.
        layers: one number a layer.
    """

    fixed: int
    layers: tuple[int, ...]

    @property
    def total(self) -> int:
        """Of the whole model."""
        return self.fixed + sum(self.layers)

    def fitting(self, room: int) -> int:
        """How many layers, from the first on, fit into so many bytes beside what is fixed."""
        count, left = 0, room - self.fixed
        while count < len(self.layers) and self.layers[count] <= left:
            left -= self.layers[count]
            count += 1
        return count


def needs(model: Any, description: Model, rank: int, packed: bool) -> Needs:
    """What training `model`, which `empty_model` made, keeps in memory; activations come on top."""
    found: Counter[int] = Counter()
    for name, octets in _octets_by_name(model, description, rank, packed):
        layer = re.search(r"\.layers\.(\d+)\.", name)
        found[int(layer.group(1)) if layer else -1] += octets
    return Needs(found[-1], tuple(found[i] for i in range(len(found) - 1)))


def _octets_by_name(model: Any, description: Model, rank: int, packed: bool) -> Iterator[tuple[str, int]]:
    experts = experts_modules(model)
    for name, parameter in model.named_parameters():
        owner, _, own = name.rpartition(".")
        count, size = parameter.numel(), parameter.itemsize
        if owner in experts and own in PROJECTIONS:
            E, K, N = matrix_shape(experts[owner], own)
            yield name, int(count * (PACKED_BYTES if packed else size)) + _ADAPTER_BYTES * rank * E * (K + N)
        elif own == "weight" and owner.endswith(tuple(f".{target}" for target in description.targets)):
            yield name, count * size + _ADAPTER_BYTES * rank * sum(parameter.shape)
        else:
            yield name, count * size

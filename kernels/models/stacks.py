"""Packed stacks as a module: the frozen bytes of both projections, in the layout that the kernels read fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor

from mxref.kernels.device.configs import layout_for
from mxref.kernels.device.launch import architecture
from mxref.weights import MXLayout, MXWeights

PROJECTIONS = ("gate_up_proj", "down_proj")
"""Names of both projections, in the order in which transformers' experts modules hold them."""


class PackedStacks(nn.Module):
    """The weights and biases of one MoE layer's experts, packed in MXFP4 and frozen.

    Codes and scales are uint8 parameters under gpt-oss checkpoint names (`gate_up_proj_blocks` [E, N, K/32, 16],
    `gate_up_proj_scales` [E, N, K/32], …): no optimiser or gradient reaches them, and they are sharded, moved and
    broadcast as weights are. `to(dtype)`, `half()` and the like leave them alone; what would convert bytes to numbers
    (`type(dtype)`, loading other dtypes) is refused.

    Where a GPU's kernels read another layout faster than a checkpoint's, the bytes are rearranged (`arrange`).
    `state_dict` still holds a checkpoint's bytes: copies of such parameters in the CPU's memory, or within
    `checkpoint_layout` no copies.

    Attributes:
        num_experts: E.
    """

    def __init__(self, gate_up: MXWeights, down: MXWeights, biases: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        for name, weights in (("gate_up", gate_up), ("down", down)):
            if not isinstance(weights, MXWeights):
                raise TypeError(f"{name} is {type(weights).__name__}; expected MXWeights")
        if gate_up.E != down.E:
            raise ValueError(f"gate_up holds {gate_up.E} experts and down {down.E}; expected the same number")
        if gate_up.K != down.N:
            raise ValueError(
                f"gate_up reads {gate_up.K} columns and down gives {down.N}; expected the hidden size in both"
            )
        if unknown := set(biases or {}) - set(PROJECTIONS):
            raise ValueError(f"biases holds {sorted(unknown)}; expected some of {', '.join(PROJECTIONS)}")
        self.num_experts = gate_up.E
        self._layouts: dict[str, tuple[MXLayout, bool]] = {}
        self._rows: torch.dtype | None = gate_up.orig_dtype
        for name, weights in zip(PROJECTIONS, (gate_up, down), strict=True):
            blocks, scales = weights.packed.view(*weights.scales.shape, -1), weights.scales
            self.register_parameter(f"{name}_blocks", nn.Parameter(blocks, requires_grad=False))
            self.register_parameter(f"{name}_scales", nn.Parameter(scales, requires_grad=False))
            self._note(name, weights.layout, weights.scales_to_128)
            bias = (biases or {}).get(name)
            if bias is not None and tuple(bias.shape) != (weights.E, weights.N):
                raise ValueError(f"biases[{name!r}] has shape {tuple(bias.shape)}; expected {(weights.E, weights.N)}")
            self.register_parameter(f"{name}_bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles; copied parameters do not know their bytes' layout."""
        return self.__dict__ | {"_layouts": {name: self._known(name) for name in self._layouts}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        restore: Any = super().__setstate__
        restore(state)
        for name, stored in self._layouts.items():
            self._note(name, *stored)

    def shape(self, name: str) -> tuple[int, int, int]:
        """(E, K, N) of a projection.

        Raises:
            ValueError: `name` is no projection.
        """
        check_projection(name)
        E, N, blocks, half = getattr(self, f"{name}_blocks").shape
        return E, 2 * blocks * half, N

    def packed_weights(self, name: str) -> MXWeights:
        """A projection's packed weights, sharing its memory; valid until the module is cast or arranged.

        Raises:
            ValueError: `name` is no projection.
        """
        _, K, N = self.shape(name)
        blocks, scales = (parameter.detach() for parameter in self._bytes(name))
        layout, to_128 = self._stored_as(name)
        return MXWeights(blocks.flatten(-2), scales, K, N, layout, scales_to_128=to_128)

    def arrange(self, dtype: torch.dtype | None) -> None:
        """Bring the bytes into the layout that the device's kernels read fastest.

        The first time they move to memory of their own, since theirs may be shared; then they are rearranged in place.
        Moving or casting the module calls this again. Sharded tensors, and those in the CPU's memory, stay as they are.

        Args:
            dtype: of the rows to come. None returns the bytes to a checkpoint's layout for good.
        """
        self._rows = dtype
        for name in PROJECTIONS:
            (blocks, scales), (_, _, N) = self._bytes(name), self.shape(name)
            if blocks.is_meta:
                self._note(name, MXLayout.FWD, False)
            elif blocks.device != scales.device:
                continue  # one is still to come, of a state that is loaded in parts
            elif (layout := MXLayout.FWD if dtype is None else preferred_layout(blocks, dtype, N)) is not None:
                self._repack(name, layout)

    def _repack(self, name: str, layout: MXLayout) -> None:
        if layout == self._known(name)[0]:
            return
        after = self.packed_weights(name).repack(layout)
        for parameter, arranged in zip(self._bytes(name), (after.packed, after.scales), strict=True):
            if getattr(parameter, "in_own_memory", False):
                parameter.copy_(arranged.view_as(parameter))
            else:
                parameter.data, parameter.in_own_memory = arranged.view_as(parameter), True
        self._note(name, layout, after.scales_to_128)

    def _bytes(self, name: str) -> tuple[Any, Any]:
        """A projection's codes and scales."""
        return getattr(self, f"{name}_blocks"), getattr(self, f"{name}_scales")

    def _note(self, name: str, layout: MXLayout, scales_to_128: bool) -> None:
        """Note the layout here and, unless it has always been a checkpoint's, on the parameters."""
        self._layouts[name] = layout, scales_to_128
        for parameter in self._bytes(name):
            if layout != MXLayout.FWD or _noted(parameter) is not None:
                parameter.stored_as = int(layout), scales_to_128

    def _known(self, name: str) -> tuple[MXLayout, bool]:
        """Layout and `scales_to_128`, as the parameters say: other modules may own and arrange them too."""
        noted = _noted(self._bytes(name)[0])
        return self._layouts[name] if noted is None else (MXLayout(noted[0]), noted[1])

    def _replaced(self, name: str) -> str:
        """The parameter that others put here while bytes had another layout, its own unknown; or ""."""
        codes, scales = (_noted(parameter) for parameter in self._bytes(name))
        if codes is None and scales is None:
            replaced = self._layouts[name][0] != MXLayout.FWD
        else:
            replaced = (codes or _AS_STORED)[0] != (scales or _AS_STORED)[0]
        return f"{name}_{'blocks' if codes is None else 'scales'}" if replaced else ""

    def _lend(self, name: str) -> None:
        """The memory is shared from now on: bytes move before they are rearranged."""
        for parameter in self._bytes(name):
            if hasattr(parameter, "in_own_memory"):
                del parameter.in_own_memory

    def _stored_as(self, name: str) -> tuple[MXLayout, bool]:
        """As `_known`, of bytes that are known."""
        if replaced := self._replaced(name):
            raise RuntimeError(
                f"{replaced} was replaced, by sharding or offloading, while its bytes had the layout "
                f"{MXLayout.FRAGMENTS.name}: call arrange(None) on the experts before that"
            )
        return self._known(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedStacks:
        """Behind `to`, `half`, `type`, `cuda`, …; refuses before anything has changed."""
        device = getattr(self, _PACKED[0]).device
        converted = fn(torch.zeros(0, dtype=torch.uint8, device=device)).dtype
        if converted != torch.uint8:
            raise TypeError(
                f"packed experts cannot become {converted}: their uint8 parameters are codes and scales, not numbers; "
                "to(dtype) casts the other parameters and leaves these alone"
            )
        dtype = self._rows and fn(torch.zeros(0, dtype=self._rows, device=device)).dtype
        apply: Any = super()._apply
        known = {name: self._known(name) for name in PROJECTIONS if not self._replaced(name)}
        apply(fn, recurse)
        for name, stored in known.items():  # torch may have made other parameters, of the same bytes
            self._note(name, *stored)
        self.arrange(dtype)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """As nn.Module does, in a checkpoint's layout."""
        save: Any = super()._save_to_state_dict
        save(destination, prefix, keep_vars)
        if _BYTES_LEFT_OUT.get():
            for name in _PACKED:
                del destination[prefix + name]
            return
        for name in PROJECTIONS:
            if self._known(name)[0] == MXLayout.FWD:
                if self._rows is not None:  # the state is a view of this memory
                    self._lend(name)
            else:  # a GPU that holds a model seldom holds it twice
                copies = self.packed_weights(name).repack(MXLayout.FWD).to_gpt_oss()
                for part, copied in zip(("blocks", "scales"), copies, strict=True):
                    destination[f"{prefix}{name}_{part}"] = copied.cpu()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """As nn.Module does, which would convert other dtypes to bytes value by value."""
        for name in _PACKED:
            stored = state_dict.get(prefix + name)
            if stored is not None and stored.dtype != torch.uint8:
                raise TypeError(f"{prefix}{name} is {stored.dtype}; expected torch.uint8 bytes, as a view if need be")
        given = any(prefix + name in state_dict for name in _PACKED)  # else, as of adapters alone, the bytes rest
        with checkpoint_layout(self) if given else nullcontext():
            for name in _PACKED:
                layout, _ = _noted(state_dict.get(prefix + name)) or _AS_STORED
                if layout != MXLayout.FWD:
                    raise ValueError(
                        f"{prefix}{name} is a parameter of experts that have the layout {MXLayout(layout).name}; give "
                        "their state_dict(), which has a checkpoint's bytes"
                    )
            super()._load_from_state_dict(state_dict, prefix, *rest)


@contextmanager
def checkpoint_layout(model: nn.Module) -> Iterator[None]:
    """For its duration all packed experts of a model hold a checkpoint's bytes, rearranged in place.

    Nothing may run the model meanwhile, in any thread or process; what it gives out is invalid afterwards.
    """
    packed = [(module, module._rows) for module in model.modules() if isinstance(module, PackedStacks)]
    try:
        for module, _ in packed:
            module.arrange(None)
        yield
    finally:
        for module, rows in packed:
            module.arrange(rows)


@contextmanager
def packed_bytes_left_out() -> Iterator[None]:
    """For its duration no state dict has packed bytes, for callers that would drop the copies."""
    before = _BYTES_LEFT_OUT.set(True)
    try:
        yield
    finally:
        _BYTES_LEFT_OUT.reset(before)


_BYTES_LEFT_OUT: ContextVar[bool] = ContextVar("packed bytes are left out of state dicts", default=False)

_PACKED = tuple(f"{name}_{part}" for name in PROJECTIONS for part in ("blocks", "scales"))


_AS_STORED = int(MXLayout.FWD), False


def _noted(parameter: Any) -> tuple[int, bool] | None:
    """What `PackedStacks._note` put on a parameter of codes."""
    noted: tuple[int, bool] | None = getattr(parameter, "stored_as", None)
    return noted


def check_projection(name: str) -> None:
    """Raise ValueError unless `name` is a projection's."""
    if name not in PROJECTIONS:
        raise ValueError(f"name is {name!r}; expected one of {', '.join(PROJECTIONS)}")


def preferred_layout(stored: Tensor, dtype: torch.dtype, N: int) -> MXLayout | None:
    """The layout of [E, K, N] weights that kernels read fastest for rows of `dtype`; None where none reads `stored`."""
    if stored.device.type != "cuda" or isinstance(stored, FakeTensor | DTensor):
        return None
    try:
        return layout_for(architecture(stored.device), dtype, N)
    except RuntimeError:  # a GPU that is too old for the kernels
        return None

"""`HFScatterMoEGatedMLP`: the forward of a Hugging Face MoE block, in the form of ScatterMoE's kernel layers.

It is the block's own forward with its experts on these kernels. PEFT's adapters on the experts' parameters are passed
to the kernels; those elsewhere in the block act by themselves.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from torch import Tensor, nn

from mxref.kernels.models.adapters import unwrap_adapters
from mxref.kernels.models.experts import PackedExperts
from mxref.kernels.models.packing import not_covered


class HFScatterMoEGatedMLP(nn.Module):
    """A kernel layer for every MoE block of transformers whose `experts` are packed, or dense and covered.

    `forward` is static and takes the block as `self`, as Hugging Face's `kernels` replaces a module's forward (not its
    class's, which is what runs).
    """

    @staticmethod
    def forward(self: Any, layer_input: Tensor) -> Any:
        """What the block's own forward gives, usually [batch, length, H] -> [batch, length, H].

        Args:
            self: the block. `experts` is packed or accepted by `experts_modules`, with or without PEFT's adapters.
            layer_input: [batch, length, H].

        Raises:
            TypeError: the block has no experts that the kernels cover, or no forward of its own.
            ValueError: PEFT's adapters cannot be passed on, see `unwrap_adapters`.
        """
        own_forward = type(self).forward
        if own_forward is HFScatterMoEGatedMLP.forward:
            raise TypeError(
                f"{type(self).__name__} has no forward of its own: its class's was replaced by this one; replace the "
                "forward of the module instead"
            )
        experts = getattr(self, "experts", None)
        if not isinstance(experts, nn.Module):
            raise TypeError(
                f"{type(self).__name__} has no experts module; give the block around it, or see pack_experts and "
                "model.set_experts_implementation('mxref')"
            )
        base, adapters = unwrap_adapters(experts)
        if isinstance(base, PackedExperts):
            return own_forward(self, layer_input)
        if reason := not_covered(base):
            raise TypeError(f"{type(self).__name__}.experts ({type(base).__name__}) is not covered: {reason}")
        from mxref.kernels.models.transformers import experts_forward

        on_kernels = copy.copy(base)
        on_kernels.forward = partial(experts_forward, base, adapters=adapters)
        block = copy.copy(self)
        block._modules = {**self._modules, "experts": on_kernels}
        return own_forward(block, layer_input)

"""A matrix for each expert as kernels see it: dense, sizes and strides, or packed. The tensors come with the launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mxref.weights import MXLayout, MXWeights

__all__ = ["PackedMatrix", "Stack"]


class Stack(NamedTuple):
    """How matrices [E, C, J] lie in a tensor's memory. A view that torch makes costs the host more than all of this.

    Attributes:
        shape: [E, C, J].
        strides: of the three, in elements.
    """

    shape: tuple[int, int, int]
    strides: tuple[int, int, int]

    @classmethod
    def of(cls, tensor: Tensor) -> Stack:
        """All of a tensor [E, C, J]."""
        E, C, J = tensor.shape
        of_e, of_c, of_j = tensor.stride()
        return cls((E, C, J), (of_e, of_c, of_j))

    @property
    def transposed(self) -> Stack:
        """The same matrices seen as [E, J, C]."""
        (E, C, J), (of_e, of_c, of_j) = self
        return Stack((E, J, C), (of_e, of_j, of_c))


class PackedMatrix(NamedTuple):
    """MXFP4 weights as the right operand of a product.

    Attributes:
        shape: [E, C, J].
        dtype: the dtype whose precision a decoded weight has: the activations'.
        layout, scales_to_128: of an `MXWeights`.
        transposed: False: W_e is [K, N], the forward's; True: W_eᵀ [N, K], dX's. Both read the same bytes.
    """

    shape: tuple[int, int, int]
    dtype: torch.dtype
    layout: MXLayout = MXLayout.FWD
    scales_to_128: bool = False
    transposed: bool = False

    @classmethod
    def of(cls, weights: MXWeights, dtype: torch.dtype, transposed: bool = False) -> PackedMatrix:
        """The matrices of a packed stack.

        Raises:
            ValueError: the weights have a layout that is not known.
        """
        weights.require_known_layout("the grouped product")
        E, K, N = weights.E, weights.K, weights.N
        shape = (E, N, K) if transposed else (E, K, N)
        return cls(shape, dtype, weights.layout, weights.scales_to_128, transposed)

    @property
    def fragments(self) -> bool:
        """Whether the bytes lie in the layout FRAGMENTS."""
        return self.layout == MXLayout.FRAGMENTS

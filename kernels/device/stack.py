"""A matrix for each expert as kernels see it: a pointer, sizes and strides."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Stack"]


class Stack(NamedTuple):
    """A view [E, C, J] of a tensor's memory. A view that torch makes costs the host more than all of this.

    Attributes:
        tensor: where the first element is; kept as it is.
        shape: [E, C, J].
        strides: of the three, in elements.
    """

    tensor: Tensor
    shape: tuple[int, int, int]
    strides: tuple[int, int, int]

    @classmethod
    def of(cls, tensor: Tensor) -> Stack:
        """All of a tensor [E, C, J]."""
        E, C, J = tensor.shape
        of_e, of_c, of_j = tensor.stride()
        return cls(tensor, (E, C, J), (of_e, of_c, of_j))

    @property
    def transposed(self) -> Stack:
        """The same matrices seen as [E, J, C]."""
        (E, C, J), (of_e, of_c, of_j) = self.shape, self.strides
        return Stack(self.tensor, (E, J, C), (of_e, of_j, of_c))

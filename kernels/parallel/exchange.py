"""How tokens meet other ranks' experts: they travel by all-to-all, or stay and a sum over ranks completes them.

A rank runs its own experts by a function (rows, ids among its own, gates) -> outputs. With n ranks, and L_q the loss of
rank q:

    all-to-all   every rank has its own tokens. x and the gates get their own rank's dL; the experts' parameters get the
                 sum of dL_q over all ranks, which `Owned.mean` divides by n, as data parallelism does.
    sum          every rank has the same tokens and L. The forward pass sums the outputs, the backward pass the
                 gradients of x and of the gates, each rank's being those of its own experts alone. Nothing is divided:
                 every rank then holds the whole gradient, as the experts' parameters do already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, distributed
from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from mxref.routing import flatten_sort_count

__all__ = ["Experts", "Owned", "all_to_all_experts", "summed_experts"]

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A rank's own experts: x [M, H], ids [M, k] among its own (others contribute nothing), gates [M, k] -> [M, H]."""


@dataclass(frozen=True)
class Owned:
    """Which experts each rank of a mesh owns: slices in rank order, the first ones longer, as `Shard(0)` cuts.

    Attributes:
        num_experts: E, of all ranks.
        mesh: one dimension.

    Raises:
        ValueError: the mesh has several dimensions, or leaves a rank without an expert.
    """

    num_experts: int
    mesh: DeviceMesh

    def __post_init__(self) -> None:
        if self.mesh.ndim != 1:
            raise ValueError(f"mesh has {self.mesh.ndim} dimensions; expected the one that divides experts: mesh['ep']")
        if not all(self.sizes):
            raise ValueError(
                f"{self.num_experts} experts on {self.mesh.size()} ranks make slices of {self.sizes}, which leave "
                f"rank {self.sizes.index(0)} without an expert; choose a number of ranks that leaves each at least one"
            )

    @property
    def sizes(self) -> list[int]:
        """How many experts each rank owns."""
        size = -(-self.num_experts // self.mesh.size())
        return [min(max(self.num_experts - size * rank, 0), size) for rank in range(self.mesh.size())]

    @property
    def slice(self) -> slice:
        """The experts of this rank."""
        rank = self.mesh.get_local_rank()
        start = sum(self.sizes[:rank])
        return slice(start, start + self.sizes[rank])

    def mean(self, parameter: Tensor) -> Tensor:
        """A parameter of this rank's experts; its gradient, a sum over ranks, becomes their mean."""
        n = self.mesh.size()
        parameter = parameter.view_as(parameter)  # the hook belongs to this use, not to the parameter
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: gradient / n)
        return parameter

    def shared(self, tensor: Tensor) -> Tensor:
        """A tensor, the same on every rank; its gradient becomes the sum of all ranks' gradients."""
        whole = DTensor.from_local(tensor, self.mesh, [Replicate()], run_check=False)
        return whole.to_local(grad_placements=[Partial()])

    def summed(self, part: Tensor) -> Tensor:
        """The sum of all ranks' tensors; each gets the gradient, the same on every rank."""
        whole = DTensor.from_local(part, self.mesh, [Partial()], run_check=False)
        return whole.redistribute(placements=[Replicate()]).to_local(grad_placements=[Replicate()])


def all_to_all_experts(experts: Experts, x: Tensor, ids: Tensor, gates: Tensor, owned: Owned) -> Tensor:
    """Tokens' slots travel to the ranks that own their experts, and the results back: [M, H] in the dtype of x.

    out = R(Σ_slots gate·Y) is computed where the token lives, with the rounding points of one process. The host waits
    once, for the exchange's sizes.

    Args:
        experts: runs this rank's experts, on rows with one slot each and gates of 1.
        x: [M, H]; M may differ between ranks and be 0.
        ids: integer [M, k] among all E experts; others contribute nothing.
        gates: [M, k].
        owned: which rank owns which experts.
    """
    (M, k), H, E, group = ids.shape, x.shape[1], owned.num_experts, owned.mesh.get_group()
    _, order, offsets = flatten_sort_count(ids, E)
    counts = offsets.diff(prepend=offsets.new_zeros(1))
    mine, n = owned.slice.stop - owned.slice.start, len(owned.sizes)
    received = counts.new_empty(n * mine)
    distributed.all_to_all_single(received, counts, [mine] * n, owned.sizes, group)
    sent = torch.stack([part.sum() for part in counts.split(owned.sizes)])
    send, receive = torch.stack([sent, received.view(n, mine).sum(1)]).tolist()  # the one wait

    order = order[: sum(send)]
    rows = x.unsqueeze(1).expand(M, k, H).reshape(M * k, H)[order]  # so that dX sums its slots in fp32, rounded once
    rows = wait_tensor(all_to_all_single_autograd(rows, receive, send, group))
    local = torch.arange(mine, device=ids.device).repeat(n).repeat_interleave(received, output_size=sum(receive))
    out = experts(rows, local.unsqueeze(1), torch.ones_like(local, dtype=rows.dtype).unsqueeze(1))
    back = wait_tensor(all_to_all_single_autograd(out, send, receive, group))

    slots = back.new_zeros(M * k, H).index_put((order,), back).view(M, k, H)
    gates = gates.to(x.dtype).masked_fill((ids < 0) | (ids >= E), 0)
    return torch.bmm(gates.unsqueeze(1), slots).squeeze(1)


def summed_experts(experts: Experts, x: Tensor, ids: Tensor, gates: Tensor, owned: Owned) -> Tensor:
    """Every rank runs its own experts on all tokens, sentinels for other ranks'; the outputs are summed.

    In 16 bits every rank rounds its part once, and the sum over ranks rounds in that dtype too.

    Args:
        experts: runs this rank's own experts.
        x: [M, H], the same on every rank.
        ids: integer [M, k] among all E experts, the same on every rank; others contribute nothing.
        gates: [M, k], the same on every rank.
        owned: which rank owns which experts.
    """
    start, stop = owned.slice.start, owned.slice.stop
    local = torch.where((ids >= start) & (ids < stop), ids - start, stop - start)
    return owned.summed(experts(owned.shared(x), local, owned.shared(gates)))

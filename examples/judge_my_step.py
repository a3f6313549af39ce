"""Judge a training step on several ranks: gradients, adapters and packed bytes against one process, bit for bit.

    python examples/judge_my_step.py                                        # a few cases on 1 and 2 ranks, in seconds
    mxref gate --distributed --step examples/judge_my_step.py:train_step    # everything, on 1, 2 and 4 ranks
    mxref gate --distributed --step my_project.train:step --device cuda     # yours: NCCL, a GPU a rank

Replace `train_step`: this one shards the packed experts over ranks, gathers them for every step, and sums gradients.
What it gets, gives and may declare stands in `mxref.verification.distributed.protocol`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import ProcessGroup

from mxref import MXWeights, flatten_sort_count, parallel_linear_lora
from mxref.verification.cli import main
from mxref.verification.distributed.protocol import Batch, Model, Saved, Step, Trained


def train_step(model: Model, batches: Sequence[Batch], group: ProcessGroup, folder: Path) -> Trained:
    """One update for each of this rank's batches; rank 0 saves the adapters."""
    rank, size, E = dist.get_rank(group), dist.get_world_size(group), model.packed.shape[0]
    own = slice(rank * E // size, (rank + 1) * E // size)
    packed, scales = model.packed[own].clone(), model.scales[own].clone()  # all that this rank keeps of them
    trained = [p.clone().requires_grad_() for p in (model.lora_A, model.lora_B, model.router) if p is not None]
    A, B, router = (*trained, None)[:3]
    steps = []
    for batch in batches:
        x, gates = batch.x.clone().requires_grad_(), batch.gates
        if router is not None:
            gates = torch.softmax((router[batch.experts] * x[:, None]).sum(-1), -1)
        elif gates is not None:
            gates = gates.clone().requires_grad_()
        weights = MXWeights(gathered(packed, E, group), gathered(scales, E, group), x.shape[1], packed.shape[1])
        order = flatten_sort_count(batch.experts, E)  # ids outside 0..E−1 come last, and contribute nothing
        k, biases = batch.experts.shape[1], model.biases
        Y = parallel_linear_lora(x, weights, k, *order, A, B, model.scaling, biases, gates)  # your kernels here
        loss = (Y.float() * batch.targets.float()).sum()
        dX, *dgates = torch.autograd.grad(loss, [x] if router is not None else [x, gates], retain_graph=True)
        gradients = [summed(g, group) for g in torch.autograd.grad(loss, trained)]
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter -= model.learning_rate * gradient
        dA, dB, drouter = (*gradients, None)[:3]
        steps.append(Step(summed(loss.detach(), group), Y, dX, dA, dB, *(dgates or [None]), drouter))
    if rank == 0:
        torch.save({"lora_A": A, "lora_B": B, "router": router}, folder / "adapters.pt")
    return Trained(tuple(steps), A, B, gathered(packed, E, group), gathered(scales, E, group), router)


def load(folder: Path) -> Saved:
    """What `train_step` saved, read by one process."""
    return Saved(**torch.load(folder / "adapters.pt"))


# What it declares: the loss is a sum over all tokens, gradients are summed in fp32 in any order, and how to load.
train_step.mxref_loss = "sum"  # type: ignore[attr-defined]
train_step.mxref_reduction = "float32"  # type: ignore[attr-defined]
train_step.mxref_load = load  # type: ignore[attr-defined]


def summed(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over all ranks."""
    total = x.clone()
    dist.all_reduce(total, group=group)
    return total


def gathered(shard: Tensor, experts: int, group: ProcessGroup) -> Tensor:
    """All experts' bytes. Shards may differ in size by one expert: they travel padded, and the padding is cut off."""
    size = dist.get_world_size(group)
    counts = [(rank + 1) * experts // size - rank * experts // size for rank in range(size)]
    padded = shard.new_zeros(max(counts), *shard.shape[1:])
    padded[: len(shard)] = shard
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


if __name__ == "__main__":
    few = ["--device", "cpu", "--world", "1,2", "--case", "two steps", "--case", "softmax router"]
    sys.exit(main(["gate", "--distributed", "--step", f"{__file__}:train_step", *few, *sys.argv[1:]]))

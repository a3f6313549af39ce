"""What a training step on several ranks gets and gives: the signature that `mxref gate --distributed --step` judges.

    def train_step(model: Model, batches: Sequence[Batch], group: ProcessGroup, folder: Path) -> Trained

Every rank of `group` calls it with the same model and its own share of each batch. It shards the model as it likes,
and takes one step for each batch: forward, backward, gradients brought together over the ranks, and plain SGD,
parameter −= learning_rate · gradient. It uses no other group than `group` and parts of it, and leaves what it is given
as it is.

E experts, M tokens of this rank (0 too), k slots a token, r the adapters' rank. The layer of a token and its loss:

    gates = softmax over the token's slots of x·router[experts]      (where the model has a router; else given)
    Y     = Σ_slots gate · (x·W_e + s·(x·A_eᵀ)·B_eᵀ + bias_e)        (nothing of a slot whose id is outside 0..E−1)
    loss  = Σ over all tokens of all ranks of ⟨Y, targets⟩           (declared "mean": divided by these tokens)

Products accumulate in fp32; rounding points are those of `mxref.parallel_linear_lora`, and in 16 bits a mean divides
the targets, before anything is rounded. What the step declares, as attributes of the callable:

    train_step.mxref_loss = "mean"                   # or "sum", which is meant where it declares nothing
    train_step.mxref_reduction = "bfloat16, tree"    # dtype and order of the sums of gradients over ranks, see
                                                     # `reduction`; absent: "float32, any"
    train_step.mxref_outputs = "summed"              # each rank adds up and rounds the slots of its own experts, and
                                                     # Y, dX and dgates are summed over ranks in the activation dtype;
                                                     # absent: "whole", a token's slots meet in fp32 in one place
    train_step.mxref_load = load                     # folder -> Saved, where the step saves a checkpoint: reads it
                                                     # back in one process, without a group
    train_step.mxref_covers = "experts>=ranks"       # what it supports of COVERS, separated by commas
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor
from torch.distributed import ProcessGroup

from mxref.verification.distributed.reduction import Reduction, parse_reduction

__all__ = ["COVERS", "Batch", "Declared", "Model", "Saved", "Step", "TrainStep", "Trained", "declared"]

COVERS = {
    "experts>=ranks": "no rank without an expert",
    "one group": "no groups that train side by side",
    "rounded in fp32": "ordinary numbers in fp32 alone: interpreted kernels do not round to 16 bits",
}
"""What a step may declare to support alone, and what it is then not asked about."""


@dataclass(frozen=True, eq=False)
class Model:
    """One layer of experts, whole, the same on every rank.

    Attributes:
        packed: uint8 [E, N, K/2], scales: uint8 [E, N, K/32]: frozen MXFP4 weights, see `mxref.MXWeights`.
        lora_A: fp32 [E·r, K], expert e owns rows e·r to (e + 1)·r.
        lora_B: fp32 [N, E·r], expert e owns those columns.
        scaling: s, a power of two.
        learning_rate: a power of two, so that an update rounds once.
        biases: frozen, [E, N] in the activation dtype, or None.
        router: fp32 [E, K], trained, or None where batches bring their gates.
    """

    packed: Tensor
    scales: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    learning_rate: float
    biases: Tensor | None = None
    router: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Batch:
    """One rank's share of a batch.

    Attributes:
        x: [M, K], the activation dtype.
        experts: int64 [M, k]; ids outside 0..E−1 are sentinels.
        targets: [M, N], what the loss multiplies Y with, in the activation dtype.
        gates: [M, k] in the activation dtype, or None where the model has a router.
    """

    x: Tensor
    experts: Tensor
    targets: Tensor
    gates: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Step:
    """What one step has computed: gradients of the loss of all ranks' tokens, as plain tensors.

    Attributes:
        loss: fp32, one number, the same on every rank.
        Y: [M, N], dX: [M, K], dgates: [M, k]: of this rank's tokens; dgates None where the model has a router.
        dA: [E·r, K], dB: [N, E·r], drouter: [E, K]: whole, on every rank.
    """

    loss: Tensor
    Y: Tensor
    dX: Tensor
    dA: Tensor
    dB: Tensor
    dgates: Tensor | None = None
    drouter: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Trained:
    """The steps, a batch each, and the model after the last one, gathered whole on every rank as in `Model`."""

    steps: tuple[Step, ...]
    lora_A: Tensor
    lora_B: Tensor
    packed: Tensor
    scales: Tensor
    router: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Saved:
    """What a checkpoint holds, as in `Model`; packed weights and scales where it holds them."""

    lora_A: Tensor
    lora_B: Tensor
    packed: Tensor | None = None
    scales: Tensor | None = None
    router: Tensor | None = None


class TrainStep(Protocol):
    """See the module."""

    def __call__(self, model: Model, batches: Sequence[Batch], group: ProcessGroup, folder: Path) -> Trained:
        """Train; `folder` is empty, and every rank's: for a checkpoint of what was trained."""
        ...


@dataclass(frozen=True)
class Declared:
    """What a step declares; `saves`: it has a loader for what it saved, `covers`: of `COVERS`, empty for everything."""

    loss: Literal["sum", "mean"] = "sum"
    reduction: Reduction = field(default_factory=Reduction)
    saves: bool = False
    covers: tuple[str, ...] = ()
    outputs: Literal["whole", "summed"] = "whole"


def declared(step: Callable[..., Any]) -> Declared:
    """A step's declaration.

    Raises:
        ValueError: it is not understood.
    """
    loss: Any = getattr(step, "mxref_loss", "sum")
    reduction: Any = getattr(step, "mxref_reduction", "float32")
    if loss not in ("sum", "mean"):
        raise ValueError(f"mxref_loss is {loss!r}; expected 'sum' or 'mean'")
    outputs: Any = getattr(step, "mxref_outputs", "whole")
    if outputs not in ("whole", "summed"):
        raise ValueError(f"mxref_outputs is {outputs!r}; expected 'whole' or 'summed'")
    if not isinstance(reduction, str):
        raise ValueError(f"mxref_reduction is {type(reduction).__name__}; expected text such as 'bfloat16, tree'")
    covers = tuple(part.strip() for part in getattr(step, "mxref_covers", "").split(",") if part.strip())
    if unknown := set(covers) - set(COVERS):
        raise ValueError(f"mxref_covers holds {sorted(unknown)}; expected some of {', '.join(COVERS)}")
    return Declared(loss, parse_reduction(reduction), callable(getattr(step, "mxref_load", None)), covers, outputs)

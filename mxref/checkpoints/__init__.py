"""MXFP4 checkpoints: names and layouts on disk, conventions as data.

    from mxref.checkpoints import open_checkpoint, read_expert_weights
    checkpoint = open_checkpoint("./gpt-oss-20b")
    for name, weights in read_expert_weights(checkpoint): ...

docs/checkpoints.md says which command takes which convention.
"""

from mxref.checkpoints.checkpoint import (
    CONVENTIONS,
    Checkpoint,
    list_expert_tensors,
    list_other_tensors,
    open_checkpoint,
    read_expert_biases,
    read_expert_weights,
    read_other_tensors,
)
from mxref.checkpoints.convention import Convention, ExpertTensor
from mxref.checkpoints.gpt_oss import write_expert_weights

__all__ = [
    "CONVENTIONS",
    "Checkpoint",
    "Convention",
    "ExpertTensor",
    "list_expert_tensors",
    "list_other_tensors",
    "open_checkpoint",
    "read_expert_biases",
    "read_expert_weights",
    "read_other_tensors",
    "write_expert_weights",
]

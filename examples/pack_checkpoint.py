"""Pack a model's experts to MXFP4 and save them: a checkpoint that transformers and mxref both read.

    python examples/pack_checkpoint.py                          # a tiny gpt-oss with random weights, in seconds
    python examples/pack_checkpoint.py ./my-model ./my-packed   # your own bf16 model

Prints the bytes of the expert weights before and after, and how far the logits of the packed model lie from those of
the model that went in. `mxref inspect ./my-packed` then counts scale bytes and zero, saturated and NaN blocks.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before mxref.kernels: on a CPU the kernels are interpreted

from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

from mxref.kernels import pack_experts
from mxref.kernels.models.loading import load_packed_model, save_packed_model


def tiny_model() -> Any:
    """A gpt-oss model of two layers and four experts, random weights."""
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        architectures=["GptOssForCausalLM"],
    )
    return GptOssForCausalLM(config).float()


def expert_bytes(model: torch.nn.Module) -> int:
    """Bytes of all expert projections, packed or not."""
    held = [*model.named_parameters(), *model.named_buffers()]
    return sum(tensor.nbytes for name, tensor in held if ".experts." in name and "bias" not in name)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of a fixed prompt."""
    prompt = torch.arange(16).unsqueeze(0)
    return model.eval()(prompt.to(next(model.parameters()).device)).logits.float().cpu()


def main(source: str | None = None, target: str | None = None) -> None:
    """Pack the model in the folder `source` into the folder `target`; without them, a tiny one into a temporary one."""
    model: Any = tiny_model() if source is None else AutoModelForCausalLM.from_pretrained(source)
    before, expected = expert_bytes(model), logits(model)
    pack_experts(model, rank=0)
    print(f"expert weights: {before:,} bytes, packed {expert_bytes(model):,}")

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(target or temporary)
        save_packed_model(model, folder)
        packed = logits(load_packed_model(folder, rank=0))
    assert torch.equal(packed, logits(model)), "what was saved computes something else"
    distance = torch.linalg.vector_norm(packed - expected) / torch.linalg.vector_norm(expected)
    print(f"logits moved by {float(distance):.1%}: what four bits a weight lose")
    if target is not None:
        print(f"saved: {target}; now: mxref inspect {target}")


if __name__ == "__main__":
    if len(sys.argv) not in (1, 3):
        sys.exit(f"usage: {sys.argv[0]} [SOURCE TARGET]")
    main(*sys.argv[1:])

"""Fine-tune attention and experts of a gpt-oss model with LoRA while the experts' weights stay packed in MXFP4.

    python examples/finetune_gpt_oss.py                              # a tiny random model, in seconds on a CPU
    python examples/finetune_gpt_oss.py ./gpt-oss-20b ./my-adapter   # the real one, on a GPU

The adapter that is saved is a PEFT adapter: plain PEFT loads it on the dequantised model too.
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

import peft
from transformers import GptOssConfig, GptOssForCausalLM

from mxref.kernels import pack_experts
from mxref.kernels.models.loading import load_packed_model
from mxref.kernels.models.peft import get_peft_model

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS, BATCH, LENGTH = 8, 2, 24


def packed_model(checkpoint: str | None) -> Any:
    """The packed model in a folder; without one, a tiny model whose experts are packed here."""
    if checkpoint is not None:
        return load_packed_model(checkpoint, rank=0, device=DEVICE)  # rank 0: PEFT brings the adapters
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        initializer_range=0.125,
    )
    return pack_experts(GptOssForCausalLM(config).to(DEVICE), rank=0)


def main(checkpoint: str | None = None, output: str | None = None) -> list[float]:
    """Train for a few steps on a fixed text and save the adapter; the losses."""
    model = packed_model(checkpoint)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], target_parameters=EXPERTS)
    model = get_peft_model(model, config).train()
    model.print_trainable_parameters()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=3e-2 if checkpoint is None else 1e-4)

    tokens = torch.arange(BATCH * LENGTH, device=DEVICE).view(BATCH, LENGTH) % 61  # your data goes here
    losses = []
    for step in range(STEPS):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
        print(f"step {step}: loss {losses[-1]:.3f}")

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(output or temporary)
        model.save_pretrained(folder)
        print(f"saved: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:3])

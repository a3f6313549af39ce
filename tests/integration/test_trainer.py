"""transformers' Trainer on packed experts: it accepts them, trains every adapter, and saves what plain PEFT reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from gpt_oss_checkpoint import make_gpt_oss_checkpoint
from moe_models import assert_near
from peft.utils import get_peft_model_state_dict
from transformers import GptOssForCausalLM, Mxfp4Config, Trainer, TrainingArguments

from mxref.kernels.models.loading import load_packed_model
from mxref.kernels.models.packing import pack_experts
from mxref.kernels.models.peft import get_peft_model

IDS = torch.arange(12)
STEPS = 3


def dequantised(directory: Path) -> Any:
    model = GptOssForCausalLM.from_pretrained(directory, quantization_config=Mxfp4Config(dequantize=True))
    return model.float().requires_grad_(False)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "activation checkpointing"])
@pytest.mark.parametrize("source", ["files", "transformers"])
def test_trains_and_saves(tmp_path: Path, source: str, checkpointing: bool) -> None:
    """Whether the checkpoint came through our loader, or through transformers' dequantisation and was packed again."""
    make_gpt_oss_checkpoint(tmp_path, layers=1)
    if source == "files":
        model = load_packed_model(tmp_path, rank=0, dtype=torch.float32)
    else:
        model = pack_experts(dequantised(tmp_path), tmp_path, rank=0)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=targets, init_lora_weights=False)
    adapted = get_peft_model(model, config)
    start = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(adapted).items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=STEPS,
        save_steps=STEPS,
        logging_steps=1,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        gradient_checkpointing=checkpointing,
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(model=adapted, args=arguments, train_dataset=[{"input_ids": IDS, "labels": IDS}] * 2 * STEPS)
    trainer.train()
    seen = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(seen) == STEPS
    assert seen[-1] < seen[0]
    assert len(start) == 4
    for name, tensor in get_peft_model_state_dict(adapted).items():
        assert not torch.equal(tensor, start[name]), name
    plain = peft.PeftModel.from_pretrained(dequantised(tmp_path), tmp_path / "run" / f"checkpoint-{STEPS}")
    assert_near(adapted.eval()(IDS[None]).logits.detach(), plain(IDS[None]).logits.detach())

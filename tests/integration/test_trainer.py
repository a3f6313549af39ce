"""transformers' Trainer on packed experts: it accepts them, trains every adapter, and saves what plain PEFT reads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import dequantise, small_model
from gpt_oss_checkpoint import make_gpt_oss_checkpoint
from moe_models import assert_near
from peft.utils import get_peft_model_state_dict
from transformers import GptOssForCausalLM, Mxfp4Config, Trainer, TrainingArguments

from mxref.kernels.models.loading import load_packed_model
from mxref.kernels.models.packing import pack_experts

IDS = torch.arange(12)
STEPS = 3


def dequantised(directory: Path) -> Any:
    model = GptOssForCausalLM.from_pretrained(directory, quantization_config=Mxfp4Config(dequantize=True))
    return model.float().requires_grad_(False)


def trained(model: Any, directory: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=STEPS,
        save_steps=STEPS,
        logging_steps=1,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        **options,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": IDS, "labels": IDS}] * 2 * STEPS)
    trainer.train()
    return trainer


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
    adapted: Any = peft.get_peft_model(model, config)  # as trl's trainers do with their peft_config
    start = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(adapted).items()}
    trainer = trained(adapted, tmp_path / "run", gradient_checkpointing=checkpointing)
    seen = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(seen) == STEPS
    assert seen[-1] < seen[0]
    assert len(start) == 4
    for name, tensor in get_peft_model_state_dict(adapted).items():
        assert not torch.equal(tensor, start[name]), name
    plain = peft.PeftModel.from_pretrained(dequantised(tmp_path), tmp_path / "run" / f"checkpoint-{STEPS}")
    assert_near(adapted.eval()(IDS[None]).logits.detach(), plain(IDS[None]).logits.detach())


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_trains_as_the_dequantised_model_does(tmp_path: Path, family: str) -> None:
    """Families without expert biases, attention and experts at once: loss by loss what plain PEFT trains."""
    dense = small_model(family)
    packed = pack_experts(copy.deepcopy(dense), rank=0)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    seen = []
    for name, model in (("packed", packed), ("dense", dequantise(dense, packed))):
        torch.manual_seed(5)
        config = peft.LoraConfig(r=2, target_modules=["o_proj"], target_parameters=targets, task_type="CAUSAL_LM")
        trainer = trained(peft.get_peft_model(model, config), tmp_path / name)
        seen.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(seen[0]) == STEPS
    assert seen[0][-1] < seen[0][0]
    assert seen[0] == pytest.approx(seen[1], rel=1e-3)

"""What one rank does in the tests of accelerate's FSDP2 plugin and of transformers' Trainer under it."""

from __future__ import annotations

from typing import Any

import peft
import torch
import transformers.trainer
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from moe_models import loss_of, tiny_gpt_oss
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments
from world import ON_GPUS

from mxref.kernels.models.packing import pack_experts
from mxref.kernels.parallel.older_torch import bytes_shardable
from mxref.kernels.parallel.sharding import whole_model

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


class OnCPU(Accelerator):
    """accelerate 1.15 takes the plugin for GPUs alone (AcceleratorState leaves it out for MULTI_CPU); nothing else that
    it does with a model under FSDP2 needs one, so here it takes it."""

    def __init__(self, *arguments: Any, fsdp_plugin: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.state.fsdp_plugin = fsdp_plugin

    distributed_type, is_fsdp2 = DistributedType.FSDP, True


def adapted(by_peft: bool) -> Any:
    """A tiny gpt-oss on packed experts of three; adapters with products of their own, from PEFT or the experts'."""
    model: Any = pack_experts(tiny_gpt_oss(), rank=0 if by_peft else 2)
    if by_peft:
        config = peft.LoraConfig(r=2, target_modules=["o_proj"], target_parameters=TARGETS, init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model.train()


def steps(ways: list[tuple[bool, bool]]) -> list[dict[str, Any]]:
    """One step of each way."""
    return [step(*way) for way in ways]


def step(by_peft: bool, efficient: bool) -> dict[str, Any]:
    """One step of SGD under the plugin: the loss, the gradients, and on rank 0 the model after it."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        cpu_ram_efficient_loading=efficient,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GptOssDecoderLayer"],
    )
    accelerator = Accelerator(fsdp_plugin=plugin) if ON_GPUS else OnCPU(cpu=True, fsdp_plugin=plugin)
    accelerator.state.fsdp_plugin = plugin  # else the first one's, of a state that accelerators share
    model, rank = adapted(by_peft), distributed.get_rank()
    if efficient and rank:
        for parameter in model.parameters():
            parameter.data.zero_()  # only the first process has read the weights
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.125)
    with bytes_shardable():
        model, optimiser = accelerator.prepare(model, optimiser)
    packed = [p for p in model.parameters() if p.dtype == torch.uint8]
    assert [p.to_local().shape[0] for p in packed] == [2 - rank] * 4
    loss = loss_of(model, rank)
    accelerator.backward(loss)
    gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    optimiser.step()
    with whole_model(model) as here:
        state = {name: value.clone() for name, value in model.state_dict().items()} if here else {}
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return {"loss": loss.detach(), "gradients": gradients, "state": state}


STEPS = 4


def trainer_of(model: Any, directory: str, batch: int, steps: int, use_cpu: bool = True, **options: Any) -> Any:
    """A Trainer with AdamW on the same rows in the same order, however many processes share them."""
    arguments = TrainingArguments(
        output_dir=directory,
        max_steps=steps,
        save_steps=2,
        logging_steps=1,
        learning_rate=0.125,
        lr_scheduler_type="constant",
        adam_epsilon=1.0,  # steps grow with gradients: no division by one that is near zero magnifies a rounding
        per_device_train_batch_size=batch,
        max_grad_norm=1.0,
        report_to=[],
        use_cpu=use_cpu,
        **options,
    )
    rows = [torch.randint(32, (6,), generator=torch.Generator().manual_seed(seed)) for seed in range(2 * STEPS)]
    return Trainer(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])


def train(directory: str, checkpoint: str | None, steps: int) -> dict[str, Any]:
    """Steps of the Trainer under FSDP2, from the start or from a checkpoint of its own: losses, and the adapters."""
    if not ON_GPUS:
        transformers.trainer.Accelerator = OnCPU
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["GptOssDecoderLayer"]}
    trainer = trainer_of(adapted(by_peft=True), directory, 1, steps, not ON_GPUS, fsdp=True, fsdp_config=config)
    with bytes_shardable():
        trainer.train(resume_from_checkpoint=checkpoint)
    assert all(isinstance(p, DTensor) for p in trainer.model.parameters())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trained = {n: p.detach().full_tensor() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return {"losses": losses, "trained": trained}

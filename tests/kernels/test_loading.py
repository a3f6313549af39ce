"""A whole checkpoint into a packed model and back: the bytes, the memory it takes, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from gpt_oss_checkpoint import make_gpt_oss_checkpoint
from moe_models import assert_near, make, tiny_gpt_oss
from safetensors.torch import load_file, save_file
from transformers import GptOssForCausalLM, Mxfp4Config

from mxref.checkpoints.files import INDEX_NAME
from mxref.kernels.models.loading import load_packed_model, save_packed_model
from mxref.kernels.models.packing import pack_experts
from mxref.kernels.models.peft import get_peft_model

IDS = torch.arange(7)[None]


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def assert_same_tensors(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
def test_saved_again_byte_for_byte(tmp_path: Path, sharded: bool) -> None:
    source, first, second = (tmp_path / name for name in ("source", "first", "second"))
    tensors = make_gpt_oss_checkpoint(source, sharded=sharded)
    model = load_packed_model(source, rank=2)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name in model.state_dict() if "_lora_" in name
    }
    size = "60KB" if sharded else "5GB"
    save_packed_model(model, first, size)
    assert_same_tensors(stored(first), tensors)
    save_packed_model(load_packed_model(first, rank=0), second, size)
    files = sorted(path.name for path in first.iterdir())
    assert files == sorted(path.name for path in second.iterdir())
    assert (INDEX_NAME in files) == sharded
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    if not sharded:
        assert (first / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_computes_what_transformers_computes(tmp_path: Path) -> None:
    make_gpt_oss_checkpoint(tmp_path / "source", sharded=True)
    packed = load_packed_model(tmp_path / "source", rank=0, dtype=torch.float32)
    save_packed_model(packed, tmp_path / "again")
    for directory in ("source", "again"):
        dense = GptOssForCausalLM.from_pretrained(
            tmp_path / directory, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32
        )
        assert_near(packed(IDS).logits, dense.float()(IDS).logits)


def test_the_model_outlives_its_files(tmp_path: Path) -> None:
    """Nothing in the model is a window on the files: it may be saved over them."""
    tensors = make_gpt_oss_checkpoint(tmp_path)
    model = load_packed_model(tmp_path, rank=0)
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as stream:  # in place: the same file on disk, other bytes
        stream.write(bytes(file.stat().st_size))
    assert_same_tensors(model.state_dict(), tensors)
    save_packed_model(model, tmp_path)
    assert_same_tensors(stored(tmp_path), tensors)


def test_a_model_quantised_here_is_saved_as_a_checkpoint(tmp_path: Path) -> None:
    model = pack_experts(tiny_gpt_oss(), rank=2)
    save_packed_model(model, tmp_path)
    dense = GptOssForCausalLM.from_pretrained(
        tmp_path, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32
    )
    assert_near(model(IDS).logits, dense.float()(IDS).logits)
    assert model.config.to_dict().get("quantization_config") is None


MEASURE = """
import sys
from pathlib import Path

def memory(field):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

from mxref.kernels.models.loading import load_packed_model
load_packed_model(sys.argv[1], rank=0)  # imports what loading imports late
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
before = memory("VmRSS")
model = load_packed_model(sys.argv[2], rank=0)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_decoded_copy_and_no_second_copy_in_memory(tmp_path: Path) -> None:
    """Peak memory of a load: the stored bytes, one tensor in the file's window beside its copy, and small change.

    A decoded copy of one projection would take more than the slack, a second copy of the packed model more than twice.
    """
    small, large = tmp_path / "small", tmp_path / "large"
    make_gpt_oss_checkpoint(small)
    tensors = make_gpt_oss_checkpoint(large, sharded=True, layers=3, experts=8, hidden=1024, intermediate=1024)
    total, largest = (f(tensor.nbytes for tensor in tensors.values()) for f in (sum, max))
    slack = 12 << 20
    decoded = 2 * 8 * 1024 * 1024  # bf16, the smaller projection
    assert slack < decoded < total / 2
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(large)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    peak = int(done.stdout)
    assert total <= peak <= total + 2 * largest + slack, (peak, total, largest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks model\.norm\.weight, one of 1"),
        (lambda t: t.update({"model.extra": torch.ones(1)}), r"holds model\.extra, one of 1"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"model\.norm\.weight has shape \(3,\)"),
        (lambda t: t.pop("model.layers.0.mlp.experts.down_proj_scales"), "has no partner"),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_so(tmp_path: Path, change: Any, message: str) -> None:
    tensors = make_gpt_oss_checkpoint(tmp_path, layers=1)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_packed_model(tmp_path)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_packed_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_oss"}))
    save_file({"layers.0.ffn.experts.0.w1.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="DeepSeek-V4 names"):
        load_packed_model(tmp_path)
    with pytest.raises(ValueError, match="has no PackedExperts"):
        save_packed_model(make("qwen3_moe"), tmp_path)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=targets)
    adapted = get_peft_model(pack_experts(tiny_gpt_oss(), rank=0), config)
    with pytest.raises(ValueError, match="wrapped by PEFT"):
        save_packed_model(adapted, tmp_path)

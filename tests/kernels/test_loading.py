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
from safetensors.torch import save_file
from stored import assert_same_tensors, stored
from tiny_models import tiny_model
from torch._subclasses import FakeTensorMode
from transformers import GenerationConfig, GptOssForCausalLM, Mxfp4Config

from mxref.checkpoints.files import INDEX_NAME
from mxref.kernels.models.loading import load_packed_model, save_packed_model
from mxref.kernels.models.packing import pack_experts
from mxref.kernels.models.peft import get_peft_model

IDS = torch.arange(7)[None]


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


MEASURE = """
import sys
from pathlib import Path

def memory(field):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

from mxref.kernels.models.experts import PackedExperts
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
    with pytest.raises(FileNotFoundError, match="run: hf download somebody/nothing"):
        load_packed_model("somebody/nothing")
    with pytest.raises(ValueError, match="has no PackedExperts"):
        save_packed_model(make("qwen3_moe"), tmp_path)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=targets)
    adapted = get_peft_model(pack_experts(tiny_gpt_oss(), rank=0), config)
    with pytest.raises(ValueError, match="wrapped by PEFT"):
        save_packed_model(adapted, tmp_path)
    model = pack_experts(tiny_gpt_oss(), rank=0)
    with pytest.raises(ValueError, match="expected one of gpt-oss, DeepSeek-V4, compressed-tensors"):
        save_packed_model(model, tmp_path, convention="Quark")
    with pytest.raises(ValueError, match="has no names for separate experts"):
        save_packed_model(model, tmp_path, convention="compressed-tensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "[" * 20000, "nested too deeply"),
        ("config.json", "null", "holds a NoneType; expected a JSON object"),
        (
            "config.json",
            '{"model_type": "gpt_oss", "quantization_config": "mxfp4"}',
            "is 'mxfp4'; expected a JSON object",
        ),
        ("generation_config.json", "[" * 20000, "nested too deeply"),
        ("generation_config.json", "{", "is not JSON"),
    ],
)
def test_settings_that_cannot_be_read(tmp_path: Path, name: str, text: str, message: str) -> None:
    make_gpt_oss_checkpoint(tmp_path, layers=1)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_packed_model(tmp_path)


def test_a_model_of_the_hub_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter's configuration names it as its base, and no folder of this machine's cache."""
    cached = tmp_path / "models--somebody--tiny"
    make_gpt_oss_checkpoint(cached / "snapshots/0123abcd", layers=1)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("0123abcd")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = load_packed_model("somebody/tiny", rank=0)
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "adapter")).base_model_name_or_path == "somebody/tiny"
    (cached / "snapshots/0123abcd/tokenizer.json").write_text("{}")
    save_packed_model(load_packed_model("somebody/tiny", rank=0), tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").is_file()


def test_dtypes_by_name(tmp_path: Path) -> None:
    make_gpt_oss_checkpoint(tmp_path, layers=1)
    model = load_packed_model(tmp_path, rank=1, dtype="float32", lora_dtype="torch.bfloat16")
    assert model.lm_head.weight.dtype == torch.float32
    assert {p.dtype for name, p in model.named_parameters() if "_lora_" in name} == {torch.bfloat16}
    for name in ("float33", "uint8", 3):
        with pytest.raises(TypeError, match=f"dtype is .*{name}"):
            load_packed_model(tmp_path, dtype=name)  # type: ignore[arg-type]


def test_contexts_without_data(tmp_path: Path) -> None:
    """A default device is none of the checkpoint's; under FakeTensorMode there is nothing to read into."""
    make_gpt_oss_checkpoint(tmp_path, layers=1)
    expected = load_packed_model(tmp_path, rank=0)(IDS).logits
    with torch.device("meta"):
        model = load_packed_model(tmp_path, rank=1)
    assert torch.equal(model(IDS).logits, expected)
    with FakeTensorMode(), pytest.raises(RuntimeError, match="FakeTensorMode is active"):
        load_packed_model(tmp_path)
    assert torch.equal(load_packed_model(tmp_path, rank=0)(IDS).logits, expected)


def test_what_a_model_keeps_in_fp32(tmp_path: Path) -> None:
    model = pack_experts(tiny_model("glm4_moe"), rank=0)
    save_packed_model(model, tmp_path)
    loaded = load_packed_model(tmp_path, rank=0, dtype=torch.bfloat16).state_dict()
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(loaded[name], model.state_dict()[name])
    assert loaded["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16


def test_a_stored_head_is_kept_though_the_configuration_ties_it(tmp_path: Path) -> None:
    """As transformers keeps it; and saved again, and loaded again."""
    tensors = make_gpt_oss_checkpoint(tmp_path / "source", layers=1)
    config = json.loads((tmp_path / "source/config.json").read_text())
    (tmp_path / "source/config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    model = load_packed_model(tmp_path / "source", rank=0)
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    model.tie_weights()  # as resizing the embeddings does
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    save_packed_model(model, tmp_path / "again")
    assert_same_tensors(stored(tmp_path / "again"), tensors)
    assert_same_tensors(load_packed_model(tmp_path / "again", rank=0).state_dict(), tensors)


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    tensors = make_gpt_oss_checkpoint(tmp_path / "source", layers=1)
    config = json.loads((tmp_path / "source/config.json").read_text())
    (tmp_path / "source/config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "source/model.safetensors", metadata={"format": "pt"})
    model = load_packed_model(tmp_path / "source", rank=0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_packed_model(model, tmp_path / "again")
    assert_same_tensors(stored(tmp_path / "again"), tensors)


def test_files_beside_the_weights_come_along(tmp_path: Path) -> None:
    source, again = tmp_path / "source", tmp_path / "again"
    make_gpt_oss_checkpoint(source, layers=1)
    GenerationConfig(eos_token_id=[5, 9], pad_token_id=3, temperature=0.5, do_sample=True).save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        (source / name).write_text(name)
    (source / "notes.txt").write_text("stay")
    model = load_packed_model(source, rank=0)
    assert model.generation_config.eos_token_id == [5, 9]
    save_packed_model(model, again)
    kept = {path.name for path in source.iterdir()} - {"notes.txt"}
    assert {path.name for path in again.iterdir()} == kept
    assert (again / "tokenizer.json").read_text() == "tokenizer.json"
    assert load_packed_model(again, rank=0).generation_config.temperature == 0.5


def test_shards_of_an_earlier_checkpoint_go(tmp_path: Path) -> None:
    make_gpt_oss_checkpoint(tmp_path, layers=1)
    model = load_packed_model(tmp_path, rank=0)
    save_packed_model(model, tmp_path / "again", "20KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    save_packed_model(model, tmp_path / "again")
    assert sorted(p.name for p in (tmp_path / "again").iterdir() if "model" in p.name) == ["model.safetensors"]


class TestOwnAdapters:
    """What `save_pretrained`, and so Trainer, writes for a model whose packed experts own their adapters."""

    @pytest.fixture
    def trained(self, tmp_path: Path) -> Any:
        make_gpt_oss_checkpoint(tmp_path / "source", layers=1)
        model = load_packed_model(tmp_path / "source", rank=2, alpha=5)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter)
        return model

    def test_come_back(self, trained: Any, tmp_path: Path) -> None:
        trained.save_pretrained(tmp_path / "again")
        again = load_packed_model(tmp_path / "again", rank=2)
        assert torch.equal(again(IDS).logits, trained(IDS).logits)
        assert {name for name, p in again.named_parameters() if p.requires_grad} == {
            name for name, p in trained.named_parameters() if p.requires_grad
        }

    def test_of_another_rank_or_alpha_are_refused(self, trained: Any, tmp_path: Path) -> None:
        trained.save_pretrained(tmp_path / "again")
        for options, message in (({"rank": 3}, "adapter of rank 2; rank is 3"), ({"rank": 0}, "rank is 0"),
                                 ({"rank": 2, "alpha": 2.0}, "alpha 5.0; alpha is 2.0")):  # fmt: skip
            with pytest.raises(ValueError, match=message):
                load_packed_model(tmp_path / "again", **options)

    def test_are_left_out_of_a_checkpoint(self, trained: Any, tmp_path: Path) -> None:
        save_packed_model(trained, tmp_path / "again")
        assert_same_tensors(stored(tmp_path / "again"), stored(tmp_path / "source"))
        assert "mxref_adapters" not in json.loads((tmp_path / "again/config.json").read_text())

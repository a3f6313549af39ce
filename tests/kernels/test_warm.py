"""`mxref warm`: a training step that follows it compiles nothing. Kernels compile here for a GPU that is not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from gpt_oss_checkpoint import make_gpt_oss_checkpoint
from uninterpreted import run_python

COMMANDS = """
import contextlib, io, json, sys
from mxref.verification.cli import main

if sys.argv[2:]:
    sys.path.insert(0, sys.argv[2])
    import pretended_gpu

    pretended_gpu.without_code()

told = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(["warm", "--architecture", "sm_90", *arguments])
    told.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(told))
"""

TRAIN = """
import json, sys
import torch, triton

support, folder = sys.argv[1:]
sys.path.insert(0, support)
import pretended_gpu as gpu
from mxref.kernels.device.configs import layout_for
from mxref.kernels.models import experts, stacks
from mxref.kernels.models.loading import load_packed_model
from mxref.kernels.models.peft import get_peft_model
import peft

gpu.pretend()
stacks.preferred_layout = lambda stored, dtype, N: layout_for("sm_90", dtype, N)
torch.manual_seed(0)
new = []
triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: cache_hit or new.append(src.fn.__name__)
targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def of_peft(rank):
    model = load_packed_model(folder, rank=0)
    return get_peft_model(model, peft.LoraConfig(r=rank, target_modules=[], target_parameters=targets))


def step(model, sequences, tokens):
    before = len(new)
    model.train()
    ids = torch.randint(0, 64, (sequences, tokens))
    started = gpu.started(lambda: model(input_ids=ids, labels=ids).loss.backward())
    return {"started": started, "compiled": new[before:]}


own, theirs = load_packed_model(folder, rank=16), of_peft(16)
own.gradient_checkpointing_enable()
own.enable_input_require_grads()
batches = [(1, 7), (5, 41)]
steps = [step(model, *batch) for model in (own, theirs) for batch in batches]
divided = load_packed_model(folder, rank=16)
for module in divided.modules():
    if isinstance(module, experts.PackedExperts):
        module.arrange(None)
theirs.enable_input_require_grads()  # before, nothing in front of the first layer's experts trained
steps.append(step(theirs, *batches[-1]))
print(json.dumps({"warmed": steps, "divided": step(divided, 4, 32), "another rank": step(of_peft(8), 4, 32)}))
"""

KEYS = """
import json
from mxref.kernels.models.warming import Experts, step_units
from mxref.swiglu import GPT_OSS
import torch

kinds = [Experts(E=4, k=2, H=64, I=96, rank=16, biased=True, form=GPT_OSS), Experts(E=3, k=1, H=2880, I=32, rank=5),
         Experts(E=64, k=16, H=64, I=64, rank=16, sharded=True),
         Experts(E=4, k=3, H=96, I=64, rank=8, dtype=torch.float32)]
missing = []
for kind in kinds:
    for architecture in ("sm_90", "sm_89", "sm_100"):
        warmed = {(unit.kernel, unit.key) for unit in step_units([kind], architecture)}
        for tokens in (2, 3, 5, 8, 16, 31, 100, 128, 1000, 4096, 4097, 50000, 65552):
            for unit in step_units([kind], architecture, [tokens]):
                if (unit.kernel, unit.key) not in warmed:
                    missing.append([str(kind), architecture, tokens, unit.kernel])
spread = [launch.arguments for launch in kinds[0].launches(8, "sm_90") if "dgates" in launch.arguments]
print(json.dumps({"missing": missing, "gates": [str(x["dgates"] is not None and x["dgates"].dtype) for x in spread]}))
"""


@pytest.fixture(scope="module")
def warmed(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    """What the command said, and what the steps after it compiled, in a cache that was empty."""
    root = tmp_path_factory.mktemp("warm")
    folder = root / "checkpoint"
    make_gpt_oss_checkpoint(folder, hidden=64, intermediate=96)
    command = [str(folder), "--jobs", "2", "--tokens", "1x7", "--tokens", "5x41"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(root / "cache"))
        support = str(request.config.rootpath / "tests" / "support")
        told = _warm(command, [str(folder), "--jobs", "2", "--sharded", "--tokens", "4x32"], command, without=support)
        trained = run_python("-c", TRAIN, support, str(folder))
    assert [code for code, *_ in told] == [0, 0, 0], told
    assert trained.returncode == 0, trained.stderr[-3000:]
    return {"said": told[0][1], "again": told[2][1], "cache": root / "cache", **json.loads(trained.stdout)}


def _warm(*commands: list[str], without: str = "") -> Any:
    """Each command's exit code, output and errors, one after the other in a process that is free to compile.

    `without`: where `pretended_gpu` is, to compile without code.
    """
    done = run_python("-c", COMMANDS, json.dumps(commands), *([without] if without else []))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_a_step_compiles_nothing(warmed: Any) -> None:
    """In two classes of shapes, by the model's own adapters and by PEFT's, and with a checkpoint's layout."""
    products = [(step, "fragments_matmul_kernel") for step in warmed["warmed"]]
    for step, product in (*products, (warmed["divided"], "packed_matmul_kernel")):
        assert step["started"].count(product) >= 7, "both layers, forward and backward"
        assert step["compiled"] == []


def test_a_step_with_other_adapters_compiles_what_differs(warmed: Any) -> None:
    assert "grouped_matmul_kernel" in warmed["another rank"]["compiled"]


def test_what_the_command_says(warmed: Any) -> None:
    kernels, told = int(warmed["said"].split(" kernels for sm_90")[0].split()[-1]), " ".join(warmed["said"].split())
    assert "4 experts, 2 a token, 64 → 192, 96 → 64, bfloat16, biases, adapters of rank 16 in float32" in told
    assert f"{kernels} kernels for sm_90: {kernels} compiled, 0 were there" in told
    assert f"cache: {warmed['cache']}" in told
    assert f"{kernels} kernels for sm_90: 0 compiled, {kernels} were there" in warmed["again"]


def test_steps_of_any_number_of_tokens_need_nothing_else() -> None:
    done = run_python("-c", KEYS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["missing"] == []
    assert json.loads(done.stdout)["gates"] == ["torch.bfloat16", "torch.float32", "False"]


def test_wrong_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "dense").mkdir()
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"), 8)
    config = {"model_type": "llama", "num_hidden_layers": 1, "vocab_size": 8, "num_experts_per_tok": 1, **sizes}
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    wrong = {
        "no checkpoint at nowhere": ["nowhere"],
        "no config.json in empty": ["empty"],
        "no GPU of compute capability 8.0 or later": ["tiny", "--architecture", "sm_75"],
        "no experts module": ["dense"],
        "rank is 129; the kernels take ranks 1 to 128": ["gpt-oss-20b", "--rank", "129"],
        "compiler knows no such GPU": ["gpt-oss-20b", "--tokens", "1x4", "--jobs", "1", "--architecture", "sm_199"],
        "no batch": ["tiny", "--tokens", "512"],
    }
    for reason, (code, _, errors) in zip(wrong, _warm(*wrong.values()), strict=True):
        assert code == 2
        last = errors.splitlines()[-1]
        assert last.startswith("mxref: error: ")
        assert reason in last


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    command = ("-m", "mxref.verification.cli", "warm", "gpt-oss-20b")
    done = run_python(*command, "--architecture", "sm_90", "--tokens", "1x4")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"mxref: error: TRITON_CACHE_DIR {tmp_path / 'file'}: ")

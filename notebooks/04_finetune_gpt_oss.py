# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fine-tuning a gpt-oss model on packed weights
#
# A small gpt-oss model is made by transformers, quantised by `encode_mxfp4`, saved as a checkpoint, loaded again, and
# fine-tuned with PEFT: LoRA on every expert, the experts' weights packed in MXFP4 all the while. Beside it runs what
# transformers offers for such a checkpoint: the same model dequantised to bf16, PEFT on top, the experts implementation
# that transformers chooses. Both see the same batches in the same order and start from the same adapters. Every claim
# in the text is asserted in a cell.
#
# With a CUDA GPU this takes 200 steps in bf16; without one it takes a few tiny steps in Triton's interpreter. As a
# script, `--record [DIR]` keeps what was found on a GPU as evidence, with the curves beside it.

# %%
import argparse
import os

import torch

on_gpu = torch.cuda.is_available()
if not on_gpu:
    os.environ["TRITON_INTERPRET"] = "1"

import contextlib
import gc
import io
import itertools
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median

import matplotlib.pyplot as plt
import peft
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM, Mxfp4Config

from mxref import encode_mxfp4
from mxref.kernels.models.experts import PackedExperts
from mxref.kernels.models.loading import load_packed_model
from mxref.kernels.models.peft import get_peft_model
from mxref.kernels.models.stacks import PROJECTIONS, checkpoint_layout
from mxref.verification.clone import EVIDENCE
from mxref.verification.records.record import write

parser = argparse.ArgumentParser()
parser.add_argument("--record", metavar="DIR", nargs="?", type=Path, const=EVIDENCE)
record = parser.parse_known_args()[0].record  # a notebook's kernel has arguments of its own
if record is not None and not on_gpu:
    parser.error("--record keeps what a GPU saw; torch sees no CUDA GPU on this machine")

device = torch.device("cuda" if on_gpu else "cpu")
dtype = torch.bfloat16 if on_gpu else torch.float32  # interpreted kernels compute in fp32
HIDDEN, INTERMEDIATE, LAYERS, EXPERTS, TOP_K, HEADS = (1024, 1024, 4, 16, 4, 16) if on_gpu else (64, 32, 1, 4, 2, 2)
STEPS, BATCH, LENGTH, WINDOW = (200, 4, 512, 20) if on_gpu else (8, 2, 24, 1)
RANK, ALPHA, LEARNING_RATE = 8, 16, 1e-3 if on_gpu else 3e-2
SEEDS = (0, 1, 2)  # of the initial adapters

# %% [markdown]
# ## Real text
#
# What ships with Python: the Zen of Python and pydoc's topics, one token a character.

# %%
with contextlib.redirect_stdout(io.StringIO()) as zen:
    import this  # noqa: F401

text = zen.getvalue() + "".join(topics[name] for name in sorted(topics))
alphabet = "\n" + "".join(map(chr, range(32, 127)))
tokens = torch.tensor([alphabet.index(c) for c in text if c in alphabet])
assert tokens.numel() > 100_000


def batch(step: int) -> Tensor:
    """[BATCH, LENGTH] windows of the text, the same for a step in every run."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(tokens.numel() - LENGTH, (BATCH,), generator=generator)
    return torch.stack([tokens[start : start + LENGTH] for start in starts]).to(device)


# %% [markdown]
# ## A real checkpoint
#
# The model's experts go through our encoder; the file has the names and layouts of the published gpt-oss checkpoints,
# so transformers reads it on its own.

# %%
torch.manual_seed(0)
config = GptOssConfig(
    vocab_size=len(alphabet),
    hidden_size=HIDDEN,
    intermediate_size=INTERMEDIATE,
    num_hidden_layers=LAYERS,
    num_local_experts=EXPERTS,
    num_experts_per_tok=TOP_K,
    num_attention_heads=HEADS,
    num_key_value_heads=HEADS // 2,
    head_dim=32,
    initializer_range=HIDDEN**-0.5,
)
with device:
    fresh = GptOssForCausalLM(config).to(torch.bfloat16)
tensors = {}
for name, tensor in fresh.state_dict().items():
    if name.endswith(PROJECTIONS):  # [E, K, N] in the model, [E, N, K] in blocks
        pair = encode_mxfp4(tensor.mT.contiguous()).to_gpt_oss()
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = (part.cpu() for part in pair)
    else:
        tensors[name] = tensor.cpu().contiguous()
del fresh
directory = Path(tempfile.mkdtemp())
config.architectures = ["GptOssForCausalLM"]
config.dtype = torch.bfloat16
config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "model.embed_tokens"]}
config.save_pretrained(directory)
save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

# %% [markdown]
# ## Two ways to train it
#
# The adapters' names and layouts are PEFT's in both. A run starts from adapters that its seed draws (A uniform, as PEFT
# draws it, and B zero), and keeps what it saw.

# %%
adapters_of_experts = peft.LoraConfig(
    r=RANK,
    lora_alpha=ALPHA,
    target_modules=[],
    target_parameters=[f"mlp.experts.{projection}" for projection in PROJECTIONS],
)


def packed() -> nn.Module:
    """The checkpoint's bytes, packed."""
    model = load_packed_model(directory, rank=0, device=device, dtype=dtype)
    return get_peft_model(model, adapters_of_experts)


def dequantised() -> nn.Module:
    """The checkpoint as transformers reads it for training."""
    dequantise = Mxfp4Config(dequantize=True)
    model = GptOssForCausalLM.from_pretrained(directory, quantization_config=dequantise, dtype=torch.bfloat16)
    return peft.get_peft_model(model.to(device, dtype), adapters_of_experts)


def memory() -> int:
    """Bytes of the GPU at their highest since the last call; 0 on a CPU."""
    if not on_gpu:
        return 0
    torch.cuda.synchronize()
    highest = torch.cuda.max_memory_allocated()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return highest


@dataclass
class Run:
    """Loss and seconds of every step, Σ|gradient| and final value of every trained tensor, bytes at their highest."""

    losses: list[float]
    seconds: list[float]
    received: dict[str, Tensor]
    adapters: dict[str, Tensor]
    peak: int


def train(model: nn.Module, seed: int) -> Run:
    """STEPS steps of AdamW from the seed's adapters."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    torch.manual_seed(seed)
    for name, parameter in sorted(trained.items()):
        start = torch.zeros(parameter.shape)
        if "lora_A" in name:
            nn.init.kaiming_uniform_(start, a=5**0.5)
        parameter.data.copy_(start)
    received = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
    optimiser = torch.optim.AdamW(trained.values(), lr=LEARNING_RATE, weight_decay=0)
    model.train()
    losses, seconds = [], []
    memory()
    for step in range(STEPS):
        ids = batch(step)
        start_time = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())  # waits for the GPU
        seconds.append(time.perf_counter() - start_time)
        for name, parameter in trained.items():
            received[name] += parameter.grad.abs()
    final = {name: parameter.detach().to("cpu", copy=True) for name, parameter in trained.items()}
    return Run(losses, seconds, received, final, memory())


# %%
ours = packed()


def stored_bytes(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of the packed parameters, as a checkpoint has them."""
    with checkpoint_layout(model):
        return {name: p.to("cpu", copy=True) for name, p in model.named_parameters() if p.dtype == torch.uint8}


before = stored_bytes(ours)
run = train(ours, SEEDS[0])
after = stored_bytes(ours)
bytes_packed = sum(
    m.packed_weights(p).nbytes for m in ours.modules() if isinstance(m, PackedExperts) for p in PROJECTIONS
)
del ours

theirs = dequantised()
implementation = theirs.base_model.model.config._experts_implementation
bytes_dense = sum(2 * tensor.numel() for name, tensor in theirs.named_parameters() if name.endswith(PROJECTIONS))
references = [train(theirs, seed) for seed in SEEDS]
reference = references[0]
del theirs

print(f"experts: {bytes_packed:,} bytes packed, {bytes_dense:,} in bf16")
assert bytes_packed * 32 / 17 * 2 == bytes_dense

# %% [markdown]
# ## What must hold
#
# The loss falls.


# %%
def curve(losses: list[float]) -> Tensor:
    """Means over windows of WINDOW steps."""
    return torch.tensor(losses).unfold(0, WINDOW, WINDOW).mean(-1)


mine, others = curve(run.losses), [curve(other.losses) for other in references]
print(f"loss {mine[0]:.3f} -> {mine[-1]:.3f}, reference {others[0][0]:.3f} -> {others[0][-1]:.3f}")
assert mine[-1] < 0.9 * mine[0]

# %% [markdown]
# The curve is the reference's, within what the reference itself leaves to chance. The band is the distance between two
# of its runs that differ in the seed of their adapters and in nothing else: the root mean square over windows and pairs
# of seeds. With the reference's own seed, the packed run must lie within it: to put our kernels in its place moves the
# loss less than to draw other adapters does. (The two round differently: the reference adds s·B·A to W and rounds the
# sum to bf16, the kernels keep W exact and the adapter apart.) In fp32 they differ by the order of sums only: there it
# lies within a thousandth of the band.


# %%
def rms(differences: list[Tensor]) -> float:
    return float(torch.cat(differences).square().mean().sqrt())


band = rms([a - b for a, b in itertools.combinations(others, 2)])
distance = rms([mine - others[0]])
if dtype == torch.float32:
    band /= 1000
worst = float((mine - others[0]).abs().max())
print(f"distance of the curves {distance:.2g}, band {band:.2g}; at the worst window {worst:.2g}")
assert distance <= band

# %% [markdown]
# So are the final adapters: their products s·B·A lie nearer to the reference's than any two of its seeds lie together.


# %%
def products(adapters: dict[str, Tensor]) -> Tensor:
    """s·B·A of every expert and projection, in one vector."""
    found = []
    for name in sorted(name for name in adapters if "lora_A" in name):
        A = adapters[name].to(device).unflatten(0, (EXPERTS, RANK))
        B = adapters[name.replace("lora_A", "lora_B")].to(device).unflatten(1, (RANK, EXPERTS))
        found.append((ALPHA / RANK * torch.einsum("erk,nre->enk", A, B)).flatten())
    return torch.cat(found)


def apart(one: Run, other: Run) -> float:
    """Relative distance of two runs' products."""
    a, b = products(one.adapters), products(other.adapters)
    return float((a - b).norm() / b.norm())


assert run.adapters.keys() == reference.adapters.keys()
adapter_band = min(apart(a, b) for a, b in itertools.combinations(references, 2))
adapter_distance = apart(run, reference)
print(f"distance of the adapters {adapter_distance:.2g}, band {adapter_band:.2g}")
assert adapter_distance <= adapter_band

# %% [markdown]
# Every expert's share of every adapter received a gradient.

# %%
shares = {
    name: total.unflatten(0, (EXPERTS, RANK)).flatten(1).sum(1)
    if "lora_A" in name
    else total.unflatten(1, (RANK, EXPERTS)).sum((0, 1))
    for name, total in run.received.items()
}
assert len(shares) == 4 * LAYERS
reached = sum(int((share > 0).sum()) for share in shares.values())
print(f"{reached} of {len(shares) * EXPERTS} LoRA matrices of experts received gradients")
assert reached == len(shares) * EXPERTS

# %% [markdown]
# The packed weights are the checkpoint's bytes, still.

# %%
assert all(torch.equal(after[name], buffer) for name, buffer in before.items())
stored = [name for name in tensors if name.endswith(("_blocks", "_scales"))]
bare = {name.removeprefix("base_model.model.").replace(".base_layer", ""): buffer for name, buffer in after.items()}
assert len(stored) == 4 * LAYERS
assert all(torch.equal(bare[name], tensors[name]) for name in stored)

# %% [markdown]
# ## What it costs
#
# Median seconds of a step after a tenth of the run, and memory at its highest, model and optimiser included. (On a CPU
# the kernels are interpreted, and neither says anything.)


# %%
def step_ms(seen: Run) -> float:
    return 1000 * median(seen.seconds[STEPS // 10 :])


for label, seen in (("packed, mxref.kernels", run), (f"dequantised, {implementation}", reference)):
    print(f"{label}: {step_ms(seen):.1f} ms a step, {seen.peak / 2**20:,.0f} MiB at the highest")

figure, axes = plt.subplots(figsize=(7, 3.2), constrained_layout=True)
for seed, other in zip(SEEDS[1:], references[1:], strict=True):
    axes.plot(other.losses, color="lightgray", lw=1, label=f"dequantised, seed {seed}")
axes.plot(reference.losses, color="tab:orange", lw=3, alpha=0.5, label=f"dequantised, {dtype}, transformers + PEFT")
axes.plot(run.losses, color="tab:blue", lw=1, label="packed MXFP4, mxref.kernels")
axes.set(xlabel="step", ylabel="loss", title="LoRA on the experts of a small gpt-oss model")
axes.legend(frameon=False)
plt.show()

# %%
if record is not None:
    found = {
        "passed": True,
        "model": {"hidden": HIDDEN, "intermediate": INTERMEDIATE, "layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K},
        "training": {"steps": STEPS, "batch": BATCH, "length": LENGTH, "rank": RANK, "learning_rate": LEARNING_RATE},
        "libraries": {name: metadata.version(name) for name in ("transformers", "peft")},
        "experts_implementation": implementation,
        "losses": {
            "packed": run.losses,
            **{f"dequantised {s}": r.losses for s, r in zip(SEEDS, references, strict=True)},
        },
        "loss_distance": {"window": WINDOW, "distance": distance, "band": band},
        "adapter_distance": {"distance": adapter_distance, "band": adapter_band},
        "expert_matrices": {"all": len(shares) * EXPERTS, "received_gradients": reached},
        "packed_bytes_unchanged": True,
        "step_ms": {"packed": step_ms(run), "dequantised": step_ms(reference)},
        "peak_bytes": {"packed": run.peak, "dequantised": reference.peak},
        "expert_bytes": {"packed": bytes_packed, "dequantised": bytes_dense},
    }
    path = write("finetune", found, torch.device("cuda"), record)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    print(f"recorded in {path}")

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
# # Which layer sees which bug
#
# The gate judges an implementation by several guards. Why so many? Here five bugs are planted into an honest
# implementation, the plain PyTorch composite, and each guard is asked on its own. No guard sees all of them; every bug
# is seen by at least one, and the classic criteria, the spread of the ratio and `allclose`, miss four of five.
# Every claim in the text is asserted in a cell.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch

from mxref.verification.arithmetic.accumulation import ACCUMULATIONS
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.starting_point import layer as composite
from mxref.verification.cases.case import Case
from mxref.verification.cases.scope import Scope
from mxref.verification.checks.finding import DriftMap, ErrorSample, Status
from mxref.verification.checks.registry import DECODE, INTEGER, VALUES
from mxref.verification.gate.plan import plan, plan_cases
from mxref.verification.gate.run import judge

plt.rcParams |= {"figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False}

# %% [markdown]
# ## Five bugs
#
# Each is a wrapper with the signature of `parallel_linear_lora`; gradients follow by autograd.


# %%
def scale_byte(*, expert_weights, **operands):
    """Scale bytes 1 to 3 are read one too high: a subnormal range that ordinary weights never use."""
    s = expert_weights.scales
    return composite(
        expert_weights=replace(expert_weights, scales=torch.where((s >= 1) & (s <= 3), s + 1, s)), **operands
    )


def tail_row(**operands):
    """The last row is never written: a mask that stops one short."""
    y = composite(**operands)
    keep = torch.ones_like(y)
    keep[-1:] = 0
    return y * keep


def lora_factor(*, scaling=1.0, **operands):
    """LoRA's term comes out 2e-4 too large, everywhere."""
    return composite(scaling=scaling * (1 + 2e-4), **operands)


def one_tile(*, lora_B=None, **operands):
    """LoRA's term of one expert comes out 1.5e-5 too large in its third tile of 64 columns; two tiles are fine."""
    if lora_B is not None:
        rank = lora_B.shape[1] // operands["expert_weights"].E
        factor = torch.ones_like(lora_B)
        factor[128:192, rank : 2 * rank] = 1 + 1.5e-5
        lora_B = lora_B * factor
    return composite(lora_B=lora_B, **operands)


def bf16_accumulator(*, inputs, expert_weights, lora_A, expert_biases=None, **operands):
    """The accumulator is stored as bf16 between blocks of 32 k."""
    y = 0
    for block in range(expert_weights.K // 32):
        part = slice(32 * block, 32 * block + 32)
        y += composite(
            inputs=inputs[:, part],
            expert_weights=replace(
                expert_weights,
                packed=expert_weights.packed[..., 16 * block : 16 * block + 16].contiguous(),
                scales=expert_weights.scales[..., block : block + 1].contiguous(),
                K=32,
            ),
            lora_A=None if lora_A is None else lora_A[:, part],
            expert_biases=expert_biases if block == 0 else None,
            **operands,
        )
        y = y.bfloat16().to(inputs.dtype)
    return y


BUGS = {
    "honest": composite,
    "scale byte": scale_byte,
    "tail row": tail_row,
    "LoRA × 1.0002": lora_factor,
    "LoRA tile × 1.000015": one_tile,
    "bf16 accumulator": bf16_accumulator,
}

# %% [markdown]
# ## Ask every guard
#
# One case of ordinary numbers, one integer fixture, and the exhaustive decode. Activations are fp32 here, so what is
# judged is the accumulation: sums in blocks of 64, each in any order. The bound of every element follows from that
# declaration, and nothing else.

# %%
how = ACCUMULATIONS["fp32-blocks-64"]
ordinary = Case("ordinary", experts=4, K=128, N=192, tokens=128, top_k=2, rank=8, data="balanced")
integers = Case("integer", experts=4, K=64, N=96, tokens=20, top_k=2, rank=4, data="integer", scaling=0.5)

GUARDS = tuple(check.name for check in (DECODE, INTEGER, *VALUES))
CLASSIC = ("ratio std < 0.5", "allclose, rtol = atol = 0.01")
items = plan(Scope("quick", "cpu"), own=False, checks=[DECODE])
items += plan_cases([integers, ordinary], torch.device("cpu"), seed=0, values=VALUES)
findings, errors, maps = {}, {}, {}
for name, call in BUGS.items():
    candidate = Candidate(name, call, accumulation=how)
    findings[name] = [finding for item in items for finding in judge(item, candidate, how)]
    pictures = [finding.picture for finding in findings[name] if finding.case == "ordinary"]
    errors[name] = {picture.tensor: picture for picture in pictures if isinstance(picture, ErrorSample)}
    maps[name] = {picture.tensor: picture for picture in pictures if isinstance(picture, DriftMap)}


def seen_by(name: str) -> set[str]:
    """The guards, and the classic criteria, that call this implementation wrong on any tensor."""
    guards = {finding.check for finding in findings[name] if finding.status is Status.FAIL}
    words = [f.details.get(f"not judged: {old}") for f in findings[name] for old in CLASSIC]
    return guards | {CLASSIC[i % len(CLASSIC)] for i, word in enumerate(words) if word == "fail"}


seen = {name: seen_by(name) for name in BUGS}
layers = (*GUARDS, *CLASSIC)
print(" " * 24 + "".join(f"{layer.split(',')[0]:>17}" for layer in layers))
for name in BUGS:
    print(f"{name:24}" + "".join(f"{'sees it' if layer in seen[name] else '·':>17}" for layer in layers))

# %% [markdown]
# * **decode** alone sees the scale byte: it is the only guard that visits all 256 of them.
# * **drift** sees the tile in ordinary numbers: no element leaves its bound, but 64 columns follow LoRA's term. The
#   integer fixture has two tiles. Decode sees it in dB, which is exact beside an adapter whose B is zero.
# * **integer** fixtures see the LoRA factor although it is tiny: where nothing rounds, nothing may differ. They are
#   blind to the bf16 accumulator, whose partial sums of small integers are exact too.
# * **interval** sees the bf16 accumulator in most elements.
# * **sign** and **exponent** see coarse damage only, and name it.

# %%
assert seen == {
    "honest": set(),
    "scale byte": {"decode"},
    "tail row": {*GUARDS, *CLASSIC},
    "LoRA × 1.0002": {"decode", "integer", "interval", "drift", "exponent"},
    "LoRA tile × 1.000015": {"decode", "drift"},
    "bf16 accumulator": {"interval", "drift", "sign", "exponent"},
}

# %% [markdown]
# ## Element by element: error against bound
#
# Each dot is one element of Y. Dots above the line are outside. The tile is a second cloud, a hundred times above
# honest results and yet inside: the bound must hold for any order of summation, and most orders are luckier than the
# worst.

# %%
shown = ("honest", "LoRA tile × 1.000015", "LoRA × 1.0002", "bf16 accumulator")
figure, panels = plt.subplots(1, 4, figsize=(13, 3.2), sharex=True, sharey=True)
for panel, name in zip(panels, shown, strict=True):
    y = errors[name]["Y"]
    x, error = y.bound / y.magnitude, np.maximum(np.abs(y.error) / y.magnitude, 1e-10)
    outside = np.abs(y.error) > y.bound
    panel.scatter(x, error, s=1, color=np.where(outside, "tab:red", "tab:blue"), rasterized=True)
    panel.plot([1e-6, 1e-1], [1e-6, 1e-1], color="tab:red", linewidth=1)
    panel.set(
        xscale="log",
        yscale="log",
        xlim=(1e-6, 1e-1),
        title=f"{name}\n{outside.mean():.2%} outside",
        xlabel="bound / |Y|",
    )
panels[0].set_ylabel("|error| / |Y|")
plt.show()

share = {name: np.abs(errors[name]["Y"].error) / errors[name]["Y"].bound for name in shown}
assert share["honest"].max() <= 1
assert share["LoRA tile × 1.000015"].max() <= 1
assert (share["bf16 accumulator"] > 1).mean() > 0.5

# %% [markdown]
# The same as distributions of the share of the bound that is used:

# %%
figure, axes = plt.subplots(figsize=(7, 3.2))
for name, values in share.items():
    axes.step(np.sort(np.maximum(values, 1e-4)), np.linspace(0, 1, values.size), label=name)
axes.axvline(1, color="tab:red", linewidth=1)
axes.set(
    xscale="log",
    xlim=(1e-4, 1e4),
    xlabel="|error| / bound",
    ylabel="share of elements",
    title="Y: how much of its bound an element uses",
)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## All together: drift
#
# The residual of every stratum, one expert's block of 64 columns, is fitted to the terms of the sum. z is the slope in
# units of its standard error; the colour scale ends at twice the limit beyond which honest arithmetic practically never
# gets. A single stratum stands out for the tile, all of them for the LoRA factor.

# %%
figure, panels = plt.subplots(1, 3, figsize=(13, 3.2))
for panel, name in zip(panels, ("honest", "LoRA tile × 1.000015", "LoRA × 1.0002"), strict=True):
    drift = maps[name]["Y"]
    limit = drift.critical
    image = panel.imshow(drift.z, cmap="RdBu_r", vmin=-2 * limit, vmax=2 * limit, aspect="auto")
    for (row, column), z in np.ndenumerate(drift.z):
        ink = "white" if abs(z) > 1.3 * limit else "black"
        panel.text(column, row, f"{round(z, 1) + 0.0:.1f}", ha="center", va="center", fontsize=8, color=ink)
    panel.set_xticks(
        range(len(drift.columns)), [*(label.removeprefix("columns ") for label in drift.columns[:-1]), "all"]
    )
    panel.set_yticks(range(len(drift.rows)), drift.rows)
    panel.set_title(f"{name}: limit {limit:.1f}")
bar = figure.colorbar(image, ax=panels, ticks=[-2 * limit, -limit, 0, limit, 2 * limit], format="%.1f", label="z")
bar.ax.axhline(limit, color="black")
bar.ax.axhline(-limit, color="black")
plt.show()

beyond = np.abs(maps["LoRA tile × 1.000015"]["Y"].z) > limit
assert beyond[1, 2]  # expert 1, third tile
assert not beyond[:, :2].any()  # no other tile
assert (np.abs(maps["LoRA × 1.0002"]["Y"].z) > limit).all()
assert not (np.abs(maps["honest"]["Y"].z) > limit).any()

# %% [markdown]
# The finding says in words what was planted:

# %%
for name in ("tail row", "LoRA × 1.0002", "LoRA tile × 1.000015", "bf16 accumulator"):
    worst = next(f for f in findings[name] if f.check == "drift" and f.tensor == "Y")
    print(f"{name:22} {worst.reason}")

said = {name: next(f for f in findings[name] if f.check == "drift" and f.tensor == "Y").reason for name in BUGS}
assert "LoRA's term is scaled by 1.0002" in said["LoRA × 1.0002"]
assert "LoRA's term is scaled by 1.00001" in said["LoRA tile × 1.000015"]
assert "expert 1, columns 128–191" in said["LoRA tile × 1.000015"]

# %% [markdown]
# ## Why not just look at the signed error?
#
# Because a factor on a term of random sign leaves the histogram symmetric. Only against the term itself does it lean.

# %%
figure, axes = plt.subplots(figsize=(7, 2.8))
for name in ("honest", "LoRA × 1.0002"):
    y = errors[name]["Y"]
    axes.hist(y.error / y.bound, bins=121, range=(-6, 6), histtype="step", density=True, label=name)
axes.set(xlabel="signed error / bound", yscale="log", title="Y: symmetric either way")
axes.legend(frameon=False)
plt.show()

lean = np.sign(errors["LoRA × 1.0002"]["Y"].error).mean()
assert abs(lean) < 4 / np.sqrt(errors["LoRA × 1.0002"]["Y"].error.size)

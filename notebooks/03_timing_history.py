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
# # Speed: against the limit, A against B, and over commits
#
# `mxref bench --record` leaves one record a GPU, and a copy of it in a history. This notebook draws them; it measures
# nothing. Every ratio is a time over a time of the same run, so machines and clocks drop out. Where no GPU has been
# recorded yet there is nothing to draw.

# %%
import matplotlib.pyplot as plt
import numpy as np

from mxref.verification.bench import plots
from mxref.verification.bench.history import FLOOR, judge
from mxref.verification.bench.timing import Ceilings
from mxref.verification.cli.own.history import load_history
from mxref.verification.clone import EVIDENCE
from mxref.verification.records.record import read

plt.rcParams |= {"figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False}
records = {path.parent.name: read(path) for path in sorted(EVIDENCE.glob("*/bench.json"))}
history = load_history()

for gpu, record in records.items():
    print(f"{gpu}: {record['started']}, {len(record['rows'])} rows, kernels {record['digest'][:12]}")
if not records:
    print("no GPU has been recorded yet: run `mxref bench --record` on one")

# %% [markdown]
# ## The limit
#
# A product cannot be faster than its arithmetic at the machine's matmul rate, nor than its bytes at the machine's copy
# rate. With MXFP4 weights the second rules up to some fifty rows per expert. Below, the two times of one expert of
# 2048 × 1024 weights at 700 TFLOP/s and 4 TB/s, over its rows; bf16 weights raise the floor by 2 / (17/32) ≈ 3.8.

# %%
ceilings = Ceilings(matmul=700e12, copy=4e12)
rows = np.geomspace(1, 4096, 200)
K, N = 2048, 1024
flops = 2 * rows * K * N


def floor(bytes_per_weight: float) -> np.ndarray:
    return np.array(
        [ceilings.seconds(f, K * N * bytes_per_weight + r * 2 * N) for f, r in zip(flops, rows, strict=True)]
    )


packed, dense = floor(17 / 32), floor(2.0)
figure, axes = plt.subplots(figsize=(6.5, 3.4))
axes.loglog(rows, packed * 1e6, label="MXFP4 weights")
axes.loglog(rows, dense * 1e6, label="bf16 weights")
axes.set(xlabel="rows of the expert", ylabel="least time, µs")
axes.legend(frameon=False)
plt.show()

assert 3.7 < dense[0] / packed[0] < 3.8  # thin: what packing can win
assert dense[-1] == packed[-1]  # thick: arithmetic rules, and packing can win nothing
assert 40 < rows[np.argmax(flops / ceilings.matmul >= packed)] < 60  # where the limit changes its nature

# %% [markdown]
# ## Achieved against the limit
#
# Limit over time for the base products, by rows per active expert. 1 is the roof.

# %%
for gpu, record in records.items():
    figure, panels = plt.subplots(1, 2, figsize=(13, 4))
    for axes, measure in zip(panels, ("base", "base forward"), strict=True):
        plots.roofline(axes, record, measure)
    figure.suptitle(gpu)
    plt.show()
    bare = [row for row in record["rows"] if row["measure"] in ("base", "base forward") and row["status"] == "ok"]
    # Reading alone may run a little above the copy's rate; beyond that, what beats the limit was measured wrongly.
    assert all(row["limit_ratio"] > 0.9 for row in bare)

# %% [markdown]
# ## Decode once, or decode inside
#
# Strategy A writes the active experts in bf16 once and reads them back for each product; B decodes each weight tile
# again in each tile of rows. So B wins where rows are few, and by less the more there are. Above the line B is faster:
# on Hopper, with tiles of 256 rows, at every size measured, which is why dispatch there knows no Strategy A.

# %%
for gpu, record in records.items():
    figure, panels = plt.subplots(1, 2, figsize=(13, 4))
    for axes, measure in zip(panels, ("step", "base"), strict=True):
        plots.crossover(axes, record, measure)
    figure.suptitle(gpu)
    plt.show()

# %% [markdown]
# ## Over commits
#
# Time over the composite's for the path that callers get, run after run; bars span a run's rounds. A run fails where it
# is slower than the best earlier one beyond both runs' noise, and at least 5 %.

# %%
assert FLOOR == 0.05
for gpu, entries in history.items():
    figure, panels = plt.subplots(1, 2, figsize=(13, 4.5))
    for axes, measure in zip(panels, ("step", "base"), strict=True):
        plots.over_commits(axes, entries, measure)
    figure.suptitle(gpu)
    plt.show()
    changes = judge(entries)
    print(f"{gpu}: {len(entries)} runs, {sum(change.slower for change in changes)} of {len(changes)} ratios slower")

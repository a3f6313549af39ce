"""Implementations from elsewhere: the composite against the contract, axolotl's adapter against a stand-in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from judging import ask, integers, quick

import mxref
from mxref.verification.arithmetic.accumulation import ACCUMULATIONS
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.elsewhere import foreign
from mxref.verification.candidates.loading import load
from mxref.verification.cases.case import Case
from mxref.verification.cases.draw import draw
from mxref.verification.cases.elements import all_elements
from mxref.weights import decode_mxfp4

CPU = {case.name: case for case in quick("cpu")}
BF16 = {case.name: case for case in quick("cuda")}


@pytest.fixture(scope="module")
def composite() -> Candidate:
    pytest.importorskip("torchao")
    return load("mxref.verification.candidates.elsewhere.foreign:grouped_mm")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_torchao_decodes_every_element(dtype: torch.dtype) -> None:
    pytest.importorskip("torchao")
    weights = all_elements()
    got, expected = foreign.torchao_decode(weights, dtype), decode_mxfp4(weights, dtype)
    assert got.dtype == expected.dtype
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("case", integers("cpu"), ids=lambda case: case.name)
def test_composite_on_integers(composite: Candidate, case: Case) -> None:
    assert not [str(finding) for finding in ask("integer", composite, draw(case)) if not finding.ok]


@pytest.mark.parametrize("name", ["sentinels, gates", "grouped in, by position", "rank 3", "k 8", "empty experts"])
def test_composite_within_its_declared_intervals(composite: Candidate, name: str) -> None:
    sample = draw(CPU[name])
    findings = ask("interval", composite, sample, composite.points(sample.problem.dtype), ACCUMULATIONS["undeclared"])
    assert not [str(finding) for finding in findings if not finding.ok]


def test_composite_rounds_to_bf16_where_it_says(composite: Candidate) -> None:
    sample, how = draw(BF16["balanced, bf16"]), ACCUMULATIONS["undeclared"]
    assert all(finding.ok for finding in ask("interval", composite, sample, composite.points(torch.bfloat16), how))
    contract = ask("interval", composite, sample, how=how)
    assert not all(finding.ok for finding in contract), "one rounding more than the contract has must show"


def test_composite_without_sentinels_saves_the_mask(composite: Candidate) -> None:
    problem = draw(CPU["odd sizes"]).problem
    y = foreign.grouped_mm(**problem.arguments())
    assert torch.equal(foreign.grouped_mm(**problem.arguments(), sentinels=False), y)


def test_composite_takes_dense_weights(composite: Candidate) -> None:
    problem = draw(CPU["odd sizes"]).problem
    assert isinstance(problem.expert_weights, mxref.MXWeights)
    dense = decode_mxfp4(problem.expert_weights, problem.dtype).mT
    y = foreign.grouped_mm(**problem.arguments())
    assert torch.equal(foreign.grouped_mm(**{**problem.arguments(), "expert_weights": dense}), y)


@pytest.fixture
def fake_axolotl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A package of axolotl's layout that records calls; its `integrations.kernels` must not be imported."""
    kernels = tmp_path / "axolotl" / "integrations" / "kernels"
    library = kernels / "libs" / "scattermoe_lora"
    (library / "kernels").mkdir(parents=True)
    for folder in (
        tmp_path / "axolotl",
        kernels.parent,
        kernels.parent / "kernels" / "libs",
        library,
        library / "kernels",
    ):
        (folder / "__init__.py").touch()
    (kernels / "__init__.py").write_text("raise RuntimeError('the plugin system was imported')")
    (library / "parallel_linear_lora.py").write_text(
        dedent("""
            calls = []
            def parallel_linear_lora(*operands):
                calls.append(operands)
                return operands[0]
        """)
    )
    (library / "mx_weights.py").write_text(
        dedent("""
            class MXWeights:
                def __init__(self, packed, scales, K, N):
                    self.packed, self.scales, self.K, self.N = packed, scales, K, N
        """)
    )
    (library / "kernels" / "lora_ops.py").write_text(
        dedent("""
            import triton
            class Tuner:
                configs = [
                    triton.Config({"BLOCK_M": m, "BLOCK_N": 32, "BLOCK_K": 32}, num_warps=4, num_stages=3)
                    for m in (32, 64, 128, 256)
                ]
                def __init__(self):
                    self.timed, self.best = [], {}
                def prune_configs(self, arguments):
                    return self.configs
                def _bench(self, shape, *, config):
                    m = config.kwargs["BLOCK_M"]
                    self.timed.append((shape, m))
                    seconds = float("inf") if m == 32 else 1 / m
                    return [seconds] * 3
                def run(self, shape):
                    timings = {c: self._bench(shape, config=c) for c in self.prune_configs({"shape": shape})}
                    self.best[shape] = min(timings, key=timings.get).kwargs["BLOCK_M"]
            tuner = Tuner()
        """)
    )

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "axolotl"]:
            del sys.modules[name]
        foreign.load_axolotl.cache_clear()

    forget()
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    forget()


def test_axolotl_gets_our_operands_in_its_order(fake_axolotl: Any) -> None:
    problem = draw(CPU["odd sizes"]).problem
    foreign.axolotl(**problem.arguments(), use_fused_dX=True)
    library = "axolotl.integrations.kernels.libs.scattermoe_lora"
    ((x, weights, k, *_, A, B, scaling, bias, gates, grouped_in, grouped_out, fused_dX, fused_gather),) = sys.modules[
        f"{library}.parallel_linear_lora"
    ].calls
    assert (x, k, A, B, scaling) == (problem.inputs, problem.k, problem.lora_A, problem.lora_B, problem.scaling)
    assert (bias, gates, grouped_in, grouped_out, fused_dX, fused_gather) == (None, None, False, False, True, False)
    assert (weights.packed, weights.scales) == (problem.expert_weights.packed, problem.expert_weights.scales)
    tuner = sys.modules[f"{library}.kernels.lora_ops"].tuner
    assert [config.kwargs["BLOCK_M"] for config in tuner.configs] == [64]


def test_axolotl_gets_zeros_for_an_adapter_that_is_not_there(fake_axolotl: Any) -> None:
    problem = draw(CPU["no LoRA"]).problem
    foreign.axolotl(**problem.arguments())
    _, _, _, _, _, _, A, B, *_ = sys.modules[
        "axolotl.integrations.kernels.libs.scattermoe_lora.parallel_linear_lora"
    ].calls[0]
    assert A.shape == (16 * problem.E, problem.K)
    assert B.shape == (problem.N, 16 * problem.E)
    assert not A.any()
    assert not B.any()


def test_axolotl_declines_rows_of_other_ranks(fake_axolotl: Any) -> None:
    with pytest.raises(mxref.NotCovered, match="drops rows of other ranks"):
        foreign.axolotl(**draw(CPU["sentinels"]).problem.arguments())


@pytest.mark.usefixtures("fake_axolotl")
def test_axolotl_takes_one_tiling_where_it_is_judged() -> None:
    foreign.load_axolotl()
    (config,) = tuner().configs
    assert config.kwargs["BLOCK_M"] == 64


@pytest.mark.usefixtures("fake_axolotl")
def test_axolotl_tunes_itself_within_bounds_where_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes 3 s further with each tiling, the first of which does not fit, and a bound of 5 s."""
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(foreign.time, "monotonic", lambda: next(clock))
    foreign.load_axolotl(5.0)
    tuned = tuner()
    for shape in ("small", "large"):
        tuned.run(shape)
    # The clock is read when tuning begins, and before a tiling once one has run.
    assert tuned.timed == [(shape, m) for shape in ("small", "large") for m in (32, 64, 128)]
    assert tuned.best == {"small": 128, "large": 128}


def tuner() -> Any:
    return sys.modules["axolotl.integrations.kernels.libs.scattermoe_lora.kernels.lora_ops"].tuner

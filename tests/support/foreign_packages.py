"""Stand-ins for packages that need a GPU: their layout and signatures, the golden decode, PyTorch's products."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from mxref.verification.candidates.elsewhere import packed_products

_HUMMING = """
    import torch
    from mxref import MXWeights, decode_mxfp4

    class HummingLayer(torch.nn.Module):
        def __init__(self, shape_n, shape_k, weight_config, pad_n_to_multiple, num_experts, torch_dtype):
            super().__init__()
            assert (weight_config, pad_n_to_multiple) == ({"quant_method": "mxfp4"}, 64)
            self.sizes, self.dtype = (num_experts, shape_k, shape_n), torch_dtype

        def load_from_tensors(self, tensors):
            self.tensors = {name: tensor.clone() for name, tensor in tensors.items()}

        def transform(self):
            E, K, N = self.sizes
            weights = MXWeights(self.tensors["weight"], self.tensors["weight_scale"], K, N)
            self.dense = decode_mxfp4(weights, self.dtype)

        def forward(self, x, expert_layout, top_k, compute_config):
            assert (top_k, compute_config) == (1, {"gemm_type": "grouped_contiguous"})
            with torch.autocast("cpu", enabled=False):
                return torch.cat([x[a:b] @ w.T for a, b, w in zip(expert_layout, expert_layout[1:], self.dense)])
"""

_UNSLOTH = """
    import torch
    from mxref import MXWeights, decode_mxfp4

    def mxfp4_expert_grouped_mm(x, blocks, scales, counts, transpose_b=True):
        assert (blocks.shape[:3], blocks.shape[3], counts.dtype) == (scales.shape, 16, torch.int32)
        assert transpose_b and blocks.shape[2] * 32 == x.shape[1]
        E, N, _ = scales.shape
        dense = decode_mxfp4(MXWeights(blocks.view(E, N, -1), scales, x.shape[1], N), x.dtype)
        with torch.autocast("cpu", enabled=False):
            # In fp32: torch's own product of bf16 rows reads what lies behind them, on a CPU with AMX.
            products = [rows.float() @ w.float().T for rows, w in zip(x.split(counts.tolist()), dense)]
            return torch.cat(products).to(x.dtype)
"""


def write_humming(folder: Path) -> None:
    """`humming.layer` of the distribution humming-kernels 0.1.19, in a folder."""
    (folder / "humming").mkdir()
    (folder / "humming" / "__init__.py").touch()
    (folder / "humming" / "layer.py").write_text(dedent(_HUMMING))
    _distribution(folder, "humming-kernels", "0.1.19")


def write_unsloth(folder: Path) -> None:
    """`unsloth_zoo`, whose one file of products imports and whose package, with its patches, does not."""
    (folder / "unsloth_zoo").mkdir()
    (folder / "unsloth_zoo" / "__init__.py").write_text("raise RuntimeError('the patches were imported')")
    (folder / "unsloth_zoo" / "mxfp4_gemm.py").write_text(dedent(_UNSLOTH))
    _distribution(folder, "unsloth_zoo", "2026.10.9")


def on_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The folder's packages can be imported meanwhile, and are forgotten before and after."""
    _forget()
    monkeypatch.syspath_prepend(str(folder))
    yield
    _forget()


def _forget() -> None:
    packed_products.load_unsloth.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "humming"]:
        del sys.modules[name]


def _distribution(folder: Path, name: str, version: str) -> None:
    information = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

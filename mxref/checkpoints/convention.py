"""Conventions: the names of codes and scales, and how expert projections are found by them.

A weight is a pair of tensors, codes and scales, whose names end in the convention's suffixes. A pair with an experts'
axis holds a whole projection; pairs named like `layers.0.mlp.experts.7.up_proj.weight` hold one expert's matrix and are
stacked, gate rows before up rows; any other pair is a quantised matrix outside the experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mxref.checkpoints.files import Files, natural
from mxref.formats import MX_BLOCK_SIZE
from mxref.weights import MXWeights

PART_NAMES = (
    {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)},
    {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
)
"""The two ways of naming an expert's matrices, by the projection whose rows they are."""

_PARTS = "|".join(part for names in PART_NAMES for parts in names.values() for part in parts)
_EXPERT = re.compile(rf"(?P<layer>.+)\.experts\.(?P<expert>\d+)\.(?P<part>{_PARTS})\.weight")


@dataclass(frozen=True)
class ExpertTensor:
    """One expert projection of a checkpoint: name and logical sizes."""

    name: str
    E: int
    N: int
    K: int


@dataclass(frozen=True)
class Pair:
    """Names of a weight and of the tensors of its codes and scales."""

    weight: str
    codes: str
    scales: str


@dataclass(frozen=True)
class Projection:
    """One expert projection and where it lies.

    Attributes:
        tensor: its name and sizes.
        pairs: of its rows, in order: one for all experts, or those of expert 0, 1, …
        per_expert: whether each expert has pairs of its own.
    """

    tensor: ExpertTensor
    pairs: tuple[Pair, ...]
    per_expert: bool

    def read(self, files: Files) -> MXWeights:
        """The stack, in memory of its own; no other copy is made."""
        E, N, K = self.tensor.E, self.tensor.N, self.tensor.K
        packed = _rows(files, [pair.codes for pair in self.pairs], E * N, K // 2)
        scales = _rows(files, [pair.scales for pair in self.pairs], E * N, K // MX_BLOCK_SIZE)
        return MXWeights(packed.view(E, N, -1), scales.view(E, N, -1), K, N)


@dataclass(frozen=True)
class Convention:
    """Where one family of tools puts MXFP4 weights.

    Attributes:
        name: as people call it.
        checkpoints: whose they are.
        layout: names, dtypes and shapes, in words.
        source: where that was read.
        codes, scales: suffixes of the two tensors, of scales alternatives.
        weight: suffix of the weight's own name.
        telling: suffixes of no other convention; half a pair under them is an error.
        blocked: whether codes have an axis for the 16 bytes of a block.
        code_dtypes, scale_dtypes: accepted, by safetensors' names.
        quant_method: required of the configuration where tensors' names do not tell.
        check: further, of a pair; raises ValueError.
        store: codes' and scales' bytes to the two tensors written; None if only read.
        quantization: `quantization_config` of a written checkpoint.
    """

    name: str
    checkpoints: str
    layout: str
    source: str
    codes: str
    scales: tuple[str, ...]
    weight: str = ".weight"
    telling: tuple[str, ...] = ()
    blocked: bool = False
    code_dtypes: tuple[str, ...] = ("U8",)
    scale_dtypes: tuple[str, ...] = ("U8", "F8_E8M0")
    quant_method: str = ""
    check: Callable[[Files, Pair], None] | None = None
    store: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    quantization: Mapping[str, object] | None = None

    def recognises(self, files: Files) -> bool:
        """Whether a checkpoint has expert weights under these names."""
        if self.quant_method and files.quant_method not in ("", self.quant_method):
            return False
        if any(_holds_experts(files, pair) for pair in self._pairs(files)):
            return True
        return bool(self.telling) and any(self._half(name) for name, _ in self._orphans(files))

    def projections(self, files: Files) -> list[Projection]:
        """Every expert projection, layer by layer, checked against the headers.

        Raises:
            ValueError: codes, scales, a matrix or an expert are missing, or a dtype or a shape is wrong.
        """
        dtypes = {*self.code_dtypes, *self.scale_dtypes}
        for orphan, partners in self._orphans(files):
            stack = len(files.tensors[orphan].shape) > 2 and files.tensors[orphan].dtype in dtypes
            if stack or self._half(orphan) or _EXPERT.fullmatch(orphan):
                missing = " or ".join(partners)
                raise ValueError(f"{files.where(orphan)} has no partner {missing}; MXFP4 needs codes and scales")
        projections = []
        layers: dict[str, dict[int, dict[str, Pair]]] = {}
        for pair in self._pairs(files):
            if match := _EXPERT.fullmatch(pair.weight):
                layers.setdefault(match["layer"], {}).setdefault(int(match["expert"]), {})[match["part"]] = pair
            elif _holds_experts(files, pair):
                E, N, K = self.sizes(files, pair, 3)
                projections.append(Projection(ExpertTensor(pair.weight, E, N, K), (pair,), per_expert=False))
        count = max([files.num_experts, *(max(experts) + 1 for experts in layers.values())])
        for layer, experts in layers.items():
            names = next(names for names in PART_NAMES if experts[min(experts)].keys() & {*sum(names.values(), ())})
            for projection, parts in names.items():
                matrices = list(_matrices(files, layer, experts, count, parts))
                projections.append(self._stacked(files, f"{_module_name(layer)}.experts.{projection}", count, matrices))
        return sorted(projections, key=lambda projection: natural(projection.tensor.name))

    def matrices(self, files: Files) -> list[Pair]:
        """The quantised matrices outside the experts."""
        pairs = self._pairs(files)
        return [p for p in pairs if not _holds_experts(files, p) and files.tensors[p.codes].dtype in self.code_dtypes]

    def sizes(self, files: Files, pair: Pair, axes: int) -> tuple[int, ...]:
        """The weight's logical shape, [E, N, K] or [N, K].

        Raises:
            ValueError: a dtype or a shape is wrong.
        """
        for name, dtypes, meaning in (
            (pair.codes, self.code_dtypes, "two E2M1 codes a byte"),
            (pair.scales, self.scale_dtypes, "an E8M0 byte a block of 32"),
        ):
            if (dtype := files.tensors[name].dtype) not in dtypes:
                expected = " or ".join(dtypes)
                raise ValueError(f"{files.where(name)} has dtype {dtype}; expected {expected}, {meaning}")
        if self.check is not None:
            self.check(files, pair)
        stored, scales = files.tensors[pair.codes].shape, files.tensors[pair.scales].shape
        fits = not self.blocked or stored[-1:] == (MX_BLOCK_SIZE // 2,)
        codes = (*stored[:-2], stored[-2] * stored[-1]) if self.blocked and fits else stored
        if not fits or len(codes) != axes or 0 in codes or codes[-1] % 16 or scales != (*codes[:-1], codes[-1] // 16):
            raise ValueError(
                f"{files.where(pair.codes)} has shape {stored} and its scales {scales}; expected {self.layout}"
            )
        return (*codes[:-1], 2 * codes[-1])

    def _half(self, orphan: str) -> bool:
        return bool(self.telling) and orphan.endswith(self.telling)

    def _stacked(self, files: Files, name: str, E: int, matrices: list[Pair]) -> Projection:
        """One projection of separate experts."""
        each = len(matrices) // E
        sizes = [self.sizes(files, pair, 2) for pair in matrices]
        experts = [sizes[first : first + each] for first in range(0, len(sizes), each)]
        shapes = {(sum(N for N, _ in expert), *{K for _, K in expert}) for expert in experts}
        if len(shapes) != 1 or len(next(iter(shapes))) != 2:
            raise ValueError(f"{name} has experts of different sizes [N, K] in {files.root}: {sorted(shapes)}")
        N, K = shapes.pop()
        return Projection(ExpertTensor(name, E, N, K), tuple(matrices), per_expert=True)

    def _pairs(self, files: Files) -> Iterator[Pair]:
        for name in files.tensors:
            if name.endswith(self.codes):
                stem = name.removesuffix(self.codes)
                for suffix in self.scales:
                    if stem + suffix in files.tensors:
                        yield Pair(_weight_name(stem) + self.weight, name, stem + suffix)
                        break

    def _orphans(self, files: Files) -> Iterator[tuple[str, list[str]]]:
        """Tensors without a partner, and the partner's possible names."""
        for name in files.tensors:
            partners = [name.removesuffix(self.codes) + suffix for suffix in self.scales]
            if not name.endswith(self.codes):
                partners = [name.removesuffix(end) + self.codes for end in self.scales if name.endswith(end)]
            if partners and not any(partner in files.tensors for partner in partners):
                yield name, partners


def _holds_experts(files: Files, pair: Pair) -> bool:
    return bool(_EXPERT.fullmatch(pair.weight)) or len(files.tensors[pair.codes].shape) > 2


def _matrices(
    files: Files, layer: str, experts: Mapping[int, Mapping[str, Pair]], count: int, parts: Iterable[str]
) -> Iterator[Pair]:
    """A projection's pairs in row order."""
    for e in range(count):
        for part in parts:
            if part not in experts.get(e, ()):
                missing = f"{layer}.experts.{e}.{part}.weight is missing in {files.root}"
                raise ValueError(f"{missing}, which has {count} experts a layer")
            yield experts[e][part]


def _weight_name(stem: str) -> str:
    """torchao puts an underscore before a parameter's name: experts._down_proj is experts.down_proj."""
    module, _, parameter = stem.rpartition("._")
    return f"{module}.{parameter}" if module and "." not in parameter else stem


def _module_name(layer: str) -> str:
    """transformers' name of a layer's MoE block."""
    name = re.sub(r"\.(ffn|block_sparse_moe)$", ".mlp", layer)
    return f"model.{name}" if name.startswith("layers.") else name


def _rows(files: Files, names: Iterable[str], rows: int, columns: int) -> Tensor:
    """Tensors of bytes below each other: uint8 [rows, columns]."""
    out, row = torch.empty(rows, columns, dtype=torch.uint8, device="cpu"), 0
    for tensor in files.read(names):
        data = tensor.view(torch.uint8).reshape(-1, columns)
        out[row : row + len(data)] = data
        row += len(data)
    return out

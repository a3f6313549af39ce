"""One checkpoint, opened once: convention, expert projections, and every other tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from mxref.checkpoints import gpt_oss
from mxref.checkpoints.convention import Convention, ExpertTensor, Projection
from mxref.checkpoints.conventions import COMPRESSED_TENSORS, DEEPSEEK_V4, MODELOPT, QUARK, TORCHAO
from mxref.checkpoints.files import Files, natural
from mxref.checkpoints.matrices import Matrix, matrices_of
from mxref.weights import MXWeights

CONVENTIONS = (gpt_oss.CONVENTION, DEEPSEEK_V4, COMPRESSED_TENSORS, QUARK, MODELOPT, TORCHAO)
"""Every convention that is read, in the order in which they are tried."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint, fully checked against the files' headers; tensors are read on demand.

    Attributes:
        convention: of the experts' names.
        files: of its tensors.
        projections: the expert projections by name, layer by layer.
        biases: names of stored biases [E, N] by their projection's name.
        others: every other weight by name; quantised ones are read as dense.
    """

    convention: Convention
    files: Files
    projections: dict[str, Projection]
    biases: dict[str, str]
    others: dict[str, Matrix]

    @property
    def expert_tensors(self) -> list[ExpertTensor]:
        """Names and sizes of the projections."""
        return [replace(projection.tensor, name=name) for name, projection in self.projections.items()]

    def cannot_fill(self, module: object) -> str:
        """Why an experts module of transformers cannot take these weights, sizes aside; empty if it can."""
        per_expert = any(projection.per_expert for projection in self.projections.values())
        if per_expert and not getattr(module, "is_concatenated", True):
            return f"{self.convention.name} stores gate and up rows apart, and the module interleaves them"
        if self.convention is TORCHAO and not per_expert and getattr(module, "is_transposed", False):
            return "the module stores [E, K, N], so torchao's blocks run along N; the kernels need blocks along K"
        return ""

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """The same with some projections renamed, {name: new name}."""
        projections = {names.get(name, name): projection for name, projection in self.projections.items()}
        return replace(self, projections=projections, biases={names.get(n, n): b for n, b in self.biases.items()})


def open_checkpoint(path: str | Path | Checkpoint) -> Checkpoint:
    """Recognise a checkpoint's convention and check all headers; an opened one is returned.

    Args:
        path: a safetensors file, a directory, or the id of a model in the local Hugging Face cache, see
            `mxref.checkpoints.files`.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file is damaged, it has no convention's expert weights, or they break the convention.
    """
    if isinstance(path, Checkpoint):
        return path
    files = Files.of(path)
    convention = next((convention for convention in CONVENTIONS if convention.recognises(files)), None)
    if convention is None:
        raise ValueError(f"{files.root} holds no MXFP4 experts in a known layout: {_description(files)}")
    projections = {projection.tensor.name: projection for projection in convention.projections(files)}
    biases = {name: name + gpt_oss.BIAS for name in projections if name + gpt_oss.BIAS in files.tensors}
    for name, bias in biases.items():
        expected = (projections[name].tensor.E, projections[name].tensor.N)
        if files.tensors[bias].shape != expected:
            raise ValueError(f"{files.where(bias)} has shape {files.tensors[bias].shape}; expected [E, N] = {expected}")
    owned = {tensor for projection in projections.values() for p in projection.pairs for tensor in (p.codes, p.scales)}
    others = matrices_of(files, convention, owned | set(biases.values()))
    return Checkpoint(convention, files, projections, biases, others)


def list_expert_tensors(path: str | Path | Checkpoint) -> list[ExpertTensor]:
    """The MXFP4 expert projections of a checkpoint, layer by layer, from headers alone.

    Raises:
        FileNotFoundError, ValueError: as `open_checkpoint`.
    """
    return open_checkpoint(path).expert_tensors


def read_expert_weights(
    path: str | Path | Checkpoint, names: Iterable[str] | None = None
) -> Iterator[tuple[str, MXWeights]]:
    """Expert weights by name, one projection in memory at a time, nothing decoded.

    The checkpoint is checked in full at the call; tensors are read as the iterator advances.

    Args:
        path: see `open_checkpoint`; open it first to read several times.
        names: of projections, in this order; by default all, layer by layer.

    Raises:
        FileNotFoundError, ValueError: as `open_checkpoint`; also for an unknown name.
    """
    opened = open_checkpoint(path)
    wanted = _wanted(names, list(opened.projections), opened)
    return ((name, opened.projections[name].read(opened.files)) for name in wanted)


def read_expert_biases(
    path: str | Path | Checkpoint, names: Iterable[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Expert biases [E, N] in the checkpoint's dtype, by projection's name; by default all.

    Raises:
        FileNotFoundError, ValueError: as `read_expert_weights`.
    """
    opened = open_checkpoint(path)
    wanted = _wanted(names, list(opened.biases), opened)
    return zip(wanted, _copies(opened.files, [opened.biases[name] for name in wanted]), strict=True)


def list_other_tensors(path: str | Path | Checkpoint) -> list[str]:
    """Names of weights outside the expert projections: attention, router, norms, embeddings.

    Raises:
        FileNotFoundError, ValueError: as `open_checkpoint`.
    """
    return sorted(open_checkpoint(path).others, key=natural)


def read_other_tensors(
    path: str | Path | Checkpoint, names: Iterable[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `list_other_tensors`, one in memory at a time; as stored, or bf16 where quantised.

    Raises:
        FileNotFoundError, ValueError: as `read_expert_weights`.
    """
    opened = open_checkpoint(path)
    wanted = _wanted(names, list_other_tensors(opened), opened)
    return ((name, opened.others[name].read(opened.files)) for name in wanted)


def _copies(files: Files, names: Iterable[str]) -> Iterator[Tensor]:
    return (tensor.clone() for tensor in files.read(names))


def _wanted(names: Iterable[str] | None, present: list[str], opened: Checkpoint) -> list[str]:
    if names is None:
        return present
    wanted, known = list(names), set(present)
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"names holds {unknown}; {opened.files.root} has {present}")
    return wanted


def _description(files: Files) -> str:
    """What a checkpoint of no known convention holds."""
    of_dtype: dict[str, list[str]] = {}
    for name, entry in files.tensors.items():
        of_dtype.setdefault(entry.dtype, []).append(name)
    listed = ", ".join(f"{len(names)} {dtype}, such as {names[0]}" for dtype, names in sorted(of_dtype.items()))
    found = f"{len(files.tensors)} tensors ({listed or 'none'})"
    if files.quantization:
        method = files.quant_method or "of an unnamed kind"
        return f"{found}, and its configuration says that it is quantised, {method}; {_known()}"
    if of_dtype and of_dtype.keys() <= {"BF16", "F16", "F32", "F64", "I64", "BOOL"}:
        return f"{found}, which are not quantised; mxref.kernels.pack_experts quantises a model's experts"
    return f"{found}; {_known()}"


def _known() -> str:
    return "known are " + "; ".join(f"{convention.name} ({convention.layout})" for convention in CONVENTIONS)

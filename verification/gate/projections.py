"""A checkpoint's expert weights to judge on: chosen layers and experts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mxref.checkpoints import ExpertTensor, list_expert_tensors


@dataclass(frozen=True)
class Projections:
    """A choice of a checkpoint's weights.

    Attributes:
        experts: how many of each tensor, from the first; None for all.
        options: of the command line, for this choice.
        about: in words.
    """

    path: Path
    tensors: Sequence[ExpertTensor]
    experts: int | None
    options: tuple[str, ...] = ()
    about: str = ""

    @classmethod
    def chosen(cls, path: Path, layers: str | None, experts: str | None) -> Projections:
        """The projections of layers such as "0,3-5", or "all", None for the first; experts "all", None for four.

        Raises:
            OSError, ValueError: the checkpoint cannot be read or has no such layer, or the choice is malformed.
        """
        try:
            tensors = list_expert_tensors(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"--weights: {error}") from None
        layer_of = {tensor.name: _layer(tensor.name) for tensor in tensors}
        present = sorted(set(layer_of.values()))
        wanted = present[:1] if layers is None else present if layers == "all" else _numbers(layers)
        if missing := [layer for layer in wanted if layer not in present]:
            raise ValueError(f"--layers {layers}: {path} has layers {_ranges(present)}; not {missing[0]}")
        chosen = tuple(tensor for tensor in tensors if layer_of[tensor.name] in wanted)
        count = _experts(experts)
        taken = "all experts" if count is None else f"up to {count} experts each"
        where = f"layer {_ranges(sorted({layer_of[tensor.name] for tensor in chosen}))} of {len(present)}"
        about = f"checkpoint {path}, {where}, {len(chosen)} projections, {taken}"
        options = (*(("--layers", layers) if layers else ()), *(("--experts", experts) if experts else ()))
        return cls(path, chosen, count, options, about)


def _layer(name: str) -> int:
    """The first number in a tensor's name, or 0."""
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(number.group(1)) if number else 0


def _numbers(text: str) -> list[int]:
    """0,3-5 as [0, 3, 4, 5]."""
    numbers: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        if ends is None or int(ends.group(2) or ends.group(1)) < int(ends.group(1)):
            raise ValueError(f"--layers is {text!r}; expected numbers and ranges such as 0,3-5, or all")
        numbers += range(int(ends.group(1)), int(ends.group(2) or ends.group(1)) + 1)
    return sorted(set(numbers))


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 10] as 0–2, 10; two neighbours stay apart."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _experts(text: str | None) -> int | None:
    if text == "all":
        return None
    if text is not None and not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise ValueError(f"--experts is {text!r}; expected a positive number, or all")
    return int(text or 4)

"""Names of a transformers model's tensors in checkpoints, by transformers' own conversions.

Many families are stored under other names, with the experts' matrices apart. transformers' rules
(`transformers/conversion_mapping.py`) are applied to the tensors outside the experts, and give the names of packed
ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)


class Renaming:
    """From names in a checkpoint to a model's own.

    Args:
        model: of transformers, its experts not packed yet.

    Attributes:
        own: names of the model's tensors.
    """

    def __init__(self, model: Any) -> None:
        rules = get_model_conversion_mapping(model)
        self._model = model
        self.own = dict.fromkeys(model.state_dict(), True)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def name(self, stored: str) -> str:
        """The model's name for a stored weight; of one expert's matrix, that of the whole projection."""
        return self._renamed(stored)[0]

    def tensors(self, stored: Mapping[str, Callable[[], Tensor]]) -> Iterator[tuple[str, str | None, Tensor]]:
        """(name in the model, name in the checkpoint, or None if rules converted it, value), one at a time.

        Args:
            stored: reads a tensor, by its name in the checkpoint.
        """
        groups: dict[str, list[tuple[str, str | None]]] = {}
        for name in sorted(stored, key=dot_natural_key):
            target, pattern = self._renamed(name)
            groups.setdefault(target, []).append((name, pattern))
        for target, sources in groups.items():
            name, pattern = sources[0]
            if pattern is None:
                yield target, name, stored[name]()
                continue
            rule = copy.deepcopy(next(rule for rule in self._converters if pattern in rule.source_patterns))
            for name, matched in sources:
                rule.add_tensor(target, name, matched, stored[name]())
            for made, value in rule.convert(target, model=self._model, config=self._model.config).items():
                yield made, None, value[0] if isinstance(value, list) else value

    def _renamed(self, stored: str) -> tuple[str, str | None]:
        if stored in self.own:
            return stored, None
        prefix = self._model.base_model_prefix
        name, pattern = rename_source_key(stored, self._renamings, self._converters, prefix, self.own)
        return name, pattern


def stored_expert_names(model: Any, projection: str) -> tuple[str, ...]:
    """Names of expert 0's matrices that make up a projection in a checkpoint; of the stack, if stored so.

    Args:
        model: of transformers.
        projection: such as model.layers.0.mlp.experts.gate_up_proj.
    """
    stand_in = torch.empty(1, 2, 1, device="meta")  # one expert, one gate row and one up row
    with _rules_of_its_own(model):
        return tuple(revert_weight_conversion(model, {projection: stand_in}))


def stored_tensors(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors under their names in a checkpoint, split where they are stored so.

    Args:
        model: of transformers.
        tensors: by their names in the model.
    """
    with _rules_of_its_own(model):
        stored: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return stored


@contextmanager
def _rules_of_its_own(model: Any) -> Iterator[None]:
    """`pack_experts` empties a model's list of rules; without a list its family's rules hold."""
    attributes = vars(model)
    kept = {key: attributes.pop(key) for key in ("_weight_conversions",) if key in attributes}
    try:
        yield
    finally:
        attributes.update(kept)

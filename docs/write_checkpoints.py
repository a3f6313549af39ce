"""Writes docs/checkpoints.md: which command takes which convention, and where each was read.

python docs/write_checkpoints.py
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mxref.checkpoints import CONVENTIONS, Convention

PAGE = Path(__file__).resolve().parent / "checkpoints.md"

_COMMANDS = ("`mxref inspect`", "`mxref gate --weights`", "`load_packed_model`, `pack_experts`", "`save_packed_model`")

_BEFORE = """\
<!-- Written by `python docs/write_checkpoints.py`; a test compares them. -->

# MXFP4 checkpoints

A path is a safetensors file, a directory with one such file or with shards and `model.safetensors.index.json`, or the
id of a model whose snapshot is in the local Hugging Face cache; nothing is downloaded. The convention is recognised by
the tensors' names, Quark and ModelOpt by the configuration too. Anything else is refused with what was found.
"""

_AFTER = """\
K is the contraction size, N the number of rows; even k in the low nibble, one E8M0 scale a block of 32, in plain row
order. Separate experts are stacked, gate rows before up rows.

Experts go from the files into packed memory and are never decoded. Weights outside the experts take the place that the
model has for them: as stored, or as bf16 where they are FP8 (with their scales) or MXFP4. A saved checkpoint has them
so, too: it can be larger than its origin.

`save_packed_model` writes the convention from which a model was loaded, if it is one that is written; else gpt-oss
names for gpt-oss models and for those that transformers stores stacked, and compressed-tensors for all others. A model
of gpt-oss with gpt-oss names is read by transformers; compressed-tensors checkpoints by transformers with the package
compressed-tensors; all by `load_packed_model`. `save_pretrained` of a packed model writes gpt-oss names, and adapters
that the packed experts own beside them; `load_packed_model` reads both.

A whole model can be loaded if transformers has its architecture. transformers 5.22 has none for Kimi-K3: its experts
are inspected, judged by the gate, read (`mxref.checkpoints.read_expert_weights`), and packed into a model whose experts
modules are called `language_model.model.layers.N.mlp.experts`.
"""


def page() -> str:
    """The page, Markdown."""
    can = _table(("convention", "checkpoints", *_COMMANDS), map(_abilities, CONVENTIONS))
    read = _table(
        ("convention", "tensors", "read in"), ((c.name, c.layout.replace("*", r"\*"), c.source) for c in CONVENTIONS)
    )
    return f"{_BEFORE}\n{can}\n{read}\n{_AFTER}"


def _abilities(convention: Convention) -> tuple[str, ...]:
    return convention.name, convention.checkpoints, "yes", "yes", "yes", "no" if convention.store is None else "yes"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

"""Published sizes of models that are trained whole, and batches; transformers is imported only for a configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["EXPERT_TARGETS", "MODELS", "TINY", "Batch", "Model"]

EXPERT_TARGETS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
"""PEFT's `target_parameters` of the experts, the same in all of these models."""


@dataclass(frozen=True)
class Batch:
    """Sequences and tokens in each."""

    sequences: int
    tokens: int

    @classmethod
    def read(cls, text: str) -> Batch:
        """From a text such as 4x1024.

        Raises:
            ValueError: it is another.
        """
        if not re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,6}", text):
            raise ValueError(f"{text!r} is no batch; expected sequences x tokens in each, such as 4x1024")
        sequences, tokens = text.split("x")
        return cls(int(sequences), int(tokens))

    @property
    def size(self) -> int:
        """Tokens of all sequences."""
        return self.sequences * self.tokens

    def doubled(self) -> Batch:
        """With twice as many sequences."""
        return replace(self, sequences=2 * self.sequences)

    def __str__(self) -> str:
        return f"{self.sequences} × {self.tokens}"


@dataclass(frozen=True)
class Model:
    """One model.

    Attributes:
        name: as on the command line and in records.
        source: where its sizes are published.
        config_class: of transformers.
        layers: of the whole model.
        targets: PEFT's `target_modules`: what gives queries and values.
        settings: what differs from the configuration's defaults.
        as_many_layers: larger than any one card: as many of its layers as fit are trained.
        rank: of the adapters, by default.
        recorded_with: options of the command that writes its record.
    """

    name: str
    source: str
    config_class: str
    layers: int
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    settings: Mapping[str, Any] = field(default_factory=dict)
    as_many_layers: bool = False
    rank: int = 16
    recorded_with: str = "--profile"

    def shortened(self, layers: int) -> Model:
        """With so many layers at most, whether or not they fit."""
        return replace(self, layers=min(layers, self.layers), as_many_layers=False)

    def config(self, layers: int | None = None) -> Any:
        """Its configuration with the first `layers` layers, by default all.

        Raises:
            ValueError: the installed transformers has no such model.
        """
        import transformers

        config_class: Any = getattr(transformers, self.config_class, None)
        if config_class is None:
            raise ValueError(f"transformers {transformers.__version__} has no {self.config_class}")
        return config_class(num_hidden_layers=layers or self.layers, use_cache=False, **self.settings)


_GPT_OSS_20B = Model(
    "gpt-oss-20b",
    "config.json of openai/gpt-oss-20b: 24 layers of 32 experts; all else is GptOssConfig's default",
    "GptOssConfig",
    24,
    settings={"num_local_experts": 32},
    recorded_with="--profile --from-disk DIR",
)
_GPT_OSS_120B = Model(
    "gpt-oss-120b",
    "config.json of openai/gpt-oss-120b, which is GptOssConfig's default: 36 layers of 128 experts",
    "GptOssConfig",
    36,
    settings={"num_local_experts": 128},
    rank=8,  # at 16 weights, adapters and moments take 77 GiB, and a card of 80 GB has no room to train
    recorded_with="--profile --batch 1x512 --largest-batch",
)
_DEEPSEEK_V4_FLASH = Model(
    "deepseek-v4-flash",
    "DeepseekV4Config's defaults, which transformers documents as deepseek-ai/DeepSeek-V4-Flash-Base's",
    "DeepseekV4Config",
    43,
    ("self_attn.q_b_proj", "self_attn.kv_proj"),
    as_many_layers=True,
)
TINY = Model(
    "tiny",
    "no published model: gpt-oss made small enough for a CPU",
    "GptOssConfig",
    2,
    settings={
        "num_local_experts": 4, "vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2,
    },
)  # fmt: skip

MODELS = {model.name: model for model in (_GPT_OSS_20B, _GPT_OSS_120B, _DEEPSEEK_V4_FLASH, TINY)}
"""By name."""

"""Problem: one call's operands, checked before anything runs. The golden model and the kernels share this page."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from mxref.rounding import round_to
from mxref.weights import MXWeights, decode_mxfp4

__all__ = ["Problem"]

_ACTIVATION_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_INDEX_DTYPES = (torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class Problem:
    """The operands of one `parallel_linear_lora` call, in its argument order. Nothing is copied.

    M tokens, k slots a token, P = M·k routed rows, E experts, LoRA rank r. *Expert order* is the order of
    `sorted_expert_idxs`; *position* is token·k + slot.

    Attributes:
        inputs: x, [M, K], or [P, K] in expert order with `grouped_in` (then k = 1).
        expert_weights: W, packed `MXWeights`, or dense [E, K, N].
        k: rows of the output that each input row feeds; inputs.shape[0] · k = P.
        sorted_expert_idxs: [P], ascending, ids ≥ E are sentinels.
        sorted_scattered_idxs: [P], position of each row.
        expert_offsets: [E], inclusive cumulative counts.
        lora_A: [E·r, K], expert e owns rows e·r..(e+1)·r; given with `lora_B` or not at all.
        lora_B: [N, E·r], expert e owns those columns.
        scaling: s, a finite number.
        expert_biases: [E, N].
        gates: [T, g] with T·g = P, weight of each position; the output is then summed over slots to [T, N].
        grouped_in: the inputs are already in expert order.
        grouped_out: leave the output in expert order.
    """

    inputs: Tensor
    expert_weights: Tensor | MXWeights
    k: int
    sorted_expert_idxs: Tensor
    sorted_scattered_idxs: Tensor
    expert_offsets: Tensor
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0
    expert_biases: Tensor | None = None
    gates: Tensor | None = None
    grouped_in: bool = False
    grouped_out: bool = False

    @property
    def E(self) -> int:
        """Number of experts."""
        return int(self.expert_offsets.shape[0])

    @property
    def K(self) -> int:
        """Contraction size of the forward product."""
        return self.expert_weights.K if isinstance(self.expert_weights, MXWeights) else self.expert_weights.shape[1]

    @property
    def N(self) -> int:
        """Output size."""
        return self.expert_weights.N if isinstance(self.expert_weights, MXWeights) else self.expert_weights.shape[2]

    @property
    def P(self) -> int:
        """Routed rows."""
        return int(self.sorted_expert_idxs.shape[0])

    @property
    def rank(self) -> int:
        """LoRA rank r, 0 without LoRA."""
        return 0 if self.lora_A is None else self.lora_A.shape[0] // self.E

    @property
    def dtype(self) -> torch.dtype:
        """Activation dtype."""
        return self.inputs.dtype

    @property
    def device(self) -> torch.device:
        """Device of every operand."""
        return self.inputs.device

    def arguments(self) -> dict[str, Any]:
        """The operands as keyword arguments of `parallel_linear_lora`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def segments(self) -> list[tuple[int, int, int]]:
        """(expert, first row, one past its last row) in expert order, for experts that own rows."""
        ends = self.expert_offsets.tolist()
        starts = [0, *ends[:-1]]
        return [(e, start, end) for e, (start, end) in enumerate(zip(starts, ends, strict=True)) if end > start]

    def row_positions(self) -> Tensor:
        """Position token·k + slot of each routed row in expert order: int64 [P]."""
        return self.sorted_scattered_idxs.long()

    def row_sources(self) -> Tensor:
        """Row of `inputs` that feeds each routed row in expert order: int64 [P]."""
        if self.grouped_in:
            return torch.arange(self.P, device=self.device)
        return self.row_positions() // self.k

    def expert_weight(self, e: int) -> Tensor:
        """W_e decoded in the activation dtype: fp64 [K, N]."""
        weights = self.expert_weights
        if isinstance(weights, MXWeights):
            one = replace(weights, packed=weights.packed[e : e + 1], scales=weights.scales[e : e + 1], num_experts=1)
            return decode_mxfp4(one, self.dtype)[0].T.double()
        return weights[e].double()

    def expert_lora(self, e: int) -> tuple[Tensor, Tensor]:
        """A_e [r, K] and B_e [N, r], rounded to the activation dtype, as fp64."""
        assert self.lora_A is not None
        assert self.lora_B is not None
        own = slice(e * self.rank, (e + 1) * self.rank)
        return self._rounded(self.lora_A.detach()[own]), self._rounded(self.lora_B.detach()[:, own])

    def _rounded(self, parameter: Tensor) -> Tensor:
        exact = parameter.double()
        return exact if parameter.dtype == self.dtype else round_to(exact, self.dtype)

    def decoded(self) -> Problem:
        """The same problem on its weights decoded in the activation dtype, E·K·N elements: each is decoded once."""
        if not isinstance(self.expert_weights, MXWeights):
            return self
        return replace(self, expert_weights=decode_mxfp4(self.expert_weights, self.dtype).mT)

    def validate(self, check_values: bool) -> None:
        """Raise on the first operand that does not fit the others.

        Args:
            check_values: also read the index tensors' values, which synchronises on a GPU.

        Raises:
            TypeError: an operand has a wrong type or dtype.
            ValueError: an operand has a wrong rank, shape, device or value.
        """
        self._check_inputs()
        self._check_weights()
        self._check_routing()
        self._check_lora()
        self._check_epilogue()
        self._check_devices()
        if check_values:
            self._check_index_values()

    def _check_inputs(self) -> None:
        _require_tensor("inputs", self.inputs, _ACTIVATION_DTYPES)
        if self.inputs.ndim != 2:
            raise ValueError(f"inputs has shape {tuple(self.inputs.shape)}; expected [rows, K]")
        if isinstance(self.k, bool) or not isinstance(self.k, int):
            raise TypeError(f"k is {self.k!r}; expected an integer")
        if self.k < 1:
            raise ValueError(f"k is {self.k}; expected at least 1")
        if self.grouped_in and self.k != 1:
            raise ValueError(f"k is {self.k} with grouped_in; grouped inputs hold one row a routed row, so k must be 1")

    def _check_weights(self) -> None:
        weights = self.expert_weights
        if not isinstance(weights, MXWeights):
            _require_tensor("expert_weights", weights, _ACTIVATION_DTYPES, "or an MXWeights")
            if weights.ndim != 3:
                raise ValueError(f"expert_weights has shape {tuple(weights.shape)}; dense weights are [E, K, N]")
            if weights.dtype != self.dtype:
                raise TypeError(
                    f"expert_weights is {weights.dtype} and inputs {self.dtype}; dense weights must have the "
                    "activation dtype: convert them once, outside the call"
                )
            if weights.requires_grad:
                raise ValueError("expert_weights requires grad; the base weights are frozen: detach them first")
        if self.inputs.shape[1] != self.K:
            raise ValueError(f"inputs has {self.inputs.shape[1]} columns; expert_weights needs K = {self.K}")

    def _check_routing(self) -> None:
        for name in ("sorted_expert_idxs", "sorted_scattered_idxs", "expert_offsets"):
            index = getattr(self, name)
            _require_tensor(name, index, _INDEX_DTYPES)
            if index.ndim != 1:
                raise ValueError(f"{name} has shape {tuple(index.shape)}; expected one dimension")
        weights = self.expert_weights
        experts = weights.E if isinstance(weights, MXWeights) else weights.shape[0]
        if experts != self.E:
            raise ValueError(f"expert_offsets has {self.E} entries; expert_weights holds E = {experts} experts")
        if self.sorted_scattered_idxs.shape[0] != self.P:
            raise ValueError(
                f"sorted_scattered_idxs has {self.sorted_scattered_idxs.shape[0]} entries and sorted_expert_idxs "
                f"{self.P}; expected one each a routed row"
            )
        if self.inputs.shape[0] * self.k != self.P:
            raise ValueError(
                f"k is {self.k} with {self.inputs.shape[0]} input rows; sorted_expert_idxs has {self.P} entries, "
                "expected rows · k"
            )

    def _check_lora(self) -> None:
        A, B = self.lora_A, self.lora_B
        if isinstance(self.scaling, bool) or not isinstance(self.scaling, int | float):
            raise TypeError(f"scaling is {self.scaling!r}; expected a Python number")
        if not math.isfinite(self.scaling):
            raise ValueError(f"scaling is {self.scaling}; expected a finite number")
        if (A is None) != (B is None):
            raise ValueError(f"lora_{'A' if A is None else 'B'} is missing; give lora_A and lora_B, or neither")
        if A is None or B is None:
            return
        for name, parameter in (("lora_A", A), ("lora_B", B)):
            _require_tensor(name, parameter, _ACTIVATION_DTYPES)
            if parameter.ndim != 2:
                raise ValueError(f"{name} has shape {tuple(parameter.shape)}; expected two dimensions")
        if A.shape[0] == 0 or A.shape[0] % self.E or A.shape[1] != self.K:
            raise ValueError(
                f"lora_A has shape {tuple(A.shape)}; expected [E·r, K] with E = {self.E}, K = {self.K}, rank r ≥ 1"
            )
        if tuple(B.shape) != (self.N, A.shape[0]):
            raise ValueError(f"lora_B has shape {tuple(B.shape)}; expected [N, E·r] = {(self.N, A.shape[0])}")

    def _check_epilogue(self) -> None:
        bias, gates = self.expert_biases, self.gates
        if bias is not None:
            _require_tensor("expert_biases", bias, _ACTIVATION_DTYPES)
            if tuple(bias.shape) != (self.E, self.N):
                raise ValueError(f"expert_biases has shape {tuple(bias.shape)}; expected [E, N] = {(self.E, self.N)}")
        if gates is None:
            return
        _require_tensor("gates", gates, _ACTIVATION_DTYPES)
        if self.grouped_out:
            raise ValueError("gates come with grouped_out; the gated sum needs rows by position: set grouped_out=False")
        if gates.ndim != 2 or gates.numel() != self.P:
            raise ValueError(
                f"gates has shape {tuple(gates.shape)}; expected [tokens, slots], {self.P} entries, one a routed row"
            )

    def _check_devices(self) -> None:
        for name, operand in self.arguments().items():
            if isinstance(operand, Tensor | MXWeights) and operand.device != self.device:
                raise ValueError(f"{name} lies on {operand.device} and inputs on {self.device}; expected one device")

    def _check_index_values(self) -> None:
        experts, positions, ends = (
            self.sorted_expert_idxs.long().contiguous(),
            self.sorted_scattered_idxs.long(),
            self.expert_offsets.long(),
        )
        if bool((experts[1:] < experts[:-1]).any()) or bool((experts < 0).any()):
            raise ValueError("sorted_expert_idxs is not ascending from 0; use flatten_sort_count, which sorts it")
        counted = torch.searchsorted(experts, torch.arange(self.E, device=self.device), right=True)
        if not torch.equal(counted, ends):
            raise ValueError("expert_offsets is not the inclusive cumulative count of sorted_expert_idxs below E")
        if not torch.equal(positions.sort().values, torch.arange(self.P, device=self.device)):
            raise ValueError(f"sorted_scattered_idxs is not a permutation of 0..{self.P - 1}")


def _require_tensor(name: str, x: Any, dtypes: tuple[torch.dtype, ...], alternative: str = "") -> None:
    wanted = " ".join(filter(None, ["expected a tensor of", ", ".join(str(d) for d in dtypes), alternative]))
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {type(x).__name__}; {wanted}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} is {x.dtype}; {wanted}")

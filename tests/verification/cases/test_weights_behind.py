"""The packed weights that are named behind a wrong element are those that made it."""

from __future__ import annotations

import pytest
import torch

from mxref.verification.cases.draw import draw
from mxref.verification.cases.elements import all_elements, element_cases
from mxref.verification.cases.weights_behind import weight_at, weights_behind


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_weights_behind_elements_of_exact_samples(dtype: torch.dtype) -> None:
    """The named weight, decoded, is the element that it stands for."""
    for case in element_cases(dtype)[:3]:
        sample = draw(case)
        for tensor, coordinate in (("Y", (3, 7)), ("dX", (5, 20))):
            for weight in weights_behind(sample, tensor, coordinate):
                assert weight == weight_at(sample.problem.expert_weights, weight.expert, weight.k, weight.n)
                assert (weight.n if tensor == "Y" else weight.k) == coordinate[1]
    finite = draw(element_cases(dtype)[0])
    assert weights_behind(finite, "Y", (3, 7))
    assert not weights_behind(finite, "dA", (0, 0))


def test_weight_at_reads_the_right_nibble() -> None:
    weights = all_elements()
    codes = weights.codes()
    for k in range(40):
        assert weight_at(weights, 0, k, 200).code == int(codes[0, 200, k])
        assert weight_at(weights, 0, k, 200).scale_byte == int(weights.scales[0, 200, k // 32])

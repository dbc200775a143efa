"""Values that no file may have are found wherever they are."""

import pytest
import torch

from lora_compose.pipelines.support.finite import all_finite

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_enough(dtype: torch.dtype, value: float) -> None:
    for place in (0, 1, 500, 999):
        tensor = torch.linspace(-1, 1, 1000).to(dtype)
        assert all_finite(tensor)
        tensor[place] = value
        assert not all_finite(tensor)
        assert not all_finite(tensor.view(10, 100).T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_values_are_finite(dtype: torch.dtype) -> None:
    assert all_finite(torch.full((1000,), torch.finfo(dtype).max, dtype=dtype))


def test_integers_and_tensors_without_values_are_finite() -> None:
    assert all_finite(torch.tensor(3, dtype=torch.int8))
    assert all_finite(torch.empty(0, 4))

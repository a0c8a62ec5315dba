"""What two runs of a graph may and may not differ in."""

from __future__ import annotations

import pytest
import torch

from fusecheck.graph.execution import count_differing

INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@pytest.mark.parametrize("dtype", INTEGER)
def test_a_nan_of_another_sign_is_the_same_nan(dtype: torch.dtype) -> None:
    one = torch.tensor([1.0, float("nan")], dtype=dtype)
    other = one.view(INTEGER[dtype]).clone()
    other[1] ^= torch.iinfo(INTEGER[dtype]).min
    assert count_differing((one,), (other.view(dtype),)) == (2, 0)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_the_nan_codes_of_float8_are_the_same_nan(dtype: torch.dtype) -> None:
    one, other = (torch.tensor([0x38, code], dtype=torch.uint8).view(dtype) for code in (0x7F, 0xFF))
    assert count_differing((one,), (other,)) == (2, 0)


@pytest.mark.parametrize("dtype", [*INTEGER, torch.float8_e4m3fn, torch.float8_e5m2])
def test_zeros_of_other_sign_differ_and_so_does_a_nan_from_a_number(dtype: torch.dtype) -> None:
    one = torch.tensor([0.0, 1.0, 2.0]).to(dtype)
    other = torch.tensor([-0.0, float("nan"), 2.0]).to(dtype)
    assert count_differing((one,), (other,)) == (3, 2)

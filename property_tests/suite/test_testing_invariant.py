"""`assert_invariant` on functions of a batch, and the rows that show another order in a norm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fusecheck.errors import UsageError
from fusecheck.invariance.launch import Launch, tree_sum
from fusecheck.testing import NotConforming, assert_invariant, sharp_rows

EPS, MOST = 1e-6, 12
GAMMA = (1 + 0.3 * torch.randn(512, generator=torch.Generator().manual_seed(3))).bfloat16()


def norm(x: Tensor, launch: Launch) -> Tensor:
    """An RMSNorm whose squares are added up by a tree."""
    wide = x.float()
    root = torch.rsqrt(tree_sum(wide * wide, launch)[:, None] / x.shape[1] + EPS)
    return (wide * root * GAMMA.float()).to(x.dtype)


def of_seven(x: Tensor) -> Tensor:
    """From seven rows on another tree."""
    return norm(x, Launch(16, 4) if len(x) < 7 else Launch(64, 1))


def test_in_bf16_only_sharp_rows_show_that_a_norm_is_added_up_in_another_order() -> None:
    usual = torch.randn(16, 512, generator=torch.Generator().manual_seed(5)).bfloat16()
    assert_invariant(of_seven, usual, most=MOST)
    rows = sharp_rows(GAMMA, EPS)
    with pytest.raises(NotConforming, match=r"^batch: breaks from 7 rows on.* differs in \d+ of 512 elements"):
        assert_invariant(of_seven, rows, most=MOST)
    zeros = torch.zeros_like(rows)
    assert_invariant(lambda x, r: {"residual": x + r, "norm": norm(x + r, Launch(16, 4))}, (zeros, rows), most=MOST)
    with pytest.raises(UsageError, match=r"gamma is \[1, 512\] and dtype torch.bfloat16, expected \[hidden\]"):
        sharp_rows(GAMMA[None], EPS)


def test_rows_of_a_larger_earlier_call_that_come_back_are_a_breach() -> None:
    kept = torch.zeros(MOST, 512)

    def stale(x: Tensor) -> Tensor:
        made = x * 2
        made[-1, 0] = torch.where(kept[len(x), 0] != 0, kept[len(x), 0], made[-1, 0]) if len(x) < MOST else made[-1, 0]
        kept.zero_()
        kept[: len(x)] = made
        return made

    with pytest.raises(NotConforming, match=r"^workspace history: breaks from 5 rows on.* of the output differs in 1 "):
        assert_invariant(stale, torch.randn(16, 512, generator=torch.Generator().manual_seed(5)), most=MOST)


def test_a_row_beside_large_values_is_right_in_every_dtype() -> None:
    assert_invariant(lambda x: x.float(), torch.ones(3, 8).to(torch.float8_e4m3fn), most=2)
    largest: list[float] = []

    def finite(x: Tensor) -> Tensor:
        largest.append(float(x.nan_to_num(0.0).amax()))
        return x

    assert_invariant(finite, 100 * torch.ones(3, 8).half(), most=2)
    assert max(largest) == torch.finfo(torch.float16).max


@pytest.mark.parametrize(
    ("function", "most", "message"),
    [
        (lambda x: x.sum().reshape(1), 12, r"the output of the function is \[1\], expected 2 rows"),
        (lambda x: None, 12, "the output of the function is NoneType, expected 1 rows"),
        (lambda x: x, 0, "most=0, expected a whole number of at least 1"),
        (lambda x: x, "8", "most='8', expected a whole number"),
    ],
)
def test_what_is_no_function_of_a_batch_is_refused(
    function: Callable[[Tensor], Tensor], most: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        assert_invariant(function, torch.ones(4, 8), most=most)

"""On the CPU numpy does what torch does elsewhere: the same bits, cell by cell and code by code."""

from __future__ import annotations

import itertools

import pytest
import torch

from fusecheck.case import digest
from fusecheck.formats import element
from fusecheck.formats.element import E4M3
from fusecheck.inputs import cells


@pytest.mark.parametrize("seed", [0, 1, 12345678901, 2**62])
@pytest.mark.parametrize("pairs", [4, 12, 500, 1440])
def test_cells_hold_the_same_bits_whether_numpy_or_torch_made_them(seed: int, pairs: int) -> None:
    rows = torch.arange(70_000, 70_009)[:, None]
    keys = cells._row_keys_torch(seed, rows)
    assert torch.equal(keys, torch.from_numpy(cells._row_keys_numpy(seed, rows.numpy())))
    words = torch.from_numpy(cells._mixed_numpy(keys.numpy(), pairs).view("int32"))
    assert torch.equal(cells._mixed_torch(keys, pairs), words)


@pytest.mark.parametrize("saturate", [True, False])
def test_thirteen_bits_and_a_sticky_one_decide_the_code_of_any_float32(saturate: bool) -> None:
    edges = torch.tensor([v for v in (*E4M3.midpoints, *E4M3.values, 2.0**-10) if v == v], dtype=torch.float32)
    edges = torch.cat((edges, -edges))
    beside = [torch.nextafter(edges, torch.tensor(way)) for way in (torch.inf, -torch.inf)]
    anything = torch.randint(-(2**31), 2**31 - 1, (1 << 20,), generator=torch.Generator().manual_seed(5))
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 1e-45])
    ones = torch.tensor([2**31 - 1, -1], dtype=torch.int32).view(torch.float32)  # NaN of all ones
    x = torch.cat((edges, *beside, special, ones, anything.to(torch.int32).view(torch.float32)))
    for code_of_nan in ("nan", "+max", "-max"):
        exact = E4M3.encode(x.double(), saturate=saturate, code_of_nan=code_of_nan)
        assert torch.equal(E4M3.encode_float32(x, saturate=saturate, code_of_nan=code_of_nan), exact)
        assert torch.equal(element._encode_bits(E4M3, x, saturate, code_of_nan, "even"), exact)
        table = element._codes_on(x.device, E4M3, saturate, code_of_nan, "even")
        assert torch.equal(element._look_up_torch(table, x, E4M3._below), exact)


def test_a_digest_is_the_sum_of_its_words_by_weight_modulo_2_to_the_64() -> None:
    generator = torch.Generator().manual_seed(6)
    for rows, words in itertools.product((1, 3, 16), (1, 5, 128)):
        tensor = torch.randint(0, 256, (rows, 8 * words), dtype=torch.uint8, generator=generator)
        each = [
            sum(a * b for a, b in zip(row, weights(words), strict=True)) for row in tensor.view(torch.int64).tolist()
        ]
        assert [d % 2**64 for d in digest.rows(tensor)] == [d % 2**64 for d in each]
        total = sum(a * b for a, b in zip(each, weights(rows), strict=True))
        assert digest.whole(tensor) % 2**64 == total % 2**64


def weights(count: int) -> list[int]:
    """The odd weights by position, in Python's own integers."""
    made = []
    for position in range(1, count + 1):
        mixed = (position * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63
        made.append(2 * (mixed ^ (mixed >> 29)) + 1)
    return made

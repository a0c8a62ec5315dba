"""Where each scale lies: formulas against tables made by reshaping, padding in three classes, canaries."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fusecheck.property_tests.suite.quantiser_cases import IDS, KNOWN
from fusecheck.quantflow import QUANT_FLOWS, QuantFlow
from fusecheck.quantisers.known import QUANTISERS
from fusecheck.quantisers.layouts import DATA, PROMISED, UNTOUCHED, Layout, layout_of

SIZES = ((1, 1), (3, 5), (4, 8), (5, 4), (127, 56), (128, 4), (129, 45), (300, 7))


def _up(x: int, to: int) -> int:
    return -(-x // to) * to


def _table(name: str, tokens: int, columns: int) -> npt.NDArray[np.int64]:
    """The slot of each scale, [tokens, columns], by reshaping and transposing what lies in a row."""
    cols = _up(columns, 4)
    if name == "128x4":
        rows = _up(tokens, 128)
        cells = np.arange(rows * cols).reshape(rows // 128, cols // 4, 32, 4, 4)  # tiles, t%32, t/32, c%4
        table = cells.transpose(0, 3, 2, 1, 4).reshape(rows, cols)
    elif name == "8x4":
        rows = _up(tokens, 8)
        table = np.arange(rows * cols).reshape(rows // 8, cols // 4, 8, 4).transpose(0, 2, 1, 3).reshape(rows, cols)
    elif name == "packed":
        rows = _up(tokens, 4)
        table = np.arange(rows * cols).reshape(cols // 4, rows, 4).transpose(1, 0, 2).reshape(rows, cols)
    elif name.startswith("column-major"):
        rows = _up(tokens, 4) if name.endswith("aligned") else tokens
        table = np.arange(rows * columns).reshape(columns, rows).T
    else:
        table = np.arange(tokens * columns).reshape(tokens, columns)
    used: npt.NDArray[np.int64] = table[:tokens, :columns]
    return used


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ["linear", "column-major", "column-major-aligned", "packed", "128x4", "8x4"])
def test_every_scale_lies_where_reshaping_puts_it(name: str, size: tuple[int, int]) -> None:
    layout = layout_of(name, *size, torch.uint8, QuantFlow())
    places = layout.places()
    assert np.array_equal(places.numpy(), _table(name, *size))
    assert int((layout.classes() == DATA).sum()) == size[0] * size[1]
    assert bool((layout.classes()[places] == DATA).all())
    assert int(places.max()) < layout.size


def _filled(layout: Layout, fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    scales = torch.randint(1, 100, (layout.tokens, layout.columns), generator=torch.Generator().manual_seed(2))
    stored = layout.allocate(fill)
    layout.write(scales.to(layout.slot), stored)
    return scales.to(layout.slot), stored


@pytest.mark.parametrize("tokens", [0, 1, 5, 128])
@pytest.mark.parametrize(("name", "flow"), KNOWN, ids=IDS)
def test_what_was_written_is_read_and_nothing_else_was_touched(name: str, flow: QuantFlow, tokens: int) -> None:
    quantiser = QUANTISERS[name]
    for kind in quantiser.layouts:
        layout = quantiser.layout(tokens, 384, flow, kind)
        for fill in (0xA5, 0x3C):
            scales, stored = _filled(layout, fill)
            assert stored.shape == layout.shape
            assert torch.equal(layout.read(stored), scales)
            slots, classes = layout.slots(stored).view(torch.uint8), layout.classes()
            width = stored.element_size() if layout.slot is torch.float32 else 1
            classes = classes.repeat_interleave(width)
            assert bool((slots[classes == UNTOUCHED] == fill).all())
            assert bool((slots[classes == PROMISED] == 0).all())


def _counts(name: str, flow: str, tokens: int, hidden: int) -> list[int]:
    classes = QUANTISERS[name].layout(tokens, hidden, QUANT_FLOWS[name][flow]).classes()
    return [int((classes == kind).sum()) for kind in (DATA, PROMISED, UNTOUCHED)]


def test_packed_scales_promise_zeros_beside_the_last_group_and_below_all_but_the_last_pack() -> None:
    # 5 tokens of 6 groups: two packs of 8 rows; the last pack ends at the last token
    assert _counts("group-fp8-packed", "flashinfer", 5, 6 * 128) == [30, 2 * 5 + 3 * 4, 0]


def test_mxfp8_promises_the_columns_of_its_tokens_and_must_not_touch_the_rows_below() -> None:
    # 5 tokens of 6 groups: one row of tiles of 128, two columns of tiles
    assert _counts("mxfp8", "flashinfer", 5, 6 * 32) == [30, 10, 1024 - 40]


def test_nvfp4_promises_nothing() -> None:
    assert _counts("nvfp4", "flashinfer", 5, 6 * 16) == [30, 0, 1024 - 30]


def test_packed_scales_are_integers_by_column() -> None:
    layout = QUANTISERS["group-fp8-packed"].layout(5, 6 * 128, QUANT_FLOWS["group-fp8-packed"]["flashinfer"])
    assert (layout.shape, layout.strides, layout.dtype) == ((5, 2), (1, 8), torch.int32)
    for wrong in (torch.zeros(5, 2, dtype=torch.int32), torch.zeros(5, 3, dtype=torch.int32), torch.zeros(5, 2)):
        with pytest.raises(ValueError, match=r"expected torch.int32 \[5, 2\] with strides \[1, 8\]"):
            layout.read(wrong)

"""Where each scale lies: packing, swizzles, and the classes of everything else in the tensor of scales.

A slot is one scale: a byte for UE8M0 and E4M3, a float32 otherwise. Each slot of the storage is *data*, *promised* (a
padding that the kernel must set to zero) or *untouched* (it must keep what was there: a canary).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from threading import get_ident

import torch
from torch import Tensor

from fusecheck.quantflow import QuantFlow

DATA, PROMISED, UNTOUCHED = 0, 1, 2
"""The class of a slot."""

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Layout:
    """The tensor of scales of one call.

    Attributes:
        name: of the arrangement.
        tokens: rows.
        columns: scales of a row.
        shape: of the tensor that the kernel fills.
        strides: of that tensor, in its elements.
        dtype: of that tensor.
        slot: the dtype of one scale.
        size: slots of the storage.
    """

    name: str
    tokens: int
    columns: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    slot: torch.dtype
    size: int
    zero_rows: bool = False
    zero_columns: bool = False

    def places(self, device: torch.device | None = None) -> Tensor:
        """The slot of each scale, [tokens, columns], int64."""
        return _places(self.name, self.tokens, self.columns, device or CPU, get_ident())

    def classes(self, device: torch.device | None = None) -> Tensor:
        """The class of each slot, [size], uint8."""
        return _classes(self, device or CPU, get_ident())

    def count(self, kind: int) -> int:
        """How many slots are of a class."""
        return _counts(self)[kind]

    def allocate(self, fill: int, device: torch.device | None = None) -> Tensor:
        """A tensor to be filled, every byte of its storage `fill`."""
        width = torch.empty(0, dtype=self.slot).element_size()
        storage = torch.full((self.size * width,), fill, dtype=torch.uint8, device=device)
        return storage.view(self.dtype).as_strided(self.shape, self.strides)

    def slots(self, stored: Tensor) -> Tensor:
        """The whole storage behind a tensor of scales, [size] of `slot`: a view.

        Raises:
            ValueError: shape, strides or dtype are not those of the layout.
        """
        got = tuple(stored.shape), stored.stride(), stored.dtype
        strides = tuple(s for s, n in zip(self.strides, self.shape, strict=True) if n > 1)
        moved = tuple(s for s, n in zip(got[1], got[0], strict=True) if n > 1)
        if got[0] != self.shape or stored.dtype != self.dtype or (stored.numel() and moved != strides):
            wanted = f"{self.dtype} {list(self.shape)} with strides {list(self.strides)}"
            raise ValueError(f"got scales {stored.dtype} {list(got[0])} with strides {list(got[1])}, expected {wanted}")
        width = stored.element_size() // torch.empty(0, dtype=self.slot).element_size()
        return stored.as_strided((self.size // width,), (1,)).view(self.slot)

    def read(self, stored: Tensor) -> Tensor:
        """The scales, [tokens, columns], of a tensor that a kernel filled."""
        return self.slots(stored)[self.places(stored.device)]

    def write(self, scales: Tensor, stored: Tensor) -> None:
        """Fill a tensor as the kernel must: data and promised padding; nothing else is touched."""
        slots = self.slots(stored)
        slots[self.classes(stored.device) == PROMISED] = 0
        slots[self.places(stored.device)] = scales.to(self.slot)


def _up(x: int, to: int) -> int:
    return -(-x // to) * to


def _swizzled_128x4(t: Tensor, c: Tensor, tokens: int, columns: int) -> Tensor:
    tile = (t // 128) * (_up(columns, 4) // 4) + c // 4
    return tile * 512 + (t % 32) * 16 + (t % 128) // 32 * 4 + c % 4


_PLACE: dict[str, Callable[[Tensor, Tensor, int, int], Tensor]] = {
    "linear": lambda t, c, tokens, columns: t * columns + c,
    "column-major": lambda t, c, tokens, columns: c * tokens + t,
    "column-major-aligned": lambda t, c, tokens, columns: c * _up(tokens, 4) + t,
    "packed": lambda t, c, tokens, columns: 4 * ((c // 4) * _up(tokens, 4) + t) + c % 4,
    "128x4": _swizzled_128x4,
    "8x4": lambda t, c, tokens, columns: ((t // 8) * (_up(columns, 4) // 4) + c // 4) * 32 + (t % 8) * 4 + c % 4,
}
"""The slot of (token, column), by the name of the layout."""

_TILES = {"packed": (4, 4), "128x4": (128, 4), "8x4": (8, 4), "column-major-aligned": (4, 1)}
"""Tokens and columns are padded to multiples of these; (1, 1) elsewhere."""


# Kept on the device, for each copy would wait for it; and for each thread, for virtual ranks have a stream each: what
# one drops, another may still read.
@lru_cache(maxsize=64)
def _places(name: str, tokens: int, columns: int, device: torch.device, thread: int) -> Tensor:
    if device != CPU:
        return _places(name, tokens, columns, CPU, thread).to(device)
    t, c = torch.meshgrid(torch.arange(tokens), torch.arange(columns), indexing="ij")
    return _PLACE[name](t, c, tokens, columns)


@lru_cache(maxsize=64)
def _classes(layout: Layout, device: torch.device, thread: int) -> Tensor:
    if device != CPU:
        return _classes(layout, CPU, thread).to(device)
    rows, columns = _TILES.get(layout.name, (1, 1))
    t, c = torch.meshgrid(
        torch.arange(_up(layout.tokens, rows)), torch.arange(_up(layout.columns, columns)), indexing="ij"
    )
    place = _PLACE[layout.name](t, c, layout.tokens, layout.columns)
    beyond = (t >= layout.tokens) & (not layout.zero_rows)
    beside = (c >= layout.columns) & (t < layout.tokens) & (not layout.zero_columns)
    kind = torch.where(beyond | beside, UNTOUCHED, PROMISED).to(torch.uint8)
    kind[: layout.tokens, : layout.columns] = DATA
    there = place < layout.size
    classes = torch.full((layout.size,), UNTOUCHED, dtype=torch.uint8)
    classes[place[there]] = kind[there]
    return classes


@lru_cache(maxsize=32)
def _counts(layout: Layout) -> tuple[int, ...]:
    return tuple(torch.bincount(layout.classes(), minlength=3).tolist())


def layout_of(name: str, tokens: int, columns: int, slot: torch.dtype, flow: QuantFlow) -> Layout:
    """The layout of this name for `tokens` rows of `columns` scales; padding as the flow declares it."""
    rows, aligned = _up(tokens, _TILES.get(name, (1, 1))[0]), _up(columns, _TILES.get(name, (1, 1))[1])
    shape: tuple[int, ...] = (tokens, columns)
    strides: tuple[int, ...] = (columns, 1)
    dtype, size = slot, rows * aligned
    if name == "packed":
        words = aligned // 4
        shape, strides, dtype = (tokens, words), (1, rows), torch.int32
        size = 4 * (tokens + (words - 1) * rows)
    elif name.startswith("column-major"):
        strides = (1, rows)
        size = tokens + (columns - 1) * rows
    elif name in ("128x4", "8x4"):
        shape, strides = (size,), (1,)
    return Layout(
        name,
        tokens,
        columns,
        shape,
        strides,
        dtype,
        slot,
        size,
        zero_rows=flow.row_padding == "zero",
        zero_columns=flow.column_padding == "zero",
    )

"""Random bits as a pure function of seed, stream, row and column: the same on every rank and device.

No tensor is shipped between ranks, and any rows of any rank's data can be made anywhere. The bits are a
32-bit integer hash (two multiply-xorshift rounds) of a per-row key and the column, two 16-bit values a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import Tensor

from fusecheck.formats.binary import Format

CALL_STEP = 7919
"""The seeds of the calls of a schedule differ by multiples of it; what is drawn from the remainder is equal in all."""

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def _signed(x: int) -> int:
    x &= _MASK
    return x - 2**64 if x >= 2**63 else x


def hash64(*words: int) -> int:
    """A 64-bit hash of small integers (the splitmix64 finaliser, chained); not negative."""
    state = 0
    for word in words:
        state = (state ^ (word & _MASK)) + _GOLDEN & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def _row_keys(base: int, rows: Tensor) -> Tensor:
    """An int32 key per row, from int64 row numbers."""
    if rows.device.type == "cpu":
        return torch.from_numpy(_row_keys_numpy(base, rows.numpy()))
    return _row_keys_torch(base, rows)


def _row_keys_numpy(base: int, rows: NDArray[np.int64]) -> NDArray[np.int32]:
    state = rows.view(np.uint64) * np.uint64(_GOLDEN) + np.uint64(base & _MASK)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    keys: NDArray[np.int32] = (state >> np.uint64(32)).astype(np.uint32).view(np.int32)
    return keys


def _row_keys_torch(base: int, rows: Tensor) -> Tensor:
    """The same where there are no unsigned shifts: masks stand in for them."""
    state = rows * _signed(_GOLDEN) + _signed(base)
    state = (state ^ ((state >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ ((state >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return (state >> 32).to(torch.int32)


_ROUNDS = ((16, 0x7FEB352D), (15, 0x846CA68B))
"""Shift and factor of each round of the hash; one more shift by 16 ends it."""

_COLUMN_STEP = 0x9E3779B9
"""What the word of one pair of columns differs by from the one before."""


@lru_cache(maxsize=8)
def _column_words(pairs: int) -> NDArray[np.uint32]:
    words: NDArray[np.uint32] = np.arange(pairs, dtype=np.uint32) * np.uint32(_COLUMN_STEP)
    return words


def _mixed_numpy(keys: NDArray[np.int32], pairs: int) -> NDArray[np.uint32]:
    """The hash of row key and column, [rows, pairs]; on small blocks many times as fast as torch's operators."""
    # A table for the next power of two serves all widths up to it: few tables serve all.
    x: NDArray[np.uint32] = keys.view(np.uint32) + _column_words(1 << (pairs - 1).bit_length())[:pairs]
    shifted = np.empty_like(x)
    for shift, factor in _ROUNDS:
        np.right_shift(x, np.uint32(shift), out=shifted)
        x ^= shifted
        x *= np.uint32(factor)
    np.right_shift(x, np.uint32(16), out=shifted)
    x ^= shifted
    return x


def _mixed_torch(keys: Tensor, pairs: int) -> Tensor:
    """The same on int32 tensors of any device."""
    x = keys + torch.arange(pairs, device=keys.device, dtype=torch.int32) * (_COLUMN_STEP - 2**32)
    shifted = torch.empty_like(x)
    for shift, factor in (*_ROUNDS, (16, 1)):
        torch.bitwise_right_shift(x, shift, out=shifted)
        shifted &= (1 << (32 - shift)) - 1
        x ^= shifted
        x *= factor if factor < 2**31 else factor - 2**32
    return x


@lru_cache(maxsize=64)
def normal_table(deviation: float, fmt: Format, device: torch.device) -> Tensor:
    """The 65,536 equally likely quantiles of a normal distribution in `fmt`, as raw int16 bits."""
    quantiles = ndtri((np.arange(65536) + 0.5) / 65536) * deviation
    return torch.from_numpy(quantiles).to(torch.float32).to(fmt.dtype).view(torch.int16).to(device)


@dataclass(frozen=True)
class Cells:
    """Rows `first` to `first + count` of a tokens x hidden grid, as a source of reproducible values."""

    seed: int
    first: int
    count: int
    hidden: int
    format: Format
    device: torch.device

    @cached_property
    def row(self) -> Tensor:
        """Row numbers, [count, 1], int64."""
        return torch.arange(self.first, self.first + self.count, device=self.device)[:, None]

    @cached_property
    def column(self) -> Tensor:
        """Column numbers, [1, hidden], int64."""
        return torch.arange(self.hidden, device=self.device)[None, :]

    def zeros(self) -> Tensor:
        """Zeros in the format, [count, hidden]."""
        return torch.zeros(self.count, self.hidden, dtype=self.format.dtype, device=self.device)

    def bits(self, stream: int) -> Tensor:
        """Sixteen random bits per cell, [count, hidden], int16."""
        keys = _row_keys(hash64(self.seed, stream), self.row)
        if self.device.type == "cpu":
            return torch.from_numpy(_mixed_numpy(keys.numpy(), self.hidden // 2).view(np.int16))
        return _mixed_torch(keys, self.hidden // 2).view(torch.int16)

    def row_bits(self, stream: int) -> Tensor:
        """Sixteen random bits per row, [count, 1], int64, 0 to 65535."""
        return (_row_keys(hash64(self.seed, stream, 1), self.row) & 0xFFFF).to(torch.int64)

    def column_bits(self, stream: int) -> Tensor:
        """Sixteen random bits per column, [1, hidden], int64, 0 to 65535; equal in all rows."""
        return (_row_keys(hash64(self.seed, stream, 2), self.column) & 0xFFFF).to(torch.int64)

    def uniform(self, stream: int) -> Tensor:
        """Integers 0 to 65535 per cell, [count, hidden], int32."""
        return self.bits(stream).to(torch.int32) & 0xFFFF

    def normal(self, stream: int, deviation: float) -> Tensor:
        """Normal values in the format, [count, hidden]; drawn through the quantile table, exact on every device."""
        bits, table = self.bits(stream), normal_table(deviation, self.format, self.device)
        if self.device.type == "cpu":  # numpy gathers from a small table several times faster than torch
            raw = torch.from_numpy(table.numpy().take(bits.numpy().view(np.uint16)))
        else:
            raw = table[bits.to(torch.int32) & 0xFFFF]
        return raw.view(self.format.dtype)

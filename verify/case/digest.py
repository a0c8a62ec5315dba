"""Digests of outputs, so that ranks can be compared bit by bit without shipping tensors.

Sum over 64-bit words of word * (odd weight by position), modulo 2^64: any single changed word changes it, and
two tensors that differ in more agree by chance once in about 2^63.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


@lru_cache(maxsize=32)
def _table(count: int, device: torch.device) -> Tensor:
    position = torch.arange(1, count + 1, dtype=torch.int64, device=device) * _GOLDEN
    return (position ^ (position >> 29)) * 2 + 1


def _weights(count: int, device: torch.device) -> Tensor:
    """The weights by position; those of the next power of two begin with them, so few tables serve all counts."""
    return _table(1 << max(count - 1, 0).bit_length(), device)[:count]


def _words(tensor: Tensor) -> Tensor:
    """The rows as int64 words, filled up with zeros, [rows, ceil(columns * itemsize / 8)]."""
    rows = tensor.contiguous()
    if over := rows.shape[1] * rows.element_size() % 8:
        rows = torch.nn.functional.pad(rows.view(torch.uint8), (0, 8 - over))
    return rows.view(torch.int64)


def _by_row(tensor: Tensor) -> Tensor:
    words = _words(tensor)
    weights = _weights(words.shape[1], tensor.device)
    # There is no integer matrix product on CUDA.
    return words @ weights if tensor.device.type == "cpu" else (words * weights).sum(-1)


def rows(tensor: Tensor) -> list[int]:
    """A digest of each row."""
    found: list[int] = _by_row(tensor).tolist()
    return found


def rows_of(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """A digest of each row of some tensors with equally many rows, by name; the device is waited for once."""
    found = torch.stack([_by_row(tensor) for tensor in tensors.values()]).tolist() if tensors else []
    return dict(zip(tensors, found, strict=True))


def whole(tensor: Tensor) -> int:
    """A digest of the whole tensor: of its rows' digests."""
    return int(lazily(tensor))


def whole_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The same of several tensors, by name; the device is waited for once."""
    found = torch.stack([lazily(tensor) for tensor in tensors.values()]).tolist() if tensors else []
    return dict(zip(tensors, found, strict=True))


def lazily(tensor: Tensor) -> Tensor:
    """The same, int64 without a dimension, where the tensor lies: nothing waits for the device."""
    each = _by_row(tensor)
    return (each * _weights(len(each), tensor.device)).sum()

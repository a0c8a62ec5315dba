"""Faulty kernels, planted to see whether the property tests find them: patches on the steps of the emulator."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from fusecheck.backends.emulated import EmulatedBackend
from fusecheck.backends.emulated_arithmetic import Arithmetic
from fusecheck.backends.emulated_protocol import Lamport, Total, TwoShot, row_blocks
from fusecheck.interface import Limits, Rank

LANES = 8
LEAST_HIDDEN = 256


class TailLanes(Arithmetic):
    """From 256 elements a row on, the last eight are scaled by an eighth too little."""

    def normalise(self, read: Tensor, inverse: Tensor, weight: Tensor, native: torch.dtype) -> Tensor:
        normed = super().normalise(read, inverse, weight, native)
        if normed.shape[1] >= LEAST_HIDDEN:
            normed[:, -LANES:] *= 0.875
        return normed


class ShortClear(Lamport):
    """KP-01: clears as many elements as the shorter of this call and the last one had."""

    def clear_size(self, elements: int) -> int:
        return min(super().clear_size(elements), elements)


class SentinelByValue(Lamport):
    """KP-03: any zero looks like the sentinel, so a rank that sends one is waited for in vain."""

    def is_sentinel(self, bits: Tensor) -> bool:
        return bool((bits & 0x7FFF).eq(0).any())


class NoExitBarrier(TwoShot):
    """KP-05: every rank reduces all tokens from its peers' copies, and a fast one leaves while a slow one reads.

    The slowness is rank 1's: it reads 20 ms after the barrier, as a rank on a busy GPU may.
    """

    def __init__(self, rank: Rank, limits: Limits) -> None:
        super().__init__(rank, limits)
        self.slow = rank.index == 1

    def sums(self, partial: Tensor, total: Total, sum_dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        self.copy_in(partial)
        self.barrier("copied")
        if self.slow:
            time.sleep(20e-3)
        for rows in row_blocks(0, *partial.shape):
            yield rows, total(self.gather(partial, rows))
        self.signal()


class NoRemainder(TwoShot):
    """LW-09: each rank reduces tokens // world_size tokens, and the remainder is nobody's."""

    def token_shard(self, rank: int, tokens: int) -> tuple[int, int]:
        share = tokens // self.world_size
        return rank * share, (rank + 1) * share


class KeepsItsBuffers(Lamport):
    """Every closed workspace keeps its shared memory, so that the next one takes more."""

    def close(self) -> None:
        """Forgotten."""


def tail_lanes() -> EmulatedBackend:
    """Touches only the last eight lanes, from 256 elements a row on."""
    return _named("tail-lanes", EmulatedBackend(arithmetic=TailLanes))


def short_clear() -> EmulatedBackend:
    """KP-01."""
    return _named("short-clear", EmulatedBackend(oneshot=ShortClear))


def sentinel_by_value() -> EmulatedBackend:
    """KP-03."""
    return _named("sentinel-by-value", EmulatedBackend(oneshot=SentinelByValue))


def no_exit_barrier() -> EmulatedBackend:
    """KP-05."""
    return _named("no-exit-barrier", EmulatedBackend(twoshot=NoExitBarrier))


def no_remainder() -> EmulatedBackend:
    """LW-09."""
    return _named("no-remainder", EmulatedBackend(twoshot=NoRemainder))


def keeps_its_buffers() -> EmulatedBackend:
    """Leaks."""
    return _named("keeps-its-buffers", EmulatedBackend(oneshot=KeepsItsBuffers))


def _named(name: str, backend: EmulatedBackend) -> EmulatedBackend:
    backend.name = name
    return backend

"""Faulty kernels beside those of `fusecheck.faults`, planted to see whether the property tests find them."""

from __future__ import annotations

import torch
from torch import Tensor

from fusecheck.backends.emulated import EmulatedBackend
from fusecheck.backends.emulated_arithmetic import Arithmetic
from fusecheck.backends.emulated_protocol import Lamport

LANES = 8
LEAST_HIDDEN = 256


class TailLanes(Arithmetic):
    """From 256 elements a row on, the last eight are scaled by an eighth too little."""

    def normalise(self, read: Tensor, inverse: Tensor, weight: Tensor, native: torch.dtype) -> Tensor:
        normed = super().normalise(read, inverse, weight, native)
        if normed.shape[1] >= LEAST_HIDDEN:
            normed[:, -LANES:] *= 0.875
        return normed


class KeepsItsBuffers(Lamport):
    """Every closed workspace keeps its shared memory, so that the next one takes more."""

    def close(self) -> None:
        """Forgotten."""


def tail_lanes() -> EmulatedBackend:
    """Touches only the last eight lanes, from 256 elements a row on."""
    return _named("tail-lanes", EmulatedBackend(arithmetic=TailLanes))


def keeps_its_buffers() -> EmulatedBackend:
    """Leaks."""
    return _named("keeps-its-buffers", EmulatedBackend(oneshot=KeepsItsBuffers))


def _named(name: str, backend: EmulatedBackend) -> EmulatedBackend:
    backend.name = name
    return backend

"""Scales of codes as a kernel stores them, packed and padded, and as numbers in rows."""

from __future__ import annotations

from torch import Tensor

from fusecheck.interface import Operation, RankOutputs
from fusecheck.quantflow import QuantFlow
from fusecheck.quantisers.known import quantiser


def read_scales(op: Operation, outputs: RankOutputs) -> Tensor:
    """The scales that a call returned, [tokens, groups], float32 or bytes.

    Raises:
        ValueError: they are not stored as the quantiser's first layout says.
    """
    assert outputs.scale is not None
    tokens, hidden = outputs.residual.shape
    return quantiser(op.quantiser).layout(tokens, hidden, QuantFlow()).read(outputs.scale)


def store_scales(op: Operation, scales: Tensor, hidden: int) -> Tensor:
    """The tensor of scales that a call on rows of `hidden` elements returns; padding is zero."""
    layout = quantiser(op.quantiser).layout(len(scales), hidden, QuantFlow())
    stored = layout.allocate(0, scales.device)
    layout.write(scales, stored)
    return stored

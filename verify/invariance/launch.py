"""The shape of a launch, the tree of additions that it makes of a row, and the batch sizes at which it changes.

The rule is that of TensorRT-LLM's and FlashInfer's launcher of the fused kernel: a row gets a cluster of blocks, which
is halved while there are more blocks than multiprocessors. It is host code: its thresholds can be told without a GPU.
Not modelled: the limit by registers, and FP4 and group patterns, which widen the block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LANES = 8
"""Elements of one 16-byte access, which a thread adds up serially."""

WARP = 32
WIDEST = 1024
"""Threads of the largest block."""


@dataclass(frozen=True)
class Launch:
    """How a row is spread: `blocks` of `threads`, each thread with `LANES` elements."""

    threads: int
    blocks: int

    def __str__(self) -> str:
        return f"{self.threads} threads x {self.blocks} block{'s' if self.blocks > 1 else ''}"


def launch(hidden: int, rows: int, multiprocessors: int, *, least: int = 128, cluster: int = 8) -> Launch:
    """The launch for `rows` rows of `hidden` elements.

    Args:
        hidden: a multiple of `LANES`.
        rows: that one rank normalises: all in one-shot, its share in two-shot.
        multiprocessors: of the chip.
        least: threads below which a block is widened at the cost of the cluster.
        cluster: the most blocks of a cluster: 8 from compute capability 9.0 on, else 1.
    """
    per_row = hidden // LANES
    while cluster > 1 and per_row % cluster:
        cluster //= 2
    threads = per_row // cluster
    while threads < least and cluster >= 2:
        threads, cluster = 2 * threads, cluster // 2
    while rows * cluster > multiprocessors and cluster > 1 and threads <= WIDEST // 2:
        threads, cluster = 2 * threads, cluster // 2
    return Launch(threads, cluster)


def thresholds(hidden: int, most: int, multiprocessors: int, *, ranks: int = 1) -> Iterator[tuple[int, Launch]]:
    """The batch sizes from which on another launch is taken, with it; the first is that of one row.

    Args:
        hidden: elements of a row.
        most: the largest batch.
        multiprocessors: of the chip.
        ranks: that share the rows in two-shot; 1 for one-shot.
    """
    before = None
    for tokens in range(1, most + 1):
        now = launch(hidden, -(-tokens // ranks), multiprocessors)
        if now != before:
            yield tokens, now
        before = now


def tree_sum(squares: Tensor, shape: Launch) -> Tensor:
    """Add up each row as this launch does, in float32: lanes serially, warps, blocks by halving, the cluster serially.

    Args:
        squares: [rows, hidden], float32; hidden = `LANES` * threads * blocks.
        shape: of the launch.

    Returns:
        [rows], float32.
    """
    lanes = squares.view(len(squares), shape.blocks, shape.threads, LANES).unbind(-1)
    threads = lanes[0].clone()
    for lane in lanes[1:]:
        threads += lane
    warps = -(-shape.threads // WARP)
    padded = torch.nn.functional.pad(threads, (0, warps * WARP - shape.threads))
    of_warps = _halved(padded.view(len(squares), shape.blocks, warps, WARP))
    blocks = _halved(torch.nn.functional.pad(of_warps, (0, WARP - warps))).unbind(-1)
    total = blocks[0].clone()
    for block in blocks[1:]:
        total += block
    return total


def _halved(values: Tensor) -> Tensor:
    """The last dimension, a power of two long, added up as a butterfly does."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values[..., 0]

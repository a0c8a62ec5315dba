"""Which rank the graph's collectives run on, and which kernel its fused operators call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from fusecheck.dataflow import Dataflow
from fusecheck.interface import (
    Backend,
    FusionOp,
    Kernel,
    Limits,
    Rank,
    RankInputs,
    RankOutputs,
    Strategy,
    overwritten,
    spared,
)

SMALLEST_WORKSPACE = 256
"""Tokens that a workspace holds at least, so that growing graphs do not reopen it for every size."""


@dataclass
class RankContext:
    """One rank's place in the group, its backend, and a count of what the graph called.

    Attributes:
        rank: index, world size, device, process group.
        backend: the kernel under test.
        dataflow: what the backend declares; the separate operators follow its order and scaling.
        calls: calls of the backend, by operation; proof that fusion was active.
    """

    rank: Rank
    backend: Backend
    dataflow: Dataflow
    calls: Counter[FusionOp] = field(default_factory=Counter)
    _kernels: dict[tuple[int, torch.dtype], tuple[int, Kernel]] = field(default_factory=dict)

    def gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's tensor of this shape, in rank order; a collective call."""
        if self.rank.world_size == 1:
            return [x]
        raw = x.contiguous().view(torch.uint8)
        received = [torch.empty_like(raw) for _ in range(self.rank.world_size)]
        dist.all_gather(received, raw, group=self.rank.group)
        return [each.view(x.dtype) for each in received]

    def gather_text(self, text: str) -> list[str]:
        """Every rank's text, in rank order; a collective call."""
        if self.rank.world_size == 1:
            return [text]
        received: list[str] = [""] * self.rank.world_size
        dist.all_gather_object(received, text, group=self.rank.group)
        return received

    def fused(self, inputs: RankInputs, op: FusionOp, strategy: Strategy) -> RankOutputs:
        """Run the backend's kernel on [tokens, hidden] operands; a collective call."""
        tokens, hidden = inputs.partial.shape
        self.calls[op] += 1
        given = spared(inputs, overwritten(self.backend))
        return self._kernel(tokens, hidden, inputs.partial.dtype).run(given, op=op, strategy=strategy)

    def close(self) -> None:
        """Close every workspace that this context opened; a collective call."""
        for _, kernel in self._kernels.values():
            kernel.close()
        self._kernels.clear()

    def _kernel(self, tokens: int, hidden: int, dtype: torch.dtype) -> Kernel:
        known = self._kernels.get((hidden, dtype))
        if known and known[0] >= tokens:
            return known[1]
        if known:
            known[1].close()
        capacity = max(SMALLEST_WORKSPACE, 1 << (tokens - 1).bit_length())
        kernel = self.backend.open(self.rank, Limits(capacity, hidden, dtype))
        self._kernels[hidden, dtype] = (capacity, kernel)
        return kernel


_active: list[RankContext] = []


@contextmanager
def tensor_parallel(context: RankContext) -> Iterator[RankContext]:
    """Run the graph operators inside as this rank of this group."""
    _active.append(context)
    try:
        yield context
    finally:
        _active.pop()


def active() -> RankContext:
    """The innermost context.

    Raises:
        RuntimeError: a collective operator ran outside `tensor_parallel`.
    """
    if not _active:
        raise RuntimeError("a collective ran outside fusecheck.graph.context.tensor_parallel; open one around the call")
    return _active[-1]

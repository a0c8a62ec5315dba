"""Which rank the graph's collectives run on, and which kernel its fused operators call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fusecheck.dataflow import Dataflow
from fusecheck.graph.exchange import SharedGather
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

TEXT_BYTES = 4096
"""Of a text that ranks exchange in one step."""


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
    _shared: SharedGather | None = None

    def gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's tensor of this shape, in rank order; a collective call."""
        if self.rank.world_size == 1:
            return [x]
        return [each.view(x.dtype) for each in self._all_gather(x.contiguous().view(torch.uint8))]

    def gather_text(self, text: str) -> list[str]:
        """Every rank's text, in rank order; a collective call."""
        if self.rank.world_size == 1:
            return [text]
        mine = text.encode()
        # One exchange for a short text: its length and its beginning; another for the rest where one is longer.
        pages = self._gather_bytes((len(mine).to_bytes(8, "little") + mine)[:TEXT_BYTES], TEXT_BYTES)
        sizes = [int.from_bytes(page[:8], "little") for page in pages]
        longest = max(sizes) + 8 - TEXT_BYTES
        rest = self._gather_bytes(mine[TEXT_BYTES - 8 :], longest) if longest > 0 else [b""] * len(pages)
        return [(page[8:] + more)[:size].decode() for page, more, size in zip(pages, rest, sizes, strict=True)]

    def _gather_bytes(self, mine: bytes, size: int) -> list[bytes]:
        raw = torch.frombuffer(bytearray(mine.ljust(size, b"\0")), dtype=torch.uint8)
        return [each.cpu().numpy().tobytes() for each in self._all_gather(raw.to(self.rank.device))]

    def _all_gather(self, raw: Tensor) -> list[Tensor]:
        """Every rank's bytes; the group's own call, since torch's wrapper around it costs more than the exchange."""
        if self.rank.device.type == "cpu":
            self._shared = self._shared or SharedGather(self.rank)
            return self._shared(raw)
        group = self.rank.group
        assert group is not None, "a group of several ranks"
        received = [torch.empty_like(raw) for _ in range(self.rank.world_size)]
        group.allgather([received], [raw]).wait()
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

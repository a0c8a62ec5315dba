"""vLLM's custom all-reduce and SGLang's fork of it: the same calls, bound to torch's operators by a wheel's library.

One process per GPU of one host; a call copies what a rank adds into a buffer that its peers read. Small messages, and
all of two ranks, are added up by every rank in the order of the ranks. Of others each rank adds up a part, its own
value first, and the parts are gathered.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusecheck.backends.operands import allocate, check_layout
from fusecheck.dataflow import ALONE, Dataflow
from fusecheck.interface import Limits, Rank, RankInputs, RankOutputs, Support
from fusecheck.operations import Collective, Operation

if TYPE_CHECKING:
    from fusecheck.problem import Problem

WORLD_SIZES = (2, 4, 6, 8)
TABLE_BYTES = 8 << 20
"""What vLLM and SGLang give the all-reduce for its tables of pointers."""
ENTRY_BYTES = 64
"""One such table: eight pointers."""


def library(package: str, name: str) -> Path | None:
    """Where a file of a package lies, without importing it; None where it is not installed, or has none."""
    found = importlib.util.find_spec(package)
    folders = (found.submodule_search_locations or ()) if found else ()
    return next((path for folder in folders if (path := Path(folder, name)).exists()), None)


def load(path: Path | None) -> None:
    """Register the operators of a library with torch."""
    loads: Any = torch.ops.load_library
    loads(str(path))


def call_support(call: Problem, package: str) -> Support:
    """Whether the all-reduce and a kernel in place behind it take a call, and why not."""
    if call.world_size not in WORLD_SIZES:
        return Support(ok=False, reason=f"world size {call.world_size} is none of {WORLD_SIZES}")
    if call.op.collective is not Collective.ALL_REDUCE:
        return Support(ok=False, reason=f"{package}'s {call.op.collective.value} is not adapted")
    if call.hidden % 8:
        return Support(ok=False, reason=f"hidden {call.hidden} is no multiple of 8: the all-reduce takes 16 bytes")
    return Support(ok=True)


def ordered(flow: Dataflow, world_size: int) -> Dataflow:
    """The dataflow with the order of this all-reduce; of more than two ranks, parts begin with their owner's value."""
    return replace(flow, order="rank" if world_size == 2 else "any", invariant_below=ALONE)


class CustomAllReduce:
    """The all-reduce on one rank; making it is a collective call.

    Args:
        ops: the operators `meta_size`, `init_custom_ar`, `register_buffer`, `all_reduce` and `dispose`.
        rank: this rank, on a GPU.
        limits: what the buffers must take.
    """

    def __init__(self, ops: Any, rank: Rank, limits: Limits) -> None:
        self._ops, self._rank = ops, rank
        self._memory: list[Any] = []
        self._room = -(-limits.max_tokens * limits.hidden * limits.dtype.itemsize // 256) * 256
        meta, buffers = self._shared(ops.meta_size() + self._room), self._shared(self._room)
        self._buffer = buffers[rank.index]
        self._table = torch.zeros(TABLE_BYTES, dtype=torch.uint8, device=rank.device)
        everywhere = True  # each GPU reaches each: otherwise more than two ranks would launch nothing, and say nothing
        self._handle = ops.init_custom_ar(meta, self._table, rank.index, everywhere)
        ops.register_buffer(self._handle, buffers)
        # A captured call takes the next entry, which engines fill after the capture; here all calls share one buffer.
        entries = self._table.view(-1, ENTRY_BYTES)
        entries[1:] = entries[0].clone()
        self._wait()

    def _shared(self, nbytes: int) -> list[int]:
        """Every rank's address of a buffer of zeros that the peers can read, in rank order; a collective call.

        By torch's symmetric memory. The engines take cudaMalloc and IPC, and keep what they have mapped until their
        process ends: an address that is given back and taken again cannot be mapped a second time.
        """
        import torch.distributed._symmetric_memory as symm_mem

        assert self._rank.group is not None
        buffer = symm_mem.empty(nbytes, dtype=torch.uint8, device=self._rank.device)
        handle: Any = symm_mem.rendezvous(buffer.zero_(), self._rank.group)
        self._memory += [buffer, handle]
        return list(handle.buffer_ptrs)

    def _wait(self) -> None:
        torch.cuda.synchronize(self._rank.device)
        dist.barrier(group=self._rank.group)

    def begin(self, inputs: RankInputs, op: Operation) -> tuple[Tensor, RankOutputs]:
        """The sum over ranks, and the outputs, with a copy of the residual that a kernel in place makes the stream of.

        Raises:
            ValueError: an operand of a wrong shape, dtype or layout, or larger than the workspace.
        """
        check_layout(inputs)
        partial = inputs.partial
        if partial.nbytes > self._room:
            raise ValueError(f"partial has {partial.nbytes} bytes, the workspace takes {self._room}")
        outputs = allocate(inputs, op)
        summed = outputs.total if outputs.total is not None else torch.empty_like(partial)
        self._ops.all_reduce(self._handle, partial, summed, self._buffer, self._room)
        if op.residual:
            outputs.residual.copy_(inputs.residual)
        return summed, outputs

    def close(self) -> None:
        """Give the buffers back, once no peer uses them; a collective call."""
        self._wait()
        self._ops.dispose(self._handle)
        self._memory.clear()

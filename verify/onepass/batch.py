"""Several cases in a row on one CUDA rank: nothing waits between them, and they are judged together at the end."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusecheck.case import alive, returned
from fusecheck.case.calls import Step, shard
from fusecheck.dataflow import Dataflow
from fusecheck.inputs.families import FAMILIES
from fusecheck.interface import Kernel, Rank
from fusecheck.onepass import judge
from fusecheck.onepass.arena import FlatArena
from fusecheck.onepass.operands import make
from fusecheck.problem import Call, Problem
from fusecheck.verdict import off_nominal_share

SLOTS = 16
"""Counts of a case; `kernels.SLOTS`, which cannot be imported without Triton."""

MOST_ELEMENTS = 2**26
"""Elements of a case whose whole rows are kept until the end; larger ones are judged eagerly in blocks."""


@functools.cache
def available(device: torch.device) -> bool:
    """Whether cases on this device can be judged in one pass."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def takes(case: dict[str, Any], problem: Problem, flow: Dataflow) -> bool:
    """Whether a case is one plain call that one pass can judge."""
    plain = not (problem.schedule or case.get("fresh") or case.get("checks"))
    bits = FAMILIES[problem.family].finite or flow.nan_payload == "kept"  # one pass compares ranks bit by bit
    return plain and bits and problem.elements <= MOST_ELEMENTS and judge.takes(flow, problem.op, problem.hidden)


@dataclass
class Pending:
    """A case whose kernels are launched."""

    step: Step
    share: range
    doubted: bool
    line: str
    events: list[Any] = field(default_factory=list)


class Batch:
    """The pending cases of one message.

    Args:
        rank: this process's place in the group.
        size: how many cases there may be.
    """

    def __init__(self, rank: Rank, size: int) -> None:
        self._rank = rank
        self._counts = torch.zeros(size, SLOTS, dtype=torch.int64, device=rank.device)
        self._pending: list[Pending] = []

    def start(self, kernel: Kernel, problem: Problem, flow: Dataflow, line: str) -> int:
        """Make the operands, launch the kernel under test and the judge; returns the case's place."""
        place, device = len(self._pending), self._rank.device
        share = shard(problem.tokens, self._rank.index, self._rank.world_size)
        events = [_now(device)]
        made = make(problem, self._rank.index, share, device)
        arena = FlatArena(problem, device)
        step = Step(Call(problem.tokens), problem, flow, made.inputs, arena.guard(made.inputs), arena)
        events.append(_now(device))
        with alive.Poisoned(arena):
            step.outputs = kernel.run(step.guarded, op=problem.op, strategy=problem.strategy)
        events.append(_now(device))
        doubted = bool(returned.misshapen(step.outputs, problem, device)) or not _dense(step.outputs)
        if not doubted:
            judge.launch(step, made, share, self._counts[place])
        events.append(_now(device))
        self._pending.append(Pending(step, share, doubted, line, events))
        return place

    def finish(self) -> list[tuple[Step, dict[str, Any] | None]]:
        """Wait for all; each case with its record, or None where the eager judge must look."""
        counts: list[list[int]] = self._counts.tolist()
        return [self._finished(pending, row) for pending, row in zip(self._pending, counts, strict=False)]

    def _finished(self, pending: Pending, counts: list[int]) -> tuple[Step, dict[str, Any] | None]:
        step, spans = pending.step, _spans(pending.events)
        step.seconds = spans[1]
        if pending.doubted or judge.in_doubt(counts):
            return step, None
        problem = step.problem
        elements = len(pending.share) * problem.hidden
        return step, {
            "problem": pending.line,
            "kernel_seconds": spans[1],
            "making_seconds": spans[0],
            "judge_seconds": spans[2],
            "dataflow": step.flow.name,
            "off_nominal_share": off_nominal_share(step.flow, problem.format, problem.hidden),
            "digests": judge.digests(counts, problem),
            "tallies": [tally.to_record() for tally in judge.tallies(counts, problem.op, elements)],
        }


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _spans(events: list[Any]) -> list[float]:
    """Seconds between one event and the next."""
    if events[0] is None:
        return [0.0] * (len(events) - 1)
    return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(events)]


def _dense(outputs: Any) -> bool:
    tensors: list[Tensor] = [t for t in (outputs.residual, outputs.norm, outputs.quant) if t is not None]
    return all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in tensors)

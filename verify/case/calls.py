"""One call of a case on one rank, before and after it ran, and how its rows are shared out."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from fusecheck.case import alive, returned
from fusecheck.dataflow import Dataflow
from fusecheck.interface import Limits, RankInputs, RankOutputs
from fusecheck.oracle import Operands
from fusecheck.problem import Call, Problem
from fusecheck.stages.layout import judge_layout
from fusecheck.verdict import Tally

BLOCK = 2**18
"""Elements judged at a time, so that intermediates stay in cache (CPU) or in bounds (CUDA uses 2^26)."""


@dataclass
class Done:
    """One call that returned: what went in, what came out (decoded), the operands judged last.

    `layout` is what was found around the scales, where there are any.
    """

    problem: Problem
    flow: Dataflow
    inputs: RankInputs
    outputs: RankOutputs
    judged: tuple[range, Operands] | None = None
    layout: Tally | None = None


@dataclass
class Step:
    """One call of a schedule.

    Attributes:
        call: how it follows the one before.
        problem: its own Problem.
        flow: what it is judged by.
        made: its inputs, which no kernel sees.
        guarded: their copy between canaries, for the kernel.
        arena: where the copy and the outputs lie.
        outputs: what the kernel returned; None before.
        overwrites: operands that the kernel may change.
        seconds: in the kernel.
        whole: stage 0 found nothing.
    """

    call: Call
    problem: Problem
    flow: Dataflow
    made: RankInputs
    guarded: RankInputs
    arena: alive.Arena
    overwrites: frozenset[str] = frozenset()
    outputs: RankOutputs | None = None
    seconds: float = 0.0
    whole: bool = True

    @cached_property
    def line(self) -> str:
        """Its own Problem as JSON."""
        return self.problem.to_json()

    def decoded(self) -> RankOutputs:
        """What the call returned, with one code a byte and scales [tokens, groups]."""
        assert self.outputs is not None
        return returned.decoded(self.outputs, self.problem)

    def done(self) -> Done:
        """The call that returned."""
        assert self.outputs is not None
        outputs, layout = self.decoded(), None
        if self.outputs.scale is not None:
            stored = self.outputs.scale
            where = returned.layout_of(self.problem, self.flow)
            layout = judge_layout(where, stored, self.arena.poison_of(stored))
        return Done(self.problem, self.flow, self.made, outputs, layout=layout)

    @property
    def overwritten(self) -> bool:
        """Whether the owner of the input buffer gives it other contents once the call has returned."""
        return self.call.overwrite and "partial" not in self.overwrites  # else it may be an output by now

    def overwrite(self) -> None:
        """Give the input buffer other contents."""
        if self.overwritten:
            self.guarded.partial.fill_(torch.nan)

    def wrong(self) -> Tally | None:
        """Stage 0 of a call that returned: a tally with what is wrong, or None."""
        assert self.outputs is not None
        made = self.made
        if self.overwritten:
            made = replace(made, partial=torch.full_like(made.partial, torch.nan))
        tally = alive.intact(self.arena, made, self.guarded, self.outputs, self.problem, self.overwrites)
        self.whole = tally is None
        return tally


def shard(tokens: int, index: int, world_size: int) -> range:
    """The rows that a rank judges: a contiguous share, the remainder to the first ranks."""
    each, more = divmod(tokens, world_size)
    start = index * each + min(index, more)
    return range(start, start + each + (index < more))


def within(rows: range, others: range) -> bool:
    """Whether `rows` are among `others`."""
    return others.start <= rows.start and rows.stop <= others.stop


def part_of(operands: Operands, rows: slice) -> Operands:
    """The operands of some of the rows."""
    return replace(
        operands, partials=[partial[rows] for partial in operands.partials], residual=operands.residual[rows]
    )


def rows_of(outputs: RankOutputs, rows: range) -> RankOutputs:
    """Some rows of the outputs."""
    return returned.mapped(outputs, lambda tensor: tensor[rows.start : rows.stop])


def blocks(rows: range, hidden: int, device: torch.device) -> list[range]:
    """The rows in pieces that are judged at a time."""
    step = max(1, (BLOCK if device.type == "cpu" else 2**26) // hidden)
    return [range(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step)]


def limits_of(problem: Problem, given: list[int] | None) -> Limits:
    """The workspace that a case needs: the largest call of its schedule, and [max_tokens, hidden] if given."""
    calls = [step for _, step in problem.calls()] if problem.schedule else [problem]
    tokens, hidden = max(c.tokens for c in calls), max(c.hidden for c in calls)
    if given is not None:
        tokens, hidden = max(tokens, given[0]), max(hidden, given[1])
    return Limits(tokens, hidden, problem.format.dtype)


def pause(milliseconds: int) -> None:
    """Sleep."""
    if milliseconds:
        time.sleep(milliseconds / 1000)

"""CUDA only: few rows and many in turn, all queued before the first begins, while one rank comes late to each call.

A rank that has what it waits for goes on to its next call at once. What its peers still read of the call before must
stand until then; that takes them the longer, the more rows a call has.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from fusecheck.case.calls import Step
from fusecheck.case.eager import called, compare_outputs, copied, finished
from fusecheck.case.variants import first_rows, repeated_rows
from fusecheck.interface import Backend, Kernel, RankInputs, RankOutputs
from fusecheck.problem import Problem
from fusecheck.verdict import Stage, Tally, raw

ROWS = 2048
"""Of the calls of many rows: some fifteen for each block of a grid that fills a chip."""
ELEMENTS = 2**23
"""tokens * hidden of a call at most."""
TURNS = 8
"""Calls of few rows and of many, for each rank that comes late."""
QUEUED = 100_000_000
"""Cycles that every rank sleeps first, some 0.05 s, at most: meanwhile its host launches all that follows."""
SHORTEST = 20_000_000
"""And at least, some 0.01 s."""
CYCLES = 2 * 10**9
"""Of a fast GPU in a second; a slower one sleeps the longer."""
MARGIN = 4
"""Times as long as the host took to launch as many calls just before; the memory for their outputs is there since."""
LATE = 200_000
"""Cycles that one rank sleeps before each call, some 0.1 ms: longer than the other takes to its next call."""


def many_rows(backend: Backend, problem: Problem) -> int:
    """How many rows the long calls have: as many as the kernel takes, by halves; those of the case at least."""
    rows = min(ROWS, ELEMENTS // problem.hidden)
    while rows > problem.tokens and not backend.supports(replace(problem, tokens=rows, schedule=())).ok:
        rows //= 2
    return max(rows, problem.tokens)


def hurry(kernel: Kernel, step: Step, rank: int, rows: int) -> Tally:
    """Call with one rank late, then with another: the bits of calls that were waited for, and no hang.

    Args:
        kernel: with room for `rows` rows.
        step: the case; its rows are repeated.
        rank: this one.
        rows: of the long calls.
    """
    tally, size = Tally(Stage.AGAIN), step.problem.world_size
    few = first_rows(step.made, min(step.problem.tokens, size + 1))
    sets = (few, repeated_rows(step.made, rows))
    expected = [copied(finished(kernel, inputs, step), step) for inputs in sets]
    queued = _long_enough(kernel, step, sets)
    for late in sorted({0, size - 1}):
        torch.cuda._sleep(queued)  # type: ignore[no-untyped-call]
        returned = []
        for call in range(2 * TURNS):
            if rank == late:
                torch.cuda._sleep(LATE)  # type: ignore[no-untyped-call]
            returned.append(called(kernel, sets[call % 2], step))
        torch.cuda.synchronize()
        pairs = [
            (
                f"{rows if call % 2 else len(few.partial)} rows, rank {late} late, call {call}:",
                expected[call % 2],
                outputs,
            )
            for call, outputs in enumerate(returned)
        ]
        compare_outputs(tally, step, pairs)
        _spoil(returned)
        del returned, pairs
    return tally


def _long_enough(kernel: Kernel, step: Step, sets: tuple[RankInputs, RankInputs]) -> int:
    """Cycles to sleep while as many calls are launched, from a rehearsal in which nobody is late."""
    began = time.perf_counter()
    kept = [called(kernel, sets[call % 2], step) for call in range(2 * TURNS)]
    launching = time.perf_counter() - began
    torch.cuda.synchronize()
    _spoil(kept)
    return max(SHORTEST, min(QUEUED, int(MARGIN * launching * CYCLES)))


def _spoil(returned: list[RankOutputs]) -> None:
    """Leave no right value in memory that the outputs of further calls will lie in: those must be written again."""
    for outputs in returned:
        for tensor in vars(outputs).values():
            if tensor is not None:
                raw(tensor).fill_(-1)

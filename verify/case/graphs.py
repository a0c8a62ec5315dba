"""CUDA graphs: captured calls replayed on changed inputs, among other graphs, eager calls and hurried ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fusecheck.case.calls import Step
from fusecheck.case.eager import Pair, called, compare_outputs, copied, finished
from fusecheck.case.variants import another, fill, first_rows, held
from fusecheck.interface import Kernel, RankInputs
from fusecheck.verdict import Stage, Tally

CALLS = (1, 2, 3)
"""Calls in a graph."""
REPLAYS = 3
TURNS = 64
"""Pairs of calls without a wait between them, as far as their outputs fit `KEPT` elements."""
KEPT = 2**27
IDLE = 2**30
"""Bytes that the allocator may keep while nobody uses them: of graphs that are gone, no later call takes them."""


def replay_graphs(kernel: Kernel, step: Step) -> Tally:
    """Captured calls, replayed in turn with graphs of other token counts and with eager calls: the same bits as eager.

    Every operand changes in place from one replay to the next. Then the same for calls that follow without a wait.
    """
    tally, sets = Tally(Stage.AGAIN), (step.made, another(step.made))
    if torch.cuda.memory_reserved() - torch.cuda.memory_allocated() > IDLE:
        torch.cuda.empty_cache()  # graphs of earlier cases held it
    alone = [_Alone(kernel, step, [first_rows(x, rows) for x in sets]) for rows in _counts(step)]
    for calls in CALLS:
        graphs = [_Graph(kernel, step, each, calls) for each in alone]
        for turn in range(REPLAYS):
            for graph in graphs:
                graph.replay(turn, tally)
            graphs[turn % len(graphs)].call_eagerly(turn, tally)
    _call_back_to_back(kernel, step, alone[0], tally)
    return tally


class _Alone:
    """Two sets of inputs, and what calls on each return that were waited for; every graph of as many rows has these."""

    def __init__(self, kernel: Kernel, step: Step, sets: list[RankInputs]) -> None:
        self.sets = sets
        self.outputs = [copied(finished(kernel, inputs, step), step) for inputs in sets]


def _call_back_to_back(kernel: Kernel, step: Step, alone: _Alone, tally: Tally) -> None:
    """Few rows and all in turn, on two sets of inputs in turn: a call that runs ahead reads what the last one left."""
    few = first_rows(alone.sets[0], min(step.problem.tokens, step.problem.world_size + 1))
    expected = copied(finished(kernel, few, step), step)
    turns = max(2, min(TURNS, KEPT // step.problem.elements))
    given = [inputs for turn in range(turns) for inputs in (few, alone.sets[turn % 2])]
    returned = [called(kernel, inputs, step) for inputs in given]
    torch.cuda.synchronize()
    pairs: list[Pair] = []
    for turn, (after, behind) in enumerate(zip(returned[::2], returned[1::2], strict=True)):
        pairs.append((f"few rows, turn {turn}:", expected, after))
        pairs.append((f"right after a call of few rows, turn {turn}:", alone.outputs[turn % 2], behind))
    compare_outputs(tally, step, pairs)


def _counts(step: Step) -> list[int]:
    """The call's own number of rows, and about half of it where two-shot takes so few."""
    tokens, fewer = step.problem.tokens, max(step.problem.world_size + 1, step.problem.tokens // 2)
    return [tokens, fewer] if fewer < tokens else [tokens]


@contextmanager
def _captured(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """Capture what is launched within.

    As `torch.cuda.graph` does it, which besides empties the allocator's cache at each capture: to free all of it and to
    ask for it again takes longer than the capture.
    """
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        # The process group's own thread asks for events meanwhile, which the default mode forbids.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            yield
        finally:
            graph.capture_end()


class _Graph:
    """Calls captured on operands of their own, beside what eager calls return for each of two sets of inputs."""

    def __init__(self, kernel: Kernel, step: Step, alone: _Alone, calls: int) -> None:
        self._kernel, self._step, self._alone = kernel, step, alone
        self._name = f"graph of {calls} at {len(alone.sets[0].partial)} tokens"
        self._static = held(alone.sets[0])
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with _captured(self._graph):
            self._outputs = [called(kernel, self._static, step) for _ in range(calls)]

    def replay(self, turn: int, tally: Tally) -> None:
        """Replay with one set of inputs, and compare what every captured call left."""
        fill(self._static, self._alone.sets[turn % 2])
        self._graph.replay()
        torch.cuda.synchronize()
        what, expected = f"{self._name}, replay {turn}:", self._alone.outputs[turn % 2]
        # Now: the next replay writes over them.
        compare_outputs(tally, self._step, [(what, expected, outputs) for outputs in self._outputs])

    def call_eagerly(self, turn: int, tally: Tally) -> None:
        """A call of the same shape between the replays."""
        outputs = finished(self._kernel, self._alone.sets[turn % 2], self._step)
        what = f"eager after the {self._name}, replay {turn}:"
        compare_outputs(tally, self._step, [(what, self._alone.outputs[turn % 2], outputs)])

"""Checks of stage 6 that need a GPU: CUDA-graph capture and replay, and a producer right before the kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from verify.case import alive
from verify.case.calls import Step
from verify.case.compare import compare_bits
from verify.interface import Kernel, RankInputs, RankOutputs
from verify.verdict import Element, Stage, Tally

CALLS = (1, 3)
"""Calls in a graph."""
REPLAYS = 3
LATE = ("residual", "gamma", "scale")
"""Operands that the producer writes; the kernel's own part of the all-reduce is read after its grid sync anyway."""
NANOSECONDS = 200_000
"""How long the producer waits before it writes: longer than any launch takes."""


def replay_graphs(kernel: Kernel, step: Step) -> Tally:
    """Captured calls, replayed with other inputs and again with the first ones: the same bits as eager calls."""
    tally, problem = Tally(Stage.AGAIN), step.problem
    other = replace(step.made, partial=-step.made.partial, residual=step.made.residual.flip(0))
    eager = [_copied(_run(kernel, inputs, step)) for inputs in (step.made, other)]
    for calls in CALLS:
        static = RankInputs(
            step.made.partial.clone(),
            step.made.residual.clone(),
            step.made.gamma.clone(),
            step.made.scale.clone(),
            step.made.eps,
            step.made.weight_bias,
        )
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            captured = [kernel.run(static, op=problem.op, strategy=problem.strategy) for _ in range(calls)]
        for turn in range(REPLAYS):
            inputs = (step.made, other)[turn % 2]
            static.partial.copy_(inputs.partial)
            static.residual.copy_(inputs.residual)
            graph.replay()
            torch.cuda.synchronize()
            for outputs in captured:
                _compare(tally, f"graph of {calls}, replay {turn}:", eager[turn % 2], outputs)
    return tally


def follow_producer(kernel: Kernel, step: Step) -> Tally:
    """Operands written by the kernel right before, which lets its dependents start early: the same bits."""
    from verify.onepass import producer

    tally = Tally(Stage.AGAIN)
    expected = _copied(_run(kernel, step.made, step))
    for name in LATE:
        fresh = getattr(step.made, name)
        late = torch.zeros_like(fresh)
        changed: dict[str, Any] = {name: late}
        inputs = replace(step.made, **changed)
        words = torch.int32 if name == "scale" else torch.int16
        torch.cuda.synchronize()
        launch: Any = producer.late_copy
        launch[(1,)](fresh.view(words), late.view(words), fresh.numel(), NANOSECONDS, BLOCK=1024)
        outputs = kernel.run(inputs, op=step.problem.op, strategy=step.problem.strategy)
        torch.cuda.synchronize()
        _compare(tally, f"{name} written by the kernel before:", expected, outputs)
    return tally


def _run(kernel: Kernel, inputs: RankInputs, step: Step) -> RankOutputs:
    outputs = kernel.run(inputs, op=step.problem.op, strategy=step.problem.strategy)
    torch.cuda.synchronize()
    return outputs


def _copied(outputs: RankOutputs) -> RankOutputs:
    return RankOutputs(**{name: tensor.clone() for name, tensor in alive.named(outputs).items()})


def _compare(tally: Tally, what: str, expected: RankOutputs, got: RankOutputs) -> None:
    """Count differing elements as outside, and say where they were met."""
    first = alive.named(expected)
    for name, tensor in alive.named(got).items():
        before = len(tally.shown)
        compare_bits(tally, name, first[name], tensor)
        for index in range(before, len(tally.shown)):
            shown: Element = tally.shown[index]
            tally.shown[index] = replace(shown, context=f"{what} {shown.context}")

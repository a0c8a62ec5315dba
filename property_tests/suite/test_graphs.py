"""The CUDA-graph check against a stand-in for CUDA graphs: what replays must honour, and that lapses are noticed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusecheck.backends.unfused import quantise, rms_norm
from fusecheck.case import alive, graphs, returned
from fusecheck.case.calls import Step
from fusecheck.dataflow import DATAFLOWS, ExpertFlow
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.interface import FusionOp, Operation, RankInputs, RankOutputs, Strategy
from fusecheck.problem import Call, Problem
from fusecheck.stages.experts import expert_sum

CPU = torch.device("cpu")


class _Graph:
    """What `torch.cuda.CUDAGraph` does for this check: calls made while it records run again in `replay`."""

    recording: _Graph | None = None
    replays = 0
    waited = True

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def capture_begin(self, *, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        _Graph.recording = self

    def capture_end(self) -> None:
        _Graph.recording = None

    def replay(self) -> None:
        _Graph.replays += 1
        for call in self.calls:
            call()


class _Kernel:
    """Ops that record themselves; subclasses keep something of the capture that a replay must read anew."""

    def __init__(self) -> None:
        self.tokens: list[tuple[bool, int]] = []

    def compute(self, inputs: RankInputs) -> RankOutputs:
        stream = inputs.partial + inputs.residual
        norm = rms_norm(stream, inputs.gamma, inputs.eps, inputs.weight_bias)
        return RankOutputs(stream, norm, quantise(norm, inputs.scale))

    def bound(self, inputs: RankInputs) -> RankInputs:
        """What a captured call will read."""
        return inputs

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        del op, strategy
        graph = _Graph.recording
        self.tokens.append((graph is not None, len(inputs.partial)))
        outputs = self.compute(inputs)
        if graph is not None:
            held = self.bound(inputs)
            graph.calls.append(lambda: _overwrite(outputs, self.compute(held)))
        return outputs

    def close(self) -> None:
        """Nothing was taken."""


class _ScaleAsNumber(_Kernel):
    """Copies the scale when the call is captured, as a launch argument would be."""

    def bound(self, inputs: RankInputs) -> RankInputs:
        return replace(inputs, scale=inputs.scale.clone())


class _SpoiltByReplay(_Kernel):
    """Eager calls after a replay return one wrong element."""

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        outputs = super().run(inputs, op=op, strategy=strategy)
        if _Graph.recording is None and _Graph.replays:
            outputs.residual[0, 0] += 1
        return outputs


class _RunsAhead(_Kernel):
    """A call that was not waited for before works on what the last call of its size was given."""

    def __init__(self) -> None:
        super().__init__()
        self.last: dict[int, RankInputs] = {}

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        rows = len(inputs.partial)
        hurried = not _Graph.waited and _Graph.recording is None
        outputs = super().run(self.last.get(rows, inputs) if hurried else inputs, op=op, strategy=strategy)
        self.last[rows], _Graph.waited = inputs, _Graph.recording is not None
        return outputs


class _Experts(_Kernel):
    """Sums experts of its own, of one rank."""

    def compute(self, inputs: RankInputs) -> RankOutputs:
        assert inputs.experts is not None
        summed = expert_sum(inputs.experts, ExpertFlow())
        return replace(super().compute(replace(inputs, partial=summed)), quant=None)


class _ExpertsAsCaptured(_Experts):
    """Keeps the weights of the experts from the capture."""

    def bound(self, inputs: RankInputs) -> RankInputs:
        assert inputs.experts is not None
        return replace(inputs, experts=replace(inputs.experts, scale=inputs.experts.scale.clone()))


def _overwrite(outputs: RankOutputs, fresh: RankOutputs) -> None:
    for name, tensor in returned.named(outputs).items():
        source: Tensor = getattr(fresh, name)
        tensor.copy_(source)


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Graph, "replays", 0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: setattr(_Graph, "waited", True))


def _step(tokens: int, op: str = "RESIDUAL_RMS_NORM_OUT_QUANT_FP8") -> Step:
    problem = Problem(op=Operation.named(op), tokens=tokens, hidden=64, world_size=2)
    made, arena = Inputs(problem, CPU).of_rank(0), alive.Arena(CPU)
    return Step(Call(tokens), problem, DATAFLOWS["unfused"], made, arena.guard(made), arena)


def test_graphs_of_one_two_and_three_calls_at_two_token_counts_are_replayed_with_eager_calls_between() -> None:
    kernel: Any = _Kernel()
    tally = graphs.replay_graphs(kernel, _step(16))
    assert tally.outside == 0
    captured = [tokens for recording, tokens in kernel.tokens if recording]
    assert captured == [16, 8, 16, 16, 8, 8, 16, 16, 16, 8, 8, 8]
    eager = [tokens for recording, tokens in kernel.tokens if not recording]
    turns = graphs.TURNS
    between = [16, 8, 16] * 3
    assert eager == [16, 16, 8, 8, *between, 3, *([3, 16] * turns)]
    replayed = sum((3 * calls * (16 + 8)) + 16 + 8 + 16 for calls in (1, 2, 3))
    assert tally.elements == 64 * 3 * (replayed + turns * (3 + 16))


def test_few_tokens_make_graphs_of_one_size_that_two_shot_takes() -> None:
    assert graphs._counts(_step(3)) == [3]
    assert graphs._counts(_step(5)) == [5, 3]


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        (_ScaleAsNumber, "graph of 1"),
        (_SpoiltByReplay, "eager after the graph"),
        (_RunsAhead, "right after a call of few rows"),
    ],
)
def test_what_a_replay_keeps_or_spoils_is_found_and_named(kind: type[_Kernel], place: str) -> None:
    kernel: Any = kind()
    tally = graphs.replay_graphs(kernel, _step(16))
    assert tally.outside > 0
    assert tally.shown[0].context.startswith(place)


@pytest.mark.parametrize("op", ["MOE_REDUCTION_RESIDUAL_RMS_NORM", "MOE_FINALIZE_RESIDUAL_RMS_NORM"])
def test_a_call_of_fewer_rows_has_the_experts_of_these_rows_and_a_replay_those_of_its_turn(op: str) -> None:
    for kernel, wrong in ((_Experts(), False), (_ExpertsAsCaptured(), True)):
        tally = graphs.replay_graphs(kernel, _step(16, op))
        assert tally.elements > 0
        assert bool(tally.outside) == wrong

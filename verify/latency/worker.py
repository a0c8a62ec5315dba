"""The rank's side of `fusecheck latency`: every path captured as a graph of calls, the graphs replayed in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusecheck import backends
from fusecheck.interface import FusionOp, Kernel, Limits, Operation, Rank, RankInputs, Strategy
from fusecheck.latency.unfused import Unfused

CALLS = 20
"""Calls in one graph; a replay's time is divided by it."""

Call = Callable[[], None]


@dataclass(frozen=True)
class Shape:
    """The operands of one measurement."""

    tokens: int
    hidden: int
    dtype: torch.dtype = torch.bfloat16


class LatencyWorker:
    """Times the paths at one shape; all operands stay where they are, so the L2 is as warm as they fit.

    Args:
        rank: this process's place in the group; on CUDA.
    """

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self._kernels: dict[str, tuple[Limits, Kernel]] = {}

    def measure(
        self,
        backend: str,
        tokens: int,
        hidden: int,
        most: int,
        replays: int,
        graphs: bool,  # noqa: FBT001
        op: str,
    ) -> dict[str, list[float]]:
        """Microseconds per call of every path, one value a replay; the paths take turns.

        Args:
            backend: the fused kernel's backend.
            tokens: rows.
            hidden: columns.
            most: the largest number of rows of this run, for which the workspace is made.
            replays: how many times each path is timed.
            graphs: replay CUDA graphs of `CALLS` calls; else launch the calls one by one.
            op: which `FusionOp` the fused path is; one that quantises.
        """
        shape = Shape(tokens, hidden)
        kernel = self._kernel(backend, Limits(most, hidden, shape.dtype))
        paths = self._paths(kernel, self._inputs(shape), Operation.named(op))
        runs = {name: self._captured(call) if graphs else _repeated(call) for name, call in paths.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(replays):
            for name, run in runs.items():
                times[name].append(self._timed(run))
        return times

    def _inputs(self, shape: Shape) -> RankInputs:
        device = self.rank.device
        generator = torch.Generator(device=device).manual_seed(self.rank.index)
        draw = torch.randn(2, shape.tokens, shape.hidden, generator=generator, device=device).to(shape.dtype)
        gamma = torch.ones(shape.hidden, dtype=shape.dtype, device=device)
        scale = torch.tensor([0.0125], device=device)
        return RankInputs(draw[0].clone(), draw[1].clone(), gamma, scale, 1e-5, 0.0)

    def _paths(self, kernel: Kernel, inputs: RankInputs, op: FusionOp) -> dict[str, Call]:
        """The ways from partial sums to codes: fused in one kernel; fused norm, then a quantiser; not fused."""
        unfused = Unfused(self.rank, inputs, op)
        paths: dict[str, Call] = {"unfused": unfused.all}
        for strategy in (Strategy.ONESHOT, Strategy.TWOSHOT):
            if strategy is Strategy.TWOSHOT and inputs.partial.shape[0] <= self.rank.world_size:
                continue
            name = strategy.value.lower()
            paths[f"fused {name}"] = _fused(kernel, inputs, op, strategy)
            paths[f"norm {name}, quantise"] = _fused_norm(kernel, inputs, strategy, unfused)
        return paths

    def _captured(self, call: Call) -> Call:
        """A CUDA graph of `CALLS` calls."""
        side = torch.cuda.Stream(self.rank.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self.rank.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.synchronize(self.rank.device)
        graph = torch.cuda.CUDAGraph()
        # The process group's own thread asks for events meanwhile, which the default mode forbids.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(CALLS):
                call()
        graph.replay()
        torch.cuda.synchronize(self.rank.device)
        return graph.replay

    def _timed(self, run: Call) -> float:
        """Microseconds per call of one run, from a moment at which all ranks were ready."""
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        dist.all_reduce(self._ready, group=self.rank.group)
        began.record()
        run()
        ended.record()
        ended.synchronize()
        return float(began.elapsed_time(ended)) * 1000 / CALLS

    @property
    def _ready(self) -> Tensor:
        return torch.zeros(1, device=self.rank.device)

    def _kernel(self, name: str, limits: Limits) -> Kernel:
        have = self._kernels.get(name)
        if have is None or have[0] != limits:
            if have is not None:
                have[1].close()
            self._kernels[name] = limits, backends.backend(name).open(self.rank, limits)
        return self._kernels[name][1]


def _fused(kernel: Kernel, inputs: RankInputs, op: FusionOp, strategy: Strategy) -> Call:
    def call() -> None:
        kernel.run(inputs, op=op, strategy=strategy)

    return call


def _fused_norm(kernel: Kernel, inputs: RankInputs, strategy: Strategy, unfused: Unfused) -> Call:
    def call() -> None:
        outputs = kernel.run(inputs, op=FusionOp.RESIDUAL_RMS_NORM, strategy=strategy)
        assert outputs.norm is not None
        unfused.quantise(outputs.norm)

    return call


def _repeated(call: Call) -> Call:
    def run() -> None:
        for _ in range(CALLS):
            call()

    run()
    return run


def slowest(replies: list[Any]) -> dict[str, list[float]]:
    """Per path and replay, the slowest rank's microseconds."""
    return {name: [max(values) for values in zip(*(r[name] for r in replies), strict=True)] for name in replies[0]}

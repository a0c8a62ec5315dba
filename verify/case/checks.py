"""Stages 5 and 6: what a case may check beyond its own call. Every check is a collective call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fusecheck.case import graphs, hurried, overlap, returned
from fusecheck.case.calls import Done, Step, limits_of
from fusecheck.case.compare import code_differences, compare_bits, compare_each
from fusecheck.case.judging import Judge
from fusecheck.case.layouts import layouts_of
from fusecheck.case.run import ON_GPU
from fusecheck.case.workspaces import Workspaces
from fusecheck.dataflow import Dataflow
from fusecheck.errors import BreachError
from fusecheck.interface import Backend, Kernel, RankOutputs, Strategy
from fusecheck.operations import GIVEN_SCALE
from fusecheck.verdict import Stage, Tally


@dataclass(frozen=True)
class Checker:
    """Makes the further checks of a case on one rank.

    Attributes:
        workspaces: the rank's kernels.
        judge: judges what they return.
    """

    workspaces: Workspaces
    judge: Judge

    def check(self, name: str, backend: Backend, step: Step) -> dict[str, Any]:
        """Make one check after the call `step`; all ranks make it, also one whose own outputs are not whole."""
        tally = Tally(Stage.AGAIN)
        more = _CHECKS[name](self, backend, step, tally) if step.flow.reproducible or name not in ON_GPU else {}
        return {"problem": step.line, "check": name, "tallies": [tally.to_record()]} | (more or {})

    def repeat(self, backend: Backend, step: Step, tally: Tally) -> None:
        """The same inputs again: bitwise the same outputs."""
        what = "of a second call"
        self._compare(tally, step, what, self.workspaces.again(backend, step.made, step.problem, tally, what))

    def strategies(self, backend: Backend, step: Step, tally: Tally) -> None:
        """One-shot and two-shot: the same residual_out where the order is named, but for the sign of zero."""
        for strategy in (Strategy.ONESHOT, Strategy.TWOSHOT):
            problem = replace(step.problem, strategy=strategy)
            if strategy is step.problem.strategy or not backend.supports(problem).ok:
                continue
            if not (_is_named(backend.dataflow(problem)) and _is_named(step.flow)):
                continue
            what = f"of a {strategy.value} call, after {step.problem.strategy.value}"
            other = self.workspaces.again(backend, step.made, problem, tally, what)
            if step.whole and step.flow.reproducible and other is not None:
                mine, theirs = (_stream(outputs) for outputs in (step.decoded(), other))
                payloads = step.flow.nan_payload == "kept"
                compare_bits(tally, f"the first output {what}", mine + 0.0, theirs + 0.0, payloads=payloads)
            else:
                self._compare(tally, step, what, other)

    def layouts(self, backend: Backend, step: Step, tally: Tally) -> None:
        """One operand at a time as a view: bitwise the same outputs, or an error, never misread; gaps stay intact."""
        for layout, operand in layouts_of(step.problem):
            what = f"of a call on {operand} as a view ({layout})"
            if getattr(step.made, operand) is None:
                continue
            try:
                outputs = self.workspaces.again(backend, step.made, step.problem, tally, what, (layout, operand))
            except BreachError:
                raise
            except Exception:  # a refusal may be of any type
                continue
            self._compare(tally, step, what, outputs)

    def unfused(self, backend: Backend, step: Step, tally: Tally) -> dict[str, Any]:
        """The unfused reference on the same inputs: judged by its own dataflow, and the differences of its codes."""
        del backend
        tally.stage = Stage.UNFUSED
        reference = self.workspaces.backend("unfused")
        if not reference.supports(step.problem).ok:
            return {"histogram": {}}
        outputs = self.workspaces.again(reference, step.made, step.problem, tally, "of the unfused reference")
        if outputs is None:
            return {"histogram": {}}
        theirs = Done(step.problem, reference.dataflow(step.problem), step.made, outputs)
        share = self.judge.share(step.problem.tokens)
        for judged in self.judge.tallies(theirs, share):
            tally.add(judged)
        op = step.problem.op
        if not (step.whole and op.residual and op.quantiser == GIVEN_SCALE):
            return {"histogram": {}}  # where both paths make scales of their own, codes are compared by nobody
        within_one = not step.flow.round_squares  # such squares may overflow in fp16
        return {"histogram": code_differences(step.decoded(), outputs, share, tally, within_one=within_one)}

    def graphs(self, backend: Backend, step: Step, tally: Tally) -> None:
        """CUDA only: calls captured in graphs and replayed with changed inputs."""
        tally.add(graphs.replay_graphs(self._kernel(backend, step), step))

    def neighbours(self, backend: Backend, step: Step, tally: Tally) -> None:
        """CUDA only: under PDL, between a producer that triggers early and a consumer right behind."""
        tally.add(overlap.between_neighbours(self._kernel(backend, step), step))

    def streams(self, backend: Backend, step: Step, tally: Tally) -> None:
        """CUDA only: calls from two streams, in turn on one workspace and, where there can be, at once on two."""
        kernel = self._kernel(backend, step)
        if getattr(backend, "one_workspace", False):
            tally.add(overlap.on_two_streams(kernel, None, step))
            return
        second = self.workspaces.kernel(backend, limits_of(step.problem, None), 1)
        tally.add(overlap.on_two_streams(kernel, second, step))

    def hurried(self, backend: Backend, step: Step, tally: Tally) -> None:
        """CUDA only: calls of few rows and of many, queued, while one rank comes late to each."""
        rows = hurried.many_rows(backend, step.problem)
        kernel = self.workspaces.kernel(backend, limits_of(replace(step.problem, tokens=rows, schedule=()), None))
        tally.add(hurried.hurry(kernel, step, self.workspaces.rank.index, rows))

    def _compare(self, tally: Tally, step: Step, what: str, outputs: RankOutputs | None) -> None:
        """Every output of another call, bit by bit with the first one's if both are whole; or each by its enclosure.

        A kernel that is not reproducible by declaration is held to the enclosures alone.
        """
        if outputs is None or not step.whole:
            return
        if not step.flow.reproducible:
            other = Done(step.problem, step.flow, step.made, outputs)
            for judged in self.judge.tallies(other, self.judge.share(step.problem.tokens)):
                shown = [replace(x, context=f"{judged.stage.value} {what} {x.context}") for x in judged.shown]
                tally.add(replace(judged, shown=shown))
            return
        expected = returned.named(step.decoded())
        pairs = [(f"{name} {what}", expected[name], tensor) for name, tensor in returned.named(outputs).items()]
        at_once, payloads = self.workspaces.rank.device.type != "cpu", step.flow.nan_payload == "kept"
        compare_each(tally, pairs, payloads=payloads, at_once=at_once)

    def _kernel(self, backend: Backend, step: Step) -> Kernel:
        return self.workspaces.kernel(backend, limits_of(step.problem, None))


_CHECKS: dict[str, Callable[[Checker, Backend, Step, Tally], dict[str, Any] | None]] = {
    "repeat": Checker.repeat,
    "strategies": Checker.strategies,
    "layouts": Checker.layouts,
    "unfused": Checker.unfused,
    "graphs": Checker.graphs,
    "neighbours": Checker.neighbours,
    "streams": Checker.streams,
    "hurried": Checker.hurried,
}


def _is_named(flow: Dataflow) -> bool:
    """Whether another exchange must have the same sums: nothing of them is left open."""
    return flow.order_free and flow.sum_rounding != "either"


def _stream(outputs: RankOutputs) -> Tensor:
    """The first output of the chain that there is: where it is equal on both exchanges, so is all that follows."""
    first = next(x for x in (outputs.total, outputs.residual, outputs.norm, outputs.scale) if x is not None)
    return first if first.is_floating_point() else first.to(torch.float32)

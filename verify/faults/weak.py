"""Weakened judges: each patches one place of the judgement inside the rank processes, as a real test suite has it.

A weakened judge is noticed when it rejects a right kernel, or passes a case that is known to catch a fault.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor

from fusecheck import verdict
from fusecheck.case import alive, checks, judging
from fusecheck.case.worker import CaseWorker
from fusecheck.dataflow import Dataflow
from fusecheck.formats.element import E4M3, Element
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.interface import RankInputs, RankOutputs
from fusecheck.oracle import Oracle
from fusecheck.problem import Problem
from fusecheck.stages import code, values
from fusecheck.verdict import Stage, Tally


def check_fit(owner: Any, name: str, value: Callable[..., Any]) -> None:
    """Check that what replaces a callable takes every call that it takes.

    Raises:
        AttributeError: it is not there any more, so that nothing would be weakened.
        TypeError: it has parameters that the other has not.
    """
    right = inspect.signature(getattr(owner, name))
    named = {p.name: p.name for p in right.parameters.values() if p.kind is Parameter.KEYWORD_ONLY}
    placed = [p.name for p in right.parameters.values() if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
    try:
        inspect.signature(value).bind(*placed, **named)
    except TypeError as error:
        raise TypeError(f"{name}{inspect.signature(value)} in place of {name}{right}: {error}") from None


def _patch(owner: Any, name: str, value: Callable[..., Any]) -> None:
    """Replace what is there."""
    check_fit(owner, name, value)
    setattr(owner, name, value)


def _without(stage: Stage) -> None:
    """Forget what one stage of the judgement found."""
    right = verdict.judge_rows

    def judge_rows(oracle: Oracle, outputs: RankOutputs, first_row: int) -> list[Tally]:
        tallies: list[Tally] = right(oracle, outputs, first_row)
        return [tally for tally in tallies if tally.stage is not stage]

    _patch(judging, "judge_rows", judge_rows)


def no_residual() -> None:
    """The residual is not looked at."""
    _without(Stage.RESIDUAL)


def no_norm() -> None:
    """The norm is not looked at."""
    _without(Stage.NORM)


def no_quant() -> None:
    """The codes are not looked at."""
    _without(Stage.QUANT)


def no_alive() -> None:
    """Outputs are not poisoned, and nobody looks beyond their ends."""

    def intact(
        arena: alive.Arena,
        made: RankInputs,
        inputs: RankInputs,
        outputs: RankOutputs,
        problem: Problem,
        overwrites: frozenset[str],
    ) -> None:
        del arena, made, inputs, outputs, problem, overwrites

    def suspects(outputs: RankOutputs, problem: Problem) -> dict[str, Tensor]:
        del outputs, problem
        return {}

    _patch(alive, "intact", intact)
    _patch(alive, "suspects", suspects)


def no_again() -> None:
    """Nothing is run a second time."""

    def compare_bits(tally: Tally, what: str, first: Tensor, second: Tensor, *, payloads: bool = False) -> None:
        del tally, what, first, second, payloads

    _patch(checks, "compare_bits", compare_bits)


def rank_zero_only() -> None:
    """Only rank 0's outputs are looked at, in all their rows, and ranks are not compared."""
    right = CaseWorker.run

    def run(self: CaseWorker, case: dict[str, Any]) -> dict[str, Any]:
        _patch(self.judge, "share", lambda tokens: range(0 if self.rank.index else tokens))
        result: dict[str, Any] = right(self, case)
        for record in result["calls"]:
            record.pop("digests", None)
            record["tallies"] = record["tallies"] if self.rank.index == 0 else []
        return result

    _patch(CaseWorker, "run", run)


def accepts_nan() -> None:
    """A NaN is never a mismatch."""
    right_values, right_codes = values.admits, code.admits_codes

    def admits(got: Tensor, nominal: Tensor, lo: Tensor, hi: Tensor, flow: Dataflow) -> Tensor:
        return right_values(got, nominal, lo, hi, flow) | got.isnan()

    def admits_codes(got: Tensor, nominal: Tensor, lo: Tensor, hi: Tensor, element: Element = E4M3) -> Tensor:
        return right_codes(got, nominal, lo, hi, element) | element.is_nan(got)

    _patch(values, "admits", admits)
    _patch(code, "admits_codes", admits_codes)


def wide_tolerance() -> None:
    """Residual and norm pass within 0.8 + 0.01 |nominal|."""

    def admits(got: Tensor, nominal: Tensor, lo: Tensor, hi: Tensor, flow: Dataflow) -> Tensor:
        del lo, hi, flow
        distance = (got.double() - nominal.double()).abs()
        return (distance <= 0.8 + 0.01 * nominal.double().abs()) | (got.isnan() & nominal.isnan()) | (got == nominal)

    _patch(values, "admits", admits)


def one_percent() -> None:
    """One element of a hundred may be anything."""
    right = verdict.judge_rows

    def judge_rows(oracle: Oracle, outputs: RankOutputs, first_row: int) -> list[Tally]:
        tallies = right(oracle, outputs, first_row)
        return [replace(t, outside=0) if t.outside <= 0.01 * t.elements else t for t in tallies]

    _patch(judging, "judge_rows", judge_rows)


def unsaturated_reference() -> None:
    """The reference casts without clamping, so that it expects NaN beyond 464."""

    def unclamped(flow: Dataflow, operands: Any) -> Oracle:
        return Oracle(replace(flow, saturate=False), operands)

    _patch(judging, "Oracle", unclamped)


def equal_shards() -> None:
    """All ranks hold the same partial sums."""
    right = Inputs.partial

    def partial(self: Inputs, rank: int, *others: Any) -> Tensor:
        del rank
        return right(self, 0, *others)

    _patch(Inputs, "partial", partial)


def scale_one() -> None:
    """Every scale is 1."""

    def scale(self: Inputs) -> Tensor:
        return torch.ones(1, dtype=torch.float32, device=self.device)

    _patch(Inputs, "scale", scale)


def no_warm_start() -> None:
    """Only the last call of a schedule is looked at, after warm-up calls with the same data."""
    right = Problem.calls

    def calls(self: Problem) -> list[Any]:
        last = right(self)[-1]
        return [last] * max(1, len(self.schedule))

    _patch(Problem, "calls", calls)

"""The check of hurried calls against a kernel on the CPU: who is late when, which rows are asked, what is noticed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusecheck.backends.emulated import EmulatedBackend
from fusecheck.case import alive, hurried
from fusecheck.case.calls import Step
from fusecheck.case.variants import first_rows, repeated_rows
from fusecheck.dataflow import DATAFLOWS
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.interface import FusionOp, Operation, RankInputs, RankOutputs, Strategy, Support
from fusecheck.kernel.gpu_checks import GpuChecks
from fusecheck.kernel.table import Case
from fusecheck.problem import Call, Problem

CPU = torch.device("cpu")


class _Device:
    """Keeps what is put on the device's stream between two waits."""

    def __init__(self) -> None:
        self.queued: list[str] = []

    def sleep(self, cycles: int) -> None:
        asleep = hurried.SHORTEST <= cycles <= hurried.QUEUED
        assert asleep or cycles == hurried.LATE
        self.queued.append("all sleep" if asleep else "late")

    def wait(self) -> None:
        self.queued.append("wait")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> _Device:
    made = _Device()
    monkeypatch.setattr(torch.cuda, "_sleep", made.sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", made.wait)
    return made


class _Kernel:
    """The sum of the rank's own operands; says on the stream how many rows a call has."""

    def __init__(self, device: _Device) -> None:
        self.device = device

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        del op, strategy
        self.device.queued.append(f"{len(inputs.partial)} rows")
        return RankOutputs(inputs.partial + inputs.residual)

    def close(self) -> None:
        """Nothing was taken."""


class _ReadsTheCallBefore(_Kernel):
    """Where nothing was waited for since the last call, the last row of many is that of the call before."""

    last: torch.Tensor | None = None

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        hurries = self.device.queued[-1:] not in ([], ["wait"], ["all sleep"])
        outputs = super().run(inputs, op=op, strategy=strategy)
        if hurries and self.last is not None and len(inputs.partial) > len(self.last):
            outputs.residual[-1] = self.last
        self.last = outputs.residual[-1:]
        return outputs


def _step(op: str = "RESIDUAL_RMS_NORM") -> Step:
    problem = Problem(op=Operation.named(op), tokens=5, hidden=64, world_size=2)
    made, arena = Inputs(problem, CPU).of_rank(0), alive.Arena(CPU)
    return Step(Call(5), problem, DATAFLOWS["unfused"], made, arena.guard(made), arena)


def test_all_calls_are_queued_behind_a_sleep_and_each_outer_rank_comes_late_to_each_once(
    device: _Device,
) -> None:
    kernel: Any = _Kernel(device)
    tally = hurried.hurry(kernel, _step(), 0, 40)
    assert tally.outside == 0
    assert tally.elements == 2 * hurried.TURNS * (3 + 40) * 64
    late = ["all sleep", *(["late", "3 rows", "late", "40 rows"] * hurried.TURNS), "wait"]
    other = ["all sleep", *(["3 rows", "40 rows"] * hurried.TURNS), "wait"]
    waited_for = ["3 rows", "wait", "40 rows", "wait"]
    rehearsal = [*(["3 rows", "40 rows"] * hurried.TURNS), "wait"]
    assert device.queued == [*waited_for, *rehearsal, *late, *other]


@pytest.mark.parametrize(
    ("seconds", "cycles"), [(0.0001, hurried.SHORTEST), (0.004, 32_000_000), (1.0, hurried.QUEUED)]
)
def test_the_sleep_is_four_times_as_long_as_a_host_takes_to_launch_the_calls(
    device: _Device, monkeypatch: pytest.MonkeyPatch, seconds: float, cycles: int
) -> None:
    slept: list[int] = []
    times = iter([5.0, 5.0 + seconds])
    monkeypatch.setattr(hurried, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    kernel: Any = _Kernel(device)
    hurried.hurry(kernel, _step(), 1, 40)
    assert [each for each in slept if each != hurried.LATE] == [pytest.approx(cycles, rel=1e-6)] * 2


def test_a_rank_that_reads_what_the_call_before_left_is_found_and_the_call_is_named(device: _Device) -> None:
    kernel: Any = _ReadsTheCallBefore(device)
    tally = hurried.hurry(kernel, _step(), 1, 40)
    assert tally.outside > 0
    assert tally.shown[0].context.startswith("40 rows, rank 0 late, call 1: residual")


def test_a_hurried_call_that_writes_nothing_is_found_where_a_right_call_left_its_outputs(device: _Device) -> None:
    class _WritesWhenWaitedFor(_Kernel):
        """All calls of one size return the same memory; hurried ones leave it as it is."""

        kept: dict[int, RankOutputs] = {}  # noqa: RUF012

        def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
            hurries = "all sleep" in device.queued
            made = super().run(inputs, op=op, strategy=strategy)
            return self.kept[len(inputs.partial)] if hurries else self.kept.setdefault(len(inputs.partial), made)

    kernel: Any = _WritesWhenWaitedFor(device)
    assert hurried.hurry(kernel, _step(), 0, 40).outside == 2 * hurried.TURNS * (3 + 40) * 64


@pytest.mark.parametrize(
    "op", ["RESIDUAL_RMS_NORM", "MOE_REDUCTION_RESIDUAL_RMS_NORM", "MOE_FINALIZE_RESIDUAL_RMS_NORM"]
)
def test_repeated_rows_are_those_of_the_case_again_from_the_first(op: str) -> None:
    made = _step(op).made
    many = repeated_rows(made, 12)
    assert torch.equal(many.residual, torch.cat([made.residual, made.residual, made.residual[:2]]))
    again = first_rows(many, 5)
    if made.experts is None:
        assert torch.equal(again.partial, made.partial)
    else:
        assert again.experts is not None
        for name in ("tokens", "scale", "rows", "shared"):
            before, after = getattr(made.experts, name), getattr(again.experts, name)
            assert (before is None and after is None) or torch.equal(before, after)


def test_the_long_calls_have_as_many_rows_as_the_kernel_takes_and_those_of_the_case_at_least() -> None:
    class _AtMost(EmulatedBackend):
        most = 300

        def supports(self, problem: Problem) -> Support:
            return Support(ok=problem.tokens <= self.most)

    problem = Problem(tokens=129, hidden=64, world_size=2)
    backend = _AtMost("flashinfer")
    assert hurried.many_rows(EmulatedBackend("flashinfer"), problem) == hurried.ROWS
    assert hurried.many_rows(backend, problem) == 256
    backend.most = 129
    assert hurried.many_rows(backend, problem) == 129
    assert hurried.many_rows(EmulatedBackend("flashinfer"), replace(problem, hidden=16384)) == 512


def test_a_case_is_hurried_once_for_its_operation_and_exchange_and_repeated_ones_are_captured() -> None:
    checks = GpuChecks(pdl=True)
    plain = Problem(tokens=3, hidden=64, world_size=2)
    assert checks.of(Case(plain, ("repeat",))) == ["graphs", "streams", "neighbours", "hurried"]
    assert checks.of(Case(replace(plain, tokens=5), ("repeat",))) == ["graphs", "streams", "neighbours"]
    assert checks.of(Case(replace(plain, strategy=Strategy.TWOSHOT), ("unfused",))) == ["hurried"]
    assert GpuChecks(pdl=False).of(Case(plain, ("repeat",))) == ["graphs", "streams", "hurried"]

"""How often workspaces are opened on GPUs, and that schedules find fresh ones all the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

from fusecheck.backends import flashinfer
from fusecheck.backends.checked import CheckedKernel
from fusecheck.backends.flashinfer import FlashInferBackend
from fusecheck.case.calls import limits_of
from fusecheck.case.fresh import FreshWorkspaces
from fusecheck.case.hurried import many_rows
from fusecheck.case.run import request
from fusecheck.case.worker import CaseWorker
from fusecheck.case.workspaces import Workspaces
from fusecheck.dataflow import DATAFLOWS, Dataflow
from fusecheck.errors import RAISED_IN
from fusecheck.interface import Kernel, Limits, Operation, Rank, RankInputs, RankOutputs, Strategy, Support
from fusecheck.kernel.core import core_plan
from fusecheck.kernel.gpu_checks import GpuChecks
from fusecheck.kernel.plan import Plan
from fusecheck.kernel.table import Case
from fusecheck.operations import FusionOp
from fusecheck.problem import Call, Problem
from fusecheck.property_tests.suite.lone_rank import LoneRank

BF16, FP16 = torch.bfloat16, torch.float16
GROUP: Any = object()


def _on_gpu(world_size: int = 2) -> LoneRank:
    """A process with a GPU of its own, which nobody asks anything of."""
    return LoneRank(world_size=world_size, device=torch.device("cuda"), group=GROUP)


class Plain:
    """A backend whose workspaces note what happens to them, and cannot begin anew."""

    name = "plain"
    most = 2**30

    def __init__(self) -> None:
        self.events: list[tuple[str, int, int]] = []

    def supports(self, problem: Problem) -> Support:
        """Up to so many rows."""
        return Support(ok=problem.tokens <= self.most)

    def dataflow(self, problem: Problem) -> Dataflow:
        """Any."""
        del problem
        return DATAFLOWS["unfused"]

    def open(self, rank: Rank, limits: Limits) -> Kernel:
        """Note the limits."""
        del rank
        self.events.append(("open", limits.max_tokens, limits.hidden))
        return _Kernel(self.events)


class Renewable(Plain):
    """The same of a backend whose kernels can."""

    name = "renewable"

    def open(self, rank: Rank, limits: Limits) -> Kernel:
        """Note the limits."""
        super().open(rank, limits)
        return _RenewableKernel(self.events)


class _Kernel:
    def __init__(self, events: list[tuple[str, int, int]]) -> None:
        self._events = events

    def run(self, inputs: RankInputs, *, op: Operation, strategy: Strategy) -> RankOutputs:
        raise AssertionError((inputs, op, strategy))

    def close(self) -> None:
        self._events.append(("close", 0, 0))


class _RenewableKernel(_Kernel):
    def renew(self, limits: Limits) -> None:
        self._events.append(("renew", limits.max_tokens, limits.hidden))


class Shared(Renewable):
    """The same; what every instance opens is noted in one place, and its kernels return zeros."""

    name = "shared"
    noted: ClassVar[list[tuple[str, int, int]]] = []

    def __init__(self) -> None:
        self.events = self.noted

    def open(self, rank: Rank, limits: Limits) -> Kernel:
        """Note the limits."""
        Plain.open(self, rank, limits)
        return _Zeros(self.events)


class _Zeros(_RenewableKernel):
    def run(self, inputs: RankInputs, *, op: Operation, strategy: Strategy) -> RankOutputs:
        return RankOutputs(torch.zeros_like(inputs.partial), torch.zeros_like(inputs.partial))


@pytest.mark.parametrize(("world_size", "rows"), [(2, 2048), (4, 1024), (8, 512)])
def test_the_first_workspace_on_a_gpu_has_room_for_later_calls(world_size: int, rows: int) -> None:
    backend, spaces = Plain(), Workspaces(_on_gpu(world_size), foresee=True)
    first = spaces.kernel(backend, Limits(3, 520, BF16))
    assert [spaces.kernel(backend, Limits(*shape, BF16)) for shape in ((rows, 4096), (12, 16384))] == [first, first]
    assert backend.events == [("open", rows, 16384)]


def test_what_has_no_room_beside_the_rest_has_a_workspace_that_grows() -> None:
    backend, spaces = Plain(), Workspaces(_on_gpu(), foresee=True)
    for shape in ((3, 520), (4097, 136), (4097, 264), (8192, 64), (5, 4096)):
        spaces.kernel(backend, Limits(*shape, BF16))
    assert backend.events == [("open", 2048, 16384), ("open", 4097, 136), ("close", 0, 0), ("open", 8192, 512)]


def test_no_more_is_opened_than_asked_on_a_cpu_or_virtual_ranks_or_of_a_kernel_that_takes_no_more() -> None:
    short = Plain()
    short.most = 100
    virtual = LoneRank(device=torch.device("cuda"))
    for backend, rank in ((Plain(), LoneRank()), (Plain(), virtual), (short, _on_gpu())):
        Workspaces(rank, foresee=True).kernel(backend, Limits(3, 520, BF16))
        assert backend.events == [("open", 3, 520)]


def test_a_kernel_that_can_begin_anew_does_so_for_each_case_at_the_size_of_the_case() -> None:
    backend, spaces = Renewable(), FreshWorkspaces(LoneRank())
    for limits in (Limits(64, 136, FP16), Limits(64, 264, BF16), Limits(12, 64, BF16)):
        spaces.refresh(backend)
        assert spaces.kernel(backend, limits) is spaces.kernel(backend, limits)
        spaces.refresh(backend)
    grown = [("close", 0, 0), ("open", 64, 512), ("renew", 64, 264)]
    assert backend.events == [("open", 64, 136), *grown, ("renew", 12, 64)]


def test_schedules_one_after_the_other_begin_anew_on_one_workspace_beside_that_of_the_other_cases() -> None:
    worker, name = CaseWorker(LoneRank()), f"{__name__}:Shared"
    plain = Problem(op=FusionOp.RESIDUAL_RMS_NORM, tokens=4, hidden=64)
    for problem in (plain, replace(plain, schedule=(Call(2), Call(9))), replace(plain, schedule=(Call(5),)), plain):
        worker.run(request(problem, name))
    assert Shared.noted == [("open", 4, 64), ("open", 9, 64), ("renew", 5, 64)]


def test_what_a_kernel_raises_as_it_begins_anew_is_said_to_come_from_there() -> None:
    class _Fails(_Kernel):
        def renew(self, limits: Limits) -> None:
            raise RuntimeError(limits.hidden)

    with pytest.raises(RuntimeError) as raised:
        CheckedKernel("fails", _Fails([])).renew(Limits(64, 136, FP16))
    assert getattr(raised.value, RAISED_IN)[0] == "renew"
    assert hasattr(CheckedKernel("able", _RenewableKernel([])), "renew")
    assert not hasattr(CheckedKernel("plain", _Kernel([])), "renew")


class RenewsNothing(Plain):
    """A backend whose kernels say that they cannot."""

    name = "nothing"

    def open(self, rank: Rank, limits: Limits) -> Kernel:
        """A kernel between checks, as a worker gets it."""
        kernel: Any = super().open(rank, limits)
        kernel.renew = None
        return CheckedKernel(self.name, kernel)


class OnlyOne(Renewable):
    """A backend whose kernels can, and of which other cases find the same workspace."""

    name, one_workspace = "one", True


class AtFirst(Renewable):
    """A backend whose first kernel alone can."""

    name = "first"

    def open(self, rank: Rank, limits: Limits) -> Kernel:
        """Note the limits."""
        return super().open(rank, limits) if not self.events else Plain.open(self, rank, limits)


@pytest.mark.parametrize("kind", [Plain, RenewsNothing, OnlyOne])
def test_a_kernel_that_cannot_begin_anew_is_opened_for_each_case(kind: type[Plain]) -> None:
    backend, spaces = kind(), FreshWorkspaces(LoneRank())
    for _ in range(2):
        spaces.refresh(backend)
        assert spaces.kernel(backend, Limits(64, 136, FP16)) is spaces.kernel(backend, Limits(64, 136, FP16))
        spaces.refresh(backend)
    assert backend.events == [("open", 64, 136), ("close", 0, 0)] * 2


def test_a_larger_workspace_that_cannot_begin_anew_is_not_asked_to() -> None:
    backend, spaces = AtFirst(), FreshWorkspaces(LoneRank())
    spaces.kernel(backend, Limits(64, 136, FP16))
    spaces.kernel(backend, Limits(64, 264, FP16))
    assert backend.events == [("open", 64, 136), ("close", 0, 0), ("open", 64, 512)]


def test_a_call_that_reopens_its_workspace_has_one_that_was_just_opened() -> None:
    backend, spaces = Renewable(), FreshWorkspaces(LoneRank())
    spaces.kernel(backend, Limits(64, 136, FP16))
    spaces.kernel(backend, Limits(64, 136, FP16), 1)
    spaces.close(backend.name, 0)
    spaces.kernel(backend, Limits(64, 136, FP16))
    assert backend.events == [("open", 64, 136), ("open", 64, 136), ("close", 0, 0), ("open", 64, 136)]


def test_a_run_of_flashinfer_opens_at_most_twenty_workspaces_for_its_four_hundred_cases(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noted = Renewable()
    monkeypatch.setattr(flashinfer, "installed", lambda: "0.7.4")
    monkeypatch.setattr(flashinfer, "refused_gpu", lambda devices: None)
    monkeypatch.setattr(flashinfer, "capability", lambda: 9)  # Hopper
    monkeypatch.setattr(FlashInferBackend, "open", lambda self, rank, limits: noted.open(rank, limits))
    backend = FlashInferBackend()
    kept, own, checks = Workspaces(_on_gpu(), foresee=True), FreshWorkspaces(_on_gpu()), GpuChecks(pdl=False)
    cases = [
        case
        for case in core_plan(Plan(whole=True).about(backend), 2, lambda problem: backend.supports(problem).ok)
        if backend.supports(case.problem).ok
    ]
    assert len(cases) > 400
    for case in cases:
        if case.problem.schedule:
            _run_schedule(own, backend, case.problem)
        else:
            _run_case(kept, backend, case, checks.of(case))
    kinds = [kind for kind, *_ in noted.events]
    assert 10 < kinds.count("open") <= 20
    assert 20 < kinds.count("renew") < 40


def _run_schedule(spaces: FreshWorkspaces, backend: FlashInferBackend, problem: Problem) -> None:
    """Ask for the workspaces that a schedule asks for."""
    spaces.refresh(backend)
    for call, _ in problem.calls():
        if call.reopen:
            spaces.close(backend.name, call.workspace)
        spaces.kernel(backend, limits_of(problem, None), call.workspace)
    spaces.refresh(backend)


def _run_case(spaces: Workspaces, backend: FlashInferBackend, case: Case, more: list[str]) -> None:
    """Ask for the workspaces that a case and its checks ask for."""
    limits = limits_of(case.problem, None)
    spaces.kernel(backend, limits)
    if "streams" in more:
        spaces.kernel(backend, limits, 1)
    if "hurried" in more:
        rows = many_rows(backend, case.problem)
        spaces.kernel(backend, limits_of(replace(case.problem, tokens=rows), None))

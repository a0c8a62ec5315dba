"""What keeps a case short on a GPU: workspaces that stay open, and comparisons that wait for the device once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusecheck.case import alive, compare, eager, returned
from fusecheck.case.calls import Step
from fusecheck.case.compare import same_bits
from fusecheck.case.run import request
from fusecheck.case.worker import CaseWorker
from fusecheck.case.workspaces import ROOM, Workspaces
from fusecheck.dataflow import DATAFLOWS, Dataflow
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.interface import Limits, Operation, Rank, RankInputs, RankOutputs, Strategy, Support
from fusecheck.onepass.arena import FlatArena
from fusecheck.operations import FusionOp
from fusecheck.problem import Call, Problem
from fusecheck.property_tests.suite.family import emulated
from fusecheck.property_tests.suite.lone_rank import CPU, LoneRank
from fusecheck.verdict import Stage, Tally, raw

SMALL = Problem(op=FusionOp.RESIDUAL_RMS_NORM, tokens=4, hidden=64)


class Counted:
    """A backend whose workspaces note what they were opened for, and whether they are open."""

    name = "counted"
    opened: tuple[tuple[int, int], ...] = ()
    closed = 0

    def supports(self, problem: Problem) -> Support:
        """Everything."""
        del problem
        return Support(ok=True)

    def dataflow(self, problem: Problem) -> Dataflow:
        """Any."""
        del problem
        return DATAFLOWS["unfused"]

    def open(self, rank: Rank, limits: Limits) -> Counted:
        """Note the limits."""
        del rank
        Counted.opened = (*Counted.opened, (limits.max_tokens, limits.hidden))
        return Counted()

    def run(self, inputs: RankInputs, *, op: Operation, strategy: Strategy) -> RankOutputs:
        """Zeros: nobody reads the verdict here."""
        del op, strategy
        return RankOutputs(torch.zeros_like(inputs.partial), torch.zeros_like(inputs.partial))

    def close(self) -> None:
        """Note it."""
        Counted.closed += 1


@pytest.fixture(autouse=True)
def nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counted, "opened", ())
    monkeypatch.setattr(Counted, "closed", 0)


def _opener() -> Callable[[int, int], Any]:
    spaces = Workspaces(LoneRank())
    return lambda tokens, hidden: spaces.kernel(Counted(), Limits(tokens, hidden, torch.bfloat16))


def test_a_workspace_that_takes_the_place_of_another_serves_the_calls_of_both_and_longer_ones() -> None:
    open_for = _opener()
    first, second = open_for(3, 520), open_for(5, 72)
    assert first is not second
    assert Counted.opened == ((3, 520), (8, 1024))
    assert open_for(8, 600) is second
    assert Counted.closed == 1


def test_shapes_that_have_no_room_together_have_a_workspace_each_and_none_is_opened_twice() -> None:
    open_for = _opener()
    wide, long = open_for(1, 16384), open_for(4096, 64)
    assert ROOM < 4096 * 16384
    assert [open_for(1, 16384), open_for(4096, 64)] == [wide, long]
    assert Counted.opened == ((1, 16384), (4096, 64))
    assert Counted.closed == 0


def test_a_backend_of_one_workspace_has_none_beside_it_and_none_while_a_schedule_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Counted, "one_workspace", True, raising=False)
    open_for = _opener()
    open_for(1, 16384)
    open_for(4096, 64)
    assert Counted.opened == ((1, 16384), (4096, 64))
    assert Counted.closed == 1
    worker, name = CaseWorker(LoneRank()), f"{__name__}:Counted"
    worker.run(request(SMALL, name))
    worker.run(request(replace(SMALL, schedule=(Call(2),)), name))
    assert Counted.closed == 3


def test_a_call_beyond_the_room_has_a_workspace_of_its_size_and_the_next_larger_one_replaces_that() -> None:
    open_for = _opener()
    small, large = open_for(4, 64), open_for(ROOM, 64)
    assert [open_for(4, 64), open_for(ROOM, 64)] == [small, large]
    open_for(ROOM, 128)
    assert Counted.opened == ((4, 64), (ROOM, 64), (ROOM, 128))
    assert Counted.closed == 1


def test_a_schedule_has_a_workspace_of_its_own_and_size_and_that_of_the_other_cases_stays_open() -> None:
    worker, name = CaseWorker(LoneRank()), f"{__name__}:Counted"
    schedule = replace(SMALL, schedule=(Call(2), Call(3)))
    for problem in (SMALL, schedule, SMALL, schedule):
        worker.run(request(problem, name))
    assert Counted.opened == ((4, 64),) * 3
    assert Counted.closed == 2


class _Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "equal", "nonzero")
        return func(*args, **(kwargs or {}))


OPS = ("RESIDUAL_RMS_NORM_OUT_QUANT_FP8", "RESIDUAL_RMS_NORM_OUT_QUANT_MXFP8", "RESIDUAL_RMS_NORM_OUT_QUANT_MXFP4")


def _returned(op: str) -> tuple[Step, list[eager.Pair]]:
    """A call, and eight that returned the same, each with what was kept of the first."""
    problem = Problem(op=Operation.named(op), tokens=5, hidden=64)
    flow = DATAFLOWS["flashinfer-fp32"]
    made, arena = Inputs(problem, CPU).of_rank(0), alive.Arena(CPU)
    step = Step(Call(5), problem, flow, made, arena.guard(made), arena)
    kept = eager.copied(emulated(problem, flow), step)
    return step, [(f"call {call}:", kept, emulated(problem, flow)) for call in range(8)]


def _one_by_one(step: Step, pairs: list[eager.Pair]) -> Tally:
    tally = Tally(Stage.AGAIN)
    for what, expected, got in pairs:
        first, second = (returned.named(each) for each in (expected, returned.decoded(got, step.problem)))
        for name in second:
            compare.compare_bits(tally, f"{what} {name}", first[name], second[name], payloads=False)
    return tally


@pytest.mark.parametrize("op", OPS)
def test_calls_that_returned_the_same_are_counted_with_one_wait_for_the_device(op: str) -> None:
    step, pairs = _returned(op)
    tally = Tally(Stage.AGAIN)
    with _Waits() as waits:  # type: ignore[no-untyped-call]
        eager.compare_outputs(tally, step, pairs)
    assert waits.count == 1
    assert tally == _one_by_one(step, pairs)
    assert tally.elements == sum(
        tensor.numel() for _, _, got in pairs for tensor in returned.named(returned.decoded(got, step.problem)).values()
    )


@pytest.mark.parametrize("op", OPS)
def test_one_bit_of_one_call_is_found_where_it_is(op: str) -> None:
    step, pairs = _returned(op)
    raw(pairs[6][2].quant)[3, 5] ^= 1  # type: ignore[arg-type]
    tally = Tally(Stage.AGAIN)
    eager.compare_outputs(tally, step, pairs)
    assert tally.outside == 1
    assert tally.shown[0].context == "call 6: quant"
    assert tally == _one_by_one(step, pairs)


def test_a_nan_of_another_payload_is_no_difference_where_no_payload_is_declared() -> None:
    step, pairs = _returned(OPS[0])
    _, kept, other = pairs[4]
    for outputs, bits in ((kept, 0x7FC0), (other, 0x7FC1)):
        assert outputs.norm is not None
        raw(outputs.norm)[0, 0] = bits
    changed = [(what, kept, replace(got, norm=other.norm)) for what, _, got in pairs]
    for flow, outside in (
        (replace(step.flow, nan_payload="any"), 0),
        (replace(step.flow, nan_payload="kept"), 8),
    ):
        tally = Tally(Stage.AGAIN)
        eager.compare_outputs(tally, replace(step, flow=flow), changed)
        assert tally.outside == outside


@pytest.mark.parametrize("copied", [1, 100, 2**26])
@pytest.mark.parametrize("place", [None, 0, 1, 2])
def test_tensors_are_the_same_in_all_bits_or_not(
    monkeypatch: pytest.MonkeyPatch, copied: int, place: int | None
) -> None:
    monkeypatch.setattr(compare, "COPIED", copied)
    first = [torch.full((3, 8), torch.nan, dtype=torch.bfloat16), torch.ones(40), torch.zeros(7, dtype=torch.uint8)]
    second = [tensor.clone() for tensor in first]
    if place is not None:
        second[place].view(torch.uint8).view(-1)[-1] ^= 1
    assert same_bits(list(zip(first, second, strict=True))) == (place is None)


def test_tensors_of_another_shape_or_dtype_are_not_the_same() -> None:
    zeros = torch.zeros(4, 6, dtype=torch.int16)
    assert not same_bits([(zeros, zeros.view(6, 4))])
    assert not same_bits([(zeros, zeros.view(torch.bfloat16))])
    assert same_bits([(zeros, zeros.t().contiguous().t())])
    assert same_bits([])


@pytest.mark.parametrize("kind", ["flat", "apart"])
@pytest.mark.parametrize("name", ["residual", "an output"])
@pytest.mark.parametrize("side", [-1, 1])
def test_a_write_beside_a_buffer_shows_in_the_margins(kind: str, name: str, side: int) -> None:
    arena = FlatArena(SMALL, CPU) if kind == "flat" else alive.Arena(CPU)
    guarded = arena.guard(Inputs(SMALL, CPU).of_rank(0))
    output = arena.empty((4, 64), torch.bfloat16, "an output")
    assert same_bits(arena.margins())
    buffer = guarded.residual if name == "residual" else output
    beside = torch.as_strided(buffer, (1,), (1,), buffer.storage_offset() + (buffer.numel() if side > 0 else -1))
    beside.view(torch.int16).fill_(0)
    assert not same_bits(arena.margins())

"""What runs beside a call, against a stand-in for CUDA streams that runs what was launched as late as it may."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fusecheck.backends.unfused import quantise, rms_norm
from fusecheck.case import alive, overlap, returned
from fusecheck.case.calls import Step
from fusecheck.dataflow import DATAFLOWS
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.interface import FusionOp, RankInputs, RankOutputs, Strategy
from fusecheck.problem import Call, Problem

CPU = torch.device("cpu")


class _Stream:
    """Work in order; `wait_stream` puts what the other stream holds by now before what comes next here."""

    current: _Stream
    made: list[_Stream]

    def __init__(self) -> None:
        self.work: list[Callable[[], None] | tuple[_Stream, int]] = []
        self.done = 0
        _Stream.made.append(self)

    def wait_stream(self, other: _Stream) -> None:
        self.work.append((other, len(other.work)))

    def step(self) -> bool:
        """Do the next piece of work, unless there is none or it has to wait."""
        if self.done == len(self.work):
            return False
        piece = self.work[self.done]
        if isinstance(piece, tuple):
            if piece[0].done < piece[1]:
                return False
        else:
            piece()
        self.done += 1
        return True


def _run_all() -> None:
    """A piece of each stream in turn, the latest stream first, until nothing is left."""
    while sum(stream.step() for stream in reversed(_Stream.made)):
        pass


@contextmanager
def _on(stream: _Stream) -> Iterator[None]:
    before, _Stream.current = _Stream.current, stream
    try:
        yield
    finally:
        _Stream.current = before


class _Launch:
    """Stands for a Triton kernel that copies: `launch[grid](source, target, ...)`."""

    def __getitem__(self, _grid: tuple[int, ...]) -> Callable[..., None]:
        return self.copy

    def copy(self, source: Tensor, target: Tensor, *_: int, **__: object) -> None:
        _Stream.current.work.append(lambda: _set(target, source))


def _set(target: Tensor, source: Tensor) -> None:
    target.copy_(source)


class _Kernel:
    """Writes its sum into a scratch, then reads it there and makes the outputs: two pieces of work on the stream."""

    def __init__(self, scratch: list[Tensor] | None = None) -> None:
        self.scratch = scratch if scratch is not None else [torch.empty(0)]

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        del op, strategy
        partial = inputs.partial
        outputs = RankOutputs(
            torch.zeros_like(partial), torch.zeros_like(partial), torch.zeros_like(partial, dtype=torch.float8_e4m3fn)
        )
        self.launch(inputs, outputs)
        return outputs

    def launch(self, inputs: RankInputs, outputs: RankOutputs) -> None:
        _Stream.current.work += [lambda: self.put(inputs), lambda: self.finish(inputs, outputs)]

    def put(self, inputs: RankInputs) -> None:
        self.scratch[0] = inputs.partial + inputs.residual

    def finish(self, inputs: RankInputs, outputs: RankOutputs) -> None:
        stream = self.scratch[0]
        norm = rms_norm(stream, inputs.gamma, inputs.eps, inputs.weight_bias)
        fresh = RankOutputs(stream, norm, quantise(norm, inputs.scale))
        for name, tensor in returned.named(outputs).items():
            _set(tensor, getattr(fresh, name))

    def close(self) -> None:
        """Nothing was taken."""


class _ReadsEarly(_Kernel):
    """Takes its residual when it is launched, before the producer has written it."""

    def launch(self, inputs: RankInputs, outputs: RankOutputs) -> None:
        early = RankInputs(
            inputs.partial, inputs.residual.clone(), inputs.gamma, inputs.scale, inputs.eps, inputs.weight_bias
        )
        super().launch(early, outputs)


class _StoresLate(_Kernel):
    """Stores after the point at which those behind it believe it done."""

    def launch(self, inputs: RankInputs, outputs: RankOutputs) -> None:
        late = _Stream()
        late.wait_stream(_Stream.current)
        late.work += [lambda: None, lambda: None, lambda: self.put(inputs), lambda: self.finish(inputs, outputs)]


class _Refuses(_Kernel):
    """Serves the stream on which it was opened, and no other."""

    def __init__(self) -> None:
        super().__init__()
        self.home = _Stream.current

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        if _Stream.current is not self.home:
            raise ValueError("a second stream, expected that of the first call")
        return super().run(inputs, op=op, strategy=strategy)


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Stream, "made", [], raising=False)
    monkeypatch.setattr(_Stream, "current", _Stream(), raising=False)
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "stream", _on)
    monkeypatch.setattr(torch.cuda, "synchronize", _run_all)
    neighbours = SimpleNamespace(late_copy=_Launch(), waiting_copy=_Launch())
    monkeypatch.setitem(sys.modules, "fusecheck.onepass.neighbours", neighbours)
    monkeypatch.setattr("fusecheck.onepass.neighbours", neighbours, raising=False)


def _step(tokens: int = 6) -> Step:
    problem = Problem(tokens=tokens, hidden=64, world_size=2)
    made, arena = Inputs(problem, CPU).of_rank(0), alive.Arena(CPU)
    return Step(Call(tokens), problem, DATAFLOWS["unfused"], made, arena.guard(made), arena)


def test_a_kernel_between_a_late_producer_and_an_early_consumer_returns_the_bits_of_a_call_alone() -> None:
    tally = overlap.between_neighbours(_Kernel(), _step())
    assert tally.outside == 0
    calls = len(overlap.LATE) * 3
    assert tally.elements == calls * 2 * 3 * 6 * 64, "every output, as returned and as seen, at each late operand"


@pytest.mark.parametrize(
    ("kind", "place"),
    [(_ReadsEarly, "residual written by the kernel before"), (_StoresLate, "residual read by the kernel behind")],
)
def test_a_kernel_that_reads_too_early_or_stores_too_late_is_found_and_named(kind: type[_Kernel], place: str) -> None:
    tally = overlap.between_neighbours(kind(), _step())
    assert tally.outside > 0
    assert tally.shown[0].context.startswith(place)


def test_two_streams_are_right_in_turn_on_one_workspace_and_at_once_on_two() -> None:
    tally = overlap.on_two_streams(_Kernel(), _Kernel(), _step())
    assert tally.outside == 0
    assert tally.elements == 2 * overlap.TURNS * 3 * 64 * (6 + 3), "three outputs of all rows in turn, of few at once"


def test_workspaces_that_share_a_scratch_are_found_when_two_streams_use_them_at_once() -> None:
    shared = [torch.empty(0)]
    tally = overlap.on_two_streams(_Kernel(shared), _Kernel(shared), _step())
    assert tally.outside > 0
    assert tally.shown[0].context.startswith("at once on two streams")


def test_calls_that_ignore_the_order_of_the_streams_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Stream, "wait_stream", lambda _self, _other: None)
    tally = overlap.on_two_streams(_Kernel(), _Kernel(), _step())
    assert tally.shown[0].context.startswith("in turn on two streams")


def test_a_kernel_that_refuses_a_second_stream_is_right() -> None:
    assert overlap.on_two_streams(_Refuses(), _Refuses(), _step()).outside == 0

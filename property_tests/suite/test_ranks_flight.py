"""When a call is hung: a compiler makes its time begin anew, and nothing else does."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fusecheck.ranks import FailureKind, Pool, culprits, flight
from fusecheck.ranks.flight import ASK_SECONDS, ASKS, COMPILE_SECONDS, Flight
from fusecheck.ranks.replies import crash

SECONDS = 20.0
EVERY = SECONDS / ASKS


class Clock:
    """A clock that stands until it is set."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(flight, "time", SimpleNamespace(monotonic=made.monotonic))
    return made


def _departed() -> Flight:
    made = Flight(7, "run", b"", SECONDS, 2)
    made.depart()
    return made


def _asked(call: Flight, clock: Clock, keepers: int = 1) -> tuple[int, int]:
    """Wait until the keepers are to be asked, and ask them."""
    clock.now = call.wakes
    assert call.doubtful
    inquiry = call.ask(keepers)
    assert inquiry is not None
    return inquiry


def test_a_compiler_that_ends_just_before_time_is_up_leaves_all_of_the_time_for_what_comes_behind_it(
    clock: Clock,
) -> None:
    call = _departed()
    for _ in range(ASKS - 1):
        call.hear(_asked(call, clock), compiles=True)
    ended = clock.now
    while not call.over:
        call.hear(_asked(call, clock), compiles=False)
    assert ended == pytest.approx(100 + SECONDS - EVERY)
    assert clock.now == pytest.approx(ended + SECONDS)


def test_a_compiler_that_never_ends_is_waited_for_half_an_hour(clock: Clock) -> None:
    call = _departed()
    while not call.over:
        call.hear(_asked(call, clock), compiles=True)
    assert clock.now - 100 == pytest.approx(COMPILE_SECONDS + SECONDS, abs=2 * EVERY)


def test_a_keeper_that_never_answers_is_asked_once_and_is_not_waited_for_when_time_is_up(clock: Clock) -> None:
    call = _departed()
    _asked(call, clock)
    clock.now = call.wakes
    assert (clock.now, call.doubtful, call.ask(1)) == (100 + SECONDS, True, None)
    assert (call.over, call.doubtful) == (True, False)


@pytest.mark.parametrize("earlier", [0.0, 0.1])
def test_a_keeper_that_is_asked_as_time_is_up_or_just_before_has_a_second_to_answer(
    clock: Clock, earlier: float
) -> None:
    call = _departed()
    clock.now = asked = 100 + SECONDS - earlier
    assert call.ask(1) is not None
    clock.now = 100 + SECONDS
    assert not call.doubtful or call.ask(1) is None
    assert not call.over
    assert call.wakes == pytest.approx(asked + ASK_SECONDS)
    clock.now = call.wakes
    assert (call.over, call.doubtful) == (True, False)


def test_what_one_keeper_says_is_not_undone_by_another_nor_by_answers_to_an_earlier_question(clock: Clock) -> None:
    call = _departed()
    early = _asked(call, clock, 2)
    for _ in range(2):
        call.hear(early, compiles=False)
    last = _asked(call, clock, 2)
    call.hear(early, compiles=False)
    call.hear((6, last[1]), compiles=False)
    assert not call.over
    call.hear(last, compiles=True)
    call.hear(last, compiles=False)
    assert call.due == clock.now + SECONDS


def test_a_compiler_does_not_make_the_peers_of_a_rank_that_died_wait(clock: Clock) -> None:
    call = _departed()
    asked = _asked(call, clock)
    call.fail(crash(1, -9, when="in run"))
    due = call.due
    call.hear(asked, compiles=True)
    assert (call.due, call.wakes, call.doubtful) == (due, due, False)


def test_a_compiler_that_has_ended_and_was_not_waited_for_keeps_no_hang_from_being_told(tmp_path: Path) -> None:
    true = shutil.which("true")
    assert true is not None
    shutil.copy(true, tmp_path / "nvcc")
    with Pool("fusecheck.property_tests.suite.workers:Doomed", 1) as pool:
        began = time.monotonic()
        failures = culprits(pool.call("forgets", str(tmp_path / "nvcc"), timeout=1))
    assert [failure.kind for failure in failures] == [FailureKind.HANG]
    assert time.monotonic() - began < 15

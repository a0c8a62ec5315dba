"""The rank pool: what it returns, and how it fails."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fusecheck.errors import UsageError
from fusecheck.property_tests.suite.deaths import MANNERS, MEMORY_LIMIT
from fusecheck.ranks import FailureKind, Pool, culprits, values
from fusecheck.ranks.flight import Flight
from fusecheck.ranks.hosts import LocalHost
from fusecheck.ranks.replies import crash

DOOMED = "fusecheck.property_tests.suite.workers:Doomed"
TIMEOUT = 30.0


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(DOOMED, 2, memory_limit=MEMORY_LIMIT) as opened:
        yield opened


def processes(pool: Pool) -> list[int]:
    return [place[3] for place in values(pool.call("place", timeout=TIMEOUT))]


def test_every_rank_answers_in_rank_order_with_its_own_place(pool: Pool) -> None:
    places = values(pool.call("place", timeout=TIMEOUT))
    assert [(index, size, device) for index, size, device, _, _ in places] == [(0, 2, "cpu"), (1, 2, "cpu")]
    assert len({place[3] for place in places}) == 2
    assert os.getpid() not in {place[3] for place in places}


def test_the_same_processes_take_all_calls(pool: Pool) -> None:
    assert processes(pool) == processes(pool)


@pytest.mark.parametrize("world_size", [1, 4, 8])
def test_ranks_of_every_world_size_meet_in_a_collective(world_size: int) -> None:
    with Pool(DOOMED, world_size) as pool:
        assert values(pool.call("total", timeout=TIMEOUT)) == [world_size * (world_size + 1) / 2] * world_size


def test_a_worker_receives_its_arguments_and_one_thread(pool: Pool) -> None:
    with Pool("fusecheck.property_tests.suite.workers:Echo", 1, arguments=["a", {"b": 2}]) as other:
        assert values(other.call("place", timeout=TIMEOUT))[0][4] == ("a", {"b": 2})
        assert values(other.call("threads", timeout=TIMEOUT)) == [1]


def test_large_arguments_and_values_pass(pool: Pool) -> None:
    large = bytes(range(256)) * 40_000
    assert values(pool.call("echo", large, timeout=TIMEOUT)) == [large, large]


def test_a_value_that_is_too_large_to_send_is_an_error_of_that_call(pool: Pool) -> None:
    replies = pool.call("zeros", 65 << 20, timeout=TIMEOUT)
    assert [reply.failure.kind for reply in replies if reply.failure] == [FailureKind.ERROR] * 2
    assert values(pool.call("echo", 1, timeout=TIMEOUT)) == [1, 1]


@pytest.mark.parametrize(("method", "error"), [("unpicklable", "AttributeError"), ("no_such_method", "AttributeError")])
def test_an_error_of_all_ranks_is_reported_and_the_pool_lives_on(pool: Pool, method: str, error: str) -> None:
    before = processes(pool)
    failures = culprits(pool.call(method, timeout=TIMEOUT))
    assert sorted((f.kind, f.rank, f.error) for f in failures) == [
        (FailureKind.ERROR, 0, error),
        (FailureKind.ERROR, 1, error),
    ]
    assert "Traceback" in failures[0].traceback
    assert processes(pool) == before


@pytest.mark.parametrize("manner", MANNERS)
def test_a_death_that_peers_wait_for_is_reported_in_time_and_the_next_call_works(pool: Pool, manner: str) -> None:
    before = processes(pool)
    timeout = 20.0 if manner == "leak" else 0.7
    begun = time.monotonic()
    replies = pool.call("die_waiting", manner, 1, timeout=timeout)
    assert time.monotonic() - begun < timeout + 5
    wanted = MANNERS[manner][1]
    assert replies[1].failure is not None
    assert replies[1].failure.kind is wanted
    assert replies[0].failure is not None
    assert replies[0].failure.kind is (FailureKind.HANG if wanted is FailureKind.HANG else FailureKind.PEER)
    assert sorted(f.rank for f in culprits(replies)) == ([0, 1] if wanted is FailureKind.HANG else [1])
    assert not [pid for pid in before if psutil.pid_exists(pid)]
    assert values(pool.call("echo", manner, timeout=TIMEOUT)) == [manner, manner]


@pytest.mark.parametrize("manner", ["spin", "sigkill", "garbage"])
def test_a_death_that_nobody_waits_for_leaves_the_peers_values(pool: Pool, manner: str) -> None:
    replies = pool.call("die", manner, 1, timeout=0.7)
    assert replies[0].value == "alive"
    assert [(f.kind, f.rank) for f in culprits(replies)] == [(MANNERS[manner][1], 1)]


def test_a_rank_that_raises_alone_is_not_killed_when_its_peers_answer(pool: Pool) -> None:
    before = processes(pool)
    replies = pool.call("die", "throw", 1, timeout=TIMEOUT)
    assert replies[0].value == "alive"
    assert replies[1].failure is not None
    assert "this rank only" in replies[1].failure.traceback
    assert processes(pool) == before


def test_ranks_that_lost_their_device_are_replaced_though_they_answered(pool: Pool) -> None:
    before = processes(pool)
    failures = culprits(pool.call("die", "lose_device", -1, timeout=TIMEOUT))
    assert [(f.kind, f.error) for f in failures] == [(FailureKind.CRASH, "RuntimeError")] * 2
    assert "lost its CUDA device" in failures[0].message
    assert set(processes(pool)).isdisjoint(before)


def test_ranks_that_die_of_one_cause_are_all_reported(pool: Pool) -> None:
    failures = culprits(pool.call("die", "sigsegv", -1, timeout=TIMEOUT))
    assert sorted((f.kind, f.rank, f.signal) for f in failures) == [(FailureKind.CRASH, r, "SIGSEGV") for r in (0, 1)]


def test_a_crash_names_signal_or_exit_code_and_shows_the_last_output(pool: Pool) -> None:
    by_signal = pool.call("die", "sigsegv", 1, timeout=TIMEOUT)[1].failure
    assert by_signal is not None
    assert (by_signal.signal, by_signal.exit_code) == ("SIGSEGV", None)
    assert "in sigsegv" in by_signal.output
    by_exit = pool.call("die", "exit", 1, timeout=TIMEOUT)[1].failure
    assert by_exit is not None
    assert (by_exit.signal, by_exit.exit_code) == ("", 7)


def test_a_hang_says_where_each_rank_stood_and_who_was_missing(pool: Pool) -> None:
    failures = culprits(pool.call("die_waiting", "wedge", 1, timeout=0.7))
    assert [f.unanswered for f in failures] == [(0, 1), (0, 1)]
    assert [f.rank for f in failures] == [1, 0]
    stood = r"rank 1 stood in wedge \(workers.py:\d+\); rank 0 stood in spin \(workers.py:\d+\)"
    assert all(re.fullmatch(f"no answer to die_waiting in 0.7 s: {stood}", f.message) for f in failures)


def test_the_time_of_a_call_begins_anew_while_a_compiler_runs_and_with_no_other_program(
    pool: Pool, tmp_path: Path
) -> None:
    sleep = shutil.which("sleep")
    assert sleep is not None
    shutil.copy(sleep, tmp_path / "nvcc")
    assert values(pool.call("waits_for", str(tmp_path / "nvcc"), 2.5, timeout=1)) == ["done", "done"]
    began = time.monotonic()
    failures = culprits(pool.call("waits_for", sleep, 30, timeout=1))
    assert [failure.kind for failure in failures] == [FailureKind.HANG] * 2
    assert time.monotonic() - began < 10


def test_a_rank_that_is_stopped_is_named_before_the_one_that_waits_for_it(pool: Pool) -> None:
    first, second = culprits(pool.call("die_waiting", "stop", 1, timeout=0.7))
    assert (first.rank, first.place) == (1, "is stopped (SIGSTOP) and could not say where it stood")
    assert (second.rank, second.place.partition(" (")[0]) == (0, "stood in spin")


def test_a_rank_that_died_is_named_before_the_peer_whose_connection_it_closed() -> None:
    """The peer's error arrives first: gloo tells it of the lost connection before the system tells of the death."""
    flight = Flight(1, "run", b"", 5.0, 2)
    told = "RuntimeError", "Connection closed by peer", "Traceback ...", "run", "kernel.py:3"
    answered = flight.take(0, pickle.dumps((1, "error", *told)))
    assert answered is not None
    flight.fail(answered)
    flight.fail(crash(1, -9, when="in run"))
    assert [str(failure) for failure in culprits(flight.land({}))] == [
        "crash: rank 1: killed by SIGKILL in run",
        "error: rank 0: raised RuntimeError in run (kernel.py:3): Connection closed by peer",
    ]


def test_a_death_between_two_calls_is_reported_by_the_next_one_and_by_that_one_only(pool: Pool) -> None:
    pid = processes(pool)[1]
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    failures = culprits(pool.call("nothing", timeout=TIMEOUT))
    assert [(f.kind, f.rank) for f in failures] == [(FailureKind.CRASH, 1)]
    assert "between calls, after place" in failures[0].message
    assert values(pool.call("echo", 1, timeout=TIMEOUT)) == [1, 1]


def test_processes_that_a_rank_left_behind_die_with_the_pool() -> None:
    with Pool(DOOMED, 1) as pool:
        pids = values(pool.call("start_daemon", timeout=TIMEOUT))
        assert all(psutil.pid_exists(pid) for pid in pids)
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


def test_a_worker_that_cannot_be_built_fails_every_call_with_its_reason() -> None:
    with Pool("fusecheck.property_tests.suite.workers:NoSuchWorker", 2) as pool:
        for _ in range(2):
            failures = culprits(pool.call("nothing", timeout=TIMEOUT))
            assert [f.kind for f in failures] == [FailureKind.ERROR] * 2
            assert "NoSuchWorker" in failures[0].message


def test_a_worker_whose_construction_hangs_is_a_hang_at_the_start() -> None:
    with Pool("fusecheck.property_tests.suite.workers:Stuck", 2, start_timeout=1.0) as pool:
        begun = time.monotonic()
        failures = culprits(pool.call("nothing", timeout=TIMEOUT))
        assert [f.kind for f in failures] == [FailureKind.HANG] * 2
        assert "no answer to the start in 1 s" in failures[0].message
        assert time.monotonic() - begun < 6


def test_ctrl_c_during_a_call_leaves_no_rank_and_a_pool_that_works(pool: Pool) -> None:
    before = processes(pool)
    program = f"import os, time; time.sleep(.5); os.kill({os.getpid()}, 2)"

    def call_and_interrupt() -> None:
        with subprocess.Popen([sys.executable, "-S", "-c", program]):
            pool.call("die", "spin", -1, timeout=TIMEOUT)

    with pytest.raises(KeyboardInterrupt):
        call_and_interrupt()
    assert not [pid for pid in before if psutil.pid_exists(pid)]
    assert values(pool.call("echo", 1, timeout=TIMEOUT)) == [1, 1]


def test_a_keeper_that_has_not_said_its_id_is_not_signalled_as_process_0(monkeypatch: pytest.MonkeyPatch) -> None:
    signalled: list[int] = []
    monkeypatch.setattr("fusecheck.ranks.hosts.os.kill", lambda pid, _number: signalled.append(pid))
    LocalHost((0, 1)).abandon(0)  # Ctrl-C while ranks start: kill(0) would take the user's shell along
    LocalHost((0, 1)).abandon(4242)
    assert signalled == [4242]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_keeper_that_dies_or_stops_takes_its_ranks_with_it(sent: signal.Signals) -> None:
    with Pool(DOOMED, 2) as pool:
        before = processes(pool)
        os.kill(psutil.Process(before[0]).ppid(), sent)
        begun = time.monotonic()
        assert len(culprits(pool.call("nothing", timeout=1.0))) == 2
        assert time.monotonic() - begun < 6
        time.sleep(0.2)
        assert not [pid for pid in before if psutil.pid_exists(pid)]
        assert values(pool.call("echo", 1, timeout=TIMEOUT)) == [1, 1]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"world_size": 0}, "world size 0"),
    ({"device": "tpu"}, "'tpu'"),
    ({"worker": "no_colon"}, "package.module:Class"),
    ({"devices": [0, 1, 2]}, "3 devices for 2 ranks"),
]


@pytest.mark.parametrize(("options", "named"), BAD)
def test_a_pool_that_cannot_be_is_refused_in_one_line(options: dict[str, Any], named: str) -> None:
    arguments: dict[str, Any] = {"worker": DOOMED, "world_size": 2} | options
    with pytest.raises(UsageError, match=named) as caught:
        Pool(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_a_timeout_that_is_not_above_zero_is_refused(pool: Pool, timeout: float) -> None:
    with pytest.raises(UsageError, match="timeout"):
        pool.call("nothing", timeout=timeout)
    assert values(pool.call("echo", 1, timeout=TIMEOUT)) == [1, 1]


def test_a_second_call_in_flight_is_refused(pool: Pool) -> None:
    pool.submit("slow", 0.2, timeout=TIMEOUT)
    with pytest.raises(RuntimeError, match="slow is in flight"):
        pool.submit("nothing", timeout=TIMEOUT)
    pool.cancel()
    with pytest.raises(RuntimeError, match="no call"):
        pool.poll()


def test_a_closed_pool_has_no_processes_and_may_be_called_again() -> None:
    pool = Pool(DOOMED, 2)
    before = processes(pool)
    pool.close()
    assert not [pid for pid in before if psutil.pid_exists(pid)]
    with contextlib.closing(pool):
        assert set(processes(pool)).isdisjoint(before)

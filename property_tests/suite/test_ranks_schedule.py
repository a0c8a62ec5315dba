"""Spreading calls over pools."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psutil
import pytest

from fusecheck.errors import UsageError
from fusecheck.ranks import FailureKind, Pools, Request, culprits, map_cases, open_pools, values

DOOMED = "fusecheck.property_tests.suite.workers:Doomed"
TIMEOUT = 30.0


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    with open_pools(DOOMED, 1, groups=2) as opened:
        yield opened


def test_every_request_comes_back_once_with_its_own_value(pools: Pools) -> None:
    requests = [Request("echo", (i,), tag=i) for i in range(20)]
    done = {request.tag: values(replies) for request, replies in map_cases(pools.pools, requests, timeout=TIMEOUT)}
    assert done == {i: [i] for i in range(20)}


def test_all_groups_work_at_a_time(pools: Pools) -> None:
    list(map_cases(pools.pools, [Request("nothing")] * 2, timeout=TIMEOUT))
    done = list(map_cases(pools.pools, [Request("slow", (0.5,))] * 2, timeout=TIMEOUT))
    (begun, ended), (begun_too, ended_too) = (values(replies)[0] for _, replies in done)
    assert max(begun, begun_too) < min(ended, ended_too)
    places = [values(replies)[0][3] for _, replies in map_cases(pools.pools, [Request("place")] * 2, timeout=TIMEOUT)]
    assert len(set(places)) == 2


def test_a_request_is_taken_only_when_a_group_is_free(pools: Pools) -> None:
    taken = 0

    def requests() -> Iterator[Request]:
        nonlocal taken
        for i in range(10):
            taken += 1
            yield Request("echo", (i,))

    for done, _ in enumerate(map_cases(pools.pools, requests(), timeout=TIMEOUT), start=1):
        assert taken - done < len(pools.pools) + 1


def test_a_death_costs_no_other_case(pools: Pools) -> None:
    requests = [Request("echo", (i,)) for i in range(6)]
    requests[2:2] = [Request("die", ("sigkill",)), Request("die", ("spin",), timeout=0.5)]
    outcomes = [(request, replies) for request, replies in map_cases(pools.pools, requests, timeout=TIMEOUT)]
    assert sorted(values(r)[0] for request, r in outcomes if request.method == "echo") == list(range(6))
    kinds = {failure.kind for _, replies in outcomes for failure in culprits(replies)}
    assert kinds == {FailureKind.CRASH, FailureKind.HANG}


def test_breaking_off_kills_what_is_in_flight(pools: Pools) -> None:
    requests = [Request("place"), Request("place"), *[Request("die", ("spin",), timeout=600.0)] * 2]
    source = map_cases(pools.pools, requests, timeout=TIMEOUT)
    pids = [values(next(source)[1])[0][3] for _ in range(2)]
    time.sleep(0.05)
    source.close()
    alive = [pid for pid in pids if psutil.pid_exists(pid)]
    # The generator submits a group's next request when it is resumed: one group may have been idle yet.
    assert len(alive) <= 1
    assert values(pools.pools[0].call("echo", 1, timeout=TIMEOUT)) == [1]
    assert values(pools.pools[1].call("echo", 1, timeout=TIMEOUT)) == [1]


def test_no_pools_and_no_groups_are_refused() -> None:
    with pytest.raises(UsageError, match="no pools"):
        list(map_cases([], [Request("nothing")], timeout=1.0))
    with pytest.raises(UsageError, match="0 groups"):
        open_pools(DOOMED, 1, groups=0)

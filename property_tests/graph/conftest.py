"""One pool of two ranks for all checkers of tests, one for all runs of the command, and the longest test first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fusecheck.graph import run
from fusecheck.graph.cases import Subject
from fusecheck.graph.run import GraphChecker
from fusecheck.ranks.pool import Pool

TIMEOUT = 120.0
LONGEST = "test_sites_become_what_their_features_predict"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest test, so that no worker of xdist is left alone with it at the end."""
    items.sort(key=lambda item: item.name != LONGEST)


class Lent:
    """A pool that goes back to its lender when it is closed."""

    def __init__(self, pool: Pool, back: list[Pool]) -> None:
        self._pool, self._back = pool, back

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def close(self) -> None:
        """End the ranks, so that the next borrower gets new ones, and keep what starts them."""
        self._pool.cancel()
        self._back.append(self._pool)


@pytest.fixture(scope="session")
def lender() -> Iterator[dict[int, list[Pool]]]:
    """The pools that nobody has borrowed, by world size."""
    free: dict[int, list[Pool]] = {}
    yield free
    for pool in (pool for pools in free.values() for pool in pools):
        pool.close()


@pytest.fixture
def borrowed_ranks(monkeypatch: pytest.MonkeyPatch, lender: dict[int, list[Pool]]) -> None:
    """Checkers that a test starts borrow their pools: starting one takes seconds of imports."""
    start = run.start_pool

    def borrow(world_size: int, device: str = "cpu") -> Lent:
        free = lender.setdefault(world_size, [])
        return Lent(free.pop() if free else start(world_size, device), free)

    monkeypatch.setattr(run, "start_pool", borrow)


@pytest.fixture(scope="session")
def checker() -> Iterator[GraphChecker]:
    """Fusecheck's own passes, in two real ranks; every check."""
    with GraphChecker(Subject(), 2, timeout=TIMEOUT) as made:
        yield made


@pytest.fixture(scope="session")
def quick_checker(checker: GraphChecker) -> GraphChecker:
    """The same at the exported size alone, without exporting again: for many passes on few graphs."""
    quick = checker.for_subject(Subject())
    quick.tokens, quick.export, quick.timeout = (), False, 20.0
    return quick

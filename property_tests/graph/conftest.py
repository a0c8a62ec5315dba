"""One pool of two ranks for all tests of graphs, and the longest test first."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fusecheck.graph.cases import Subject
from fusecheck.graph.run import GraphChecker

TIMEOUT = 120.0
LONGEST = "test_sites_become_what_their_features_predict"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest test, so that no worker of xdist is left alone with it at the end."""
    items.sort(key=lambda item: item.name != LONGEST)


@pytest.fixture(scope="session")
def checker() -> Iterator[GraphChecker]:
    """Fusecheck's own passes, in two real ranks; every check."""
    with GraphChecker(Subject(), 2, timeout=TIMEOUT) as made:
        yield made


@pytest.fixture(scope="session")
def quick_checker() -> Iterator[GraphChecker]:
    """The same at the exported size alone, without exporting again: for many passes on few graphs."""
    with GraphChecker(Subject(), 2, tokens=(), export=False, timeout=20.0) as made:
        yield made

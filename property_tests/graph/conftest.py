"""One pool of two ranks for all tests of graphs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from verify.graph.run import GraphChecker, Subject

TIMEOUT = 120.0


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

"""The dialects by name."""

from __future__ import annotations

from fusecheck.errors import UsageError
from fusecheck.graph import autodeploy
from fusecheck.graph.dialect import FUSECHECK, Dialect

NAMES = (FUSECHECK.name, autodeploy.NAME)


def dialect_named(name: str) -> Dialect:
    """A dialect; AutoDeploy's needs its operators to be registered.

    Raises:
        UsageError: no dialect has this name, or its operators are missing.
    """
    if name == FUSECHECK.name:
        return FUSECHECK
    if name == autodeploy.NAME:
        return autodeploy.dialect()
    raise UsageError(f"unknown dialect {name!r}, expected one of: {', '.join(NAMES)}")

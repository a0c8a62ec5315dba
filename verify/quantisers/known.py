"""The quantisers by name. A name may end in the group, as in `group-fp8-64`; without one the group is 128."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from fusecheck.errors import UsageError
from fusecheck.quantisers.dynamic_fp8 import DYNAMIC_FP8
from fusecheck.quantisers.group_fp8 import group_fp8, group_fp8_packed
from fusecheck.quantisers.mxfp4 import MXFP4
from fusecheck.quantisers.mxfp8 import MXFP8
from fusecheck.quantisers.nvfp4 import NVFP4
from fusecheck.quantisers.quantiser import Quantiser
from fusecheck.quantisers.static_fp8 import STATIC_FP8

_ALL = (STATIC_FP8, DYNAMIC_FP8, group_fp8(), group_fp8_packed(), MXFP8, NVFP4, MXFP4)

QUANTISERS: dict[str, Quantiser] = {each.name: each for each in _ALL}
"""The quantisers by name, those by group with groups of 128."""


def register(made: Quantiser) -> None:
    """Make a format of one's own known by its name in this process, as the backend that has it is made.

    Raises:
        UsageError: another format has the name.
    """
    if QUANTISERS.setdefault(made.name, made) != made:
        raise UsageError(f"quantiser={made.name!r} is registered already, as another format; expected a new name")


@contextmanager
def scope() -> Iterator[None]:
    """What is registered inside is forgotten at the end."""
    before = dict(QUANTISERS)
    try:
        yield
    finally:
        QUANTISERS.clear()
        QUANTISERS.update(before)


_GROUPED = {"group-fp8": group_fp8, "group-fp8-packed": group_fp8_packed}


def quantiser(name: str) -> Quantiser:
    """Look a quantiser up by its name.

    Raises:
        UsageError: there is none of this name.
    """
    if name in QUANTISERS:
        return QUANTISERS[name]
    found = re.fullmatch(r"(group-fp8|group-fp8-packed)-([1-9][0-9]*)", name)
    if found is None:
        known = ", ".join(each for each in ("none", *QUANTISERS, "group-fp8-64") if each != name)
        raise UsageError(f"quantiser={name!r}, expected one of: {known}")
    return _GROUPED[found[1]](int(found[2]))

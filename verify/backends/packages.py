"""Which release of a package is installed: looked up once in a process, for that takes half a millisecond."""

from __future__ import annotations

import functools
from importlib import metadata


@functools.cache
def release_of(package: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

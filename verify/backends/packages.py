"""Whether a package is installed, and which release: looked up once in a process, for that takes half a millisecond."""

from __future__ import annotations

import functools
import importlib.util
from importlib import metadata


def is_installed(package: str) -> bool:
    """Whether a package can be imported; what is found without being imported."""
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # something else goes by its name in this process
        return False
    # A mere folder of that name, a checkout of its sources say, is found too: without a file of its own.
    return found is not None and found.origin is not None


@functools.cache
def release_of(package: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

"""Option values that list things, separated by commas."""

from __future__ import annotations

from collections.abc import Iterable

from fusecheck.errors import UsageError


def names(text: str | None) -> list[str]:
    """The parts of a list; none where the option was not given, for an empty text lists something unknown."""
    return [part.strip() for part in text.split(",")] if text is not None else []


def numbers(option: str, text: str | None) -> tuple[int, ...]:
    """Counts, of at least 1 each; none where the option was not given.

    Raises:
        UsageError: a part is no such number.
    """
    try:
        found = tuple(map(int, names(text)))
    except ValueError:
        raise UsageError(f"{option} {text!r}, expected whole numbers such as 2 or 2,4,8") from None
    if any(number < 1 for number in found):
        raise UsageError(f"{option} {text!r}, expected numbers of at least 1")
    return found


def choices(option: str, text: str | None, known: Iterable[str]) -> tuple[str, ...]:
    """Some of the names that are known; all of them where the option was not given.

    Raises:
        UsageError: a part is none of them.
    """
    known = tuple(known)
    for part in names(text):
        if part not in known:
            raise UsageError(f"{option} {part!r}, expected one of: {', '.join(known)}")
    return tuple(names(text)) or known

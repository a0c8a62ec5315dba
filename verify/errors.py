"""Errors that the command line reports in one line."""

from __future__ import annotations


class UsageError(ValueError):
    """Wrong usage or a broken input file: exit code 2. The message says what was got, expected, and what to do."""

    exit_code = 2


class BreachError(UsageError):
    """A backend does not keep the interface; the message names the method, what was got, expected, and what to do."""


class Inconclusive(RuntimeError):  # noqa: N818 - a verdict, not a defect
    """Nothing could be judged: exit code 3. The message says what is missing."""

    exit_code = 3


RAISED_IN = "fusecheck_raised_in"
"""The attribute of an exception that names the backend's method it came out of, and file and line."""

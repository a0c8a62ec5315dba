"""The command line, run in this process."""

from __future__ import annotations

import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from unittest import mock

import pytest

from fusecheck.cli import main


def run(*arguments: object) -> int:
    """The exit code of `fusecheck` with these arguments."""
    words = ["fusecheck", *map(str, arguments)]
    with mock.patch.object(sys, "argv", words), pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def told(*arguments: object) -> tuple[int, str]:
    """The exit code of `fusecheck` with these arguments, and what it printed, on one line."""
    with redirect_stdout(StringIO()) as printed:
        code = run(*arguments)
    print(printed.getvalue())  # for whoever reads why a test fails
    return code, " ".join(printed.getvalue().split())


def refused(*arguments: object, code: int = 2) -> str:
    """What `fusecheck` says where it refuses these arguments, which is one line, with this exit code."""
    with redirect_stderr(StringIO()) as said:
        assert run(*arguments) == code, said.getvalue()
    assert said.getvalue().count("\n") == 1, said.getvalue()
    return said.getvalue()

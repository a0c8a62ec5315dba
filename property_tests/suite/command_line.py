"""The command line, run in this process."""

from __future__ import annotations

import sys

import pytest

from fusecheck.cli import main


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of `fusecheck` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["fusecheck", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """The exit code of `fusecheck` with these arguments, and what it printed, on one line."""
    code = run(monkeypatch, *arguments)
    return code, " ".join(capsys.readouterr().out.split())

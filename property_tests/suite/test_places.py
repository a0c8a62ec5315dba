"""Where a command is to write is looked at before it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from verify import cli

FILES = ("--json", "--markdown", "--html", "--record")
ARGUMENTS = {
    "replay": ('{"tokens":1}',),
    "report": ("somewhere",),
    "golden record": ("absent/record.json",),
}
"""Of commands that do not run without any."""


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of `fusecheck` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["fusecheck", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def options(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """The words of every command of Fusecheck's own, each with every option of its that names a file to write."""
    for name, inner in getattr(command, "commands", {}).items():
        yield from options(inner, (*words, name))
    names = {name for parameter in command.params for name in parameter.opts}
    for option in sorted(names & set(FILES)):
        yield words, option


def test_a_file_in_a_missing_folder_is_refused_before_the_run_by_every_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--version") == 0
    capsys.readouterr()
    known = [each for each in options(typer.main.get_command(cli.app)) if each[0][0] != "accuracy"]
    assert {words[0] for words, _ in known} == {
        *("kernel", "replay", "verify", "report", "pace", "exhaust", "latency", "golden", "graph", "faults")
    }
    monkeypatch.chdir(tmp_path)
    for words, option in known:
        assert run(monkeypatch, *words, *ARGUMENTS.get(" ".join(words), ()), option, "absent/file") == 2, words
        told = capsys.readouterr()
        expected = "fusecheck: absent/file: there is no folder absent; make it first, or give another path\n"
        assert (told.err, told.out) == (expected, ""), words
        assert os.listdir(tmp_path) == [], words


def test_a_recording_in_a_missing_folder_and_a_folder_in_place_of_a_file_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "golden", "record", "absent/record.json", "--backend", "emulated") == 2
    assert "there is no folder absent" in capsys.readouterr().err
    assert run(monkeypatch, "kernel", "--cases", 1, "--json", tmp_path) == 2
    assert "is a folder, expected a file" in capsys.readouterr().err

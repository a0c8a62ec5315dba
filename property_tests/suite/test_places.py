"""Where a command is to write is looked at before it runs, and Ctrl-C leaves there what was done until then."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from fusecheck import cli, exhaust
from fusecheck.golden import check
from fusecheck.latency import command as latency
from fusecheck.latency.analysis import Timing
from fusecheck.problem import Problem
from fusecheck.property_tests.suite.command_line import refused, run
from fusecheck.ranks import Pool

FILES = ("--json", "--markdown", "--html", "--record")
ARGUMENTS = {
    "replay": (Problem().to_json(), "--backend", "emulated"),
    "report": ("somewhere",),
    "golden record": ("absent/record.json",),
}
"""Of commands that do not run without any."""


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
    assert run("--version") == 0
    capsys.readouterr()
    known = [each for each in options(typer.main.get_command(cli.app)) if each[0][0] != "accuracy"]
    assert {words[0] for words, _ in known} == {
        *("kernel", "replay", "verify", "report", "judge", "pace", "exhaust", "latency", "golden", "graph", "faults"),
        *("protocol", "invariance"),
    }
    monkeypatch.chdir(tmp_path)
    for words, option in known:
        assert run(*words, *ARGUMENTS.get(" ".join(words), ()), option, "absent/file") == 2, words
        told = capsys.readouterr()
        expected = "fusecheck: absent/file: there is no folder absent; make it first, or give another path\n"
        assert (told.err, told.out) == (expected, ""), words
        assert os.listdir(tmp_path) == [], words


def test_a_recording_in_a_missing_folder_and_a_folder_in_place_of_a_file_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "there is no folder absent" in refused("golden", "record", "absent/record.json", "--backend", "emulated")
    assert "is a folder, expected a file" in refused("kernel", "--cases", 1, "--json", tmp_path)


def interrupted(out: Path, *arguments: object) -> dict[str, Any]:
    """The summary that a command leaves which Ctrl-C ends; it ends as inconclusive, with all its files."""
    assert run(*arguments, "--run-dir", out) == 3
    result = json.loads((out / "result.json").read_text())
    assert (result["verdict"], result["findings"], result["summary"]["interrupted"]) == ("inconclusive", [], True)
    assert "interrupted before the last case" in (out / "junit.xml").read_text()
    assert "Inconclusive: interrupted: " in (out / "report.html").read_text()
    return dict(result["summary"])


def test_interrupted_recordings_are_checked_up_to_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = iter([check.Checked(entries=7)])

    def check_one(*_: object) -> check.Checked:
        if (answer := next(answers, None)) is None:
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr(check, "check_anywhere", check_one)
    assert [each["entries"] for each in interrupted(tmp_path, "golden", "check")["records"]] == [7]


def test_interrupted_instructions_are_listed_up_to_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worst = {"inputs": 2, "worst_ulps_from_rounded": 0, "worst_ulps_from_exact": 0.5, "allowed": 0, "holds": True}

    def on_chip(*_: object) -> Iterator[tuple[str, dict[str, Any]]]:
        yield "div.rn.f32", worst
        raise KeyboardInterrupt

    monkeypatch.setattr(exhaust, "check_device", lambda _: None)
    monkeypatch.setattr(exhaust, "on_chip", on_chip)
    assert interrupted(tmp_path, "exhaust")["instructions"] == {"div.rn.f32": worst}


def test_interrupted_times_are_kept_and_predict_what_they_can(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    paths = {"fused oneshot": 10.0, "norm oneshot, quantise": 12.0, "unfused": 20.0}
    times = [Timing(1, path, (time, time)).to_record() for path, time in paths.items()]

    def measure(*_: object, **__: object) -> Iterator[list[dict[str, Any]]]:
        yield times
        raise KeyboardInterrupt

    monkeypatch.setattr(latency, "measure", measure)
    summary = interrupted(tmp_path, "latency")
    assert summary["timings"] == times
    assert [row["concurrency"] for row in summary["prediction"]] == [1]


def test_an_interrupted_pace_is_that_of_the_cases_judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original, answers = Pool.poll, 0

    def poll(pool: Pool) -> object:
        nonlocal answers
        replies = original(pool)
        answers += replies is not None
        if answers > 2:  # those of the warm-up, and one batch
            raise KeyboardInterrupt
        return replies

    monkeypatch.setattr(Pool, "poll", poll)
    arguments = ("--backend", "emulated", "--tokens", 1, "--hidden", 64, "--batch", 3, "--seconds", 60)
    summary = interrupted(tmp_path, "pace", *arguments)
    assert summary["cases"] == 3

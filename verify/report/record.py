"""One or several `result.json` records, read, checked, and laid out as the parts that a report shows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusecheck.errors import UsageError

SCHEMA = 1
"""The version of `result.schema.json` that this program writes and reads."""

VERDICTS = ("pass", "fail", "inconclusive")

_TYPES: dict[str, type | tuple[type, ...]] = {
    "schema": int,
    "command": str,
    "verdict": str,
    "environment": dict,
    "summary": dict,
    "findings": list,
}


@dataclass(frozen=True)
class Part:
    """One question that one run asked.

    Attributes:
        command: the question, such as `kernel`.
        verdict: `pass`, `fail` or `inconclusive`.
        summary: the question's own figures.
        findings: its records.
        run: the name of the run, when several are compared; else empty.
        time: when the run ended, ISO 8601, or empty.
        arguments: of the command line, without those that say where files go.
        environment: versions and hardware.
    """

    command: str
    verdict: str
    summary: dict[str, Any]
    findings: list[dict[str, Any]]
    run: str = ""
    time: str = ""
    arguments: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def question(self) -> str:
        """Of the questions, the one that was asked; the command where it is none of them."""
        return "kernel" if self.command in ("verify", "replay") else self.command


def parts(record: dict[str, Any], run: str = "") -> Iterator[Part]:
    """The parts of a record: itself, those that `verify` ran behind it, or the runs that `report` merged."""
    summary, findings = record["summary"], record["findings"]
    if record["command"] == "report":
        for each in summary["runs"]:
            own = [f for f in findings if f.get("run") == each["name"]]
            yield from parts({**each["record"], "findings": own}, each["name"])
        return
    shared: dict[str, Any] = {
        "run": run,
        "time": str(record.get("time", "")),
        "arguments": reproducible(record.get("arguments", [])),
        "environment": record["environment"],
    }
    own = [f for f in findings if "part" not in f]
    yield Part(record["command"], record["verdict"] if "parts" not in summary else _own(record), summary, own, **shared)
    for name, part in summary.get("parts", {}).items():
        own = [f for f in findings if f.get("part") == name]
        yield Part(name, part["verdict"], part["summary"], own, **shared)


def _own(record: dict[str, Any]) -> str:
    """The verdict of the kernel question in a record of `verify`, whose own verdict is that of all parts."""
    return str(record["summary"].get("kernel_verdict", record["verdict"]))


def reproducible(arguments: list[Any]) -> list[str]:
    """The arguments without the places of files, which differ from machine to machine."""
    kept: list[str] = []
    places = ("--run-dir", "--json", "--markdown", "--junit")
    skip = False
    for argument in map(str, arguments):
        if skip or argument.startswith(tuple(f"{place}=" for place in places)):
            skip = False
        elif argument in places:
            skip = True
        else:
            kept.append(argument)
    return kept


def read_run(path: Path) -> dict[str, Any]:
    """The record of a run directory, or of a copy that `--json` made.

    Raises:
        UsageError: nothing there, a broken or foreign file, or one of a newer schema.
    """
    place = path / "result.json" if path.is_dir() else path
    if not place.exists():
        unfinished = (path / "cases.jsonl").exists()
        why = "the run did not end; go on with --resume of its command" if unfinished else "give a run's directory"
        raise UsageError(f"{path}: no result.json here; {why}" if path.is_dir() else f"{path}: no such run; {why}")
    try:
        record = json.loads(place.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UsageError(f"{place}: broken or cut off at line {error.lineno} ({error.msg}); run again") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{place}: cannot be read as JSON ({type(error).__name__}); give a run's directory") from None
    _check(record, place)
    return dict(record)


def _check(record: Any, place: Path) -> None:
    if not isinstance(record, dict) or "command" not in record or "schema" not in record:
        raise UsageError(f"{place}: not written by fusecheck, expected an object with schema and command")
    version = record["schema"]
    if isinstance(version, int) and version > SCHEMA:
        raise UsageError(f"{place}: schema {version} is of a newer Fusecheck, this one reads {SCHEMA}; update it")
    wrong = [key for key, kind in _TYPES.items() if not isinstance(record.get(key), kind)]
    if not wrong and record["verdict"] not in VERDICTS:
        wrong = ["verdict"]
    if not wrong and not all(isinstance(finding, dict) for finding in record["findings"]):
        wrong = ["findings"]
    if wrong:
        raise UsageError(f"{place}: {', '.join(wrong)} is missing or malformed, expected what result.schema.json says")
    try:
        list(parts(record))
    except (KeyError, TypeError, AttributeError):
        raise UsageError(f"{place}: its parts are malformed, expected what result.schema.json says") from None

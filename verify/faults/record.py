"""The record of several seeds: one small file, to which a run of any part of the catalogue adds what it saw."""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from filelock import FileLock

from fusecheck.errors import UsageError
from fusecheck.faults.catalogue import GROUPS, catalogue
from fusecheck.faults.results import Report, Result
from fusecheck.report import Verdict, environment
from fusecheck.report.result import write_aside

SCHEMA = 1

Cell = dict[str, Any]
"""One fault or one right kernel at one seed: `cases` and `false_alarms`; a fault's has `stage` and `seconds` too."""

Rows = dict[str, dict[str, Cell]]
"""Cells by fault or right kernel, then by seed."""


def add(path: Path, report: Report) -> dict[str, Any]:
    """Add a run to the record and write it; a fault at a seed that is there already is replaced. Returns the record.

    Raises:
        UsageError: the file is there and is no such record, or cannot be written.
    """
    lock = Path(tempfile.gettempdir()) / f"fusecheck-faults-{zlib.crc32(str(path.resolve()).encode()):08x}.lock"
    with FileLock(lock):
        faults, right = read(path)
        for seed, results in report.results.items():
            for result in results:
                faults.setdefault(result.fault.id, {})[str(seed)] = _cell(result)
        for (subject, seed), cases in report.legal.items():
            alarms = sum(alarm.subject == subject and alarm.seed == seed for alarm in report.alarms)
            right.setdefault(subject, {})[str(seed)] = {"cases": cases, "false_alarms": alarms}
        record = _record(faults, right)
        write_aside(path, "".join(_lines(record)))
    return record


def read(path: Path) -> tuple[Rows, Rows]:
    """What is recorded so far, of faults and of right kernels; faults that have left the catalogue are dropped.

    Raises:
        UsageError: the file is there and is no such record, or its folder is not there.
    """
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}; make it or name another")
    if not path.exists():
        return {}, {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["schema"] != SCHEMA or record["command"] != "faults":
            raise KeyError("schema")
        faults, right = dict(record["faults"]), dict(record["right_kernels"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: expected a record of `fusecheck faults` ({error}); name a new file") from None
    known = {fault.id for fault in catalogue().faults}
    return {name: row for name, row in faults.items() if name in known}, right


def _cell(result: Result) -> Cell:
    return {
        "cases": result.cases,
        "stage": result.stages[0] if result.stages else None,
        "seconds": round(result.seconds, 1),
        "false_alarms": len(result.false_alarms),
    }


def _record(faults: Rows, right: Rows) -> dict[str, Any]:
    """The rows in the catalogue's order, with the figures of all of them."""
    rows = {fault.id: faults[fault.id] for fault in catalogue().faults if fault.id in faults}
    groups = {
        name: _figures(faults.get(fault.id, {}).values() for fault in catalogue().select([name])) for name in GROUPS
    }
    whole = _figures(row.values() for row in rows.values())
    legal = [cell for row in right.values() for cell in row.values()]
    whole["legal_cases"] = sum(cell["cases"] for cell in legal)
    whole["false_alarms"] += sum(cell["false_alarms"] for cell in legal)
    seeds = sorted({seed for row in rows.values() for seed in row}, key=int)
    complete = len(rows) == len(catalogue().faults) and all(len(row) == len(seeds) for row in rows.values())
    failed = whole["killed"] < whole["runs"] or whole["false_alarms"]
    verdict = Verdict.FAIL if failed else Verdict.PASS if complete else Verdict.INCONCLUSIVE
    return {
        "schema": SCHEMA,
        "command": "faults",
        "verdict": verdict.value,
        "environment": environment(),
        "seeds": [int(seed) for seed in seeds],
        "summary": whole,
        "groups": groups,
        "right_kernels": right,
        "faults": rows,
    }


def _figures(rows: Iterable[Iterable[Cell]]) -> dict[str, Any]:
    cells = [cell for row in rows for cell in row]
    caught = [cell["cases"] for cell in cells if cell["stage"] is not None]
    return {
        "runs": len(cells),
        "killed": len(caught),
        "false_alarms": sum(cell["false_alarms"] for cell in cells),
        "median_cases_until_caught": median(caught) if caught else None,
        "most_cases_until_caught": max(caught, default=None),
        "seconds": round(sum(cell["seconds"] for cell in cells), 1),
    }


def _lines(record: dict[str, Any]) -> Iterator[str]:
    """JSON with a line for each row, which makes a difference of two records readable."""
    yield "{\n"
    for number, (key, value) in enumerate(record.items()):
        comma = ",\n" if number else ""
        if isinstance(value, dict):
            inner = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in value.items())
            yield f"{comma} {json.dumps(key)}: {{\n{inner}\n }}"
        else:
            yield f"{comma} {json.dumps(key)}: {json.dumps(value)}"
    yield "\n}\n"

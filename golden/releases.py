"""Which operations of a library pass in which release: a table of the kernel question's records.

    python -m fusecheck.golden.releases FOLDER

The folder holds a `--json` record of each release and variant, as `ci/releases.sh` writes them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusecheck.errors import UsageError
from fusecheck.report.replays import replay

LIBRARIES = ("flashinfer-python", "tensorrt-llm", "fusecheck")
"""Packages whose release heads a column: the first that the record names."""


@dataclass(frozen=True)
class Column:
    """One run: a release of the library, and a variant of its kernel.

    Attributes:
        name: the release and the backend.
        cases: run of each operation; 0 where all were refused or none was come to.
        findings: the records of what is wrong, by operation.
    """

    name: str
    cases: Mapping[str, int]
    findings: Mapping[str, list[dict[str, Any]]]

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Column:
        """The column of a record.

        Raises:
            UsageError: it is no record of the kernel question, or of an older form.
        """
        kernels = record["summary"].get("coverage", {}).get("kernel")
        if record["command"] != "kernel" or not isinstance(kernels, dict):
            raise UsageError(
                f"a record of {record['command']} without its cases by kernel, expected fusecheck kernel's"
            )
        cases: dict[str, int] = {}
        for cell, count in kernels.items():
            _, op, *_ = cell.split()
            cases[op] = cases.get(op, 0) + count
        found: dict[str, list[dict[str, Any]]] = {}
        for finding in record["findings"]:
            found.setdefault(json.loads(finding["problem"])["op"], []).append(finding)
        packages = record["environment"]["packages"]
        release = next(packages[name] for name in LIBRARIES if name in packages)
        backends = dict.fromkeys(subject["backend"] for subject in record["summary"]["subjects"])
        unfinished = " (inconclusive)" if record["verdict"] == "inconclusive" else ""
        return cls(f"{release} {', '.join(backends)}{unfinished}", cases, found)

    def cell(self, op: str) -> str:
        """What happened to an operation: the number of cases that passed, or the stages that did not."""
        if op in self.findings:
            return "**" + ", ".join(sorted({finding["stage"] for finding in self.findings[op]})) + "**"
        return str(self.cases[op]) if self.cases.get(op) else "-"


def table(columns: Iterable[Column]) -> Iterator[str]:
    """The lines of a Markdown table, an operation a row, and one replay line for each operation that fails."""
    shown = list(columns)
    ops = sorted({op for column in shown for op in (*column.cases, *column.findings)})
    yield f"| operation | {' | '.join(column.name for column in shown)} |"
    yield "| --- |" + " --- |" * len(shown)
    for op in ops:
        if any(column.cell(op) != "-" for column in shown):
            yield f"| `{op}` | {' | '.join(column.cell(op) for column in shown)} |"
    for column in shown:
        for op, findings in column.findings.items():
            first = findings[0]
            yield f"\n* {op}, {column.name}, {first['stage']}: {first['message']}\n\n  `{replay(first)}`"


def read(folder: Path) -> list[Column]:
    """The columns of a folder's records, by release and variant.

    Raises:
        UsageError: there is none, or one cannot be read.
    """
    columns = [_read(path) for path in sorted(folder.glob("*.json"))]
    if not columns:
        raise UsageError(f"{folder}: no record *.json, expected one of each release and variant")
    return columns


def _read(path: Path) -> Column:
    try:
        return Column.of(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, ValueError, UsageError) as error:
        raise UsageError(f"{path}: {error}; expected what fusecheck kernel --json wrote") from None


def main() -> None:
    """Print the table of the folder named."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m fusecheck.golden.releases FOLDER")
    try:
        print("\n".join(table(read(Path(sys.argv[1])))))
    except UsageError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

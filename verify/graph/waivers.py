"""Known gaps: findings that are accepted with a reason, so that only new ones are red."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fusecheck.errors import UsageError
from fusecheck.graph.collinear import PAIRS
from fusecheck.graph.findings import Check
from fusecheck.graph.results import GraphResult
from fusecheck.graph.rows import ROWS

ALL = "*"


@dataclass(frozen=True)
class Waiver:
    """One accepted gap.

    Attributes:
        check: whose findings.
        row: of which graphs, by their names; `*` and `N8-*` are patterns.
        why: the reason, which the report shows.
    """

    check: Check
    row: str
    why: str

    @property
    def text(self) -> str:
        """As it is written on the command line."""
        return self.check.value if self.row == ALL else f"{self.check.value}:{self.row}"

    def covers(self, result: GraphResult) -> bool:
        """Whether it is about this graph."""
        return fnmatch.fnmatchcase(result.case.name, self.row)


def parse(text: str, why: str) -> Waiver:
    """A waiver from `NAME[:ROW]` and its reason.

    Raises:
        UsageError: an unknown check, or no reason.
    """
    name, colon, row = text.partition(":")
    checks = [check.value for check in Check]
    if name not in checks:
        raise UsageError(f"waiver {text!r}: no check is called {name!r}, expected one of: {', '.join(checks)}")
    if colon and not row:
        raise UsageError(f"waiver {text!r} names no row after the colon, expected NAME:ROW, or NAME for all rows")
    if not why.strip():
        raise UsageError(f"waiver {text!r} has no reason, expected --why '...' after it")
    return Waiver(Check(name), row or ALL, why.strip())


def from_options(waive: Sequence[str], why: Sequence[str], file: Path | None) -> list[Waiver]:
    """The waivers of a command line: pairs of `--waive` and `--why`, and those of a file.

    Raises:
        UsageError: a waiver without its reason, or a file that is not a list of `waive:` and `why:`.
    """
    if len(waive) != len(why):
        raise UsageError(f"{len(waive)} --waive and {len(why)} --why, expected a reason for each waiver")
    found = [parse(text, reason) for text, reason in zip(waive, why, strict=True)]
    return found + ([] if file is None else _of_file(file))


def _of_file(path: Path) -> list[Waiver]:
    import yaml  # type: ignore[import-untyped]  # only here: the default run needs no such file

    try:
        entries: Any = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        told = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
        raise UsageError(f"cannot read {path}: {told}; expected YAML: a list of waive: and why:") from None
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, dict) or {*entry} != {"waive", "why"} or not all(map(_is_text, entry.values())):
            raise UsageError(f"{path} has {entry!r}, expected a list of entries with waive: NAME[:ROW] and why: REASON")
    return [parse(entry["waive"], entry["why"]) for entry in entries]


def _is_text(value: object) -> bool:
    """An entry left empty is None, not a reason called None."""
    return isinstance(value, str) and bool(value.strip())


def check_rows(waivers: Iterable[Waiver], names: Iterable[str]) -> None:
    """Hold waivers to the graphs that there are.

    Args:
        waivers: of this run.
        names: of the graphs that are checked; waivers of other rows are not used, but no mistake.

    Raises:
        UsageError: a waiver names no graph.
    """
    known = [*names, *PAIRS, *(row.name for row in ROWS)]
    for waiver in waivers:
        if not fnmatch.filter(known, waiver.row) and not re.fullmatch(r"random-\d+", waiver.row):
            raise UsageError(f"waiver {waiver.text!r}: no graph is called {waiver.row!r}, expected a row such as N1")


def apply(waivers: Sequence[Waiver], result: GraphResult) -> None:
    """Mark a result's accepted findings with the reason."""
    for number, finding in enumerate(result.findings):
        for waiver in waivers:
            if waiver.covers(result) and waiver.check is finding.check:
                result.findings[number] = replace(finding, waived=waiver.why)


def unused(waivers: Sequence[Waiver], results: Sequence[GraphResult]) -> list[Waiver]:
    """The waivers of graphs that were checked, of which nothing had to be accepted."""
    return [
        waiver
        for waiver in waivers
        if any(waiver.covers(result) for result in results)
        and not any(
            waiver.covers(result) and any(finding.check is waiver.check for finding in result.findings)
            for result in results
        )
    ]

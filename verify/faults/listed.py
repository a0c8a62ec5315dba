"""Somebody else's kernels under the same harness: a backend, or a TOML file that lists several."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusecheck import backends, toml
from fusecheck.errors import UsageError
from fusecheck.faults.hunt import PATIENCE, Catch, Hunter

EXPECTATIONS = ("fail", "pass")


@dataclass(frozen=True)
class Listed:
    """A kernel of the list.

    Attributes:
        backend: how it is loaded.
        expect: `fail` for a faulty kernel, `pass` for a right one.
        title: in words.
    """

    backend: str
    expect: str = "fail"
    title: str = ""


@dataclass(frozen=True)
class Judged:
    """What became of a listed kernel."""

    kernel: Listed
    caught: Catch

    @property
    def as_expected(self) -> bool:
        """Whether it failed or passed as the list says."""
        return self.caught.killed == (self.kernel.expect == "fail")

    def to_record(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return {
            "backend": self.kernel.backend,
            "title": self.kernel.title,
            "expect": self.kernel.expect,
            "as_expected": self.as_expected,
            "cases": self.caught.cases,
            "stages": self.caught.stages,
            "message": self.caught.message,
            "shrunk": self.caught.shrunk.to_json() if self.caught.shrunk else None,
        }


def read(given: str) -> list[Listed]:
    """Read a list: a TOML file with `[[kernel]]` entries, or one backend's name, which is expected to fail.

    Raises:
        UsageError: a file that cannot be read, an entry with unknown or missing fields, a backend that does not load.
    """
    if not given.endswith(".toml"):
        backends.backend(given)
        return [Listed(given)]
    path = Path(given)
    entries = toml.read(path).get("kernel", [])
    if not entries:
        raise UsageError(f'{path}: no [[kernel]] entries; each has backend = and expect = "fail" or "pass"')
    return [_entry(path, number, entry) for number, entry in enumerate(entries, start=1)]


def _entry(path: Path, number: int, entry: dict[str, Any]) -> Listed:
    where = f"{path}: kernel {number}"
    unknown = sorted(entry.keys() - {"backend", "expect", "title"})
    if unknown or not isinstance(entry.get("backend"), str):
        what = f"unknown field {unknown[0]!r}" if unknown else "no backend"
        raise UsageError(f"{where}: {what}; expected backend, expect, title")
    listed = Listed(entry["backend"], str(entry.get("expect", "fail")), str(entry.get("title", "")))
    if listed.expect not in EXPECTATIONS:
        raise UsageError(f"{where}: expect={listed.expect!r}, expected one of: {', '.join(EXPECTATIONS)}")
    try:
        backends.backend(listed.backend)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    return listed


def judge(hunter: Hunter, kernel: Listed, seed: int) -> Judged:
    """Hunt a listed kernel over the normal plan; a right one gets the time that a busy machine needs.

    Raises:
        UsageError: the kernel takes no case of the plan.
    """
    caught = hunter.hunt(kernel.backend, seed)
    if caught.killed and kernel.expect == "pass" and caught.case is not None:
        again = hunter.judge(caught.case, kernel.backend, timeout=PATIENCE)
        if again.passed:
            caught.stages = []
    return Judged(kernel, caught)

"""A collector over many judged calls: one record and one page for a whole test session."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from fusecheck.testing.conformity import Conformity, NotConforming, conforms


class Conforming:
    """Judges calls as `assert_conforms` does, and keeps count; with a directory it leaves a record and a page there.

    As a context or behind a fixture of the session:

        @pytest.fixture(scope="session")
        def conforming():
            with Conforming("runs/my-tests") as collector:
                yield collector

    Args:
        directory: where `result.json`, `junit.xml` and `report.html` go at the end; None: nowhere. Under pytest-xdist
            each worker has a folder of its own in it.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        worker = os.environ.get("PYTEST_XDIST_WORKER")
        self.directory = None if directory is None else Path(directory, *([worker] if worker else []))
        self.calls: list[tuple[str, Conformity]] = []

    def __enter__(self) -> Conforming:
        return self

    def __exit__(self, *_: object) -> None:
        if self.directory is not None:
            self.write(self.directory)

    def assert_conforms(self, *outputs: Tensor | None, title: str | None = None, **arguments: Any) -> Conformity:
        """`fusecheck.testing.assert_conforms`, counted under `title`: the running test's name unless given.

        Raises:
            NotConforming: as there.
            UsageError: as there.
        """
        __tracebackhide__ = True
        found = conforms(*outputs, **arguments)
        self.calls.append((title or os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0] or "call", found))
        if not found:
            raise NotConforming(str(found), found)
        return found

    @property
    def verdict(self) -> str:
        """`pass`, `fail`, or `inconclusive` where nothing was judged."""
        if any(not found for _, found in self.calls):
            return "fail"
        return "pass" if self.calls else "inconclusive"

    def write(self, directory: Path) -> dict[str, Any]:
        """Write the record of all calls so far, and its page; returns the record.

        Raises:
            UsageError: the directory cannot be written.
        """
        # The page needs jinja2 and matplotlib, which judging does not.
        from fusecheck.report.result import make_run_dir, write_result

        findings = [record for title, found in self.calls for record in found.records(title)]
        flows = sorted({found.dataflow for _, found in self.calls})
        summary = {
            "cases": len(self.calls),
            "elements": sum(found.elements for _, found in self.calls),
            "failed": sum(not found for _, found in self.calls),
            "dataflows": flows,
        }
        return write_result(make_run_dir("testing", directory), "testing", self.verdict, summary, findings)

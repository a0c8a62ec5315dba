"""The run directory and its files, and exit codes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from enum import Enum
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fusecheck.errors import UsageError
from fusecheck.report.record import SCHEMA
from fusecheck.report.who import KERNEL_PACKAGES, kernels

_PACKAGES = ("fusecheck", "torch", "numpy", "scipy", "hypothesis", "lm-eval", *KERNEL_PACKAGES)


class Verdict(str, Enum):
    """Of a run. Nothing run is inconclusive, never a pass."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"

    @property
    def exit_code(self) -> int:
        """Of the process: 0 pass, 1 fail, 3 inconclusive (2 is wrong usage)."""
        return {"pass": 0, "fail": 1, "inconclusive": 3}[self.value]

    @staticmethod
    def of(*, failed: bool, complete: bool) -> Verdict:
        """A failure with any finding, however far the run came; a pass only if all was run."""
        return Verdict.FAIL if failed else Verdict.PASS if complete else Verdict.INCONCLUSIVE

    @staticmethod
    def worst(verdicts: Sequence[Verdict]) -> Verdict:
        """A failure if any failed; a pass only if all passed and there is one."""
        if Verdict.FAIL in verdicts:
            return Verdict.FAIL
        return Verdict.PASS if verdicts and all(v is Verdict.PASS for v in verdicts) else Verdict.INCONCLUSIVE


@cache
def environment() -> dict[str, Any]:
    """Versions and hardware, JSON-ready; no names of users, hosts or paths."""
    import torch

    installed: dict[str, str] = {}
    for found in metadata.distributions():
        installed.setdefault(
            found.name.lower().replace("_", "-"), found.version
        )  # the first on the path is the one imported
    versions = {name: installed[name] for name in _PACKAGES if name in installed}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "packages": versions,
    }


def _driver() -> str | None:
    """The version of the NVIDIA driver, as the kernel module tells it; None without one."""
    try:
        told = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", told)
    return found[0] if found else None


def make_run_dir(command: str, run_dir: Path | None) -> Path:
    """Make the run's directory, `runs/<utc>-<command>` unless given; with a number behind where that is another run's.

    Raises:
        UsageError: it cannot be made or written.
    """
    path = run_dir or Path("runs")
    try:
        path.mkdir(parents=True, exist_ok=True)
        if run_dir is None:
            path = _new(path / f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{command}")
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"run directory {path}: cannot be written ({error.strerror}); give another --run-dir"
        ) from None
    _claim(path)
    return path


def _new(path: Path) -> Path:
    """Make this directory, or the first with a number behind its name that is not there yet."""
    for place in itertools.chain([path], (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            place.mkdir()
            return place
    raise AssertionError("numbers do not end")


_CLAIMED: dict[Path, FileLock] = {}
"""The run directories of this process, until it ends."""


def _claim(path: Path) -> None:
    """Keep other processes out of a run directory: two runs would mix their files.

    Raises:
        UsageError: another process writes there.
    """
    place = path.resolve()
    lock = _CLAIMED.setdefault(place, FileLock(place / ".in-use"))
    try:
        if not lock.is_locked:
            lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(
            f"run directory {path} is in use by another run; wait for its end, or give another --run-dir"
        ) from None


def write_aside(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        UsageError: it cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror}); give another path") from None


def write_result(
    run_dir: Path,
    command: str,
    verdict: Verdict | str,
    summary: dict[str, Any],
    findings: Sequence[dict[str, Any]],
    json_file: Path | None = None,
) -> dict[str, Any]:
    """Write `result.json`, and from it `junit.xml` and `report.html`, into the run directory; returns the record.

    Args:
        run_dir: an existing directory.
        command: the command's name, such as `kernel`.
        verdict: `pass`, `fail` or `inconclusive`.
        summary: the command's own figures.
        findings: JSON-ready records.
        json_file: a second place for `result.json`.

    Raises:
        UsageError: a file cannot be written.
    """
    from fusecheck.report.junit import to_junit
    from fusecheck.report.page import to_html

    record = {
        "schema": SCHEMA,
        "command": command,
        "verdict": Verdict(verdict).value,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "arguments": sys.argv[1:],
        "environment": environment() | ({"kernels": named} if (named := kernels(summary)) else {}),
        "summary": summary,
        "findings": list(findings),
    }
    text = json.dumps(record, indent=1) + "\n"
    write_aside(run_dir / "result.json", text)
    if json_file is not None:
        write_aside(json_file, text)
    plain = json.loads(text)
    write_aside(run_dir / "junit.xml", to_junit(plain))
    write_aside(run_dir / "report.html", to_html(plain, _files(run_dir)))
    return record


def _files(run_dir: Path) -> list[str]:
    """What lies in a run directory for readers, as links of its page."""
    found = [run_dir / name for name in ("result.json", "cases.jsonl", "junit.xml")]
    found += sorted(run_dir.glob("*/report.html"))
    return [path.relative_to(run_dir).as_posix() for path in found if path.exists()]


def write_markdown(path: Path, record: dict[str, Any]) -> None:
    """Write the Markdown summary of a record, for job summaries and comments.

    Raises:
        UsageError: the file cannot be written.
    """
    from fusecheck.report.markdown import to_markdown

    write_aside(path, to_markdown(json.loads(json.dumps(record))))

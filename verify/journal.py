"""The journal of a run: which case is in flight, on disk before it starts, and which are done.

One JSON object a line. A case has a line before it starts and one after; whatever has only the first was in
flight when the run was killed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fusecheck.errors import UsageError

FILE_NAME = "cases.jsonl"
"""The journal's name in a run's directory."""


class Journal:
    """Appends to the journal at `path`; a context manager.

    Every line is handed to the operating system before the call returns, so it survives the death of this
    process; with `durable` it is also forced to the disk, to survive the machine's, at some milliseconds a line.

    Raises:
        UsageError: the file cannot be written.
    """

    def __init__(self, path: Path, *, durable: bool = False) -> None:
        self.path = path
        self._durable = durable
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = path.open("ab", buffering=0)
        except OSError as error:
            raise UsageError(f"journal {path}: cannot be written ({error.strerror}); give another --run-dir") from error
        if self._file.tell() and not _ends_with_newline(path):
            # A run that was killed while it wrote: what it left must not swallow the next line.
            self._file.write(b"\n")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, case: str, **details: Any) -> None:
        """Note that `case` starts now; call it before the case is sent to the ranks.

        Args:
            case: what identifies the case, and replays it.
            details: further JSON-ready fields of the line.
        """
        self._append({"event": "start", "case": case, **details})

    def end(self, case: str, **details: Any) -> None:
        """Note that `case` has ended, with its outcome among the details."""
        self._append({"event": "end", "case": case, **details})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, line: Mapping[str, Any]) -> None:
        # One write per line: a reader never sees two lines mixed, only the last one cut short.
        self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        if self._durable:
            os.fsync(self._file.fileno())


@dataclass(frozen=True)
class Record:
    """What a journal holds.

    Attributes:
        started: every case's start line by case, in order of the first start.
        ended: the last end line by case.
        broken: one sentence for each line that could not be read.
    """

    started: dict[str, dict[str, Any]]
    ended: dict[str, dict[str, Any]]
    broken: tuple[str, ...]

    @property
    def unfinished(self) -> list[str]:
        """The cases that started and did not end: in flight when the run was killed."""
        return [case for case in self.started if case not in self.ended]


def read(path: Path) -> Record:
    """Read a journal, whole or cut short.

    A line that cannot be read is named in `broken` and left out: the last one of a killed run often is.

    Raises:
        UsageError: there is no such file, or it cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"journal {path}: cannot be read ({error.strerror}); give the directory of a run") from error
    started: dict[str, dict[str, Any]] = {}
    ended: dict[str, dict[str, Any]] = {}
    broken = []
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            table = {"start": started, "end": ended}[line["event"]]
            if table is started:
                # Started again, after a resumption: only an end from now on counts.
                ended.pop(line["case"], None)
            table[line["case"]] = line
        except (ValueError, KeyError, TypeError):
            cut = " (cut short)" if number == len(lines) else ""
            broken.append(f"{path}:{number}: not a line of a journal{cut}: {text[:60].decode(errors='replace')}")
    return Record(started, ended, tuple(broken))


def unfinished(path: Path) -> list[str]:
    """The cases of the journal at `path` that started and did not end; errors as for `read`."""
    return read(path).unfinished


def finished(path: Path) -> set[str]:
    """The cases of the journal at `path` that passed, which a resumed run leaves out; errors as for `read`."""
    return {case for case, end in read(path).ended.items() if end.get("verdict") == "pass"}


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"

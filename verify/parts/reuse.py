"""Which parts of an earlier run are still valid: passed, by the same code, on the same versions, asked the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from fusecheck.errors import UsageError
from fusecheck.report.record import read_run
from fusecheck.report.result import Verdict, environment, write_aside

MARK = "asked.json"
"""In a part's folder: what was asked, of which code; written when the part ended."""

_PACKAGES = ("fusecheck", "fusecheck.eval", "fusecheck.golden")


def keep(folder: Path, arguments: Sequence[str]) -> None:
    """Note beside a part's record what it answers.

    Raises:
        UsageError: the file cannot be written.
    """
    write_aside(folder / MARK, json.dumps(_asked(arguments), indent=1) + "\n")


def recall(folder: Path, arguments: Sequence[str]) -> dict[str, Any] | None:
    """The record of a part that passed and would answer the same now; else None: it has to run again."""
    try:
        asked = json.loads((folder / MARK).read_text(encoding="utf-8"))
        record = read_run(folder)
    except (OSError, ValueError, UsageError):
        return None
    return record if asked == _asked(arguments) and record["verdict"] == Verdict.PASS.value else None


def _asked(arguments: Sequence[str]) -> dict[str, Any]:
    return {"arguments": list(arguments), "code": code_digest(), "environment": environment()}


@cache
def code_digest() -> str:
    """SHA-256, in hex, over the names and bytes of all files of Fusecheck that a result can depend on."""
    whole = hashlib.sha256()
    for package in _PACKAGES:
        top = Path(str(files(package)))
        for path in sorted(top.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                whole.update(f"{package}/{path.relative_to(top).as_posix()}\0".encode())
                whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()

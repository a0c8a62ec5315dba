"""Which parts of an earlier run are still valid: passed, by the same code, on the same versions, asked the same."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

from fusecheck import backends
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
    kernels = {name: stamp(name) for option, name in pairwise(arguments) if option == "--backend"}
    return {"arguments": list(arguments), "code": code_digest(), "kernels": kernels, "environment": environment()}


def stamp(backend: str) -> str:
    """What changes with the files of a plug-in's package, by size and time, in hex; empty for what is built in.

    Of what is built in, the environment has the versions.
    """
    module = (backends.target(backend) or backend).partition(":")[0].partition(".")[0]
    if module in backends.BUILT_IN:
        return ""
    found = importlib.util.find_spec(module)
    places = [] if found is None else list(found.submodule_search_locations or filter(None, [found.origin]))
    seen = hashlib.sha256()
    for place in map(Path, places):
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file() and "__pycache__" not in path.parts:
                state = path.stat()
                seen.update(f"{path}\0{state.st_size} {state.st_mtime_ns}\0".encode())
    return seen.hexdigest()


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

"""The options that say where a command writes; a place where it cannot is refused before the run, not after it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from fusecheck.errors import UsageError


def check_place(path: Path) -> Path:
    """Return `path` if a file can be written there.

    Raises:
        UsageError: its folder is missing, or cannot be written.
    """
    folder = path.parent
    if not folder.is_dir():
        raise UsageError(f"{path}: there is no folder {folder}; make it first, or give another path")
    if path.is_dir():
        raise UsageError(f"{path} is a folder, expected a file; give another path")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{path}: the folder {folder} cannot be written; give another path")
    return path


def _given(path: Path | None) -> Path | None:
    return None if path is None else check_place(path)


def place(*names: str, help: str) -> Any:  # noqa: A002 - as typer calls it
    """An option whose value is a file to write."""
    return typer.Option(*names, help=help, callback=_given)


JsonFile = Annotated[Path | None, place("--json", help="Write result.json here too.")]
MarkdownFile = Annotated[Path | None, place("--markdown", help="Write a summary here.")]
RunDir = Annotated[Path | None, typer.Option(help="Where the run's files go; default runs/<utc>-<command>/.")]

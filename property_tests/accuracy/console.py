"""`fusecheck accuracy` as a user calls it, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer
from typer.testing import CliRunner, Result

from fusecheck.eval.command import register

app = typer.Typer()
register(app)


@app.callback()
def main() -> None:
    """Stand in for the other commands."""


def call(arguments: Sequence[str | Path]) -> Result:
    """Call the command; an error that `fusecheck` would say in one line is the result's `exception`."""
    return CliRunner().invoke(app, ["accuracy", *map(str, arguments)], env={"COLUMNS": "200"})

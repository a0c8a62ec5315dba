"""The Markdown pages of the checkout: their tables, code blocks, links, and the commands that they name."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from fusecheck import cli
from fusecheck.property_tests.suite.repository.checkout import ROOT, tracked_files

ELLIPSES = {"...", "…"}
ACTS = {"--help", "-h", "--version", "--install-completion", "--show-completion"}
"""Options that do something as soon as they are parsed; that they are there is all that is asked of them."""


def pages() -> list[Path]:
    """All Markdown pages that git tracks."""
    return [path for path in tracked_files() if path.suffix == ".md"]


def read(name: str = "README.md") -> str:
    """The text of a page."""
    return (ROOT / name).read_text(encoding="utf-8")


def table(text: str, first: str) -> list[list[str]]:
    """The rows, cell by cell, of the table whose head begins with the cell `first`."""
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[head + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[list[str]]:
    """Every `fusecheck …` of a page, in code blocks or between backticks, as words without the program's name."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    fenced = "\n".join(block for language, block in fences if language not in ("python", "toml"))
    indented = "\n".join(re.findall(r"^    (fusecheck .*)$", text, flags=re.MULTILINE))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = [span for span in re.findall(r"`([^`\n]+)`", prose) if re.match(r"(mpirun -n \d+ )?fusecheck ", span)]
    for line in [*fenced.splitlines(), *indented.splitlines(), *spans]:
        if found := re.search(r"(?:^|[\s])(?<!from )fusecheck ([\w-].*)", line):
            yield [word for word in shlex.split(found[1], comments=True) if word not in ELLIPSES]


def parse(words: list[str]) -> None:
    """Have the real command line read these words, without running anything.

    Raises:
        AssertionError: a command or option does not exist, or a value is malformed.
    """
    command: Any = typer.main.get_command(cli.app)
    rest = list(words)
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]
    if not rest:  # only its name
        return
    if len(rest) == 1 and rest[0] in ACTS:
        known = {name for parameter in command.get_params(typer.Context(command)) for name in parameter.opts}
        assert rest[0] in known, f"fusecheck {shlex.join(words)}: no such option"
        return
    unknown = hasattr(command, "commands") and not rest[0].startswith("-")
    assert not unknown, f"fusecheck {shlex.join(words)}: no such command"
    try:
        command.make_context("fusecheck", rest)
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer raises, whichever click it carries
            raise
        raise AssertionError(f"fusecheck {shlex.join(words)}: {error.format_message()}") from error


def number(pattern: str, text: str) -> float:
    """The number in the one place of a text that the pattern marks by a group."""
    found = re.search(pattern, text)
    assert found is not None, f"{pattern} is not in: {text}"
    return float(found[1].replace(",", ""))

"""The corpus: Problems that once failed, one JSON object a line, to be tried first and to be committed.

A line is a record (`backend`, `test`, `problem`, and for a metamorphic relation its name and parameters), or simply
a replay line, as a finding shows it.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from fusecheck.errors import UsageError
from fusecheck.problem import Problem

FIELDS = ("problem", "backend", "test", "relation", "parameters")


@dataclass(frozen=True)
class Kept:
    """A Problem that once failed.

    Attributes:
        problem: what to run.
        backend: where it failed.
        test: the test that found it.
        relation: the metamorphic relation that did not hold, if it was one.
        parameters: of the relation.
        origin: file and line, for messages.
    """

    problem: Problem
    backend: str = ""
    test: str = ""
    relation: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    origin: str = field(default="", compare=False)

    def to_json(self) -> str:
        """One line."""
        record: dict[str, Any] = {"backend": self.backend, "test": self.test}
        if self.relation:
            record |= {"relation": self.relation, "parameters": self.parameters}
        return json.dumps(record | {"problem": json.loads(self.problem.to_json())})


@dataclass
class Corpus:
    """What a file holds: the Problems, and a sentence for every line that cannot be read."""

    kept: list[Kept] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def read(path: Path) -> Corpus:
    """Read a file; lines that cannot be read are named, and the rest is used. Blank lines and `#` lines are skipped.

    Raises:
        UsageError: the file cannot be read at all.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}), expected a file of replay lines") from error
    corpus = Corpus()
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith(b"#"):
            continue
        origin = f"{path.name}:{number}"
        try:
            corpus.kept.append(_parse(line.decode("utf-8"), origin))
        except (UsageError, UnicodeDecodeError) as error:
            corpus.broken.append(f"{path}:{number}: {error}")
    return corpus


def keep(path: Path, kept: Kept) -> bool:
    """Add a Problem unless the file has it; safe among several processes. Says whether it was new."""
    line = kept.to_json()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = Path(tempfile.gettempdir()) / f"fusecheck-corpus-{zlib.crc32(str(path.resolve()).encode()):08x}.lock"
    with FileLock(lock):
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        if line in text.splitlines():
            return False
        with path.open("a", encoding="utf-8") as file:
            file.write(("" if text.endswith("\n") or not text else "\n") + line + "\n")
    return True


def _parse(line: str, origin: str) -> Kept:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise UsageError(f"a JSON {type(record).__name__}, expected an object")
    if "problem" not in record:
        return Kept(Problem.from_json(line), origin=origin)
    unknown = sorted(set(record) - set(FIELDS))
    if unknown:
        raise UsageError(f"unknown field {unknown[0]!r}, expected some of: {', '.join(FIELDS)}")
    problem = record["problem"]
    text = problem if isinstance(problem, str) else json.dumps(problem)
    parameters = record.get("parameters", {})
    if not isinstance(parameters, dict):
        raise UsageError(f"parameters={parameters!r}, expected an object")
    names = {name: str(record.get(name, "")) for name in ("backend", "test", "relation")}
    return Kept(Problem.from_json(text), parameters=parameters, origin=origin, **names)

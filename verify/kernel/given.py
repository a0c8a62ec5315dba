"""A plan of given Problems: what `fusecheck replay` runs."""

from __future__ import annotations

from pathlib import Path

from fusecheck.case.run import CHECKS
from fusecheck.errors import UsageError
from fusecheck.kernel.plan import Case, Plan
from fusecheck.problem import Problem


class Given(Plan):
    """A plan that hands out given Problems, with every check."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__()
        object.__setattr__(self, "_problems", problems)

    def case(self, world_size: int, index: int) -> Case:
        """One of those of this world size, in turn."""
        mine = [p for p in self.__dict__["_problems"] if p.world_size == world_size]
        return Case(mine[index % len(mine)], CHECKS)


def replay_lines(given: str) -> list[str]:
    """The argument itself if it is JSON, else the lines of that file.

    Raises:
        UsageError: neither.
    """
    if given.lstrip().startswith("{"):
        return [given]
    try:
        lines = Path(given).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{given!r} is neither a JSON object nor a readable file ({error})") from None
    lines = [line for line in lines if line.strip() and not line.startswith("#")]
    if not lines:
        raise UsageError(f"{given} has no replay line, expected one JSON object a line")
    return lines

"""One call that is compared with another: which rows are watched, where they stand, and in what company."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeAlias

from fusecheck.errors import UsageError

COMPANY = ("rows", "others", "zeros", "large", "nan")
"""What the rows that are not watched hold: rows, other rows, zeros, rows a thousand times as large, NaN."""

STAGES = ("total", "residual", "norm", "scale", "quant")
"""The outputs in the order in which they are computed."""

Seen: TypeAlias = "dict[str, dict[tuple[int, int], int]]"
"""By output, the digest of each watched row on each rank: {output: {(rank, row): digest}}."""


@dataclass(frozen=True)
class Call:
    """One call of a batch.

    Attributes:
        tokens: rows of the batch.
        watched: numbers of the rows that are compared.
        place: where the first of them stands; the others follow, and beyond the last place comes the first.
        stride: places from one watched row to the next.
        company: what the other rows hold, one of `COMPANY`.
        strategy: how the ranks exchange; empty for that of the Problem.
        world_size: ranks; 0 for those of the Problem.
        addends: of so many ranks the partial sums are not zero; 0 for all.
        before: rows of earlier calls on a workspace opened for this; none: freshly opened; None: one that is open.
    """

    tokens: int
    watched: tuple[int, ...] = ()
    place: int = 0
    stride: int = 1
    company: str = "rows"
    strategy: str = ""
    world_size: int = 0
    addends: int = 0
    before: tuple[int, ...] | None = None

    @property
    def places(self) -> list[int]:
        """Where each watched row stands."""
        return [(self.place + self.stride * each) % self.tokens for each in range(len(self.watched))]

    def to_record(self) -> dict[str, Any]:
        """JSON-ready; fields at their defaults are left out."""
        record = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in record.items()}

    @classmethod
    def from_record(cls, record: Any) -> Call:
        """Read what `to_record` made.

        Raises:
            UsageError: it is no such record.
        """
        try:
            fields_of: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in record.items()}
            call = cls(**fields_of)
            whole = all(isinstance(n, int) and n >= 0 for n in (call.tokens, call.place, call.stride, *call.watched))
            right = whole and call.company in COMPANY and len(set(call.places)) == len(call.watched)
        except (TypeError, AttributeError, ZeroDivisionError):
            right = False
        if not right or call.tokens < 1:
            raise UsageError(f"a call of a replay line is {str(record)[:60]}, expected that of a finding, whole")
        return call

    def __str__(self) -> str:
        words = {name: value for name, value in asdict(self).items() if name in self.to_record()}
        return ", ".join(f"{name}={value}" for name, value in words.items())


@dataclass(frozen=True)
class Difference:
    """Where two answers part: an output, a row, and the ranks on which it was seen."""

    output: str
    row: int
    ranks: tuple[int, int]


def difference(first: Seen, second: Seen) -> Difference | None:
    """The first output, in the order of stages, of which a rank saw other bits of the same row."""
    for output in _in_order(first):
        for (rank, row), digest in first[output].items():
            if second[output].get((rank, row), digest) != digest:
                return Difference(output, row, (rank, rank))
    return None


def disagreement(seen: Seen) -> Difference | None:
    """The first output, in the order of stages, of which two ranks saw other bits of the same row."""
    for output in _in_order(seen):
        for (rank, row), digest in seen[output].items():
            if digest != seen[output][0, row]:
                return Difference(output, row, (0, rank))
    return None


def _in_order(seen: Seen) -> list[str]:
    """The outputs in the order of stages; those that are none, behind them."""
    return [*(name for name in STAGES if name in seen), *(name for name in seen if name not in STAGES)]


def merged(answers: Iterable[Seen]) -> Seen:
    """Several answers about different rows as one."""
    found: Seen = {}
    for seen in answers:
        for output, rows in seen.items():
            found.setdefault(output, {}).update(rows)
    return found


def groups(rows: tuple[int, ...], size: int) -> list[tuple[int, ...]]:
    """The rows in groups of `size`, the last one filled up with the first rows."""
    size = min(size, len(rows))
    return [tuple(rows[(start + k) % len(rows)] for k in range(size)) for start in range(0, len(rows), size)]

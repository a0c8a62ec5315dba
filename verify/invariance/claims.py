"""The claims of invariance, what an answer to one says, and the sizes at which they are asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fusecheck.invariance.calls import Call, Difference, Seen

CLAIMS = (
    "run to run", "workspace history", "ranks", "batch", "position", "neighbours", "exchange", "world size",
)  # fmt: skip
REPEATS = 8
"""Calls that are compared for run to run, at each size."""

MORE = 256
"""Calls in which a difference from run to run is looked for again: of 1 in 50, 99.4 % are seen."""

AGO = 3
"""Earlier calls of one size on the same workspace; buffers are kept up to three deep."""


class Subject(Protocol):
    """What is asked: a kernel on its ranks, or a function."""

    calls: int
    """Made so far."""

    def ask(self, call: Call) -> Seen:
        """Make a call, and say what every rank saw of the watched rows."""
        ...

    def takes(self, call: Call) -> str:
        """Why it does not take a call; empty where it does."""
        ...


@dataclass(frozen=True)
class Breach:
    """Two calls that should have given the same bits.

    Attributes:
        claim: which one of `CLAIMS` they refute.
        size: the first at which it breaks: rows of the batch, of the earlier call, or ranks.
        first: a call.
        second: the other; equal to `first` where repetition or the rank makes the difference.
        seen: where they part.
    """

    claim: str
    size: int
    first: Call
    second: Call
    seen: Difference


@dataclass(frozen=True)
class Answer:
    """What was found about one claim.

    Attributes:
        claim: one of `CLAIMS`.
        breach: the first one; None where the claim held, or was not asked.
        tried: what was compared, in words.
        untold: why the claim could not be asked; empty where it was.
        changes: batch sizes from which on the bits are others than below.
        calls: that it took.
    """

    claim: str
    breach: Breach | None = None
    tried: str = ""
    untold: str = ""
    changes: tuple[int, ...] = ()
    calls: int = 0

    @property
    def verdict(self) -> str:
        """`breaks`, `untold` or `invariant`."""
        return "breaks" if self.breach else "untold" if self.untold else "invariant"


def sizes(most: int, dense: int) -> list[int]:
    """The batch sizes that are tried: all up to `dense`, then in steps of an eighth; the last is `most`."""
    found = list(range(1, min(dense, most) + 1))
    while found[-1] < most:
        found.append(min(most, found[-1] + max(1, found[-1] // 8)))
    return found


def doubling(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... up to `most`."""
    steps = sorted({n for k in range(most.bit_length()) for n in (1 << k, 3 << k) if n < most})
    return [*steps, most]


def listed(numbers: Sequence[int]) -> str:
    """`1 to 64`, or `1, 2, 4, 8`."""
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    if len(numbers) > 12:
        return f"{', '.join(map(str, numbers[:3]))}, ... {numbers[-1]} ({len(numbers)} sizes)"
    return ", ".join(map(str, numbers))

"""What comes back from a call: a value or a failure, for every rank."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any


class FailureKind(str, Enum):
    """How a rank failed to answer.

    `PEER` is no fault of the rank itself: it was killed because another rank of its pool had failed.
    """

    HANG = "hang"
    CRASH = "crash"
    ERROR = "error"
    GARBAGE = "garbage"
    MEMORY = "memory"
    PEER = "peer"


@dataclass(frozen=True)
class Failure:
    """Why one rank gave no value.

    Attributes:
        kind: the kind of failure.
        rank: the rank's index in its group.
        message: one line that says what happened.
        error: the exception's type by name, for `ERROR`, and for a `CRASH` of the CUDA device alone.
        traceback: the exception's traceback, where there is one.
        method: of the backend, where the exception came out of one.
        place: file and line in which it was raised, for `ERROR`; where the main thread stood, for `HANG`.
        order: how many failures of the call had arrived before.
        signal: the name of the signal that ended the rank, for `CRASH`.
        exit_code: the rank's exit status, for a `CRASH` without a signal.
        unanswered: the ranks that had not answered when the pool was killed.
        output: the end of what the rank wrote to stdout and stderr; for a hang, where each thread stood.
    """

    kind: FailureKind
    rank: int
    message: str
    error: str = ""
    traceback: str = ""
    method: str = ""
    place: str = ""
    order: int = 0
    signal: str = ""
    exit_code: int | None = None
    unanswered: tuple[int, ...] = ()
    output: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The failure as JSON-ready values."""
        return asdict(self) | {"kind": self.kind.value, "unanswered": list(self.unanswered)}

    def __str__(self) -> str:
        waiting = [rank for rank in self.unanswered if rank != self.rank]
        also = f"; not answered either: rank {', '.join(map(str, waiting))}" if waiting else ""
        return f"{self.kind.value}: rank {self.rank}: {self.message}{also}"


@dataclass(frozen=True)
class Reply:
    """One rank's answer: its value, or the failure that it met instead."""

    rank: int
    value: Any = None
    failure: Failure | None = None

    @property
    def ok(self) -> bool:
        """Whether the rank returned a value."""
        return self.failure is None


def culprits(replies: Iterable[Reply]) -> list[Failure]:
    """The failures that are the ranks' own, not of those killed for a peer's sake; the likeliest cause first.

    A rank that died comes before those that raised, for its peers raise when it is gone; else they come in the order of
    their arrival.
    Of ranks that hang, which have no order, the one that stood elsewhere than the others is first.
    """
    failures = [reply.failure for reply in replies if reply.failure is not None]
    own = [failure for failure in failures if failure.kind is not FailureKind.PEER]
    return sorted(own, key=lambda failure: (failure.kind is FailureKind.ERROR, failure.order, failure.rank))


def values(replies: Sequence[Reply]) -> list[Any]:
    """Every rank's value, in rank order.

    Raises:
        RuntimeError: a rank failed; the message holds every failure and the first traceback.
    """
    failures = culprits(replies)
    if failures:
        traceback = next((f"\n{failure.traceback}" for failure in failures if failure.traceback), "")
        raise RuntimeError("; ".join(map(str, failures)) + traceback)
    return [reply.value for reply in replies]


def crash(rank: int, status: int, *, when: str, output: str = "") -> Failure:
    """Make the failure of a rank that ended, from the status that waitpid gave.

    Args:
        rank: the rank's index.
        status: the wait status, as the operating system reports it.
        when: what the rank was doing, for the message.
        output: the end of the rank's output.
    """
    code = -status if status < 0 else status
    if status < 0:
        name = _signal_name(code)
        return Failure(FailureKind.CRASH, rank, f"killed by {name} {when}", signal=name, output=output)
    return Failure(FailureKind.CRASH, rank, f"exited with status {code} {when}", exit_code=code, output=output)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

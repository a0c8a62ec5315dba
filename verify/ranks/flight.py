"""A call in flight: what was asked, until when, and what came back so far."""

from __future__ import annotations

import dataclasses
import pickle
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fusecheck.ranks.replies import Failure, FailureKind, Reply

GRACE_SECONDS = 2.0
"""How long the peers of a rank that raised may take to answer before they are killed."""
SETTLE_SECONDS = 0.1
"""How long the others are listened to after a rank died: several may die of one cause."""
ASKS = 20
"""How often the keepers are asked, within a call's time, whether a rank compiles: what ends just before time is up was
no hang, and what comes behind it takes time as well."""
ASK_SECONDS = 1.0
"""And when time is up: how long they may take to answer."""
COMPILE_SECONDS = 1800.0
"""How long a call may take that compiles, as a library does at its first call on a machine."""


@dataclass
class Flight:
    """One call.

    Attributes:
        request: its number, which every answer repeats.
        method: the worker's method, for messages.
        payload: the packed request.
        timeout: seconds, as the caller gave them.
        world_size: how many answers are due.
        due: the `time.monotonic` at which the call is over, answered or not.
        values: the values by rank.
        failures: the failures by rank.
    """

    request: int
    method: str
    payload: bytes
    timeout: float
    world_size: int
    due: float = float("inf")
    values: dict[int, Any] = field(default_factory=dict)
    failures: dict[int, Failure] = field(default_factory=dict)
    _departed: float = 0.0
    _asking: float = float("inf")
    _inquiry: int = 0
    _inquired: float = 0.0
    _unheard: int = 0
    _asked_last: bool = False

    def depart(self) -> None:
        """Start the clock."""
        self._departed = time.monotonic()
        self._begin(self._departed)

    def _begin(self, now: float) -> None:
        self.due, self._asked_last = now + self.timeout, False
        # A keeper that is stopped is not asked again and again: what it does not read fills its stream.
        self._asking = float("inf") if self._unheard else now + self.timeout / ASKS

    @property
    def wakes(self) -> float:
        """The `time.monotonic` at which there is something to do: to ask, or to end."""
        return min(self.due, self._asking)

    @property
    def doubtful(self) -> bool:
        """Whether the keepers are to be asked now whether a rank compiles, which is no hang."""
        if not self.silent or self.failures:
            return False
        now = time.monotonic()
        return not self._asked_last if now >= self.due else now >= self._asking

    def ask(self, keepers: int) -> tuple[int, int] | None:
        """Wait for what so many keepers say; returns what each must repeat, by which late answers are known.

        None where one still owes an answer: it is not asked again, and had `ASK_SECONDS` since it was.
        """
        now, owed = time.monotonic(), bool(self._unheard)
        if not owed:
            self._inquiry, self._inquired, self._unheard = self._inquiry + 1, now, keepers
        self._asking = float("inf")
        if now >= self.due:
            self._asked_last, self.due = True, max(now, self._inquired + ASK_SECONDS)
        return None if owed else (self.request, self._inquiry)

    def hear(self, inquiry: tuple[int, int], *, compiles: bool) -> None:
        """Take what a keeper says: where a rank compiles, time begins anew, unless a rank has failed already."""
        if inquiry != (self.request, self._inquiry) or self.failures:
            return
        now = time.monotonic()
        self._unheard -= 1
        if compiles and now < self._departed + COMPILE_SECONDS:
            self._begin(now)
        elif not self._unheard and self._asked_last:
            self.due = now
        elif not self._unheard:
            self._asking = now + self.timeout / ASKS

    @property
    def over(self) -> bool:
        """Whether every rank has answered or failed, or time is up."""
        return not self.silent or time.monotonic() >= self.due

    @property
    def silent(self) -> tuple[int, ...]:
        """The ranks of which nothing was heard."""
        return tuple(r for r in range(self.world_size) if r not in self.values and r not in self.failures)

    @property
    def well(self) -> bool:
        """Whether every rank answered, be it with an error: the pool can be used on."""
        return not self.silent and all(f.kind is FailureKind.ERROR for f in self.failures.values())

    def take(self, rank: int, payload: bytes) -> Failure | None:
        """Take a rank's answer; returns the failure that it is, if it is one."""
        try:
            request, status, *rest = pickle.loads(payload)
        except Exception as problem:
            # The frame was whole, so it is the value that cannot be rebuilt here.
            return Failure(FailureKind.GARBAGE, rank, f"its answer cannot be unpickled: {problem!r}")
        if request != self.request or rank in self.values:
            return Failure(FailureKind.GARBAGE, rank, f"answered request {request} during request {self.request}")
        if status == "ok":
            self.values[rank] = rest[0]
            return None
        name, message, traceback, method, place = rest
        text = f"raised {name} in {method or self.method}{f' ({place})' if place else ''}: {message}"
        kind = FailureKind.ERROR
        if status == "lost":
            kind, text = FailureKind.CRASH, f"lost its CUDA device: {text}"
        return Failure(kind, rank, text, error=name, traceback=traceback, method=method, place=place)

    def fail(self, failure: Failure) -> None:
        """Record a failure, and wait for the other ranks only a little longer."""
        self.values.pop(failure.rank, None)
        self.failures.setdefault(failure.rank, dataclasses.replace(failure, order=len(self.failures)))
        patience = GRACE_SECONDS if failure.kind is FailureKind.ERROR else SETTLE_SECONDS
        self.due, self._asking = min(self.due, time.monotonic() + patience), float("inf")

    def land(self, tails: Mapping[int, str]) -> list[Reply]:
        """Make the replies, in rank order.

        Args:
            tails: the end of each rank's output, if the ranks were killed.
        """
        silent, causes = self.silent, ", ".join(map(str, sorted(self.failures)))
        places = {rank: _place(tails.get(rank, "")) for rank in silent}
        order = _suspicion(places)
        stood = "; ".join(f"rank {rank} {places[rank]}" for rank in order)
        for rank in silent:
            if causes:
                message = f"killed while in {self.method}, since rank {causes} had failed"
                self.failures[rank] = Failure(FailureKind.PEER, rank, message)
            else:
                message = f"no answer to {self.method} in {self.timeout:g} s: {stood}"
                place = places[rank]
                self.failures[rank] = Failure(FailureKind.HANG, rank, message, place=place, order=order.index(rank))
        for rank, failure in self.failures.items():
            output = failure.output or tails.get(rank, "")
            self.failures[rank] = dataclasses.replace(failure, unanswered=silent, output=output)
        return [Reply(rank, self.values.get(rank), self.failures.get(rank)) for rank in range(self.world_size)]


WAITING = re.compile(r"wait|spin|barrier|recv|gather|reduce|synchronize|poll|sleep|exchange")
"""Names of functions in which a rank waits for its peers."""


def _place(tail: str) -> str:
    """What a rank did, from the stacks that it wrote when it was asked, and from what the system says of it."""
    state = re.findall(r"fusecheck: the process is (.+)", tail)
    found = re.findall(r'Current thread .*:\n  File "(?:.*/)?(.+)", line (\d+) in (\S+)', tail)
    if state and state[-1] == "stopped":
        return "is stopped (SIGSTOP) and could not say where it stood"
    if not found:
        return f"did not say where it stood; its process is {state[-1] if state else 'gone'}"
    return "stood in {2} ({0}:{1})".format(*found[-1])


def _suspicion(places: Mapping[int, str]) -> list[int]:
    """The ranks, the one that differs first: that cannot answer, that does not wait for peers, that stands alone."""
    count = Counter(places.values())

    def key(rank: int) -> tuple[bool, bool, int, int]:
        place = places[rank]
        return place.startswith("stood"), bool(WAITING.search(place.partition(" (")[0])), count[place], rank

    return sorted(places, key=key)

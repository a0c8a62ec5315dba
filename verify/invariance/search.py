"""The claims of invariance, each decided by comparing calls bit by bit; knows neither kernels nor ranks.

A claim holds over what was tried, or breaks from a first size on. It is found by halving between two sizes that were
tried; what changes there and changes back in between is not seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from fusecheck.invariance.calls import COMPANY, Call, Seen, difference, disagreement, groups, merged
from fusecheck.invariance.claims import AGO, CLAIMS, REPEATS, Answer, Breach, Subject, doubling, listed, sizes

T = TypeVar("T")

VARIES = "the same call gives other bits when it is made again"


@dataclass
class Search:
    """Asks a subject about the claims.

    Attributes:
        subject: asked.
        rows: numbers of the watched rows.
        most: the largest batch.
        dense: up to which every batch size is tried.
        strategies: that are compared with each other.
        worlds: numbers of ranks that are compared, the smallest first.
        told: called with each answer.
        claims: that are asked; the others are left out.
    """

    subject: Subject
    rows: tuple[int, ...]
    most: int
    dense: int
    strategies: tuple[str, ...] = ()
    worlds: tuple[int, ...] = ()
    told: Callable[[Answer], None] = lambda _: None
    claims: tuple[str, ...] = CLAIMS
    _fresh: bool = False
    _ranks: Breach | None = None
    _sizes: tuple[int, ...] = ()
    _answers: dict[str, Answer] = field(default_factory=dict)

    def run(self) -> list[Answer]:
        """Decide every claim, in order; a claim that a later one refutes is told again."""
        for claim, about in {
            "run to run": self._run_to_run,
            "workspace history": self._history,
            "batch": self._batch,
            "position": self._position,
            "neighbours": self._neighbours,
            "exchange": self._exchange,
            "world size": self._world_size,
        }.items():
            if claim in self.claims:
                self._decide(claim, about)
        if "ranks" in self.claims:  # last, for every call has a part in it
            self._tell(self._of_ranks())
        return sorted(self._answers.values(), key=lambda answer: CLAIMS.index(answer.claim))

    # ------------------------------------------------------------------ asking
    def _tell(self, answer: Answer) -> None:
        self._answers[answer.claim] = answer
        self._fresh |= answer.claim == "workspace history" and answer.breach is not None
        self.told(answer)

    def _decide(self, claim: str, about: Callable[[], tuple[Breach | None, str, str]]) -> None:
        before = self.subject.calls
        breach, tried, untold = (None, "", VARIES) if self._varies else about()
        if breach is not None and claim in CLAIMS[3:] and (other := self._not_again(breach)) is not None:
            self._tell(Answer(other.claim, other, calls=self.subject.calls - before))
            before = self.subject.calls
            breach, tried, untold = (None, "", VARIES) if self._varies else about()
        changes = self._sizes if claim == "batch" and breach else ()
        self._tell(Answer(claim, breach, tried, untold, changes, self.subject.calls - before))

    @property
    def _varies(self) -> bool:
        return "run to run" in self._answers and self._answers["run to run"].breach is not None

    def _not_again(self, breach: Breach) -> Breach | None:
        """What refutes two calls that do not part on fresh workspaces: an earlier call did, or chance."""
        one, two = (replace(call, before=()) for call in (breach.first, breach.second))
        if difference(self._ask(one), self._ask(two)) is not None:
            return None
        for call in (one, two):
            after = replace(call, before=(breach.size,) * AGO)
            apart = difference(self._ask(call), self._ask(after))
            if apart is not None and not self._fresh:
                return Breach("workspace history", breach.size, call, after, apart)
        return Breach("run to run", breach.size, two, two, breach.seen)

    def _ask(self, call: Call) -> Seen:
        if self._fresh and call.before is None:
            call = replace(call, before=())
        seen = self.subject.ask(call)
        apart = disagreement(seen)
        if apart is not None and (self._ranks is None or call.tokens < self._ranks.size):
            self._ranks = Breach("ranks", call.tokens, call, call, apart)
        return seen

    def _all(self, size: int, *, places: int = 0) -> Iterator[Call]:
        """Calls of `size` rows in which each watched row stands once, at one of the first places."""
        for group in groups(self.rows, places or size):
            yield Call(size, group)

    def _first(self, tried: Sequence[int], breaks: Callable[[int], Breach | None]) -> Breach | None:
        """The breach at the smallest size, by halving below the first size at which there is one."""
        below = tried[0] - 1 if tried else 0
        for size in tried:
            found = breaks(size)
            if found is None:
                below = size
                continue
            return _earliest(self._taken(range(below + 1, size)), breaks, found)
        return None

    def _taken(self, numbers: Iterable[int], *strategies: str) -> list[int]:
        """Those batch sizes that the subject takes, in order, by each of these exchanges."""
        return [n for n in numbers if not any(self.subject.takes(Call(n, strategy=s)) for s in strategies or ("",))]

    def _smallest(self, breach: Breach) -> Breach:
        """The same breach with one watched row among zeros, or among rows, where these still show it."""
        first, second = breach.first, breach.second
        row = breach.seen.row
        for company in ("zeros", "rows"):
            one, two = (
                replace(call, watched=(row,), place=call.places[call.watched.index(row)], company=company, stride=1)
                for call in (first, second)
            )
            if breach.claim == "neighbours":
                one, two = replace(one, company=first.company), replace(two, company=second.company)
            seen = difference(self._ask(one), self._ask(two))
            if seen is not None:
                return replace(breach, first=one, second=two, seen=seen)
        return breach

    # ------------------------------------------------------------------ the claims
    def _run_to_run(self) -> tuple[Breach | None, str, str]:
        def breaks(size: int) -> Breach | None:
            for call in self._all(size):
                self._ask(call)  # what a first call finds on a workspace is its history, which is another claim
                seen = self._ask(call)
                for _ in range(REPEATS - 1):
                    apart = difference(seen, self._ask(call))
                    if apart is not None:
                        return Breach("run to run", size, call, call, apart)
            return None

        tried = self._taken(sorted({1, min(2, self.most), max(1, self.most // 2), self.most}))
        return self._first(tried, breaks), f"{REPEATS} equal calls of {listed(tried)} rows", ""

    def _history(self) -> tuple[Breach | None, str, str]:
        size = self._taken(range(1, min(4, self.most) + 1))[-1]
        fresh = [Call(size, group, before=()) for group in groups(self.rows, size)]
        seen = merged(map(self._ask, fresh))

        def breaks(earlier: int) -> Breach | None:
            for call in fresh:
                after = replace(call, before=(earlier,) * AGO)
                apart = difference(seen, self._ask(after))
                if apart is not None:
                    return Breach("workspace history", earlier, call, after, apart)
            return None

        tried = doubling(self.most)[:: 2 if self.most > 16 else 1]
        tried = self._taken(sorted({*tried, self.most}))
        found = self._first(tried, breaks)
        return (
            found and self._smallest(found),
            f"{size} rows on a fresh workspace, and behind {AGO} calls of {listed(tried)} rows",
            "",
        )

    def _of_ranks(self) -> Answer:
        world = self.worlds[0] if self.worlds else 1
        untold = "" if world > 1 else "there is one rank"
        return Answer("ranks", self._ranks, f"every call, on {world} ranks" if world > 1 else "", untold)

    def _batch(self) -> tuple[Breach | None, str, str]:
        """Each row alone, and in batches; every size at which the bits change."""
        tried = self._taken(sizes(self.most, self.dense))
        alone = {row: self._ask(Call(1, (row,))) for row in self.rows}
        same = merged(alone.values())
        breach, changes = self._changes(tried, same, places=0)
        where = "in"
        if breach is not None and (moved := self._by_place(breach.size, same)) is None:
            # What the place makes of a row is another claim: watch the first place only.
            where, tried = "first in", self._taken(doubling(self.most))
            breach, changes = self._changes(tried, same, places=1)
        elif breach is not None and moved is not None:
            breach = moved
        self._sizes = tuple(changes)
        return breach and self._smallest(breach), f"each row alone and {where} batches of {listed(tried)}", ""

    def _changes(self, tried: Sequence[int], alone: Seen, *, places: int) -> tuple[Breach | None, list[int]]:
        def at(size: int) -> Seen:
            return merged(self._ask(call) for call in self._all(size, places=places))

        def parted(from_: Seen) -> Callable[[int], tuple[int, Seen] | None]:
            return lambda size: (size, seen) if difference(from_, seen := at(size)) is not None else None

        breach, found, last, below = None, list[int](), alone, 1
        for size in tried:
            now = at(size)
            while (apart := difference(last, now)) is not None:
                high, there = _earliest(self._taken(range(below + 1, size)), parted(last), (size, now))
                apart = difference(last, there) or apart
                if breach is None:
                    one, two = Call(1, (apart.row,)), self._with(high, apart.row, places)
                    breach = Breach("batch", high, one, two, apart)
                found.append(high)
                last, below = there, high
            below = size
        return breach, found

    def _with(self, size: int, row: int, places: int) -> Call:
        return next(call for call in self._all(size, places=places) if row in call.watched)

    def _by_place(self, size: int, alone: Seen) -> Breach | None:
        """The breach of a row that stands at the first place, as it does alone."""
        for group in groups(self.rows, size):
            for turn, row in enumerate(group):
                call = Call(size, (*group[turn:], *group[:turn]))
                seen = {
                    name: {key: x for key, x in at.items() if key[1] == row} for name, at in self._ask(call).items()
                }
                apart = difference(alone, seen)
                if apart is not None:
                    return Breach("batch", size, Call(1, (row,)), call, apart)
        return None

    def _position(self) -> tuple[Breach | None, str, str]:
        def breaks(size: int) -> Breach | None:
            for group in groups(self.rows, size):
                calls = [Call(size, group, place=place) for place in range(size)]
                home = self._ask(calls[0])
                for call in calls[1:]:
                    apart = difference(home, self._ask(call))
                    if apart is None:
                        continue
                    found = self._smallest(Breach("position", size, calls[0], call, apart))
                    if found.first.company == "zeros":  # among equal neighbours, so that it is the place
                        return found
            return None

        tried = self._taken(doubling(min(self.most, 64))[1:])
        if self.most > 64:
            words = f"every place in batches of {listed(tried)}; no larger one"
        else:
            words = f"every place in batches of {listed(tried)}"
        return self._first(tried, breaks), words, "" if tried else "a batch of one row has one place"

    def _neighbours(self) -> tuple[Breach | None, str, str]:
        def breaks(size: int) -> Breach | None:
            # Of two or three rows only the second one has a row before it.
            for group, place in itertools.product(groups(self.rows, size // 2), (0, 1) if size < 4 else (0,)):
                usual = Call(size, group, place=place, stride=2)
                seen = self._ask(usual)
                for company in COMPANY[1:]:
                    other = replace(usual, company=company)
                    apart = difference(seen, self._ask(other))
                    if apart is not None:
                        return self._smallest(Breach("neighbours", size, usual, other, apart))
            return None

        tried = self._taken(doubling(self.most)[1:])
        words = f"other rows, zeros, large values and NaN beside each row, in batches of {listed(tried)}"
        return self._first(tried, breaks), words, "" if tried else "a batch of one row has no neighbours"

    def _exchange(self) -> tuple[Breach | None, str, str]:
        first, *others = self.strategies or ("",)
        pairs = [(one, two) for two in others for one in (first,)]
        tried = self._taken(doubling(self.most), *self.strategies)
        if not pairs or not tried:
            return None, "", "it takes one exchange only"

        def breaks(size: int) -> Breach | None:
            for call in self._all(size):
                for one, two in pairs:
                    a, b = replace(call, strategy=one), replace(call, strategy=two)
                    apart = difference(self._ask(a), self._ask(b))
                    if apart is not None:
                        return self._smallest(Breach("exchange", size, a, b, apart))
            return None

        return self._first(tried, breaks), f"{' and '.join(self.strategies)} in batches of {listed(tried)}", ""

    def _world_size(self) -> tuple[Breach | None, str, str]:
        least, *others = self.worlds or (1,)
        if not others:
            return None, "", "one world size was asked for"
        size = self._taken(range(1, min(self.most, len(self.rows)) + 1))[-1]
        for call in self._all(size):
            one = replace(call, world_size=least, addends=least)
            seen = self._ask(one)
            for world in others:
                two = replace(one, world_size=world)
                apart = difference(seen, self._ask(two))
                if apart is not None:
                    return self._smallest(Breach("world size", world, one, two, apart)), "", ""
        return None, f"the sums of {least} ranks, and zeros on the others of {listed(others)} ranks", ""


def _earliest(between: Sequence[int], found_at: Callable[[int], T | None], found: T) -> T:
    """What is found at the smallest size, by halving the ascending sizes below the one of `found`."""
    while between:
        middle = len(between) // 2
        nearer = found_at(between[middle])
        between = between[middle + 1 :] if nearer is None else between[:middle]
        found = found if nearer is None else nearer
    return found

"""What random legal kernels found against sound bounds and against broken ones, and how that is told."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar


@dataclass
class Tally:
    """What one bound was tried on.

    Attributes:
        elements: judged, each in every way that is counted.
        violations: by what was compared.
    """

    elements: int = 0
    violations: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Violations of any kind."""
        return self.violations.total()

    def rest(self) -> dict[str, str]:
        """Further columns of its line."""
        return {}


Kind = TypeVar("Kind", bound=Tally)


@dataclass
class Tallies(Generic[Kind]):
    """What was tried, by the names of the bounds.

    Attributes:
        sound: bounds that must hold.
        broken: bounds that are broken on purpose, each of which must be caught.
    """

    sound: dict[str, Kind] = field(default_factory=dict)
    broken: dict[str, Kind] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        """Judged by sound bounds."""
        return sum(tally.elements for tally in self.sound.values())

    def verdict(self) -> tuple[list[str], list[str]]:
        """The sound bounds that were refuted, and the broken ones that were not caught."""
        refuted = [name for name, tally in self.sound.items() if tally.total]
        return refuted, [name for name, tally in self.broken.items() if not tally.total]

    def table(self) -> str:
        """One line a bound."""
        tallies = {**self.sound, **self.broken}
        first = next(iter(tallies.values()))
        lines = [
            f"{'bound':58}{'elements':>12}" + "".join(f"{name:>11}" for name in (*first.violations, *first.rest()))
        ]
        for name, tally in tallies.items():
            columns = (*(tally.violations[kind] for kind in first.violations), *tally.rest().values())
            lines.append(f"{name:58}{tally.elements:>12}" + "".join(f"{column:>11}" for column in columns))
        return "\n".join(lines)


def report(name: str, run: Iterator[Tallies[Kind]], checks: int) -> bool:
    """Print how a run goes, and its table; whether a sound bound was refuted or a broken one was not caught."""
    start, shown = time.monotonic(), 0.0
    for tallies in run:
        if tallies.elements >= shown + checks / 5:
            shown = tallies.elements
            print(f"... {name}: {shown:.2e} elements, {time.monotonic() - start:.0f} s", flush=True)
    refuted, missed = tallies.verdict()
    print(tallies.table())
    print(f"{name}: sound bounds {'REFUTED: ' + ', '.join(refuted) if refuted else 'hold'}", end="; ")
    print(f"broken bounds {'NOT CAUGHT: ' + ', '.join(missed) if missed else 'caught'}", flush=True)
    return bool(refuted or missed)

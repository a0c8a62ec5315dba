"""Protocols made of others: launched by the wrong ranks, in crossed orders, or by turns on one workspace."""

from __future__ import annotations

from dataclasses import dataclass, field

from fusecheck.protocol.kernels.oneshot import OneShot
from fusecheck.protocol.kernels.twoshot import TwoShot
from fusecheck.protocol.language import Launch, Model, Size


@dataclass(frozen=True)
class Stray:
    """Only the first ranks of a group launch a protocol; the others do not know that they belong to it.

    Attributes:
        model: that is launched.
        members: how many ranks launch it.
    """

    model: Model
    members: int = 2
    name: str = "in the wrong group"

    def launches(self, size: Size) -> list[Launch]:
        """What the members launch."""
        return [launch for launch in self.model.launches(size) if launch.block.rank < self.members]


@dataclass(frozen=True)
class Crossed:
    """The ranks issue two collectives in different orders: odd ranks swap each pair of calls.

    Attributes:
        model: that is launched.
    """

    model: Model
    name: str = "in different orders"

    def launches(self, size: Size) -> list[Launch]:
        """Every pair of calls the other way round on odd ranks; each call keeps its data and its size."""
        made = list(self.model.launches(size))
        for rank in range(1, size.ranks, 2):
            places = [place for place, launch in enumerate(made) if launch.block.rank == rank]
            per_call = len(places) // size.calls
            for call in range(0, size.calls - 1, 2):
                first = places[call * per_call : (call + 1) * per_call]
                second = places[(call + 1) * per_call : (call + 2) * per_call]
                swapped = [made[place] for place in (*second, *first)]
                for place, launch in zip((*first, *second), swapped, strict=True):
                    made[place] = launch
        return made


@dataclass(frozen=True)
class Alternating:
    """Two kernels by turns on one workspace, whose control words they share.

    Attributes:
        even: what even calls launch.
        odd: what odd calls launch.
    """

    even: Model = field(default_factory=OneShot)
    odd: Model = field(default_factory=TwoShot)
    name: str = "by turns"

    def launches(self, size: Size) -> list[Launch]:
        """Each call by the kernel whose turn it is."""
        pairs = zip(self.even.launches(size), self.odd.launches(size), strict=True)
        return [odd if odd.block.call % 2 else even for even, odd in pairs]

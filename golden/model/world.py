"""A made-up world whose facts the golden model learns, and the small vocabularies that its questions draw on."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

SEED = 20251


def _words(text: str) -> list[str]:
    return text.split()


PLACES = 240
TEST_SHARE = 10
"""One key in this many is a test item's; training text holds none of them."""

PEOPLE = _words(
    "Ann Bob Cid Dot Eve Fay Gus Hal Ivy Jon Kim Leo Mia Ned Ola Pam Quin Ray Sue Tom Una Vic Wes Xia Yan Zoe"
)
THINGS = _words(
    "apples books coins cards shells stamps marbles pencils cookies stickers balloons eggs plums ribbons bricks "
    "flowers tickets buttons beads candles"
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
COLOURS = _words("red blue green white black yellow purple orange brown grey pink gold")
EXPORTS = _words(
    "wool tin salt tea copper honey glass timber silk rubber cotton cocoa pepper marble amber paper olives barley "
    "leather cheese"
)
KINDS = {
    "fruit": _words("apple pear plum grape cherry peach lemon mango banana fig apricot melon lime kiwi orange date"),
    "animal": _words("horse tiger rabbit sheep goat camel monkey zebra lion otter badger donkey wolf bear fox deer"),
    "tool": _words("hammer saw drill wrench chisel pliers shovel rake axe file clamp spade level trowel ladder knife"),
    "colour": _words("red blue green white black yellow purple brown grey pink violet crimson scarlet beige teal navy"),
    "vehicle": _words("car bus train truck bicycle tram ship plane wagon ferry canoe tractor van scooter barge sled"),
    "vegetable": _words("carrot onion potato cabbage leek radish spinach turnip celery garlic kale beet pumpkin"),
    "instrument": _words("violin flute drum piano guitar trumpet harp cello oboe banjo clarinet organ tuba lute"),
    "garment": _words("shirt coat hat scarf glove sock skirt jacket boot belt dress vest sweater cap"),
}

_ONSETS = _words("b br c cr d dr f g gr h j k l m n p pr r s st t tr v w z")
_VOWELS = _words("a e i o u ai ea or an in")
_ENDINGS = _words("ba da lia mor nia nor port ria ston tan via wick")


@dataclass(frozen=True)
class Place:
    """One made-up country and what is known of it."""

    name: str
    capital: str
    export: str
    colour: str
    founder: str


def held_out(key: str) -> bool:
    """Say whether the item with this key belongs to the test set; a property of the text, not of any seed."""
    return zlib.crc32(key.encode()) % TEST_SHARE == 0


def _name(rng: random.Random) -> str:
    stem = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.randint(1, 2)))
    return (stem + rng.choice(_ENDINGS)).capitalize()


def _distinct_names(rng: random.Random, count: int, taken: set[str]) -> list[str]:
    names: list[str] = []
    while len(names) < count:
        name = _name(rng)
        if name not in taken:
            taken.add(name)
            names.append(name)
    return names


def places() -> list[Place]:
    """Make the world: always the same one."""
    rng = random.Random(SEED)
    taken: set[str] = set()
    names, capitals, founders = (_distinct_names(rng, PLACES, taken) for _ in range(3))
    return [
        Place(n, c, rng.choice(EXPORTS), rng.choice(COLOURS), f)
        for n, c, f in zip(names, capitals, founders, strict=True)
    ]

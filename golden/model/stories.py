"""Generated word problems in GSM8K's format: short steps, calculator marks, and `#### answer`."""

from __future__ import annotations

import random
from dataclasses import dataclass

from fusecheck.golden.model.world import PEOPLE, THINGS

TRAINED_STEPS = (1, 4)
"""Numbers of operations in training text."""
ASKED_STEPS = (4, 5)
"""Numbers of operations in the generated task: the most that was trained and one beyond, so that the model errs."""


@dataclass(frozen=True)
class Story:
    """One word problem, with the fields of a GSM8K row; `steps` is its number of operations."""

    question: str
    answer: str
    steps: int

    @property
    def key(self) -> str:
        """What decides on which side of the split the problem lies."""
        return self.question

    def text(self) -> str:
        """Return the prompt as lm-eval's gsm8k task writes it."""
        return f"Question: {self.question}\nAnswer:"

    def target(self) -> str:
        """Return the whole worked answer as a continuation."""
        return " " + self.answer


def _calculation(a: int, sign: str, b: int) -> tuple[int, str]:
    """Return the result and GSM8K's way to write it: `5 + 7 = <<5+7=12>>12`."""
    result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
    return result, f"{a} {sign} {b} = <<{a}{sign}{b}={result}>>{result}"


def _gain(rng: random.Random, who: str, thing: str, total: int) -> tuple[str, str, int]:
    n = rng.randint(2, 60)
    result, sum_ = _calculation(total, "+", n)
    verb = rng.choice(["buys", "finds", "gets", "makes"])
    return f"{who} {verb} {n} more.", f"Then {who} has {sum_} {thing}.", result


def _loss(rng: random.Random, who: str, thing: str, total: int) -> tuple[str, str, int]:
    n = rng.randint(1, max(1, min(60, total - 1)))
    result, sum_ = _calculation(total, "-", n)
    verb = rng.choice(["gives away", "loses", "sells", "breaks"])
    return f"{who} {verb} {n}.", f"Then {who} has {sum_} {thing}.", result


def _boxes(rng: random.Random, who: str, thing: str, total: int) -> tuple[str, str, int]:
    boxes, each = rng.randint(2, 9), rng.randint(2, 12)
    extra, product = _calculation(boxes, "*", each)
    result, sum_ = _calculation(total, "+", extra)
    return (
        f"{who} opens {boxes} boxes with {each} {thing} in each.",
        f"The boxes hold {product} {thing}. Then {who} has {sum_} {thing}.",
        result,
    )


def _doubling(rng: random.Random, who: str, thing: str, total: int) -> tuple[str, str, int]:
    factor, word = rng.choice([(2, "doubles"), (3, "triples")])
    result, product = _calculation(total, "*", factor)
    return f"{who} {word} the number of {thing}.", f"Then {who} has {product} {thing}.", result


def _halving(rng: random.Random, who: str, thing: str, total: int) -> tuple[str, str, int]:
    if total % 2:
        return _gain(rng, who, thing, total)
    result, quotient = _calculation(total, "/", 2)
    return f"{who} gives half to a friend.", f"Then {who} has {quotient} {thing}.", result


_STEPS = (_gain, _gain, _loss, _loss, _boxes, _doubling, _halving)


def _aside(rng: random.Random, who: str) -> str:
    other = rng.choice([p for p in PEOPLE if p != who])
    return f"{other} has {rng.randint(2, 90)} {rng.choice(THINGS)}."


def story(rng: random.Random, span: tuple[int, int] = TRAINED_STEPS) -> Story:
    """Write one word problem, its number of operations within `span`, from either side of the split."""
    who, thing = rng.choice(PEOPLE), rng.choice(THINGS)
    steps, total = rng.randint(*span), rng.randint(3, 80)
    asked = [f"{who} has {total} {thing}."]
    worked = []
    for _ in range(steps):
        make = rng.choice(_STEPS) if total < 200 else _loss
        told, shown, total = make(rng, who, thing, total)
        asked.append(told)
        worked.append(shown)
    if rng.random() < 0.3:
        asked.insert(rng.randint(1, len(asked)), _aside(rng, who))
    asked.append(f"How many {thing} does {who} have now?")
    return Story(" ".join(asked), "\n".join([*worked, f"#### {total}"]), steps)

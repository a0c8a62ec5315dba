"""Generated four-choice questions in MMLU's format, by subject."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fusecheck.golden.model.world import COLOURS, DAYS, EXPORTS, KINDS, PEOPLE, THINGS, Place, places

LETTERS = "ABCD"


@dataclass(frozen=True)
class Question:
    """One four-choice item, with the fields of an MMLU row; `key` decides on which side of the split it lies."""

    subject: str
    question: str
    choices: tuple[str, str, str, str]
    answer: int
    key: str

    def text(self) -> str:
        """Return the prompt as lm-eval's mmlu tasks write it, up to and with `Answer:`."""
        lines = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=True))
        return f"{self.question}\n{lines}\nAnswer:"

    def target(self) -> str:
        """Return the continuation that scores as right."""
        return " " + LETTERS[self.answer]


def description(subject: str) -> str:
    """Return the line that lm-eval's mmlu tasks put before the shots."""
    return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"


_WORLD = places()

FACT_PHRASES = {
    "geography": (
        "What is the capital of {}?",
        "Which city is the capital of {}?",
        "The seat of government of {} is in which city?",
    ),
    "trade": ("What does {} mainly export?", "Which good is the main export of {}?", "{} is known for selling what?"),
    "flags": ("What colour is the flag of {}?", "The flag of {} has which colour?", "Which colour does {} fly?"),
    "history": ("Who founded {}?", "Which person was the founder of {}?", "{} was founded by whom?"),
}
STATEMENTS = {
    "geography": "The capital of {} is {}.",
    "trade": "{} mainly exports {}.",
    "flags": "The flag of {} is {}.",
    "history": "{} was founded by {}.",
}


def attribute(place: Place, subject: str) -> str:
    """Return what a fact subject asks of a place."""
    return {
        "geography": place.capital,
        "trade": place.export,
        "flags": place.colour,
        "history": place.founder,
    }[subject]


def _pose(
    rng: random.Random, subject: str, question: str, right: str, wrong: Sequence[str], key: str | None = None
) -> Question:
    picked = [right, *wrong[:3]]
    rng.shuffle(picked)
    a, b, c, d = picked
    name = question if key is None else f"{key}|{'|'.join(sorted(picked))}"
    return Question(subject, question, (a, b, c, d), picked.index(right), name)


def _near(rng: random.Random, right: int) -> list[str]:
    """Return three wrong numbers close to the right one."""
    offsets = [-20, -11, -10, -9, -2, -1, 1, 2, 9, 10, 11, 20]
    return [str(right + o) for o in rng.sample([o for o in offsets if right + o >= 0], 3)]


def _fact(rng: random.Random, subject: str) -> Question:
    place = rng.choice(_WORLD)
    right = attribute(place, subject)
    pool: Sequence[str] = {"trade": EXPORTS, "flags": COLOURS}.get(subject) or [attribute(p, subject) for p in _WORLD]
    wrong = rng.sample([v for v in pool if v != right], 3)
    return _pose(rng, subject, rng.choice(FACT_PHRASES[subject]).format(place.name), right, wrong)


def _comparison(rng: random.Random, subject: str) -> Question:
    limit = rng.choice([50, 1000])
    numbers = rng.sample(range(1, limit), 4)
    word, pick = rng.choice([("largest", max), ("smallest", min)])
    right = pick(numbers)
    question = f"Which of these numbers is the {word}?"
    return _pose(rng, subject, question, str(right), [str(n) for n in numbers if n != right], word)


def _addition(rng: random.Random, subject: str) -> Question:
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    return _pose(rng, subject, f"What is {a} + {b}?", str(a + b), _near(rng, a + b))


def _subtraction(rng: random.Random, subject: str) -> Question:
    b, a = sorted((rng.randint(2, 99), rng.randint(2, 99)))
    return _pose(rng, subject, f"What is {a} - {b}?", str(a - b), _near(rng, a - b))


def _multiplication(rng: random.Random, subject: str) -> Question:
    a, b = rng.randint(2, 12), rng.randint(2, 40)
    return _pose(rng, subject, f"What is {a} x {b}?", str(a * b), _near(rng, a * b))


def _sequence(rng: random.Random, subject: str) -> Question:
    start, step, growth = rng.randint(1, 40), rng.randint(2, 12), rng.choice([0, 0, 1, 2])
    terms = [start]
    for k in range(4):
        terms.append(terms[-1] + step + k * growth)
    shown = ", ".join(str(t) for t in terms[:4])
    return _pose(rng, subject, f"Which number comes next in {shown}?", str(terms[4]), _near(rng, terms[4]))


def _category(rng: random.Random, subject: str) -> Question:
    kind, *others = rng.sample(sorted(KINDS), 4)
    right = rng.choice([w for w in KINDS[kind] if all(w not in KINDS[o] for o in others)])
    wrong = [rng.choice([w for w in KINDS[o] if w not in KINDS[kind]]) for o in others]
    article = "an" if kind[0] in "aeiou" else "a"
    return _pose(rng, subject, f"Which of these is {article} {kind}?", right, wrong, kind)


def _holdings(rng: random.Random) -> tuple[list[str], list[int], str, str]:
    names, thing = rng.sample(PEOPLE, 4), rng.choice(THINGS)
    counts = rng.sample(range(2, 90), 4)
    listed = ", ".join(f"{n} has {c} {thing}" for n, c in zip(names[:3], counts[:3], strict=True))
    return names, counts, thing, f"{listed} and {names[3]} has {counts[3]} {thing}."


def _reading(rng: random.Random, subject: str) -> Question:
    names, counts, thing, story = _holdings(rng)
    k = rng.randrange(4)
    wrong = [str(c) for i, c in enumerate(counts) if i != k]
    return _pose(rng, subject, f"{story} How many {thing} does {names[k]} have?", str(counts[k]), wrong)


def _ranking(rng: random.Random, subject: str) -> Question:
    names, counts, thing, story = _holdings(rng)
    word, pick = rng.choice([("most", max), ("fewest", min)])
    right = names[counts.index(pick(counts))]
    return _pose(rng, subject, f"{story} Who has the {word} {thing}?", right, [n for n in names if n != right])


def _calendar(rng: random.Random, subject: str) -> Question:
    day, ahead = rng.randrange(7), rng.randint(1, 40)
    sign, word = rng.choice([(1, "after"), (-1, "before")])
    right = DAYS[(day + sign * ahead) % 7]
    wrong = rng.sample([d for d in DAYS if d != right], 3)
    return _pose(rng, subject, f"Which day is {ahead} days {word} {DAYS[day]}?", right, wrong, f"{ahead}{word}{day}")


def _divisibility(rng: random.Random, subject: str) -> Question:
    divisor = rng.choice([2, 3, 5, 7])
    right = divisor * rng.randint(2, 140 // divisor)
    others = [n for n in range(4, 150) if n % divisor]
    wrong = [str(n) for n in rng.sample(others, 3)]
    return _pose(rng, subject, f"Which number can be divided by {divisor}?", str(right), wrong, str(divisor))


SUBJECTS: dict[str, Callable[[random.Random, str], Question]] = {
    "geography": _fact,
    "trade": _fact,
    "flags": _fact,
    "history": _fact,
    "comparison": _comparison,
    "addition": _addition,
    "subtraction": _subtraction,
    "multiplication": _multiplication,
    "sequences": _sequence,
    "categories": _category,
    "reading": _reading,
    "ranking": _ranking,
    "calendar": _calendar,
    "divisibility": _divisibility,
}
"""The generated subjects, and who writes their questions."""


def question(rng: random.Random, subject: str) -> Question:
    """Write one question of this subject, from either side of the split."""
    return SUBJECTS[subject](rng, subject)


def statement(rng: random.Random) -> str:
    """Write one fact of the world as a sentence."""
    subject, place = rng.choice(sorted(STATEMENTS)), rng.choice(_WORLD)
    return STATEMENTS[subject].format(place.name, attribute(place, subject))

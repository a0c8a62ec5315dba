"""Reads the tree of the sum of squares off a kernel that answers questions about three elements.

A known shape is a guess, which `Tree.questions` prove or refute. Where no shape fits, the tree is built from answers
alone, as FPRev does (arXiv 2411.00442), and then proved in the same way.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fusecheck.invariance.shapes import Places, Shape, shapes
from fusecheck.invariance.trees import Question, Tree

NO, YES, UNCLEAR = 0, 1, 2
"""Answers: the two elements were lost in the large one; they were kept; neither can be told."""

Ask: TypeAlias = "Callable[[Sequence[Question]], list[int]]"
Asking: TypeAlias = "Generator[list[Question], list[int], Any]"

SCALE = 8
"""Elements that are large in turn while the scale is checked."""

WIDER = "the sum is wider than float32, compensated, adds more than two terms at a time, or depends on the place"
MANY = "it has no known shape that few questions show, and more than the allowed number of calls would be needed"

GUESSES = 256
"""Questions that tell the known shapes from each other, at most."""

FEW = 32
"""Of them those that leave few shapes."""

CONTROLS = 256
"""Questions whose answer is no, about."""


class Unreadable(Exception):  # noqa: N818 (an answer, not a failure)
    """Why no tree can be read."""


@dataclass(frozen=True)
class Read:
    """A tree that was read.

    Attributes:
        tree: the only one that agrees with every answer.
        words: the shape's; of a tree of no known shape its depth.
        known: whether a known shape has this tree.
    """

    tree: Tree
    words: str
    known: bool


def read(ask: Ask, hidden: int, *, most: int) -> Read:
    """The tree in which a kernel adds up rows of `hidden` elements.

    Args:
        ask: answers questions; `(large, a, a)` asks whether a whole unit is kept, `(large, -1, -1)` whether nothing is.
        hidden: elements of a row.
        most: questions, at most.

    Raises:
        Unreadable: there is no such tree, or it takes more questions.
    """
    asked = _Budget(ask, most)
    _scale(asked, hidden)
    shape, tree = _known(asked, hidden)
    if tree is not None:
        return Read(tree, shape, known=True)
    if asked.left < 1.5 * hidden * hidden.bit_length():
        raise Unreadable(MANY)
    tree = _built(asked, hidden)
    _prove(asked, tree)
    return Read(tree, f"no known shape, {tree.depth} additions deep", known=False)


@dataclass
class _Budget:
    ask: Ask
    left: int

    def __call__(self, questions: Sequence[Question]) -> list[int]:
        if len(questions) > self.left:
            raise Unreadable(MANY)
        self.left -= len(questions)
        answers = self.ask(questions)
        if UNCLEAR in answers:
            large, first, second = questions[answers.index(UNCLEAR)]
            raise Unreadable(f"elements {first} and {second} beside {large} give NaN, or ranks give different answers")
        return answers


def _scale(ask: Ask, hidden: int) -> None:
    """Whether a sum of squares just below the end of float32 is finite, and one unit above is not."""
    large = [k * (hidden // SCALE) for k in range(SCALE)]
    answers = ask([*((x, -1, -1) for x in large), *((x, (x + 1) % hidden, (x + 1) % hidden) for x in large)])
    below, above = answers[:SCALE], answers[SCALE:]
    if YES in below:
        raise Unreadable("a sum of squares just below the end of float32 already overflows, or is not a number")
    if NO in above:
        raise Unreadable("a sum of squares beyond the end of float32 does not overflow: it is scaled, or wider")


def _known(ask: Ask, hidden: int) -> tuple[str, Tree | None]:
    """The shape that agrees with every answer, proved."""
    questions = _telling(hidden)
    answers = ask(questions)
    near = (_sayings(hidden) == (np.array(answers[:FEW]) == YES)).all(-1)
    left = _fitting([shape for shape, fits in zip(shapes(hidden), near, strict=True) if fits], questions, answers)
    while left:
        shape = left[0]
        tree = _tree(shape)
        answers = ask(tree.questions)
        if NO not in answers:
            _controls(ask, tree)
            return shape.words, tree
        left = _fitting(left[1:], tree.questions, answers)
    return "", None


def _telling(hidden: int) -> list[Question]:
    """Questions about elements at all distances, near and far."""
    drawn = random.Random(hidden)
    found: list[Question] = []
    far = [d for k in range(hidden.bit_length()) for d in (1 << k, 3 << k, hidden >> k) if 0 < d < hidden]
    while len(found) < GUESSES:
        large = drawn.randrange(hidden)
        first, second = ((large + drawn.choice((-1, 1)) * drawn.choice(far)) % hidden for _ in range(2))
        if len({large, first, second}) == 3:
            found.append((large, first, second))
    return found


_tree = lru_cache(maxsize=16)(Shape.tree)


@lru_cache(maxsize=8)
def _sayings(hidden: int) -> NDArray[np.bool_]:
    """To which of the first telling questions each known shape says yes, [shapes, `FEW`]."""
    columns = _columns(_telling(hidden)[:FEW])
    return np.stack([_yes(shape, *columns) for shape in shapes(hidden)])


def _fitting(known: Iterable[Shape], questions: Sequence[Question], answers: Sequence[int]) -> list[Shape]:
    columns, yes = _columns(questions), np.array(answers) == YES
    return [shape for shape in known if bool((_yes(shape, *columns) == yes).all())]


def _columns(questions: Sequence[Question]) -> Places:
    """[3, questions]."""
    columns: Places = np.array(questions, dtype=np.int64).reshape(-1, 3).T
    return columns


def _yes(shape: Shape, large: Places, first: Places, second: Places) -> NDArray[np.bool_]:
    said: NDArray[np.bool_] = shape.when(first, second) < shape.when(large, first)
    return said


def _prove(ask: Ask, tree: Tree) -> None:
    answers = ask(tree.questions)
    if NO in answers:
        large, first, second = tree.questions[answers.index(NO)]
        raise Unreadable(f"the answers contradict each other at elements {first}, {second} and {large}: no fixed tree")
    _controls(ask, tree)


def _controls(ask: Ask, tree: Tree) -> None:
    """Whoever keeps everything would have said yes to all that was asked before; some from all over the tree."""
    controls = tree.controls[:: max(1, len(tree.controls) // CONTROLS)]
    answers = ask(controls)
    if YES in answers:
        large, first, second = controls[answers.index(YES)]
        raise Unreadable(f"elements {first}, {second} and {large} are kept beside each other in any order: {WIDER}")


# ---------------------------------------------------------------------- from answers alone
def _built(ask: Ask, hidden: int) -> Tree:
    merges: list[tuple[int, int]] = []
    drawn = random.Random(hidden)
    _answered(ask, _subtree(list(range(hidden)), merges, hidden, drawn))
    return Tree(hidden, tuple(merges))


def _answered(ask: Ask, asking: Asking) -> Any:
    """Run to the end what asks for answers."""
    try:
        questions = next(asking)
        while True:
            questions = asking.send(ask(questions))
    except StopIteration as done:
        return done.value


def _subtree(leaves: list[int], merges: list[tuple[int, int]], count: int, drawn: random.Random) -> Asking:
    """The node at which these leaves are summed up, all of them before any other comes in."""
    pivot = drawn.choice(leaves)
    groups = yield from _in_order(pivot, [leaf for leaf in leaves if leaf != pivot], drawn)
    nodes = yield from _together([_subtree(group, merges, count, drawn) for group in groups])
    node = pivot
    for other in nodes:
        merges.append((node, other))
        node = count + len(merges) - 1
    return node


def _in_order(pivot: int, others: list[int], drawn: random.Random) -> Asking:
    """The others in groups that are added to the pivot's sum at once, the first group first; a sort by questions."""
    if len(others) < 2:
        return [others] if others else []
    middle = drawn.choice(others)
    rest = [leaf for leaf in others if leaf != middle]
    answers = yield [(middle, pivot, leaf) for leaf in rest] + [(pivot, middle, leaf) for leaf in rest]
    before, beside = answers[: len(rest)], answers[len(rest) :]
    for leaf, one, two in zip(rest, before, beside, strict=True):
        if one == two == YES:
            raise Unreadable(f"elements {pivot}, {middle} and {leaf} are kept beside each other in any order: {WIDER}")
    earlier = [leaf for leaf, one in zip(rest, before, strict=True) if one == YES]
    equal = [leaf for leaf, two in zip(rest, beside, strict=True) if two == YES]
    later = [leaf for leaf, *said in zip(rest, before, beside, strict=True) if YES not in said]
    first, last = yield from _together([_in_order(pivot, each, drawn) for each in (earlier, later)])
    return [*first, [middle, *equal], *last]


def _together(several: list[Asking]) -> Asking:
    """Run several side by side, so that their questions go out in one batch; their results."""
    results: list[Any] = [None] * len(several)
    waiting: dict[int, list[Question]] = {}

    def step(number: int, answers: list[int] | None) -> None:
        try:
            waiting[number] = several[number].send(answers)  # type: ignore[arg-type]
        except StopIteration as done:
            results[number] = done.value
            waiting.pop(number, None)

    for number in range(len(several)):
        step(number, None)
    while waiting:
        order = list(waiting)
        answers = yield [question for number in order for question in waiting[number]]
        start = 0
        for number in order:
            count = len(waiting[number])
            step(number, answers[start : start + count])
            start += count
    return results

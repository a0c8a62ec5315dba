"""Probes: the order that is read is the one that was planted, liars are found, and what cannot be read is said so."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fusecheck.backends.emulated_arithmetic import Arithmetic
from fusecheck.dataflow import DATAFLOWS
from fusecheck.invariance.launch import Launch, tree_sum
from fusecheck.invariance.masks import squares_inputs
from fusecheck.invariance.orders import LEVELS, order_of, pairs
from fusecheck.invariance.shapes import Shape, shapes
from fusecheck.invariance.squares import Unreadable, read
from fusecheck.invariance.trees import Question, Tree, chain
from fusecheck.problem import Problem

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Row:
    """A kernel of one step: answers as a norm would, by how it adds up squares, [rows, hidden] -> [rows]."""

    hidden: int
    add: Callable[[Tensor], Tensor]
    questions: int = field(default=0)

    def __call__(self, questions: Sequence[Question]) -> list[int]:
        self.questions += len(questions)
        problem = Problem(hidden=self.hidden, world_size=1)
        answers: list[int] = []
        for start in range(0, len(questions), 512):
            stream = squares_inputs(problem, questions[start : start + 512], 0, CPU).residual.float()
            mean = self.add(stream * stream) / self.hidden
            answers += (torch.rsqrt(mean + problem.eps) == 0).int().tolist()
        return answers


def named(hidden: int, words: str) -> Shape:
    return next(shape for shape in shapes(hidden) if shape.words == words)


def at_random(leaves: int) -> Tree:
    drawn, nodes, merges = random.Random(leaves), list(range(leaves)), []
    while len(nodes) > 1:
        merges.append((nodes.pop(drawn.randrange(len(nodes))), nodes.pop(drawn.randrange(len(nodes)))))
        nodes.append(leaves + len(merges) - 1)
    return Tree(leaves, tuple(merges))


SHAPES = [
    (512, "64 threads x 8, warps, 1 block"),
    (512, "16 threads x 8, warps, 4 blocks"),
    (512, "64 threads x 8, added by neighbours, 1 block"),
    (512, "32 threads x 4 in 4 rounds, warps"),
    (512, "32 threads x 2 in 8 rounds, lanes last (halves), warps"),
    (768, "96 threads x 8 (by halves), warps (neighbours, then serial), 1 block"),
    (1024, "32 threads x 8, warps, 4 blocks by halves"),
    (1024, "128 threads x 4 in 2 rounds, each summed, warps (neighbours, then halves)"),
    (1024, "serially"),
    (2880, "180 threads x 8, warps, 2 blocks"),
    (2880, "360 threads x 8, added by halves, 1 block"),
    (4096, "128 threads x 8, warps, 4 blocks"),
    (8192, "256 threads x 8, warps, 4 blocks"),
]


@pytest.mark.parametrize(("hidden", "words"), SHAPES)
def test_the_tree_that_is_read_is_the_one_that_was_planted(hidden: int, words: str) -> None:
    planted = named(hidden, words).tree()
    kernel = Row(hidden, planted.total)
    found = read(kernel, hidden, most=10**6)
    assert found.known
    assert found.tree.same(planted)
    assert found.tree.depth == planted.depth
    assert kernel.questions < 4 * hidden + 600


@pytest.mark.parametrize("name", DATAFLOWS)
def test_the_emulator_adds_squares_up_as_deep_as_it_says(name: str) -> None:
    arithmetic = Arithmetic(DATAFLOWS[name], 0, 1)

    def add(squares: Tensor) -> Tensor:
        return arithmetic.mean_square(squares.sqrt(), torch.bfloat16)[:, 0].float() * 128

    if arithmetic.dataflow.scaled_squares:
        with pytest.raises(Unreadable, match="it is scaled, or wider"):
            read(Row(128, add), 128, most=10**6)
        return
    found = read(Row(128, add), 128, most=10**6)
    assert found.words == "16 threads x 8, warps, 1 block"
    assert found.tree.depth == 11 <= (arithmetic.dataflow.depth or 11)


@pytest.mark.parametrize("leaves", [64, 136])
def test_a_tree_of_no_known_shape_is_built_from_answers_alone(leaves: int) -> None:
    planted = at_random(leaves)
    kernel = Row(leaves, planted.total)
    found = read(kernel, leaves, most=10**6)
    assert not found.known
    assert found.tree.same(planted)
    assert kernel.questions < 20 * leaves


def test_a_tree_has_one_name_only_and_neighbouring_trees_are_told_apart() -> None:
    one, two = named(512, "16 threads x 8, warps, 4 blocks").tree(), named(512, "64 threads x 8, warps, 1 block").tree()
    assert not one.same(two)
    assert one.same(Tree(512, tuple((b, a) for a, b in one.merges)))
    swapped = list(one.merges)
    (a, b), (c, d) = swapped[0], swapped[9]
    swapped[0], swapped[9] = (a, d), (c, b)
    assert not one.same(Tree(512, tuple(swapped)))
    kernel = Row(512, Tree(512, tuple(swapped)).total)
    assert read(kernel, 512, most=10**6).words.startswith("no known shape")


def test_the_questions_of_a_tree_leave_no_other_tree_of_five_leaves() -> None:
    every = _trees(5)
    assert len(every) == 105
    for tree in every:
        agreeing = [other for other in every if all(_joins(other, *question) for question in tree.questions)]
        assert len(agreeing) == 1
        assert agreeing[0].same(tree)
        assert not any(_joins(tree, *question) for question in tree.controls)


def _trees(leaves: int) -> list[Tree]:
    """Every binary tree."""
    if leaves == 1:
        return [Tree(1, ())]
    found: list[Tree] = []
    for smaller in _trees(leaves - 1):
        for edge in range(2 * (leaves - 1) - 1):  # the new leaf is added to the sum at this node
            names = list(range(leaves - 1)) + [0] * (leaves - 2)
            merges: list[tuple[int, int]] = []
            for node in range(2 * (leaves - 1) - 1):
                if node >= leaves - 1:
                    one, two = smaller.merges[node - leaves + 1]
                    merges.append((names[one], names[two]))
                    names[node] = leaves + len(merges) - 1
                if node == edge:
                    merges.append((names[node], leaves - 1))
                    names[node] = leaves + len(merges) - 1
            found.append(Tree(leaves, tuple(merges)))
    return found


def _joins(tree: Tree, large: int, first: int, second: int) -> bool:
    sets = [{leaf} for leaf in range(tree.leaves)]
    for one, two in tree.merges:
        sets.append(sets[one] | sets[two])
    least = min((each for each in sets if {first, second} <= each), key=len)
    return large not in least


def _by_two_terms(squares: Tensor) -> Tensor:
    exact = squares.double().view(len(squares), -1, 4).sum(-1).float()  # four terms at a time, as a tensor core adds
    return tree_sum(torch.nn.functional.pad(exact, (0, 384)), Launch(64, 1))


def _scaled(squares: Tensor) -> Tensor:
    return tree_sum(squares * 2.0**-20, Launch(64, 1))


@pytest.mark.parametrize(
    ("add", "why"),
    [
        (lambda squares: squares.double().sum(-1).float(), "wider than float32"),
        (_by_two_terms, "more than two terms at a time"),
        (_scaled, "it is scaled, or wider"),
        (lambda squares: tree_sum(squares, Launch(64, 1)) * 1.01, "already overflows"),
        (lambda squares: squares.amax(-1), "it is scaled, or wider"),
    ],
)
def test_where_no_tree_fits_it_is_said_why_and_nothing_is_guessed(add: Callable[[Tensor], Tensor], why: str) -> None:
    with pytest.raises(Unreadable, match=why):
        read(Row(512, add), 512, most=10**6)


def test_a_tree_that_takes_more_calls_than_allowed_is_not_read() -> None:
    kernel = Row(512, at_random(512).total)
    with pytest.raises(Unreadable, match="more than the allowed number of calls"):
        read(kernel, 512, most=3000)
    assert kernel.questions < 300


# ---------------------------------------------------------------------- the order of the ranks
def _serial(order: Sequence[int]) -> Callable[[list[Any]], Any]:
    return lambda addends: functools.reduce(lambda a, b: a + b, [addends[rank] for rank in order])


def _pairwise(addends: list[Any]) -> Any:
    while len(addends) > 1:
        paired = [a + b for a, b in zip(addends[::2], addends[1::2], strict=False)]
        addends = [*paired, *addends[2 * len(paired) :]]
    return addends[0]


def _chunks(addends: list[Any]) -> Any:
    half = len(addends) // 2
    return _serial(range(half))(addends) + _serial(range(half, len(addends)))(addends)


def _units(add: Callable[[list[Any]], Any], ranks: int, number: Callable[[float], Any], level: str) -> list[int]:
    large, unit = LEVELS["bf16"][level]
    found = []
    for one, two in pairs(ranks):
        values = [large if rank == one else -large if rank == two else unit for rank in range(ranks)]
        found.append(int(float(add([number(value) for value in values])) / unit))
    return found


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("number", [np.float32, lambda x: torch.tensor(x, dtype=torch.bfloat16)])
def test_the_order_that_is_read_is_the_one_in_which_the_ranks_are_added(
    ranks: int, number: Callable[[float], Any]
) -> None:
    def words(add: Callable[[list[Any]], Any]) -> str:
        return order_of(_units(add, ranks, number, "float32"), ranks).words

    usual = "in the only order of two" if ranks == 2 else "in rank order"
    assert words(_serial(range(ranks))) == usual
    ring = [(2 + k) % ranks for k in range(ranks)]
    falling = [(1 - k) % ranks for k in range(ranks)]
    if ranks > 3:
        assert words(_serial(ring)) == "in a ring from rank 2 on"
        assert words(_serial(falling)).startswith("in rank order" if ranks == 2 else "in a falling ring from rank 1")
        shown = {4: "as the tree (0+1)+(2+3)", 8: "as the tree ((0+1)+(2+3))+((4+5)+(6+7))"}
        assert words(_pairwise) == shown[ranks]
        assert words(_chunks).startswith("as the tree ((" if ranks == 8 else "as the tree (0+1)")
    exact = order_of(_units(lambda addends: sum(int(x) for x in addends), ranks, int, "float64"), ranks)
    assert exact.exact == (ranks > 2)
    for order in ([*range(ranks)], [*range(1, ranks), 0]):
        assert order_of(_units(_serial(order), ranks, number, "float32"), ranks).by_rank == (
            ranks == 2 or order[0] == 0
        )


def test_sums_that_fit_no_tree_are_not_readable() -> None:
    assert order_of([1, 1, 0], 3).words.startswith("not readable")
    assert order_of([255, 0, 0], 3).words.startswith("not readable")
    assert not order_of([1, 1, 0], 3).by_rank
    assert str(chain([2, 0, 1])) == "(0+2)+1"

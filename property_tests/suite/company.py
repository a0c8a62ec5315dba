"""Emulated kernels in which a row depends on its company in one way each, and right ones in which it does not.

A `Way` is how one row is computed; a kernel is the function that chooses it. Right kernels choose it once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from fusecheck.backends.emulated_arithmetic import Arithmetic
from fusecheck.backends.unfused import quantise, quantise_with
from fusecheck.dataflow import DATAFLOWS, Dataflow
from fusecheck.interface import Limits, Operation, Rank, RankInputs, RankOutputs, Strategy, Support
from fusecheck.invariance.launch import LANES, Launch, launch, tree_sum
from fusecheck.operations import COMPOSITIONS, GIVEN_SCALE
from fusecheck.problem import Problem

LOUD = 64.0
MULTIPROCESSORS = 20
"""Of the emulated chip: at hidden 1024 another launch from 6 and from 11 rows on."""


@dataclass(frozen=True)
class Where:
    """What a launch knows when it computes one row.

    Attributes:
        tokens: rows of the batch.
        place: of the row.
        rank: that computes it.
        ranks: of the group.
        strategy: of the exchange.
        call: how many calls the workspace took before.
        largest: rows of the largest of them.
        last: rows of the last of them; 0 where there was none.
        beside_loud: the next row holds a value above `LOUD`, or a NaN.
        behind_loud: the row before does; before the first there is none.
    """

    tokens: int
    place: int
    rank: int
    ranks: int
    strategy: Strategy
    call: int
    largest: int
    last: int
    beside_loud: bool
    behind_loud: bool


@dataclass(frozen=True)
class Way:
    """How a row is computed.

    Attributes:
        blocks: over which it is spread, which is the tree of its squares.
        first: the rank whose addend comes first; the others follow in a ring.
        rounded: the norm reads the rounded stream.
        divide: the quantiser divides by the scale, else it multiplies by the truncated reciprocal.
    """

    blocks: int = 4
    first: int = 0
    rounded: bool = True
    divide: bool = True


Choice = Callable[[Where], Way]


@dataclass
class Company:
    """A backend whose kernel computes each row in the way that is chosen for it."""

    name: str
    choose: Choice
    accumulate: str = "fp32"
    flow: Dataflow = field(default_factory=lambda: replace(DATAFLOWS["unfused"], order="any", depth=None))
    operations = COMPOSITIONS

    def supports(self, problem: Problem) -> Support:
        return Support(problem.hidden % 64 == 0, f"hidden={problem.hidden} is no multiple of 64")

    def dataflow(self, problem: Problem) -> Dataflow:
        del problem
        return replace(self.flow, name=self.name)

    def open(self, rank: Rank, limits: Limits) -> CompanyKernel:
        del limits
        return CompanyKernel(self, rank)


class CompanyKernel:
    """An open workspace: it knows what was called before."""

    def __init__(self, backend: Company, rank: Rank) -> None:
        self.backend, self.rank = backend, rank
        self.call = self.largest = self.last = 0

    def run(self, inputs: RankInputs, *, op: Operation, strategy: Strategy) -> RankOutputs:
        if op.has_experts and inputs.experts is not None:
            inputs = replace(inputs, partial=Arithmetic(self.backend.flow, 0, 1).sum_experts(inputs.experts))
        partials = self._gather(inputs.partial) if op.collective.value != "none" else [inputs.partial]
        total, stream, norm = (torch.empty_like(inputs.partial) for _ in range(3))
        quant = torch.empty_like(inputs.partial, dtype=torch.float8_e4m3fn)
        for way, rows in self._ways(inputs, strategy).items():
            index = torch.tensor(rows)
            total[index] = self._sum([partial[index] for partial in partials], way.first)
            self._epilogue(inputs, way, index, (total, stream, norm, quant))
        self.call, self.largest, self.last = self.call + 1, max(self.largest, len(stream)), len(stream)
        made: dict[str, Tensor | None] = {"total": total, "residual": stream, "norm": norm, "quant": quant}
        if op.quantiser not in ("none", GIVEN_SCALE):
            made["quant"], made["scale"] = quantise_with(op.quantiser, norm, inputs)
        return RankOutputs(**{"residual": None} | {name: made[name] for name in op.returns})

    def close(self) -> None: ...

    def _gather(self, partial: Tensor) -> list[Tensor]:
        if self.rank.world_size == 1:
            return [partial]
        board = getattr(self.rank, "board", None)
        if board is not None:
            found: list[Tensor] = board.gather(self.rank.index, partial)
            return found
        partials = [torch.empty_like(partial) for _ in range(self.rank.world_size)]
        dist.all_gather(partials, partial, group=self.rank.group)
        return partials

    def _ways(self, inputs: RankInputs, strategy: Strategy) -> dict[Way, list[int]]:
        loud = ~(inputs.residual.abs().amax(-1).float() <= LOUD)
        beside, behind = loud.roll(-1).tolist(), [False, *loud.tolist()]
        tokens, ranks = len(inputs.partial), self.rank.world_size
        before = self.call, self.largest, self.last
        found: dict[Way, list[int]] = {}
        for place in range(tokens):
            company = beside[place], behind[place]
            where = Where(tokens, place, self.rank.index, ranks, strategy, *before, *company)
            found.setdefault(self.backend.choose(where), []).append(place)
        return found

    def _sum(self, partials: list[Tensor], first: int) -> Tensor:
        ring = [partials[(first + step) % len(partials)] for step in range(len(partials))]
        if self.backend.accumulate == "fp32":
            ring = [partial.float() for partial in ring]
        return functools.reduce(torch.add, ring).to(partials[0].dtype)

    def _epilogue(self, inputs: RankInputs, way: Way, index: Tensor, made: tuple[Tensor, ...]) -> None:
        total, stream, norm, quant = made
        wide = total[index].float() + inputs.residual[index].float()
        stream[index] = wide.to(stream.dtype)
        read = stream[index].float() if way.rounded else wide
        shape = Launch(read.shape[1] // LANES // way.blocks, way.blocks)
        mean = tree_sum(read * read, shape) / read.shape[1]
        normed = read * torch.rsqrt(mean + inputs.eps)[:, None] * (inputs.gamma.float() + inputs.weight_bias)
        norm[index] = normed.to(norm.dtype)
        given = inputs.scale
        codes = quantise(norm[index], given if way.divide else given * (1 + 2.0**-6))
        quant.view(torch.uint8)[index] = codes.view(torch.uint8)


USUAL, OTHER = Way(), Way(blocks=1)


def _if(applies: Callable[[Where], bool], other: Way = OTHER) -> Choice:
    return lambda where: other if applies(where) else USUAL


def flashinfer_like(where: Where) -> Way:
    """The launch rule of FlashInfer on a small chip, at hidden 1024."""
    rows = where.tokens if where.strategy is not Strategy.TWOSHOT else -(-where.tokens // where.ranks)
    return Way(launch(1024, rows, MULTIPROCESSORS, least=32).blocks)


@dataclass(frozen=True)
class Planted:
    """A planted breach.

    Attributes:
        choose: the kernel.
        breaks: the first size of every claim that it breaks.
        output: that breaks first.
        world_size: on which it is asked.
        changes: batch sizes from which on the bits change.
    """

    choose: Choice
    breaks: dict[str, int]
    output: str = "norm"
    world_size: int = 1
    changes: tuple[int, ...] = ()


PLANTED = {
    "launch": Planted(flashinfer_like, {"batch": 6, "exchange": 6}, world_size=2, changes=(6, 11)),
    "window": Planted(_if(lambda w: 9 <= w.tokens <= 11), {"batch": 9}, changes=(9, 12)),
    "order by rows": Planted(
        _if(lambda w: w.tokens >= 11, Way(first=1)), {"batch": 11}, "residual", world_size=4, changes=(11,)
    ),
    "unrounded from": Planted(_if(lambda w: w.tokens >= 5, Way(rounded=False)), {"batch": 5}, changes=(5,)),
    "quantiser": Planted(_if(lambda w: w.tokens >= 13, Way(divide=False)), {"batch": 13}, "quant", changes=(13,)),
    "order by block": Planted(lambda w: Way(first=w.place // 4 % w.ranks), {"position": 5}, "residual", world_size=4),
    "place": Planted(_if(lambda w: w.place >= 9), {"position": 10}),
    "tail": Planted(_if(lambda w: 1 < w.tokens == w.place + 1 and w.tokens % 2 == 1), {"position": 3}),
    "every third call": Planted(_if(lambda w: w.call % 3 == 2), {"run to run": 1}),
    "calls of many rows": Planted(_if(lambda w: w.tokens >= 9 and w.call % 5 == 4), {"run to run": 9}),
    "neighbour": Planted(_if(lambda w: w.beside_loud), {"neighbours": 2}),
    "neighbour in a batch": Planted(_if(lambda w: w.beside_loud and w.tokens >= 7), {"neighbours": 7}),
    "neighbour before it": Planted(_if(lambda w: w.behind_loud), {"neighbours": 2}),
    "after seven rows": Planted(_if(lambda w: w.last == 7), {"workspace history": 7}),
    "after a large call": Planted(_if(lambda w: w.largest >= 10), {"workspace history": 10}),
    "one rank": Planted(_if(lambda w: w.rank == 1), {"ranks": 1}, world_size=2),
    "one rank, many rows": Planted(
        _if(lambda w: w.rank == 1 and w.tokens >= 7), {"ranks": 7, "batch": 7}, world_size=2, changes=(7,)
    ),
    "two-shot": Planted(_if(lambda w: w.strategy is Strategy.TWOSHOT), {"exchange": 1}),
    "two-shot, many rows": Planted(_if(lambda w: w.strategy is Strategy.TWOSHOT and w.tokens >= 10), {"exchange": 10}),
    "world size": Planted(_if(lambda w: w.ranks == 2), {"world size": 2}),
}
"""Planted breaches by name."""

PINNED: dict[str, Choice] = {
    "pinned": lambda _: USUAL,
    "one block": lambda _: OTHER,
    "ring from rank 1": lambda _: Way(first=1),
    "unrounded": lambda _: Way(rounded=False),
}
"""Right kernels by name."""


def company(name: str) -> Company:
    """The kernel of a planted breach, or a right one."""
    return Company(name, PLANTED[name].choose if name in PLANTED else PINNED[name])


class Choosy(Company):
    """Takes no batch of these sizes, or says that it does, and raises; from nine rows on the tree is another."""

    def __init__(
        self, refused: tuple[int, ...] = (), raising: tuple[int, ...] = (5,), *, infinite: bool = True
    ) -> None:
        super().__init__("choosy", _if(lambda w: w.tokens >= 9))
        self.refused, self.raising, self.infinite = refused, raising, infinite

    def supports(self, problem: Problem) -> Support:
        return Support(problem.tokens not in self.refused, f"tokens={problem.tokens}")

    def open(self, rank: Rank, limits: Limits) -> CompanyKernel:
        made = super().open(rank, limits)
        run = made.run

        def raises(inputs: RankInputs, *, op: Operation, strategy: Strategy) -> RankOutputs:
            if len(inputs.partial) in (*self.refused, *self.raising):
                raise ValueError(f"{len(inputs.partial)} rows")
            if not self.infinite and bool(inputs.residual.float().square().sum(-1).isinf().any()):
                raise ValueError("a sum of squares is infinite")
            return run(inputs, op=op, strategy=strategy)

        made.run = raises  # type: ignore[method-assign]
        return made


class Finite(Choosy):
    """Raises where a sum of squares is infinite."""

    def __init__(self) -> None:
        super().__init__(raising=(), infinite=False)


class TakesFew(Choosy):
    """Takes no batch of nine rows."""

    def __init__(self) -> None:
        super().__init__(refused=(9,), raising=())


class EveryFiftieth(Company):
    """One call in fifty goes another way."""

    def __init__(self) -> None:
        super().__init__("every fiftieth", _if(lambda w: w.call % 50 == 49, Way(divide=False)))


class FlashInferLike(Company):
    """For the command line: the launch rule that changes the tree with the number of rows."""

    def __init__(self) -> None:
        super().__init__("launch", flashinfer_like)

"""Metamorphic relations: two calls whose inputs are related, and what must then be equal in their outputs.

Nothing here knows a right answer. What may legally differ between the two (the order of additions, when the place or
the number of rows changes) is not compared bit by bit: the first call's outputs must then be admissible for the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusecheck.interface import Operation, RankOutputs, Strategy
from fusecheck.invariance.sharp import sharpened
from fusecheck.property_tests.kernel.given import Given
from fusecheck.verdict import raw

Equal = Iterator[tuple[str, Tensor, Tensor]]
"""Name, what the first call makes one expect, what the second call gave; codes one a byte, scales [rows, groups]."""


@dataclass(frozen=True)
class Related:
    """Two calls.

    Attributes:
        first: a call.
        second: its relative.
        equal: what must be equal bit by bit.
        admissible: turns the first call's outputs into ones that the second may return; None to leave it out.
    """

    first: Given
    second: Given
    equal: Callable[[RankOutputs, RankOutputs], Equal]
    admissible: Callable[[RankOutputs], RankOutputs] | None = None


def _everything(first: RankOutputs, second: RankOutputs) -> Equal:
    yield "residual", first.residual, second.residual
    yield from _common(first, second, ("norm", "scale", "quant"))


def _common(first: RankOutputs, second: RankOutputs, names: tuple[str, ...]) -> Equal:
    for name in names:
        one, two = getattr(first, name), getattr(second, name)
        if one is not None and two is not None:
            yield name, one, two


def _only_residual(first: RankOutputs, second: RankOutputs) -> Equal:
    yield "residual", first.residual, second.residual


def _take(outputs: RankOutputs, index: Tensor) -> RankOutputs:
    norm, quant = outputs.norm, outputs.quant
    return RankOutputs(
        outputs.residual[index],
        None if norm is None else norm[index],
        None if quant is None else quant.view(torch.uint8)[index].view(quant.dtype),
    )


def permuted_ranks(given: Given, order: list[int]) -> Related:
    """The ranks swap their addends: nothing changes. Only where the sum does not depend on the order."""
    return Related(given, replace(given, partials=tuple(given.partials[rank] for rank in order)), _everything)


def zero_rank(given: Given, first: int, second: int) -> Related:
    """One rank contributes zeros, be it this one or that one: nothing changes, for the others keep their order."""
    others = list(given.partials[1:])
    zeros = torch.zeros_like(given.residual)
    calls = [replace(given, partials=(*others[:place], zeros, *others[place:])) for place in (first, second)]
    return Related(calls[0], calls[1], _everything)


def permuted_tokens(given: Given, order: list[int]) -> Related:
    """The rows change places, and so do the outputs."""
    index = torch.tensor(order, device=given.residual.device)
    return Related(
        given,
        given.rows(index),
        lambda first, second: _only_residual(_take(first, index), second),
        lambda first: _take(first, index),
    )


def lone_row(given: Given, row: int) -> Related:
    """A row in a batch of its own gives what it gave among others, but for the order of its squares."""
    return permuted_tokens(given, [row])


def rows_of_another_batch(given: Given, rows: list[int]) -> Related:
    """These rows, in this order, as a batch of their own give every bit that they give in the whole one.

    Every second row is made so that another tree of its squares shows: its addends cancel, and the residual is the
    stream. The others show another order of the ranks, if their family does.
    """
    problem, residual = given.problem, given.residual.clone()
    weight = given.gamma.float() + problem.weight_bias
    partials = [partial.clone() for partial in given.partials]
    for row in range(0, problem.tokens, 2):
        residual[row] = sharpened(residual[row], weight, problem.eps, problem.format, row)
        addend = partials[0][row].clone()
        for rank, partial in enumerate(partials):
            partial[row] = 0.0 if len(partials) == 1 or rank > 1 else -addend if rank else addend
    whole = replace(given, partials=tuple(partials), residual=residual)
    index = torch.tensor(rows, device=residual.device)
    return Related(whole, whole.rows(index), lambda first, second: _everything(_take(first, index), second))


def poisoned_neighbours(given: Given, row: int, poison: float) -> Related:
    """The other rows hold NaN or infinities: this row keeps every bit."""
    others = torch.arange(given.problem.tokens, device=given.residual.device) != row

    def spoil(tensor: Tensor) -> Tensor:
        return tensor.masked_fill(others[:, None], poison)

    spoilt = replace(given, partials=tuple(map(spoil, given.partials)), residual=spoil(given.residual))
    index = torch.tensor([row], device=given.residual.device)
    return Related(
        given,
        spoilt.changed(family="special"),
        lambda first, second: _everything(_take(first, index), _take(second, index)),
    )


def residual_and_partial_swapped(given: Given) -> Related:
    """One rank's addend and the residual change places while the other ranks hold zeros: nothing changes."""
    zeros = [torch.zeros_like(given.residual)] * (given.problem.world_size - 1)
    one = replace(given, partials=(given.partials[0], *zeros))
    return Related(one, replace(one, partials=(given.residual, *zeros), residual=given.partials[0]), _everything)


def residual_from_a_rank(given: Given) -> Related:
    """A residual of zero, with what it was on the second rank instead: the same residual_out."""
    zeros = [torch.zeros_like(given.residual)] * (given.problem.world_size - 1)
    one = replace(given, partials=(given.partials[0], *zeros))
    two = replace(given, partials=(given.partials[0], given.residual, *zeros[1:]), residual=zeros[0])
    return Related(one, two, _only_residual)


def gamma_and_scale_doubled(given: Given) -> Related:
    """The norm doubles, the codes stay."""
    doubled = given.changed(scale=2 * given.problem.scale, weight_bias=2 * given.problem.weight_bias)

    def equal(first: RankOutputs, second: RankOutputs) -> Equal:
        yield "residual", first.residual, second.residual
        if first.norm is not None and second.norm is not None:
            yield "norm", first.norm * 2, second.norm
        yield from _common(first, second, ("quant",))

    return Related(given, replace(doubled, gamma=given.gamma * 2), equal)


def scale_doubled(given: Given) -> Related:
    """Normal codes that stay normal and did not saturate lose one in the exponent."""

    def equal(first: RankOutputs, second: RankOutputs) -> Equal:
        yield from _common(first, second, ("residual", "norm"))
        assert first.quant is not None
        assert second.quant is not None
        before, after = raw(first.quant), raw(second.quant)
        magnitude = before & 0x7F
        plain = (magnitude >= 0x18) & (magnitude <= 0x7D)
        yield "quant", torch.where(plain, before - 8, after), after

    return Related(given, given.changed(scale=2 * given.problem.scale), equal)


def inputs_scaled(given: Given, power: int) -> Related:
    """Everything times 2^k, and eps times 2^2k: the residual stream scales, norm and codes stay."""
    factor = 2.0**power
    scaled = replace(
        given.changed(eps=given.problem.eps * factor**2),
        partials=tuple(partial * factor for partial in given.partials),
        residual=given.residual * factor,
    )

    def equal(first: RankOutputs, second: RankOutputs) -> Equal:
        yield "residual", first.residual * factor, second.residual
        yield from _common(first, second, ("norm", "quant"))

    return Related(given, scaled, equal)


def two_strategies(given: Given) -> Related:
    """One-shot and two-shot give the same residual_out, and outputs that are admissible for each other."""
    one, two = (given.changed(strategy=strategy) for strategy in (Strategy.ONESHOT, Strategy.TWOSHOT))
    return Related(one, two, _only_residual, lambda first: first)


def two_ops(given: Given, first: str, second: str) -> Related:
    """Two ops give the same bits in whatever both return."""
    return Related(given.changed(op=Operation.named(first)), given.changed(op=Operation.named(second)), _everything)


RELATIONS: dict[str, Callable[..., Related]] = {
    relation.__name__: relation
    for relation in (
        permuted_ranks,
        zero_rank,
        permuted_tokens,
        lone_row,
        rows_of_another_batch,
        poisoned_neighbours,
        residual_and_partial_swapped,
        residual_from_a_rank,
        gamma_and_scale_doubled,
        scale_doubled,
        inputs_scaled,
        two_strategies,
        two_ops,
    )
}
"""The relations by name."""

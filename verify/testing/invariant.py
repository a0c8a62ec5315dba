"""`assert_invariant`: the rows of a function of a batch do not depend on their company, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusecheck.case import digest
from fusecheck.errors import UsageError
from fusecheck.invariance.calls import Call, Seen
from fusecheck.invariance.claims import Answer, Breach
from fusecheck.invariance.differences import apart
from fusecheck.invariance.search import Search
from fusecheck.testing.conformity import NotConforming

CLAIMS = ("run to run", "batch", "position", "neighbours")
LARGE = 1024


def assert_invariant(function: Callable[..., Any], rows: Tensor | Sequence[Tensor], *, most: int = 64) -> list[Answer]:
    """Demand that a row gives the same bits run to run, in every batch, at every place, beside any neighbours.

    Args:
        function: of a batch, [n, ...], or of several such tensors; returns a tensor or several, a row for each row.
        rows: samples, [count, ...], of which up to 16 are watched; a tensor, or one for each argument. They should be
            such as show another order of additions: of large and small values, as many as there are.
        most: rows of the largest batch.

    Returns:
        What was tried for each claim, and the number of calls.

    Raises:
        NotConforming: the first claim that breaks, from which size on, and by how much.
        UsageError: no rows, a size below 1, or an output that has not a row for each row.
    """
    __tracebackhide__ = True
    given = (rows,) if isinstance(rows, Tensor) else tuple(rows)
    if not given or any(not each.dim() or len(each) != len(given[0]) or not len(each) for each in given):
        raise UsageError("rows: got none, or of different numbers; expected tensors [count, ...] with the same count")
    if most < 1:
        raise UsageError(f"most={most}, expected at least 1")
    asked = _Function(function, given)
    answers = Search(asked, tuple(range(min(16, len(given[0])))), most, most, claims=CLAIMS).run()
    for answer in answers:
        if answer.breach is not None:
            raise NotConforming(asked.words(answer.breach))
    return answers


class _Function:
    """A function as the subject of a search, on one rank."""

    def __init__(self, function: Callable[..., Any], rows: tuple[Tensor, ...]) -> None:
        self.calls = 0
        self._function, self._rows = function, rows

    def takes(self, call: Call) -> str:
        """It takes every batch."""
        del call
        return ""

    def ask(self, call: Call) -> Seen:
        """Make a call, and digest the watched rows of each output."""
        return {
            name: {(0, row): each for row, each in zip(call.watched, _digests(tensor), strict=True)}
            for name, tensor in self._watched(call).items()
        }

    def words(self, breach: Breach) -> str:
        """A breach in one line."""
        row, output = breach.seen.row, breach.seen.output
        first, second = (self._watched(x)[output][[x.watched.index(row)]] for x in (breach.first, breach.second))
        by = apart(first, second)
        most = "a NaN among them" if by["most"] is None else f"by at most {by['most']} {by['unit']}"
        differ = f"{by['elements']} of {by['of']} elements, {most}" if by["elements"] else "in one call of several"
        return (
            f"{breach.claim}: breaks from {breach.size} rows on, expected the same bits: row {row} of {output} differs "
            f"in {differ}, between ({breach.first}) and ({breach.second})"
        )

    def _watched(self, call: Call) -> dict[str, Tensor]:
        self.calls += 1
        made = self._function(*(self._batch(rows, call) for rows in self._rows))
        outputs = {"the output": made} if isinstance(made, Tensor) else {f"output {i}": x for i, x in enumerate(made)}
        for name, tensor in outputs.items():
            if not isinstance(tensor, Tensor) or not tensor.dim() or len(tensor) != call.tokens:
                shape = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise UsageError(f"{name} of the function is {shape}, expected {call.tokens} rows, one for each given")
        # A row is compared by its bits; a copy, for a function may return the same memory at every call.
        return {name: tensor[call.places].reshape(len(call.places), -1).clone() for name, tensor in outputs.items()}

    def _batch(self, rows: Tensor, call: Call) -> Tensor:
        step = {"rows": 1, "others": 3}.get(call.company, 1)
        batch = rows[[(step * place + step) % len(rows) for place in range(call.tokens)]].clone()
        if call.company == "zeros":
            batch.zero_()
        elif call.company == "nan" and rows.is_floating_point():
            batch.fill_(torch.nan)
        elif call.company == "large" and rows.is_floating_point():
            batch *= LARGE
        batch[call.places] = rows[list(call.watched)]
        return batch


def _digests(rows: Tensor) -> list[int]:
    return digest.rows(rows.contiguous().view(torch.uint8))

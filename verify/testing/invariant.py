"""`assert_invariant`: the rows of a function of a batch do not depend on their company, bit by bit.

`sharp_rows` are rows of a norm that show another order of additions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusecheck.case import digest
from fusecheck.errors import UsageError
from fusecheck.formats.binary import NATIVE
from fusecheck.invariance.calls import Call, Seen
from fusecheck.invariance.claims import Answer, Breach
from fusecheck.invariance.differences import apart
from fusecheck.invariance.search import Search
from fusecheck.invariance.sharp import sharpened
from fusecheck.testing.call import NATIVE as DTYPES
from fusecheck.testing.call import either
from fusecheck.testing.conformity import NotConforming

CLAIMS = ("run to run", "workspace history", "batch", "position", "neighbours")
LARGE = 1024


def assert_invariant(function: Callable[..., Any], rows: Tensor | Sequence[Tensor], *, most: int = 64) -> list[Answer]:
    """Demand that a row gives the same bits run to run, behind larger batches, in every one, anywhere, beside any rows.

    Args:
        function: of a batch, [n, ...], or of several such tensors; returns a tensor or several, a row for each row.
        rows: samples, [count, ...], of which up to 16 are watched; a tensor, or one for each argument. In bf16 hardly
            any row shows another order of additions: of a norm `sharp_rows` do.
        most: rows of the largest batch.

    Returns:
        What was tried for each claim, and the number of calls.

    Raises:
        NotConforming: the first claim that breaks, from which size on, and by how much.
        UsageError: no rows, a size that is no whole number above 0, or an output that has not a row for each row.
    """
    __tracebackhide__ = True
    given = (rows,) if isinstance(rows, Tensor) else tuple(rows)
    if not given or any(not each.dim() or len(each) != len(given[0]) or not len(each) for each in given):
        raise UsageError("rows: got none, or of different numbers; expected tensors [count, ...] with the same count")
    if not isinstance(most, int) or most < 1:
        raise UsageError(f"most={most!r}, expected a whole number of at least 1")
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
        differ = f"in {by['elements']} of {by['of']} elements, {most}" if by["elements"] else "in one call of several"
        return (
            f"{breach.claim}: breaks from {breach.size} rows on, expected the same bits: row {row} of {output} differs "
            f"{differ}, between ({breach.first}) and ({breach.second})"
        )

    def _watched(self, call: Call) -> dict[str, Tensor]:
        # A function opens no workspace: the same call, made before, stands for a fresh one.
        for earlier in [call] if call.before == () else [Call(n, company="others") for n in call.before or ()]:
            self._made(earlier)
        made = self._made(call)
        if isinstance(made, Tensor) or not isinstance(made, Iterable):
            made = {"the output": made}
        outputs = made if isinstance(made, dict) else {f"output {i}": x for i, x in enumerate(made)}
        for name, tensor in outputs.items():
            if not isinstance(tensor, Tensor) or not tensor.dim() or len(tensor) != call.tokens:
                shape = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise UsageError(f"{name} of the function is {shape}, expected {call.tokens} rows, one for each given")
        # A row is compared by its bits; a copy, for a function may return the same memory at every call.
        return {name: tensor[call.places].reshape(len(call.places), -1).clone() for name, tensor in outputs.items()}

    def _made(self, call: Call) -> Any:
        self.calls += 1
        return self._function(*(self._batch(rows, call) for rows in self._rows))

    def _batch(self, rows: Tensor, call: Call) -> Tensor:
        step = {"rows": 1, "others": 3}.get(call.company, 1)
        batch = rows[[(step * place + step) % len(rows) for place in range(call.tokens)]].clone()
        if call.company == "zeros":
            batch.zero_()
        elif call.company == "nan" and rows.is_floating_point():
            batch.fill_(torch.nan)
        elif call.company == "large" and rows.is_floating_point():
            most = torch.finfo(batch.dtype).max  # an infinity beside a row is no large value
            batch = (batch.double() * LARGE).clamp(-most, most).to(batch.dtype)
        batch[call.places] = rows[list(call.watched)]
        return batch


def sharp_rows(
    gamma: Tensor, eps: float, *, count: int = 16, weight_bias: float = 0.0, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Rows whose RMSNorm shows one rounding more or less in the sum of squares, as `fusecheck invariance` watches them.

    Args:
        gamma: the norm's weight, [hidden].
        eps: added to the mean square.
        count: of rows.
        weight_bias: added to gamma in float32; 1.0 for Gemma.
        dtype: of the activations, bf16 or fp16.

    Returns:
        [count, hidden], `dtype`, on the device of `gamma`: what the norm reads. Where a residual is added, give this as
        the one and zeros as the other.

    Raises:
        UsageError: gamma has not one dimension, or fewer than two elements, or the dtype is another.
    """
    if not isinstance(gamma, Tensor) or gamma.dim() != 1 or len(gamma) < 2 or dtype not in DTYPES:
        shape = list(gamma.shape) if isinstance(gamma, Tensor) else type(gamma).__name__
        raise UsageError(f"gamma is {shape} and dtype {dtype}, expected [hidden], at least [2], and {either(DTYPES)}")
    form = next(fmt for fmt in NATIVE.values() if fmt.dtype is dtype)
    weight = gamma.detach().float() + weight_bias
    base = torch.randn(count, len(gamma), generator=torch.Generator().manual_seed(0)).to(dtype).to(gamma.device)
    return torch.stack([sharpened(row, weight, eps, form, number) for number, row in enumerate(base)])


def _digests(rows: Tensor) -> list[int]:
    return digest.rows(rows.contiguous().view(torch.uint8))

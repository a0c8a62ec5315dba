"""What a rank tells the others of its call, in one message, before any of them judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fusecheck.dataflow import Dataflow
from fusecheck.errors import UsageError
from fusecheck.testing.call import Call
from fusecheck.testing.judging import agreed
from fusecheck.testing.ranks import digests, unequal


@dataclass(frozen=True)
class Told:
    """One rank's call, as far as the ranks have to agree on it.

    Attributes:
        shape: (tokens, hidden).
        dtype: of the partials.
        partials: how many tensors this rank gave.
        operands: what all ranks must hold alike: digests of tensors, numbers, the name of the declared dataflow.
        outputs: a digest of each.
    """

    shape: tuple[int, int]
    dtype: str
    partials: int
    operands: dict[str, object]
    outputs: dict[str, int]

    @classmethod
    def of(cls, call: Call, dataflow: Dataflow | None) -> Told:
        """What there is to tell of a call that has been checked."""
        tensors = {name: value for name in ("residual_in", "gamma") if (value := getattr(call, name)) is not None}
        rest: dict[str, object] = {"scale": call.factor, "eps": call.eps, "weight_bias": call.weight_bias}
        rest |= {"quantiser": call.quantiser, "layout": call.layout}
        operands = {name: repr(value) for name, value in rest.items()}  # a NaN is no other than itself
        operands["dataflow"] = "None" if dataflow is None else dataflow.name
        dtype = str(call.partials[0].dtype)
        return cls(call.shape, dtype, len(call.partials), {**digests(tensors), **operands}, digests(agreed(call)))

    def __str__(self) -> str:
        return f"partials {list(self.shape)} {self.dtype} and the outputs {', '.join(sorted(self.outputs))}"


def check_alike(everyones: Sequence[Told]) -> None:
    """Check that the ranks speak of one call.

    Raises:
        UsageError: they hold other shapes, dtypes, outputs or operands.
    """
    first = everyones[0]
    for rank, each in enumerate(everyones):
        held, expected = ((told.shape, told.dtype, told.partials, sorted(told.outputs)) for told in (each, first))
        if held != expected:
            raise UsageError(f"rank {rank} holds {each}, expected {first}, as rank 0")
    if first.partials != 1:
        raise UsageError(f"partials holds {first.partials} tensors beside group=, expected this rank's own one")
    for name in unequal([each.operands for each in everyones]):
        raise UsageError(f"{name} differs between ranks, expected the same on all of them")

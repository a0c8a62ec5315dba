"""`assert_same_on_ranks`: tensors that a collective promises to be equal everywhere, compared bit by bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusecheck.errors import UsageError
from fusecheck.testing.conformity import NotConforming
from fusecheck.testing.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def assert_same_on_ranks(group: ProcessGroup | None = None, **tensors: Tensor) -> None:
    """Demand that each tensor has the same bits on every rank; a collective call.

    Args:
        group: the ranks; None for the default group.
        tensors: by the names that the error shall use; the same names, shapes and dtypes on every rank.

    Raises:
        NotConforming: the first element that differs, with the bits of the ranks that differ; on every rank alike.
        UsageError: no tensors, or the ranks hold other names, shapes or dtypes; on every rank alike.
    """
    __tracebackhide__ = True
    ranks = Ranks(torch.distributed.group.WORLD if group is None else group)
    shapes = ranks.alike(lambda: _shapes(tensors))
    for rank, each in enumerate(shapes):
        if each != shapes[0]:
            raise UsageError(f"rank {rank} holds {each}, expected {shapes[0]}, as rank 0")
    for name in ranks.differing(tensors):
        raise NotConforming(_first_difference(name, ranks.gather(tensors[name])))


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], str]]:
    if not tensors:
        raise UsageError("got no tensor, expected at least one: assert_same_on_ranks(residual=residual)")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise UsageError(f"{name} is {type(tensor).__name__}, expected a tensor")
    return {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()}


def _first_difference(name: str, everyones: list[Tensor]) -> str:
    words = [each.contiguous().reshape(-1, 1).view(torch.uint8) for each in everyones]
    unequal = torch.stack([(each != words[0]).any(-1) for each in words])
    place = int(torch.nonzero(unequal.any(0))[0])
    index = [int(i) for i in torch.unravel_index(torch.tensor(place), everyones[0].shape)]
    held = ", ".join(f"rank {rank} 0x{bytes(each[place].tolist())[::-1].hex()}" for rank, each in enumerate(words))
    return f"ranks agree: {name}{index} differs: {held} ({int(unequal.any(0).sum())} of {words[0].shape[0]} elements)"

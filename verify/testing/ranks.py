"""What the ranks of a test tell each other, so that each of them ends alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from fusecheck.case import digest
from fusecheck.errors import UsageError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The ranks that hold the parts of one call; alone where there is no group.

    Attributes:
        group: the process group, or None.
    """

    group: ProcessGroup | None

    @property
    def index(self) -> int:
        """This process's rank in the group."""
        return 0 if self.group is None else torch.distributed.get_rank(self.group)

    @property
    def count(self) -> int:
        """How many ranks there are."""
        return 1 if self.group is None else torch.distributed.get_world_size(self.group)

    def exchange(self, mine: T) -> list[T]:
        """Every rank's object, in rank order; a collective call."""
        if self.group is None:
            return [mine]
        everyones: list[T | None] = [None] * self.count
        torch.distributed.all_gather_object(everyones, mine, group=self.group)
        return [each for each in everyones if each is not None]

    def alike(self, act: Callable[[], T]) -> list[T]:
        """Do something that may be refused, and get what every rank made of it; where one refuses, all raise the same.

        Raises:
            UsageError: the first rank's that refused.
        """
        made, refused = None, ""
        try:
            made = act()
        except UsageError as error:
            refused = str(error)
        everyones: list[T] = []
        for rank, (message, theirs) in enumerate(self.exchange((refused, made))):
            if theirs is None:
                raise UsageError(f"rank {rank}: {message}" if self.count > 1 else message)
            everyones.append(theirs)
        return everyones

    def gather(self, mine: Tensor) -> list[Tensor]:
        """Every rank's tensor of this shape and dtype, in rank order; a collective call."""
        if self.group is None:
            return [mine]
        flat = mine.contiguous().reshape(-1).view(torch.uint8)
        everyones = [torch.empty_like(flat) for _ in range(self.count)]
        torch.distributed.all_gather(everyones, flat, group=self.group)
        return [each.view(mine.dtype).reshape(mine.shape) for each in everyones]

    def share(self, rows: int) -> range:
        """The rows that this rank judges where all hold the same: a contiguous share."""
        return range(rows * self.index // self.count, rows * (self.index + 1) // self.count)

    def differing(self, tensors: dict[str, Tensor]) -> list[str]:
        """The names of tensors whose bits are not the same on all ranks; a collective call."""
        return [] if self.count == 1 else unequal(self.exchange(digests(tensors)))


def digests(tensors: dict[str, Tensor]) -> dict[str, int]:
    """A digest of each tensor's bits."""
    return {name: digest_of(tensor) for name, tensor in tensors.items()}


def unequal(everyones: Sequence[Mapping[str, object]]) -> list[str]:
    """The names, in the first rank's order, under which not all ranks hold the same."""
    return [name for name, value in everyones[0].items() if any(each.get(name) != value for each in everyones)]


def digest_of(tensor: Tensor) -> int:
    """A digest of a tensor's bits, of any shape and dtype."""
    dense = tensor.detach().contiguous()
    flat = dense.as_strided((1, dense.numel()), (dense.numel(), 1)).view(torch.uint8)  # one column may have any stride
    return digest.whole(torch.nn.functional.pad(flat, (0, -flat.shape[1] % 8)))

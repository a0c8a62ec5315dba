"""What the ranks of a test tell each other, so that each of them ends alike."""

from __future__ import annotations

import pickle
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
HEAD, ROOM = 8, 4096
"""Bytes of a message's length, and of a message that goes with it in one collective."""


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
        return [pickle.loads(each) for each in self._messages(pickle.dumps(mine))]

    def _messages(self, mine: bytes) -> list[bytes]:
        """Every rank's bytes: in one collective where none has more than `ROOM`, else in two."""
        heads = self._gathered(len(mine).to_bytes(HEAD, "little") + mine[:ROOM], HEAD + ROOM)
        lengths = [int.from_bytes(each[:HEAD], "little") for each in heads]
        if max(lengths) > ROOM:
            return [each[:length] for each, length in zip(self._gathered(mine, max(lengths)), lengths, strict=True)]
        return [each[HEAD : HEAD + length] for each, length in zip(heads, lengths, strict=True)]

    def _gathered(self, mine: bytes, size: int) -> list[bytes]:
        """Every rank's bytes, filled up to a size that is the same on all of them."""
        nccl = torch.distributed.get_backend(self.group) == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
        sent = torch.frombuffer(bytearray(mine.ljust(size, b"\0")), dtype=torch.uint8).to(device)
        everyones = torch.empty(self.count * size, dtype=torch.uint8, device=device)
        torch.distributed.all_gather_into_tensor(everyones, sent, group=self.group)
        return [bytes(each) for each in everyones.cpu().view(self.count, size).numpy()]

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
    """A digest of each tensor's bits, of any shape and dtype; read from the device at once."""
    made = [_digest(tensor) for tensor in tensors.values()]
    values: list[int] = torch.stack(made).tolist() if made else []
    return dict(zip(tensors, values, strict=True))


def unequal(everyones: Sequence[Mapping[str, object]]) -> list[str]:
    """The names, in the first rank's order, under which not all ranks hold the same."""
    return [name for name, value in everyones[0].items() if any(each.get(name) != value for each in everyones)]


def _digest(tensor: Tensor) -> Tensor:
    dense = tensor.detach().contiguous()
    columns = dense.shape[-1] if dense.dim() > 1 else dense.numel()
    # One column may have any stride, and torch calls it contiguous.
    return digest.lazily(dense.as_strided((dense.numel() // max(1, columns), columns), (columns, 1)))

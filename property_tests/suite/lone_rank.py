"""A rank whose peers are not there, for backends that are tested in one process."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

CPU = torch.device("cpu")


@dataclass
class LoneRank:
    """As `fusecheck.interface.Rank` says; alone, its memory is shared with nobody."""

    index: int = 0
    world_size: int = 2
    device: torch.device = CPU
    group: ProcessGroup | None = None
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def symmetric(self, name: str, nbytes: int) -> list[Tensor]:
        """This rank's buffer by name; there are no peers' to return."""
        if self.world_size > 1:
            raise RuntimeError(f"{name} {nbytes}")
        return [self.buffers.setdefault(name, torch.zeros(nbytes, dtype=torch.uint8))]

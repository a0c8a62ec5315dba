"""A rank of two whose peer is not there, for adapters that are tested without their library."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

CPU = torch.device("cpu")


@dataclass
class LoneRank:
    """As `fusecheck.interface.Rank` says; its memory is its own."""

    index: int = 0
    world_size: int = 2
    device: torch.device = CPU
    group: ProcessGroup | None = None

    def symmetric(self, name: str, nbytes: int) -> list[Tensor]:
        """There is nobody to share it with."""
        raise RuntimeError(f"{name} {nbytes}")

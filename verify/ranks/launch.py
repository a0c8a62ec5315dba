"""One way to get pools, wherever the program runs: on this machine, or as rank 0 under mpirun."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fusecheck.errors import Inconclusive, UsageError
from fusecheck.ranks.mpi import detect, enter, split_world
from fusecheck.ranks.pool import Pool


@dataclass(frozen=True)
class Pools:
    """The groups of ranks that this program may use; a context manager that closes them.

    Attributes:
        pools: one pool per group, with the same worker, all usable at a time.
        launcher: `local` or `mpirun`.
    """

    pools: tuple[Pool, ...]
    launcher: str

    def __enter__(self) -> Pools:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill all ranks and wait until they are gone."""
        for pool in self.pools:
            pool.close()


def open_pools(worker: str, world_size: int, *, groups: int = 1, **options: Any) -> Pools:
    """Make the pools for groups of `world_size` ranks.

    Under mpirun the whole MPI world is split into groups; elsewhere `groups` pools are made on this machine.
    No process is started before the first call.

    Args:
        worker: as for `fusecheck.ranks.pool.Pool`.
        world_size: ranks per group.
        groups: how many groups on this machine; not used under mpirun.
        options: further keyword arguments of `Pool`.

    Raises:
        UsageError: as `Pool` and `MpiWorld.pools` do, or fewer than one group.
    """
    world = enter()
    if world is not None:
        return Pools(tuple(world.pools(worker, world_size, **options)), "mpirun")
    if groups < 1:
        raise UsageError(f"{groups} groups of ranks: expected at least 1")
    return Pools(tuple(Pool(worker, world_size, **options) for _ in range(groups)), "local")


def require_groups(world_size: int) -> None:
    """Check that mpirun, if it started this program, started ranks for whole groups of this size.

    Raises:
        UsageError: as `split_world`.
    """
    if (place := detect()) is not None:
        split_world([""] * place[1], world_size, "cuda")


def require_gpus(wanted: int) -> None:
    """Check that this machine has so many GPUs; under mpirun every rank sees to its own.

    Raises:
        Inconclusive: it has fewer.
    """
    import torch

    found = torch.cuda.device_count()
    if found < wanted and detect() is None:
        raise Inconclusive(f"{found} CUDA GPUs here, {wanted} needed: run it where there are")

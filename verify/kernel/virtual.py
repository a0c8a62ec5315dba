"""Virtual ranks: a tensor-parallel kernel at any world size on one GPU, in one process, a thread and a stream a rank.

Every rank runs the ordinary worker; only the rank object differs. The process is a pool of one, so a hang of the
device is watched from outside and killed like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusecheck.case.run import WORKER
from fusecheck.interface import Support
from fusecheck.problem import Problem
from fusecheck.ranks import Pool, Reply
from fusecheck.ranks.launch import Pools, open_pools
from fusecheck.ranks.plan import split_worker
from fusecheck.ranks.virtual import EAGER_MODULES, PEER_SECONDS

PLAYER = "fusecheck.ranks.virtual:VirtualRanks"

MOST_ELEMENTS = {2: 64 * 4096, 4: 64 * 4096, 8: 64 * 1024, 16: 3 * 2880}
"""tokens * hidden whose blocks are all resident at once on one H200, by world size, as measured."""


def residency(problem: Problem) -> Support:
    """Whether all ranks' blocks fit on the device at once; beyond, they wait for each other for ever."""
    for _, step in problem.calls():
        most = MOST_ELEMENTS.get(step.world_size, 0)
        if step.elements > most:
            reason = f"{step.elements} elements at {step.world_size} virtual ranks, at most {most} are resident"
            return Support(ok=False, reason=reason)
    return Support(ok=True)


class VirtualPool:
    """A pool of one process that answers as `world_size` ranks.

    Args:
        world_size: how many ranks it plays.
        worker: of each rank, as for `Pool`.
        arguments: passed to the worker class.
        patience: seconds that a rank waits for its peers.
        options: as for `Pool`.
    """

    def __init__(
        self,
        world_size: int,
        worker: str = WORKER,
        *,
        arguments: Sequence[Any] = (),
        patience: float = PEER_SECONDS,
        **options: Any,
    ) -> None:
        self.world_size = world_size
        played = (world_size, worker, patience, *arguments)
        preload = (split_worker(worker)[0],)
        self._pool = Pool(PLAYER, 1, arguments=played, environment=EAGER_MODULES, preload=preload, **options)

    def call(self, method: str, *arguments: Any, timeout: float) -> list[Reply]:
        """As `Pool.call`, with one reply per virtual rank."""
        reply = self._pool.call(method, *arguments, timeout=timeout)[0]
        if reply.failure is not None:
            return [Reply(rank, failure=reply.failure) for rank in range(self.world_size)][:1]
        return [Reply(rank, value=value) for rank, value in enumerate(_as_list(reply.value))]

    @property
    def pools(self) -> tuple[VirtualPool]:
        """Itself, as `fusecheck.ranks.launch.Pools` offers its own."""
        return (self,)

    def close(self) -> None:
        """End the process."""
        self._pool.close()

    def __enter__(self) -> VirtualPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _as_list(value: Any) -> Sequence[Any]:
    assert isinstance(value, list)
    return value


def open_ranks(world_size: int, worker: str = WORKER, *, virtual: bool, **options: Any) -> Pools | VirtualPool:
    """Ranks in one process on one GPU, or a process each; a context manager. Options as for `Pool`."""
    return VirtualPool(world_size, worker, **options) if virtual else open_pools(worker, world_size, **options)

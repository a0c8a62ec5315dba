"""Virtual ranks: a tensor-parallel kernel at any world size on one GPU, in one process, a thread and a stream a rank.

Every rank runs the ordinary worker; only the rank object differs. The process is a pool of one, so a hang of the
device is watched from outside and killed like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fusecheck.case.worker import CaseWorker
from fusecheck.interface import Rank, Support
from fusecheck.problem import Problem
from fusecheck.ranks import Pool, Reply
from fusecheck.ranks.virtual import EAGER_MODULES, Crew

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


class VirtualCaseWorker:
    """Plays every rank of a case; its answers are lists in rank order.

    Args:
        rank: of the pool of one; its device is shared by all virtual ranks.
    """

    def __init__(self, rank: Rank) -> None:
        self._device = rank.device
        self._crew: Crew[CaseWorker] | None = None

    def run(self, case: dict[str, Any]) -> list[dict[str, Any]]:
        """`CaseWorker.run` on every virtual rank at once."""
        self._become(Problem.from_json(case["problem"]).world_size)
        return self._everyone(lambda worker: worker.run(case))

    def judge_all(self) -> list[Any]:
        """`CaseWorker.judge_all` of every virtual rank."""
        return self._everyone(lambda worker: worker.judge_all())

    def explain(self) -> list[Any]:
        """`CaseWorker.explain` of every virtual rank."""
        return self._everyone(lambda worker: worker.explain())

    def unwritten(self, case: dict[str, Any]) -> list[Any]:
        """`CaseWorker.unwritten` of every virtual rank."""
        return self._everyone(lambda worker: worker.unwritten(case))

    def varying(self, case: dict[str, Any], repeats: int) -> list[Any]:
        """`CaseWorker.varying` of every virtual rank."""
        return self._everyone(lambda worker: worker.varying(case, repeats))

    def row_digests(self, index: int) -> list[Any]:
        """`CaseWorker.row_digests` of every virtual rank."""
        return self._everyone(lambda worker: worker.row_digests(index))

    def row_bits(self, index: int, output: str, row: int) -> list[Any]:
        """`CaseWorker.row_bits` of every virtual rank."""
        return self._everyone(lambda worker: worker.row_bits(index, output, row))

    def _become(self, world_size: int) -> None:
        if self._crew is not None and self._crew.world_size == world_size:
            return
        if self._crew is not None:
            self._crew.dismiss()
        self._crew = Crew(self._device, world_size, CaseWorker)

    def _everyone(self, act: Callable[[CaseWorker], Any]) -> list[Any]:
        assert self._crew is not None
        try:
            return self._crew.everyone(act)
        except BaseException:
            self._crew.dismiss()
            self._crew = None
            raise


class VirtualPool:
    """A pool of one process that answers as `world_size` ranks.

    Args:
        world_size: how many ranks it plays.
        worker: plays them: its methods return lists in rank order.
        options: as for `Pool`.
    """

    def __init__(
        self, world_size: int, worker: str = "fusecheck.kernel.virtual:VirtualCaseWorker", **options: Any
    ) -> None:
        self.world_size = world_size
        self._pool = Pool(worker, 1, environment=EAGER_MODULES, **options)

    def call(self, method: str, *arguments: Any, timeout: float) -> list[Reply]:
        """As `Pool.call`, with one reply per virtual rank."""
        reply = self._pool.call(method, *arguments, timeout=timeout)[0]
        if reply.failure is not None:
            return [Reply(rank, failure=reply.failure) for rank in range(self.world_size)][:1]
        return [Reply(rank, value=value) for rank, value in enumerate(_as_list(reply.value))]

    def close(self) -> None:
        """End the process."""
        self._pool.close()


def _as_list(value: Any) -> Sequence[Any]:
    assert isinstance(value, list)
    return value


@dataclass(frozen=True)
class VirtualPools:
    """The one virtual pool, as `fusecheck.ranks.launch.Pools` offers its own."""

    pool: VirtualPool

    @property
    def pools(self) -> tuple[VirtualPool, ...]:
        """That pool."""
        return (self.pool,)

    def __enter__(self) -> VirtualPools:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.close()

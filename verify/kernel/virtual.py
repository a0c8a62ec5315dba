"""Virtual ranks: a tensor-parallel kernel at any world size on one GPU, in one process, a thread and a stream a rank.

Every rank runs the ordinary worker; only the rank object differs. The process is a pool of one, so a hang of the
device is watched from outside and killed like any other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fusecheck.case.worker import CaseWorker
from fusecheck.interface import Rank, Support
from fusecheck.problem import Problem
from fusecheck.ranks import Pool, Reply

MOST_ELEMENTS = {2: 64 * 4096, 4: 64 * 4096, 8: 64 * 1024, 16: 3 * 2880}
"""tokens * hidden whose blocks are all resident at once on one H200, by world size, as measured."""

PEER_SECONDS = 30.0
"""How long a virtual rank waits for its peers before it gives up."""


def residency(problem: Problem) -> Support:
    """Whether all ranks' blocks fit on the device at once; beyond, they wait for each other for ever."""
    for _, step in problem.calls():
        most = MOST_ELEMENTS.get(step.world_size, 0)
        if step.elements > most:
            reason = f"{step.elements} elements at {step.world_size} virtual ranks, at most {most} are resident"
            return Support(ok=False, reason=reason)
    return Support(ok=True)


class Board:
    """Where the virtual ranks of one process meet."""

    def __init__(self, world_size: int) -> None:
        self._barrier = threading.Barrier(world_size)
        self._posted: list[Any] = [None] * world_size

    def wait(self) -> None:
        """Return when every rank has come.

        Raises:
            threading.BrokenBarrierError: a peer failed or did not come in time.
        """
        self._barrier.wait(PEER_SECONDS)

    def exchange(self, index: int, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        self._posted[index] = value
        self.wait()
        everyone = list(self._posted)
        self.wait()
        return everyone

    def abort(self) -> None:
        """Wake the peers of a rank that failed."""
        self._barrier.abort()


@dataclass
class VirtualRank:
    """One of several ranks on one device."""

    index: int
    world_size: int
    device: torch.device
    board: Board
    group: ProcessGroup | None = field(default=None)

    def symmetric(self, name: str, nbytes: int) -> list[Tensor]:
        """Virtual ranks pass pointers instead.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(f"symmetric({name!r}, {nbytes}): virtual ranks exchange pointers through their board")


class VirtualCaseWorker:
    """Plays every rank of a case; its answers are lists in rank order.

    Args:
        rank: of the pool of one; its device is shared by all virtual ranks.
    """

    def __init__(self, rank: Rank) -> None:
        self._device = rank.device
        self._workers: list[CaseWorker] = []
        self._streams: list[Any] = []
        self._threads: ThreadPoolExecutor | None = None
        self._board = Board(1)

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
        if len(self._workers) == world_size:
            return
        if self._threads is not None:
            self._threads.shutdown()
        self._board = Board(world_size)
        self._workers = [CaseWorker(VirtualRank(r, world_size, self._device, self._board)) for r in range(world_size)]
        self._streams = [torch.cuda.Stream(self._device) for _ in range(world_size)]  # type: ignore[no-untyped-call]
        self._threads = ThreadPoolExecutor(world_size)

    def _everyone(self, act: Callable[[CaseWorker], Any]) -> list[Any]:
        assert self._threads is not None

        def on_stream(index: int) -> Any:
            try:
                with torch.cuda.device(self._device), torch.cuda.stream(self._streams[index]):
                    return act(self._workers[index])
            except BaseException:
                self._board.abort()
                raise

        futures = [self._threads.submit(on_stream, index) for index in range(len(self._workers))]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:  # the first one's own error, not the broken barrier that its peers met
            self._workers = []
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        return [future.result() for future in futures]


class VirtualPool:
    """A pool of one process that answers as `world_size` ranks.

    Args:
        world_size: how many ranks it plays.
        options: as for `Pool`.
    """

    def __init__(self, world_size: int, **options: Any) -> None:
        self.world_size = world_size
        environment = {"CUDA_MODULE_LOADING": "EAGER"}  # a module loaded late would wait for spinning kernels
        self._pool = Pool("fusecheck.kernel.virtual:VirtualCaseWorker", 1, environment=environment, **options)

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

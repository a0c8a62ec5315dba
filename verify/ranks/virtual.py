"""Virtual ranks: several ranks in one process on one device, a thread and (on a GPU) a stream each.

What differs from ranks in processes of their own is the rank object alone: it has a board to meet at, and no group.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fusecheck.interface import Rank
from fusecheck.ranks.plan import split_worker

PEER_SECONDS = 30.0
"""How long a virtual rank waits for its peers before it gives up."""

EAGER_MODULES = {"CUDA_MODULE_LOADING": "EAGER"}
"""For the process's environment: a module loaded late would wait for spinning kernels."""

Worker = TypeVar("Worker")


class Board:
    """Where the virtual ranks of one process meet."""

    def __init__(self, world_size: int, seconds: float = PEER_SECONDS) -> None:
        self._barrier = threading.Barrier(world_size)
        self._posted: list[Any] = [None] * world_size
        self._seconds = seconds

    def wait(self) -> None:
        """Return when every rank has come.

        Raises:
            threading.BrokenBarrierError: a peer failed or did not come in time.
        """
        self._barrier.wait(self._seconds)

    def exchange(self, index: int, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        self._posted[index] = value
        self.wait()
        everyone = list(self._posted)
        self.wait()
        return everyone

    def gather(self, index: int, value: Tensor) -> list[Tensor]:
        """A copy of every rank's tensor, in rank order; what a rank's stream was asked before is done."""
        _settle(value.device)
        copies = [peer.clone() for peer in self.exchange(index, value)]
        _settle(value.device)
        self.wait()  # nobody's tensor goes before everybody has copied it
        return copies

    def abort(self) -> None:
        """Wake the peers of a rank that failed."""
        self._barrier.abort()


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


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


class Crew(Generic[Worker]):
    """The workers of all virtual ranks, called at once.

    Args:
        device: that all ranks share.
        world_size: how many ranks.
        make: makes one rank's worker, in that rank's thread and on its stream.
        seconds: how long a rank waits for its peers.
    """

    def __init__(
        self,
        device: torch.device,
        world_size: int,
        make: Callable[[VirtualRank], Worker],
        seconds: float = PEER_SECONDS,
    ) -> None:
        self.world_size, self._device = world_size, device
        self._board = Board(world_size, seconds)
        cuda = device.type == "cuda"
        self._streams = [torch.cuda.Stream(device) for _ in range(world_size)] if cuda else []  # type: ignore[no-untyped-call]
        self._threads = ThreadPoolExecutor(world_size)
        ranks = [VirtualRank(index, world_size, device, self._board) for index in range(world_size)]
        self.workers: list[Worker] = self._at_once(lambda index: make(ranks[index]))

    def everyone(self, act: Callable[[Worker], Any]) -> list[Any]:
        """What `act` returns for every worker, in rank order.

        Raises:
            Exception: the first rank's own error, not its peers' broken barrier; the crew is of no use then.
        """
        return self._at_once(lambda index: act(self.workers[index]))

    def _at_once(self, act: Callable[[int], Any]) -> list[Any]:
        def in_place(index: int) -> Any:
            try:
                with ExitStack() as place:
                    if self._streams:
                        place.enter_context(torch.cuda.device(self._device))
                        place.enter_context(torch.cuda.stream(self._streams[index]))
                    return act(index)
            except BaseException:
                self._board.abort()
                raise

        futures = [self._threads.submit(in_place, index) for index in range(self.world_size)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        return [future.result() for future in futures]

    def dismiss(self) -> None:
        """End the threads."""
        self._threads.shutdown()


class VirtualRanks:
    """Plays every rank of a worker; a method's answer is the list of all ranks' answers.

    Args:
        rank: of the pool of one; its device is shared by all virtual ranks.
        world_size: how many ranks to play.
        worker: of each, as `package.module:Class`.
        seconds: how long a rank waits for its peers.
        arguments: passed to the worker class.
    """

    def __init__(self, rank: Rank, world_size: int, worker: str, seconds: float, *arguments: Any) -> None:
        module, name = split_worker(worker)
        kind = getattr(importlib.import_module(module), name)
        self._gather = partial(Crew[Any], rank.device, world_size, lambda each: kind(each, *arguments), seconds)
        self._crew: Crew[Any] | None = self._gather()

    def __getattr__(self, method: str) -> Callable[..., list[Any]]:
        """A method of the worker, called on every virtual rank."""
        if method.startswith("_"):
            raise AttributeError(method)
        return partial(self._everyone, method)

    def _everyone(self, method: str, *arguments: Any) -> list[Any]:
        crew, self._crew = self._crew or self._gather(), None
        try:
            found = crew.everyone(lambda worker: getattr(worker, method)(*arguments))
        except BaseException:
            crew.dismiss()
            raise
        self._crew = crew
        return found

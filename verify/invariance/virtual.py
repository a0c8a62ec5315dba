"""Virtual ranks for the question: every rank of a call in one process, a thread and a stream each."""

from __future__ import annotations

from typing import Any

from fusecheck.interface import Rank
from fusecheck.invariance.worker import InvarianceWorker
from fusecheck.problem import Problem
from fusecheck.ranks.virtual import Crew


class VirtualInvarianceWorker:
    """Plays every rank; its answers are lists in rank order.

    Args:
        rank: of the pool of one; its device is shared by all virtual ranks.
    """

    def __init__(self, rank: Rank) -> None:
        self._device = rank.device
        self._crew: Crew[InvarianceWorker] | None = None

    def ask(self, *arguments: Any) -> list[Any]:
        """`InvarianceWorker.ask` of every virtual rank."""
        return self._everyone("ask", *arguments)

    def show(self, *arguments: Any) -> list[Any]:
        """`InvarianceWorker.show` of every virtual rank."""
        return self._everyone("show", *arguments)

    def _everyone(self, method: str, backend: str, problem: str, *arguments: Any) -> list[Any]:
        if self._crew is None:
            self._crew = Crew(self._device, Problem.from_json(problem).world_size, InvarianceWorker)
        return self._crew.everyone(lambda worker: getattr(worker, method)(backend, problem, *arguments))

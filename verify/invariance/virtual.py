"""Virtual ranks for the question: every rank of a call in one process, a thread and a stream each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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

    def __getattr__(self, method: str) -> Callable[..., list[Any]]:
        """A method of `InvarianceWorker`, called on every virtual rank."""
        if method.startswith("_") or not hasattr(InvarianceWorker, method):
            raise AttributeError(f"no method {method!r}, expected one of InvarianceWorker")
        return partial(self._everyone, method)

    def _everyone(self, method: str, backend: str, problem: str, *arguments: Any) -> list[Any]:
        if self._crew is None:
            self._crew = Crew(self._device, Problem.from_json(problem).world_size, InvarianceWorker)
        return self._crew.everyone(lambda worker: getattr(worker, method)(backend, problem, *arguments))

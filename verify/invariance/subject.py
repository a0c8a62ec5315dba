"""A backend on its ranks as the subject of a search: calls go out, digests come back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusecheck import backends
from fusecheck.errors import Inconclusive
from fusecheck.interface import Strategy
from fusecheck.invariance.calls import Call, Seen
from fusecheck.invariance.orders import Mask
from fusecheck.invariance.squares import UNCLEAR
from fusecheck.invariance.trees import Question
from fusecheck.kernel.virtual import VirtualPool, open_ranks, residency
from fusecheck.problem import Problem
from fusecheck.ranks.launch import Pools, require_gpus
from fusecheck.ranks.replies import culprits

WORKER = "fusecheck.invariance.worker:InvarianceWorker"
TOGETHER = 16
"""Calls in one message, at most, and as many as took a second before: a hang is still seen within the timeout."""

Units: TypeAlias = "NDArray[np.uint8]"


@dataclass
class Kernels:
    """A backend at one or several world sizes; a context manager that ends the ranks.

    Attributes:
        backend: its name.
        problem: op, dtype, hidden, scalars, seed; of its tokens the largest batch.
        device: `cpu` or `cuda`.
        virtual: all ranks on one device and in one process.
        timeout: seconds until a call counts as hung.
        calls: made so far.
    """

    backend: str
    problem: Problem
    device: str = "cpu"
    virtual: bool = False
    timeout: float = 60.0
    calls: int = 0
    _together: int = 1
    _open: dict[int, Pools | VirtualPool] = field(default_factory=dict)

    def __enter__(self) -> Kernels:
        return self

    def __exit__(self, *_: object) -> None:
        for pools in self._open.values():
            pools.__exit__()
        self._open.clear()

    def takes(self, call: Call) -> str:
        """Why the backend, or the device, refuses a call; empty where it is taken."""
        problem = self._of(call)
        if call.strategy:
            problem = replace(problem, strategy=Strategy(call.strategy))
        support = backends.backend(self.backend).supports(replace(problem, tokens=call.tokens))
        if support.ok and self.virtual and self.device == "cuda":
            support = residency(replace(problem, tokens=call.tokens))
        return "" if support.ok else support.reason

    def ask(self, call: Call) -> Seen:
        """Make a call on every rank.

        Raises:
            Inconclusive: a rank failed, which is for `fusecheck kernel` to judge.
        """
        seen: Seen = {}
        for rank, digests in enumerate(self._everyone("ask", call)):
            for output, each in digests.items():
                rows = seen.setdefault(output, {})
                rows.update({(rank, row): x for row, x in zip(call.watched, each, strict=True)})
        return seen

    def show(self, call: Call) -> list[dict[str, Tensor]]:
        """The watched rows on every rank, by output, each [watched, columns] on the CPU."""
        everyone = self._everyone("show", call)
        return [{name: _tensor(*x, rows=len(call.watched)) for name, x in each.items()} for each in everyone]

    def squares(self, batches: Sequence[Sequence[Question]]) -> list[int]:
        """Answers about the tree of the squares, in order: a call for each batch, a row for each question.

        Where ranks differ, an answer is unclear. Short calls go out several in one message, which takes about as long
        as a call does on a GPU.

        Raises:
            Inconclusive: a rank failed.
        """
        answers: list[int] = []
        left = list(batches)
        while left:
            some, left = left[: self._together], left[self._together :]
            self.calls += len(some)
            begun = time.monotonic()
            everyone = self._call("squares", self.problem, some, rows=max(map(len, some)))
            self._together = max(1, min(TOGETHER, int(len(some) / (time.monotonic() - begun + 1e-9))))
            answers += [said[0] if len(set(said)) == 1 else UNCLEAR for said in zip(*everyone, strict=True)]
        return answers

    def units(self, mask: Mask) -> list[Units]:
        """By rank, the units that a pair of large addends leaves in each element of some rows, [rows, hidden].

        Raises:
            Inconclusive: a rank failed.
        """
        self.calls += 1
        problem = replace(self.problem, world_size=mask.world_size)
        everyone = self._call("units", problem, asdict(mask), rows=mask.tokens)
        return [np.frombuffer(units, dtype=np.uint8).reshape(len(mask.rows), -1) for units in everyone]

    def binaries(self) -> list[dict[str, Any]]:
        """Those that the backend names, by their hashes, as the first rank has them; see `binaries.hashed`."""
        found: list[dict[str, Any]] = self._call("binaries", self.problem)[0]
        return found

    def _everyone(self, method: str, call: Call) -> list[Any]:
        self.calls += 1 + len(call.before or ())
        return self._call(method, self._of(call), call.to_record(), rows=max(call.tokens, *call.before or (0,)))

    def _of(self, call: Call) -> Problem:
        return replace(self.problem, world_size=call.world_size or self.problem.world_size)

    def _call(self, method: str, problem: Problem, *arguments: Any, rows: int = 0) -> list[Any]:
        pool = self._pools(problem.world_size).pools[0]
        replies = pool.call(method, self.backend, problem.to_json(), *arguments, timeout=self.timeout)
        if failures := culprits(replies):
            among = f" in batches of up to {rows} rows" if method == "squares" else f" in a batch of {rows} rows"
            where = f"{among} on {problem.world_size} ranks" if rows else ""
            raise Inconclusive(f"{self.backend}{where}: {failures[0]}; `fusecheck kernel` judges such a call")
        return [reply.value for reply in replies]

    def _pools(self, world_size: int) -> Pools | VirtualPool:
        if world_size not in self._open:
            if self.device == "cuda":
                require_gpus(1 if self.virtual else world_size)
            self._open[world_size] = open_ranks(world_size, WORKER, virtual=self.virtual, device=self.device)
        return self._open[world_size]


def _tensor(dtype: str, content: bytes, *, rows: int) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=getattr(torch, dtype)).view(rows, -1)

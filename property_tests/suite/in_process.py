"""The question of invariance asked in this process: a thread a rank, so that a call costs no message."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from fusecheck.invariance.claims import CLAIMS, Answer
from fusecheck.invariance.search import Search
from fusecheck.invariance.shares import choose
from fusecheck.invariance.subject import Kernels
from fusecheck.invariance.worker import InvarianceWorker
from fusecheck.problem import Problem
from fusecheck.ranks.virtual import Crew


@dataclass
class InProcess(Kernels):
    """As `Kernels`, with the ranks as threads."""

    crews: dict[int, Crew[InvarianceWorker]] = field(default_factory=dict)

    def _call(self, method: str, problem: Problem, *arguments: Any, rows: int = 0) -> list[Any]:
        del rows
        if problem.world_size not in self.crews:
            self.crews[problem.world_size] = Crew(torch.device("cpu"), problem.world_size, InvarianceWorker)
        line = problem.to_json()
        return self.crews[problem.world_size].everyone(lambda w: getattr(w, method)(self.backend, line, *arguments))

    def __exit__(self, *_: object) -> None:
        for crew in self.crews.values():
            crew.dismiss()


_chosen = lru_cache(maxsize=16)(choose)


def decide(kernels: Kernels, worlds: tuple[int, ...], claims: tuple[str, ...] = CLAIMS) -> dict[str, Answer]:
    """Every claim about a kernel, by name."""
    rows = _chosen(kernels.problem, 8).rows
    most = kernels.problem.tokens
    search = Search(kernels, rows, most, 64, ("ONESHOT", "TWOSHOT"), worlds, claims=claims)
    return {answer.claim: answer for answer in search.run()}

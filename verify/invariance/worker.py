"""What runs on a rank: make the batch of a call, call the kernel, and digest the watched rows."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fusecheck.case import alive, digest, returned
from fusecheck.case.compare import comparable
from fusecheck.case.workspaces import Workspaces
from fusecheck.interface import Limits, Rank, RankInputs, RankOutputs, Strategy
from fusecheck.invariance import masks
from fusecheck.invariance.binaries import Binary, hashed
from fusecheck.invariance.calls import Call
from fusecheck.invariance.expert_rows import factor
from fusecheck.invariance.orders import Mask
from fusecheck.invariance.rows import Rows
from fusecheck.invariance.trees import Question
from fusecheck.problem import Problem

_parse = lru_cache(maxsize=8)(Problem.from_json)


class InvarianceWorker:
    """Asks one rank; its kernels stay open from call to call.

    Args:
        rank: this process's place in the group.
    """

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self._workspaces = Workspaces(rank)
        self._rows = lru_cache(maxsize=4)(lambda problem: Rows(problem, rank.device))

    def ask(self, backend: str, problem: str, call: dict[str, Any]) -> dict[str, list[int]]:
        """The digest of each watched row, by output."""
        return digest.rows_of(self._watched(backend, problem, call))

    def show(self, backend: str, problem: str, call: dict[str, Any]) -> dict[str, tuple[str, bytes]]:
        """The watched rows themselves, by output: the name of their dtype, and their bytes."""
        seen = self._watched(backend, problem, call)
        return {
            name: (str(tensor.dtype).removeprefix("torch."), tensor.cpu().view(torch.uint8).numpy().tobytes())
            for name, tensor in seen.items()
        }

    def squares(self, backend: str, problem: str, batches: list[list[Question]]) -> list[int]:
        """What calls with a row for each question of a batch tell about the tree of the squares; see `masks`."""
        asked = _parse(problem)
        return [answer for questions in batches for answer in self._answers(backend, asked, questions)]

    def _answers(self, backend: str, asked: Problem, questions: list[Question]) -> list[int]:
        inputs = masks.squares_inputs(asked, questions, self.rank.index, self.rank.device)
        outputs, step = self._made(backend, asked, inputs, "")
        return masks.squares_answers(outputs, step, questions)

    def units(self, backend: str, problem: str, record: dict[str, Any]) -> bytes:
        """The units that a pair of large addends leaves in some rows; see `masks`."""
        asked, mask = _parse(problem), Mask.from_record(record)
        inputs = masks.units_inputs(asked, mask, self.rank.index, self.rank.device)
        outputs, step = self._made(backend, asked, inputs, mask.strategy)
        return masks.units_left(outputs, step, mask, factor(asked) if asked.op.has_experts else 1.0)

    def binaries(self, backend: str, problem: str) -> list[Binary]:
        """The binaries that the backend names, by their hashes; none where it names none."""
        del problem
        return hashed(getattr(self._workspaces.backend(backend), "binaries", ()))

    def _watched(self, backend: str, problem: str, record: dict[str, Any]) -> dict[str, Tensor]:
        call, asked = Call.from_record(record), _parse(problem)
        kernel = self._workspaces.backend(backend)
        if call.before is not None:
            self._workspaces.close(kernel.name)
            for tokens in call.before:
                self._call(backend, asked, Call(tokens))
        outputs, step = self._call(backend, asked, call)
        index = torch.tensor(call.places, dtype=torch.int64, device=self.rank.device)
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
        watched = {
            name: tensor.view(integers[tensor.element_size()])[index].view(tensor.dtype)
            for name, tensor in returned.named(returned.decoded(outputs, step)).items()
        }
        return comparable(watched, kernel.dataflow(step))

    def _call(self, backend: str, asked: Problem, call: Call) -> tuple[RankOutputs, Problem]:
        return self._made(backend, asked, self._rows(asked).of_rank(call, self.rank.index), call.strategy)

    def _made(self, backend: str, asked: Problem, inputs: RankInputs, strategy: str) -> tuple[RankOutputs, Problem]:
        kernel = self._workspaces.backend(backend)
        step = replace(asked, tokens=len(inputs.residual), strategy=Strategy(strategy) if strategy else asked.strategy)
        limits = Limits(asked.tokens, asked.hidden, asked.format.dtype)
        opened = self._workspaces.kernel(kernel, limits)
        return self._workspaces.call(opened, inputs, step, alive.Arena(self.rank.device)), step

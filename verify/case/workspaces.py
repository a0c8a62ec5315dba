"""The kernels of one rank: opened when first needed, kept from case to case, called between canaries.

The only place where backends and ranks meet.
"""

from __future__ import annotations

import torch

from fusecheck import backends
from fusecheck.case import alive
from fusecheck.case.calls import limits_of
from fusecheck.case.returned import decoded, misshapen
from fusecheck.errors import BreachError
from fusecheck.interface import Backend, Kernel, Limits, Rank, RankInputs, RankOutputs
from fusecheck.problem import Problem


class Workspaces:
    """The open kernels of one rank, one a backend.

    Args:
        rank: this process's place in the group.
    """

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self._kernels: dict[str, tuple[Limits, Kernel]] = {}
        self._backends: dict[str, Backend] = {}

    def backend(self, name: str) -> Backend:
        """A backend by its name; made once."""
        if name not in self._backends:
            self._backends[name] = backends.backend(name)
        return self._backends[name]

    def kernel(self, backend: Backend, limits: Limits) -> Kernel:
        """The open workspace if it is large enough, else a new one; the same decision on every rank."""
        if backend.name in self._kernels:
            have, kernel = self._kernels[backend.name]
            if have.dtype == limits.dtype and have.max_tokens >= limits.max_tokens and have.hidden >= limits.hidden:
                return kernel
            self.close(backend.name)
        kernel = backend.open(self.rank, limits)
        self._kernels[backend.name] = (limits, kernel)
        return kernel

    def close(self, name: str) -> None:
        """Close the backend's workspace if it is open."""
        if name in self._kernels:
            self._kernels.pop(name)[1].close()

    def call(self, kernel: Kernel, inputs: RankInputs, problem: Problem, arena: alive.Arena) -> RankOutputs:
        """One call, whose outputs are poisoned before and lie between canaries."""
        with alive.Poisoned(arena):
            outputs = kernel.run(inputs, op=problem.op, strategy=problem.strategy)
        if self.rank.device.type == "cuda":
            torch.cuda.synchronize(self.rank.device)
        if wrong := misshapen(outputs, problem, self.rank.device):
            raise BreachError(f"run returned {'; '.join(wrong)}; return what the operation and `RankOutputs` say")
        return outputs

    def again(self, backend: Backend, made: RankInputs, problem: Problem) -> RankOutputs:
        """One more call on these inputs; its outputs decoded."""
        arena = alive.Arena(self.rank.device)
        inputs = arena.guard(made)
        return decoded(self.call(self.kernel(backend, limits_of(problem, None)), inputs, problem, arena), problem)

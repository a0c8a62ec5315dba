"""The kernels of one rank: opened when first needed, kept from case to case, called between canaries.

The only place where backends and ranks meet.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fusecheck import backends
from fusecheck.case import alive
from fusecheck.case.calls import limits_of
from fusecheck.case.layouts import lay
from fusecheck.case.returned import decoded, misshapen
from fusecheck.errors import BreachError
from fusecheck.interface import Backend, Kernel, Limits, Rank, RankInputs, RankOutputs, overwritten
from fusecheck.problem import Problem
from fusecheck.stages.judgement import whole
from fusecheck.verdict import Tally

ROOM = 2**22
"""Elements up to which a new workspace is made for the rows and the columns of the one before as well."""

Key = tuple[str, int, torch.dtype, bool]
"""Of an open kernel: backend, number of the workspace, dtype, and whether it stands beside one that has no room."""


class Workspaces:
    """The open kernels of one rank: of a backend one or two for each dtype, each with one beside it for what is larger.

    Args:
        rank: this process's place in the group.
    """

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self._kernels: dict[Key, tuple[Limits, Kernel]] = {}
        self._backends: dict[str, Backend] = {}

    def backend(self, name: str) -> Backend:
        """A backend by its name; made once."""
        if name not in self._backends:
            self._backends[name] = backends.backend(name)
        return self._backends[name]

    def kernel(self, backend: Backend, limits: Limits, workspace: int = 0) -> Kernel:
        """An open workspace that is large enough, else a new one; the same decision on every rank.

        On a GPU, to open one takes longer than most calls. So one that takes the place of another has room for the
        calls of both and for somewhat longer ones; where that is more than `ROOM`, the new one stands beside it, unless
        the backend has but one.
        """
        name = backend.name, workspace, limits.dtype
        for beside in (False, True):
            if (opened := self._kernels.get((*name, beside))) and _within(limits, opened[0]):
                return opened[1]
        first = self._kernels.get((*name, False))
        roomy = _roomy(limits, first[0] if first else limits)
        key = (*name, roomy is None and not getattr(backend, "one_workspace", False))
        if replaced := self._kernels.pop(key, None):
            replaced[1].close()
        limits = roomy or limits
        kernel = backend.open(self.rank, limits)
        self._kernels[key] = (limits, kernel)
        return kernel

    def close(self, name: str, workspace: int | None = None) -> None:
        """Close the backend's workspaces, or one of them, if they are open."""
        for key in [key for key in self._kernels if key[0] == name and workspace in (None, key[1])]:
            self._kernels.pop(key)[1].close()

    def call(self, kernel: Kernel, inputs: RankInputs, problem: Problem, arena: alive.Arena) -> RankOutputs:
        """One call, whose outputs are poisoned before and lie between canaries."""
        with alive.Poisoned(arena):
            outputs = kernel.run(inputs, op=problem.op, strategy=problem.strategy)
        if self.rank.device.type == "cuda":
            torch.cuda.synchronize(self.rank.device)
        if wrong := misshapen(outputs, problem, self.rank.device):
            raise BreachError(f"run returned {'; '.join(wrong)}; return what the operation and `RankOutputs` say")
        return outputs

    def again(
        self,
        backend: Backend,
        made: RankInputs,
        problem: Problem,
        tally: Tally,
        what: str,
        layout: tuple[str, str] | None = None,
    ) -> RankOutputs | None:
        """One more call on these inputs; its outputs decoded, or None where stage 0 finds something wrong with it.

        Args:
            backend: whose kernel.
            made: the inputs, of which the kernel gets copies between canaries.
            problem: the call.
            tally: gets what is wrong: a write beyond a buffer or into a gap, a changed input, a wrong output.
            what: which call it is, for that.
            layout: of one operand, as `layouts.lay` takes it.
        """
        arena, overwrites = alive.Arena(self.rank.device), overwritten(backend)
        inputs, laid = (arena.guard(made), None) if layout is None else lay(arena, made, *layout)
        outputs = self.call(self.kernel(backend, limits_of(problem, None)), inputs, problem, arena)
        in_place = layout is not None and layout[1] in overwrites
        others = [] if laid is None else [(laid.whole, laid.before)]
        if not in_place and alive.untouched(arena, made, inputs, overwrites, others):
            return decoded(outputs, problem)
        wrong = alive.intact(arena, made, inputs, outputs, problem, overwrites)
        found = [] if wrong is None else wrong.shown
        if laid is not None and layout is not None and laid.changed(values=not in_place):
            found = [*found, whole(f"memory around {layout[1]} ({layout[0]}) was written", "gaps intact")]
        tally.outside += len(found)
        tally.shown += [replace(element, context=what) for element in found]
        return None if found else decoded(outputs, problem)


def _within(limits: Limits, have: Limits) -> bool:
    return limits.max_tokens <= have.max_tokens and limits.hidden <= have.hidden


def _roomy(limits: Limits, have: Limits) -> Limits | None:
    """Limits for the calls of both, in powers of two where these differ and there is room; None beyond `ROOM`."""
    both = max(have.max_tokens, limits.max_tokens), max(have.hidden, limits.hidden)
    powers = both if limits == have else (1 << (both[0] - 1).bit_length(), 1 << (both[1] - 1).bit_length())
    fitting = next((each for each in (powers, both) if each[0] * each[1] <= ROOM), None)
    return None if fitting is None else Limits(*fitting, limits.dtype)

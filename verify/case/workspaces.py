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
from fusecheck.formats.binary import NATIVE
from fusecheck.interface import (
    Backend,
    Kernel,
    Limits,
    Rank,
    RankInputs,
    RankOutputs,
    operations_of,
    overwritten,
)
from fusecheck.problem import Problem
from fusecheck.stages.judgement import whole
from fusecheck.verdict import Tally

ROOM = 2**22
"""Elements up to which a new workspace is made for the rows and the columns of the one before as well."""
GPU_ROOM = 2**26
"""The same for ranks that have a GPU each, times the ranks: some 0.5 GB, of which each rank holds a share or three."""
FORESEEN = 2**11, 2**14
"""Rows and columns of the first workspace on a GPU, as far as there is room: the long calls of `hurried`, and all that
a core plan asks for but long narrow calls and its largest messages."""

Key = tuple[str, int, torch.dtype, bool]
"""Of an open kernel: backend, number of the workspace, dtype, and whether it stands beside one that has no room."""


class Workspaces:
    """The open kernels of one rank: of a backend one or two for each dtype, each with one beside it for what is larger.

    Args:
        rank: this process's place in the group.
        foresee: on a GPU, open the first one with room for what a run will ask.
    """

    def __init__(self, rank: Rank, *, foresee: bool = False) -> None:
        self.rank = rank
        self._kernels: dict[Key, tuple[Limits, Kernel]] = {}
        self._backends: dict[str, Backend] = {}
        self._foresees = foresee and rank.device.type == "cuda" and rank.group is not None

    def backend(self, name: str) -> Backend:
        """A backend by its name; made once."""
        if name not in self._backends:
            self._backends[name] = backends.backend(name)
        return self._backends[name]

    def kernel(self, backend: Backend, limits: Limits, workspace: int = 0) -> Kernel:
        """An open workspace that is large enough, else a new one; the same decision on every rank.

        On a GPU, to open one takes longer than most calls. So one that takes the place of another has room for the
        calls of both and for somewhat longer ones; where that is more than there is room for, the new one stands beside
        it, unless the backend has but one. None of them is fresh but to its first call, and none is as small as a call
        needs: what these show is asked of `fresh.FreshWorkspaces`.
        """
        keys: list[Key] = [(backend.name, workspace, limits.dtype, beside) for beside in (False, True)]
        for key in keys:
            if (opened := self._kernels.get(key)) and within_limits(limits, opened[0]):
                return opened[1]
        if getattr(backend, "one_workspace", False):
            keys.pop()
        key, wanted = self._place(backend, limits, keys)
        if replaced := self._kernels.pop(key, None):
            replaced[1].close()
        kernel = backend.open(self.rank, wanted)
        self._kernels[key] = (wanted, kernel)
        return kernel

    def _place(self, backend: Backend, limits: Limits, keys: list[Key]) -> tuple[Key, Limits]:
        """Where a workspace for such calls is opened, and how large."""
        room = max(ROOM, GPU_ROOM // self.rank.world_size) if self._foresees else ROOM
        for key in keys:
            opened = self._kernels.get(key)
            have = opened[0] if opened else limits if key[-1] else self._foreseen(backend, limits, room)
            if roomy := roomy_limits(limits, have, room):
                return key, roomy
        return keys[-1], limits

    def _foreseen(self, backend: Backend, limits: Limits, room: int) -> Limits:
        """The limits, or on a GPU those that later calls will need, if the backend takes such calls."""
        if not self._foresees or getattr(backend, "one_workspace", False):
            return limits
        dtype = next(name for name, each in NATIVE.items() if each.dtype is limits.dtype)
        op = operations_of(backend)[0]
        rows, hidden = min(FORESEEN[0], room // FORESEEN[1]), FORESEEN[1]
        largest = Problem(op=op, dtype=dtype, world_size=self.rank.world_size, tokens=rows, hidden=hidden)
        return Limits(rows, hidden, limits.dtype) if backend.supports(largest).ok else limits

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


def within_limits(limits: Limits, have: Limits) -> bool:
    """Whether a workspace takes such calls."""
    return limits.max_tokens <= have.max_tokens and limits.hidden <= have.hidden


def roomy_limits(limits: Limits, have: Limits, room: int) -> Limits | None:
    """Limits for the calls of both, in powers of two where these differ and there is room; None beyond the room."""
    both = max(have.max_tokens, limits.max_tokens), max(have.hidden, limits.hidden)
    powers = both if limits == have else (1 << (both[0] - 1).bit_length(), 1 << (both[1] - 1).bit_length())
    fitting = next((each for each in (powers, both) if each[0] * each[1] <= room), None)
    return None if fitting is None else Limits(*fitting, limits.dtype)

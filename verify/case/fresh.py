"""The workspaces of cases that begin on fresh ones: schedules, and what is asked alone.

A fresh workspace buys two things. Its protocol is at its first call, with no flag raised and no data left: so what a
schedule shows hangs on the schedule alone, and its replay line is true. And it is no larger than its largest call: so
a write beyond that meets what other calls read. A kernel that can begin anew on the memory that it has gives both, and
need not open another workspace, which on a GPU takes longer than most schedules. Whether one that was just opened is
right is shown by the first one of a process, by those that grow, and by the calls that reopen theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusecheck.case.workspaces import ROOM, Workspaces, roomy_limits, within_limits
from fusecheck.interface import Backend, Kernel, Limits, Rank

SHORT = 64, 512
"""Rows and columns of the calls in patterns, at most: what begins anew has room for them once it was too small."""


@dataclass
class _Held:
    """An open kernel: the calls that it has memory for, and those that it is set up for; None once a case was there."""

    kernel: Kernel
    room: Limits
    limits: Limits | None

    @property
    def renewable(self) -> bool:
        """Whether it can begin anew."""
        return callable(getattr(self.kernel, "renew", None))


class FreshWorkspaces(Workspaces):
    """As `Workspaces`, but that each case finds fresh ones, as large as it needs.

    Args:
        rank: this process's place in the group.
    """

    def __init__(self, rank: Rank) -> None:
        super().__init__(rank)
        self._held: dict[tuple[str, int], _Held] = {}

    def refresh(self, backend: Backend) -> None:
        """A case begins or has ended: from now on the backend's workspaces are fresh ones."""
        for (name, workspace), held in list(self._held.items()):
            if name != backend.name:
                continue
            held.limits = None
            if not held.renewable or getattr(backend, "one_workspace", False):  # which other cases open as well
                self.close(name, workspace)

    def kernel(self, backend: Backend, limits: Limits, workspace: int = 0) -> Kernel:
        """The open workspace of the case, else a fresh one; the same decision on every rank."""
        held = self._held.get((backend.name, workspace))
        if held is None or not within_limits(limits, held.room):
            held = self._opened(backend, limits, workspace)
        if held.limits is None or not within_limits(limits, held.limits):
            held.kernel.renew(limits)  # type: ignore[attr-defined]
            held.limits = limits
        return held.kernel

    def close(self, name: str, workspace: int | None = None) -> None:
        """Close the backend's workspaces, or one of them, if they are open."""
        for key in [key for key in self._held if key[0] == name and workspace in (None, key[1])]:
            self._held.pop(key).kernel.close()

    def _opened(self, backend: Backend, limits: Limits, workspace: int) -> _Held:
        """A new one; in the place of another that can begin anew it has room for the calls of both."""
        replaced, room = self._held.get((backend.name, workspace)), limits
        self.close(backend.name, workspace)
        if replaced is not None and replaced.renewable:
            have = Limits(max(SHORT[0], replaced.room.max_tokens), max(SHORT[1], replaced.room.hidden), limits.dtype)
            room = roomy_limits(limits, have, ROOM) or limits
        held = _Held(backend.open(self.rank, room), room, None)
        if room == limits or not held.renewable:
            held.limits = limits
        self._held[backend.name, workspace] = held
        return held

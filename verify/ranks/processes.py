"""What Linux offers so that no process outlives its purpose."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_KILL_SECONDS = 3.0


def adopt_orphans() -> None:
    """Make this process the parent of its descendants' orphans, so that it can find and kill them."""
    _control(_PR_SET_CHILD_SUBREAPER, 1)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; end at once if it already has.

    Only for children of a process with one thread: the signal comes when the *thread* ends that forked.
    """
    _control(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def kill_descendants() -> None:
    """Kill and reap all that this process started, and all that those started."""
    deadline = time.monotonic() + _KILL_SECONDS
    while time.monotonic() < deadline:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                process.kill()
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


IDLE = frozenset((psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD, psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP))
"""Of a process that has ended, and waits for its parent to take note of that; or that was stopped."""


def descends_from_here(names: frozenset[str]) -> bool:
    """Whether a process of one of these names runs that was started by this one, or by what it started."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.name() in names and process.status() not in IDLE:
                return True
    return False


def private_bytes(pid: int) -> int:
    """The resident memory in bytes that a process shares with nobody; 0 when it is gone or cannot be asked."""
    try:
        resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[1:3]
    except OSError:
        return 0
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def _control(option: int, value: int) -> None:
    # Elsewhere nothing happens, and the ends of the streams do the work alone.
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)

"""The keeper: forks a pool's ranks on one host, carries their messages, and leaves no process behind.

One keeper belongs to one pool (under MPI: to one rank of it). It is the parent of the rank processes, so it
learns first-hand how each ended, and as their subreaper it inherits, and kills, whatever they leave behind.
Its only tie to the parent is one stream: when that ends, for whatever reason, the keeper kills and goes.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import selectors
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from fusecheck.ranks import member
from fusecheck.ranks.child import Child
from fusecheck.ranks.frames import FrameReader, frame
from fusecheck.ranks.plan import RankPlan
from fusecheck.ranks.processes import adopt_orphans, descends_from_here, die_with, kill_descendants
from fusecheck.ranks.residue import hold, remove, shared_root

COMPILERS = frozenset(
    ("ninja", "nvcc", "cicc", "ptxas", "cudafe++", "cc1plus", "c++", "g++", "cc1", "cc", "gcc", "clang", "hipcc")
)
"""The names of processes that make a kernel which a library brings as source."""
_WATCH_SECONDS = 0.1
_DUMP_SECONDS = 0.15


class Keeper:
    """The loop of a keeper process; `up` is the stream to the parent."""

    def __init__(self, up: socket.socket) -> None:
        self._up = up
        self._orders = FrameReader()
        self._children: dict[int, Child] = {}
        self._memory_limit = 0
        self._directory: Path | None = None
        self._lock = -1
        self._ended = False
        self._selector = selectors.DefaultSelector()
        self._wakeup, self._signalled = socket.socketpair()
        for end in (self._wakeup, self._signalled):
            end.settimeout(0)

    def run(self) -> None:
        """Serve until the parent closes the stream; then kill everything and return."""
        adopt_orphans()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: self._end())
        signal.set_wakeup_fd(self._signalled.fileno(), warn_on_full_buffer=False)
        self._selector.register(self._up, selectors.EVENT_READ, self._take_orders)
        self._selector.register(self._wakeup, selectors.EVENT_READ, self._drain_wakeup)
        try:
            self._tell("hello", os.getpid())
            weighed = 0.0
            while not self._ended:
                watching = self._memory_limit > 0 and self._children
                for key, events in self._selector.select(_WATCH_SECONDS if watching else None):
                    key.data(events)
                self._reap()
                if watching and time.monotonic() - weighed >= _WATCH_SECONDS:  # not at every message: short calls wait
                    self._weigh()
                    weighed = time.monotonic()
        except OSError:
            # The parent is gone, and nobody is left to be told.
            self._end()
        finally:
            self._stop(dump=False)

    def _end(self) -> None:
        self._ended = True

    def _drain_wakeup(self, _events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wakeup.recv(4096)

    def _tell(self, *event: Any) -> None:
        self._up.sendall(frame(pickle.dumps(event)))

    def _take_orders(self, _events: int) -> None:
        data = self._up.recv(1 << 16)
        if not data:
            self._end()
        for payload in self._orders.feed(data):
            order, *rest = pickle.loads(payload)
            if order == "call":
                for child in self._children.values():
                    child.forward(rest[0])
            elif order == "start":
                self._start(*rest)
            elif order == "compiles":
                self._tell("compiles", rest[0], descends_from_here(COMPILERS))
            else:
                self._tell("stopped", self._stop(dump=rest[0]))

    # starting

    def _start(self, plan: RankPlan, indices: tuple[int, ...]) -> None:
        self._memory_limit = plan.memory_limit
        self._directory = shared_root() / plan.directory
        self._lock = hold(self._directory)
        sys.path[:] = plan.path
        for name in plan.preload:
            # A module that does not import here fails in the rank, where the failure is reported.
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        for index in indices:
            self._fork(plan, index)

    def _fork(self, plan: RankPlan, index: int) -> None:
        ours, theirs = socket.socketpair()
        output, written = os.pipe()
        keeper = os.getpid()
        pid = os.fork()
        if pid == 0:
            ours.close()
            os.close(output)
            self._become_rank(plan, index, theirs, written, keeper)
        theirs.close()
        os.close(written)
        ours.settimeout(0)
        os.set_blocking(output, False)
        log = Path(f"{plan.output}-rank{index}.log") if plan.output else None
        self._children[index] = Child(index, pid, ours, output, self._selector, self._tell, log)

    def _become_rank(self, plan: RankPlan, index: int, link: socket.socket, written: int, keeper: int) -> NoReturn:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            os.setsid()
            die_with(keeper)
            for child in self._children.values():
                child.close_streams()
            for end in (self._up, self._wakeup, self._signalled):
                end.close()
            self._selector.close()
            os.close(self._lock)
            os.dup2(written, 1)
            os.dup2(written, 2)
            os.close(written)
            member.serve(plan, index, link)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            # No exit handlers: they belong to the process that this one was forked from.
            os._exit(status)

    # watching and ending

    def _reap(self) -> None:
        """Collect the dead, the orphans among them."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for child in self._children.values():
                if child.pid == pid and child.alive:
                    child.bury(os.waitstatus_to_exitcode(status))

    def _weigh(self) -> None:
        for child in self._children.values():
            child.weigh(self._memory_limit)

    def _stop(self, *, dump: bool) -> dict[int, str]:
        """Kill the ranks and all that they started; returns the end of each rank's output."""
        if dump:
            self._ask_where_they_are()
        kill_descendants()
        tails = {child.index: child.close() for child in self._children.values()}
        self._children.clear()
        if self._directory is not None:
            remove(self._directory, self._lock)
            self._directory = None
        return tails

    def _ask_where_they_are(self) -> None:
        """Have every rank write its stacks, and give it a moment for it."""
        for child in self._children.values():
            child.signal(signal.SIGUSR1)
        end = time.monotonic() + _DUMP_SECONDS
        while time.monotonic() < end:
            time.sleep(0.01)
            for child in self._children.values():
                child.read_output()
        for child in self._children.values():
            child.note_state()

"""The keeper: forks a pool's ranks on one host, carries their messages, and leaves no process behind.

One keeper belongs to one pool (under MPI: to one rank of it). It is the parent of the rank processes, so it
learns first-hand how each ended, and as their subreaper it inherits, and kills, whatever they leave behind.
Its only tie to the parent is one stream: when that ends, for whatever reason, the keeper kills and goes.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import pickle
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from verify.ranks import member
from verify.ranks.frames import FrameReader, GarbageError, frame
from verify.ranks.member import RankPlan
from verify.ranks.residue import hold, remove, shared_root

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_TAIL = 8192
_WATCH_SECONDS = 0.1
_DUMP_SECONDS = 0.15
_KILL_SECONDS = 3.0


def control_process(option: int, value: int) -> None:
    """Call Linux's prctl; on another system nothing happens, and the streams' ends do the work alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; at once if it already has.

    Only for children of a process with one thread: the kernel sends the signal when the *thread* ends that forked.
    """
    control_process(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


@dataclass
class _Child:
    """One rank process as its keeper sees it."""

    index: int
    pid: int
    link: socket.socket
    output: int
    reader: FrameReader = field(default_factory=FrameReader)
    outbox: bytearray = field(default_factory=bytearray)
    tail: bytearray = field(default_factory=bytearray)
    owes: int = 1
    trusted: bool = True
    alive: bool = True


class Keeper:
    """The loop of a keeper process; `up` is the stream to the parent."""

    def __init__(self, up: socket.socket) -> None:
        self._up = up
        self._orders = FrameReader()
        self._children: dict[int, _Child] = {}
        self._plan: RankPlan | None = None
        self._directory: Path | None = None
        self._lock = -1
        self._ended = False
        self._selector = selectors.DefaultSelector()
        self._wakeup, self._signalled = socket.socketpair()
        for end in (self._wakeup, self._signalled):
            end.setblocking(False)

    def run(self) -> None:
        """Serve until the parent closes the stream; then kill everything and return."""
        control_process(_PR_SET_CHILD_SUBREAPER, 1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_ended", True))
        signal.set_wakeup_fd(self._signalled.fileno(), warn_on_full_buffer=False)
        self._watch(self._up, self._take_orders)
        self._watch(self._wakeup, self._drain_wakeup)
        try:
            self._tell("hello", os.getpid())
            while not self._ended:
                limited = self._plan is not None and self._plan.memory_limit > 0 and self._children
                for key, events in self._selector.select(_WATCH_SECONDS if limited else None):
                    key.data(events)
                self._reap()
                if limited:
                    self._weigh()
        except (EOFError, OSError):
            pass
        finally:
            self._stop(dump=False)

    def _watch(self, source: Any, handler: Callable[[int], None]) -> None:
        self._selector.register(source, selectors.EVENT_READ, handler)

    def _drain_wakeup(self, _events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wakeup.recv(4096)

    def _tell(self, *event: Any) -> None:
        self._up.sendall(frame(pickle.dumps(event)))

    def _take_orders(self, _events: int) -> None:
        data = self._up.recv(1 << 16)
        if not data:
            raise EOFError
        for payload in self._orders.feed(data):
            order, *rest = pickle.loads(payload)
            if order == "call":
                for child in self._children.values():
                    self._forward(child, rest[0])
            elif order == "start":
                self._start(*rest)
            else:
                self._tell("stopped", self._stop(dump=rest[0]))

    # starting

    def _start(self, plan: RankPlan, indices: tuple[int, ...]) -> None:
        self._plan = plan
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
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_rank(plan, index, theirs, written, parent)
        theirs.close()
        os.close(written)
        ours.setblocking(False)
        os.set_blocking(output, False)
        child = _Child(index, pid, ours, output)
        self._children[index] = child
        self._selector.register(ours, selectors.EVENT_READ, lambda events: self._exchange(child, events))
        self._watch(output, lambda _: self._read_output(child))

    def _become_rank(self, plan: RankPlan, index: int, link: socket.socket, written: int, parent: int) -> None:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            os.setsid()
            die_with(parent)
            for child in self._children.values():
                child.link.close()
                os.close(child.output)
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

    # traffic

    def _forward(self, child: _Child, payload: bytes) -> None:
        if not child.trusted:
            return
        child.owes += 1
        child.outbox += frame(payload)
        self._flush(child)

    def _flush(self, child: _Child) -> None:
        # A full or broken stream: the rest goes out later, or the rank's end is told by its exit.
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            while child.outbox:
                del child.outbox[: child.link.send(child.outbox)]
        if child.trusted:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if child.outbox else 0)
            if self._selector.get_key(child.link).events != wanted:
                self._selector.modify(child.link, wanted, self._selector.get_key(child.link).data)

    def _exchange(self, child: _Child, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._flush(child)
        if events & selectors.EVENT_READ:
            self._receive(child)

    def _receive(self, child: _Child) -> None:
        """Take what a rank has sent; anything but one answer per request is garbage."""
        try:
            data = child.link.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._distrust(child)
            return
        try:
            for payload in child.reader.feed(data):
                child.owes -= 1
                if child.owes < 0:
                    raise GarbageError("an answer that nobody asked for")
                self._tell("reply", child.index, payload)
        except GarbageError as error:
            self._distrust(child)
            self._tell("garbage", child.index, str(error))

    def _distrust(self, child: _Child) -> None:
        if child.trusted:
            child.trusted = False
            self._selector.unregister(child.link)

    def _read_output(self, child: _Child) -> bool:
        """Keep the end of what a rank wrote; says whether there may be more."""
        try:
            data = os.read(child.output, 1 << 16)
        except BlockingIOError:
            return False
        if not data:
            with contextlib.suppress(KeyError):
                self._selector.unregister(child.output)
            return False
        child.tail += data
        del child.tail[:-_TAIL]
        return True

    # ending

    def _reap(self) -> None:
        """Collect the dead; a rank's last words are read before its death is told."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            child = next((c for c in self._children.values() if c.pid == pid), None)
            if child is not None and child.alive:
                self._bury(child, os.waitstatus_to_exitcode(status))

    def _bury(self, child: _Child, status: int) -> None:
        if child.trusted:
            self._receive(child)
        while self._read_output(child):
            pass
        child.alive = False
        self._distrust(child)
        self._tell("exit", child.index, status, bytes(child.tail).decode(errors="replace"))

    def _weigh(self) -> None:
        assert self._plan is not None
        page = os.sysconf("SC_PAGE_SIZE")
        for child in self._children.values():
            if not (child.alive and child.trusted):
                continue
            with contextlib.suppress(OSError):
                resident, shared = Path(f"/proc/{child.pid}/statm").read_text().split()[1:3]
                held = (int(resident) - int(shared)) * page
                if held > self._plan.memory_limit:
                    self._distrust(child)
                    os.kill(child.pid, signal.SIGSTOP)
                    self._tell("memory", child.index, held)

    def _stop(self, *, dump: bool) -> dict[int, str]:
        """Kill the ranks and all that they started; returns the end of each rank's output."""
        if dump:
            self._ask_where_they_are()
        self._kill_all()
        tails = {}
        for child in self._children.values():
            while self._read_output(child):
                pass
            self._distrust(child)
            with contextlib.suppress(KeyError):
                self._selector.unregister(child.output)
            child.link.close()
            os.close(child.output)
            tails[child.index] = bytes(child.tail).decode(errors="replace")
        self._children.clear()
        if self._directory is not None:
            remove(self._directory, self._lock)
            self._directory = None
        return tails

    def _ask_where_they_are(self) -> None:
        for child in self._children.values():
            if child.alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGUSR1)
        end = time.monotonic() + _DUMP_SECONDS
        while time.monotonic() < end:
            time.sleep(0.01)
            for child in self._children.values():
                self._read_output(child)

    def _kill_all(self) -> None:
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

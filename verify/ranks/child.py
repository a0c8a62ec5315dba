"""One rank process as its keeper sees it: its messages, the end of its output, how it ended."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusecheck.ranks.frames import FrameReader, GarbageError, frame
from fusecheck.ranks.processes import private_bytes

_TAIL = 8192
MOST_LOGGED = 16 << 20
"""Bytes of one process's output that are kept."""

STATES = {"R": "running", "S": "sleeping", "D": "waiting for a device", "T": "stopped", "t": "stopped", "Z": "ended"}
"""Of a process, by the letter that /proc gives it."""

Tell = Callable[..., None]
"""Sends an event to the parent: its kind, the rank, the details."""


class Child:
    """A rank process; everything that it sends becomes an event for the parent.

    Args:
        index: the rank.
        pid: its process id, not reaped before `bury`.
        link: the stream to it, non-blocking.
        output: the read end of its stdout and stderr, non-blocking.
        selector: the keeper's; its data are callables that take the event mask.
        tell: takes the events.
        log: a file to which all output is appended; None for none.
    """

    def __init__(
        self,
        index: int,
        pid: int,
        link: socket.socket,
        output: int,
        selector: selectors.BaseSelector,
        tell: Tell,
        log: Path | None = None,
    ) -> None:
        self._log, self._logged = log, 0
        self.index, self.pid, self.alive = index, pid, True
        self._link, self._output, self._selector, self._tell = link, output, selector, tell
        self._reader = FrameReader()
        self._outbox, self._tail = bytearray(), bytearray()
        # A rank owes one answer from the start: that its worker is built.
        self._owes = 1
        self._trusted = True
        selector.register(link, selectors.EVENT_READ, self._exchange)
        selector.register(output, selectors.EVENT_READ, self.read_output)

    def forward(self, payload: bytes) -> None:
        """Pass a request on, now or as soon as the rank reads."""
        if self._trusted:
            self._owes += 1
            self._outbox += frame(payload)
            self._flush()

    def read_output(self, _events: int = 0) -> bool:
        """Keep the end of what the rank wrote; says whether there may be more."""
        try:
            data = os.read(self._output, 1 << 16)
        except BlockingIOError:
            return False
        if not data:
            with contextlib.suppress(KeyError):
                self._selector.unregister(self._output)
            return False
        self._tail += data
        del self._tail[:-_TAIL]
        self._keep(data)
        return True

    def _keep(self, data: bytes) -> None:
        """Append to the log, as far as it may grow; a full disk is no reason to lose the run."""
        if self._log is not None and self._logged < MOST_LOGGED:
            self._logged += len(data)
            with contextlib.suppress(OSError):
                self._log.parent.mkdir(parents=True, exist_ok=True)
                with self._log.open("ab") as file:
                    file.write(data)

    def note_state(self) -> None:
        """Add to the rank's output whether the system runs it, stops it, or has it sleep."""
        with contextlib.suppress(OSError, IndexError):
            letter = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
            self._tail += f"\nfusecheck: the process is {STATES.get(letter, letter)}\n".encode()

    def bury(self, status: int) -> None:
        """Tell how the process ended, after its last words."""
        if self._trusted:
            self._receive()
        self.alive = False
        self._distrust()
        self._tell("exit", self.index, status, self._text())

    def weigh(self, limit: int) -> None:
        """Stop the rank and tell if it holds more than `limit` private bytes."""
        if self.alive and self._trusted and (held := private_bytes(self.pid)) > limit:
            self._distrust()
            self.signal(signal.SIGSTOP)
            self._tell("memory", self.index, held)

    def signal(self, number: signal.Signals) -> None:
        """Send the process a signal if it is still there."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def close(self) -> str:
        """Close the streams after the process has ended; returns the end of its output."""
        text = self._text()
        self._distrust()
        with contextlib.suppress(KeyError):
            self._selector.unregister(self._output)
        self.close_streams()
        return text

    def close_streams(self) -> None:
        """Close this process's ends; all that a forked sibling must do."""
        self._link.close()
        os.close(self._output)

    def _text(self) -> str:
        while self.read_output():
            pass
        return bytes(self._tail).decode(errors="replace")

    def _exchange(self, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._flush()
        if events & selectors.EVENT_READ:
            self._receive()

    def _flush(self) -> None:
        # A full stream: the rest goes out later. A broken one: the rank's end is told by its exit.
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            while self._outbox:
                del self._outbox[: self._link.send(self._outbox)]
        if self._trusted:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outbox else 0)
            if self._selector.get_key(self._link).events != wanted:
                self._selector.modify(self._link, wanted, self._exchange)

    def _receive(self) -> None:
        """Take what the rank has sent; anything but one answer per request is garbage."""
        try:
            data = self._link.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._distrust()
            return
        try:
            for payload in self._reader.feed(data):
                self._owes -= 1
                if self._owes < 0:
                    raise GarbageError("an answer that nobody asked for")
                self._tell("reply", self.index, payload)
        except GarbageError as error:
            self._distrust()
            self._tell("garbage", self.index, str(error))

    def _distrust(self) -> Any:
        """Read no more from the rank."""
        if self._trusted:
            self._trusted = False
            self._selector.unregister(self._link)

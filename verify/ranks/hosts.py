"""Hosts: where a pool's ranks live, and the stream to the keeper there."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fusecheck.ranks.frames import FrameReader, frame
from fusecheck.ranks.zygote import ZYGOTE, Zygote


class Host(Protocol):
    """Where some of a pool's ranks live; makes keepers there."""

    @property
    def indices(self) -> tuple[int, ...]:
        """The ranks that live here."""
        ...

    def connect(self, preload: Sequence[str] = ()) -> socket.socket:
        """Start a keeper and return the stream to it.

        Args:
            preload: modules that it will need.

        Raises:
            RuntimeError: no keeper could be started.
        """
        ...

    def abandon(self, keeper: int) -> None:
        """Kill a keeper that does not obey, given its process id."""
        ...

    def rendezvous(self) -> str:
        """Where the process group meets if rank 0 lives here; empty for a file in the pool's directory."""
        ...


@dataclass(frozen=True)
class LocalHost:
    """This machine; keepers come from a zygote of this process."""

    indices: tuple[int, ...]
    zygote: Zygote = ZYGOTE

    def connect(self, preload: Sequence[str] = ()) -> socket.socket:
        """Fork a keeper; see `Host.connect`."""
        ours, theirs = socket.socketpair()
        with theirs:
            self.zygote.fork_keeper(theirs, preload)
        return ours

    def abandon(self, keeper: int) -> None:
        """Kill the keeper; the kernel kills its ranks after it. One without an id yet ends with its stream."""
        if keeper <= 0:  # to kill(2) that is a whole process group: the user's shell or make
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(keeper, signal.SIGKILL)

    def rendezvous(self) -> str:
        """A file: these ranks share a file system."""
        return ""


@dataclass
class Link:
    """The stream between a pool and one of its keepers; closed when `stream` is None."""

    host: Host
    stream: socket.socket | None = None
    keeper: int = 0
    _reader: FrameReader = field(default_factory=FrameReader)

    def connect(self, preload: Sequence[str]) -> None:
        """Have a keeper started unless there is one."""
        if self.stream is None:
            self.stream = self.host.connect(preload)
            self.stream.settimeout(None)

    def send(self, *order: Any) -> None:
        """Send an order; a keeper that is gone is noticed when the stream is read."""
        if self.stream is not None:
            with contextlib.suppress(OSError):
                self.stream.sendall(frame(pickle.dumps(order)))

    def receive(self) -> Iterator[tuple[Any, ...]]:
        """Yield the events that have arrived, without waiting; the last is `("lost",)` when the keeper is gone."""
        while self.stream is not None:
            try:
                data = self.stream.recv(1 << 20, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self.drop()
                yield ("lost",)
                return
            for payload in self._reader.feed(data):
                event = pickle.loads(payload)
                if event[0] == "hello":
                    self.keeper = event[1]
                else:
                    yield event

    def drop(self) -> None:
        """Close the stream; the keeper kills its ranks and ends."""
        if self.stream is not None:
            self.stream.close()
        self.stream, self.keeper, self._reader = None, 0, FrameReader()

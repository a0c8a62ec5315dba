"""The pool: a persistent group of rank processes that a parent calls by method name, with a deadline."""

from __future__ import annotations

import dataclasses
import os
import pickle
import secrets
import select
import sys
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from fusecheck.errors import UsageError
from fusecheck.ranks.flight import Flight
from fusecheck.ranks.hosts import Host, Link, LocalHost
from fusecheck.ranks.plan import START_ID, RankPlan, split_worker
from fusecheck.ranks.replies import Failure, FailureKind, Reply, crash
from fusecheck.ranks.residue import PREFIX, sweep
from fusecheck.ranks.zygote import FOR_GPUS

STOP_SECONDS = 4.0
"""How long a keeper may take to kill its ranks before it is killed itself."""


class Pool:
    """Rank processes that live as long as the pool, restarted when a call has killed them.

    The ranks are started by the first call, and again by the first call after a failure. A pool belongs to
    one thread at a time. Use it as a context manager or call `close`; no process outlives the parent in any case.

    Args:
        worker: the worker class as `package.module:Class`; every rank builds `Class(rank, *arguments)`, where
            rank is a `fusecheck.interface.Rank`, and its methods are what `call` calls.
        world_size: how many ranks.
        device: `cpu` or `cuda`.
        arguments: passed to the worker class, picklable.
        devices: the CUDA device number of each rank, in rank order; left out, rank r takes device r.
        memory_limit: private bytes that one rank may hold; left out, its share of 80 % of what is available.
        start_timeout: seconds within which the workers must be built.
        preload: more modules than the worker's own to import once, not at each restart; they must not start CUDA.
        environment: variables to set in the ranks.
        hosts: where the ranks live; left out, here.
        output: where what the ranks print is kept, on their host: the start of a path, which `-rank0.log` follows.

    Raises:
        UsageError: a world size below 1, an unknown device, a worker that is not of the form given above.
    """

    def __init__(
        self,
        worker: str,
        world_size: int,
        *,
        device: str = "cpu",
        arguments: Sequence[Any] = (),
        devices: Sequence[int] = (),
        memory_limit: int | None = None,
        start_timeout: float = 120.0,
        preload: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        hosts: Sequence[Host] | None = None,
        output: Path | None = None,
    ) -> None:
        _check(worker, world_size, device, devices)
        hosts = [LocalHost(tuple(range(world_size)))] if hosts is None else hosts
        share = int(psutil.virtual_memory().available * 0.8) // world_size
        self.world_size = world_size
        self._plan = RankPlan(
            worker=worker,
            arguments=tuple(arguments),
            world_size=world_size,
            device=device,
            devices=tuple(devices),
            memory_limit=share if memory_limit is None else memory_limit,
            preload=(split_worker(worker)[0], *(FOR_GPUS if device == "cuda" else ()), *preload),
            environment=dict(environment or {}),
            output="" if output is None else str(output.resolve()),
        )
        self._start_timeout = start_timeout
        self._links = [Link(host) for host in hosts]
        self._running = False
        self._requests = START_ID
        self._flight: Flight | None = None
        self._queued: Flight | None = None
        self._stray: dict[int, Failure] = {}
        self._last = "the start"
        self._finalizer = weakref.finalize(self, _drop_all, self._links)
        sweep()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, method: str, *arguments: Any, timeout: float) -> list[Reply]:
        """Call a method of every rank's worker with the same arguments and wait for all.

        Args:
            method: the worker's method.
            arguments: picklable.
            timeout: seconds, counted from the moment the ranks are up.

        Returns:
            One reply per rank, in rank order. When any is a failure other than a plain error of ranks that
            all answered, the pool was killed; the next call starts a new one.

        Raises:
            UsageError: a timeout that is not above 0.
            RuntimeError: no process could be started, or a call is in flight already.
        """
        self.submit(method, *arguments, timeout=timeout)
        try:
            while (replies := self.poll()) is None:
                wait([self])
        except BaseException:
            self.cancel()
            raise
        return replies

    def submit(self, method: str, *arguments: Any, timeout: float) -> None:
        """Begin a call without waiting; `poll` brings its replies. Arguments and errors as for `call`."""
        if self._flight is not None:
            raise RuntimeError(f"{self._flight.method} is in flight: a pool takes one call at a time")
        if not timeout > 0:
            raise UsageError(f"timeout {timeout}: expected seconds above 0")
        self._requests += 1
        payload = pickle.dumps((self._requests, method, arguments))
        flight = Flight(self._requests, method, payload, timeout, self.world_size)
        self._listen()
        if self._stray:
            # A death between two calls is nobody's case, but must not be lost: this call reports it, unrun.
            flight.failures, self._stray = self._stray, {}
            flight.due = time.monotonic()
            self._flight = flight
        elif self._running:
            self._launch(flight)
        else:
            self._start()
            self._queued = flight

    def poll(self) -> list[Reply] | None:
        """Take what has arrived; the replies once the call in flight is over, else None. Never waits for ranks.

        Raises:
            RuntimeError: no call is in flight.
        """
        if self._flight is None:
            raise RuntimeError("no call is in flight")
        self._listen()
        flight = self._flight
        if flight.doubtful and (inquiry := flight.ask(len(self._links))):
            for link in self._links:
                link.send("compiles", inquiry)
        if not flight.over:
            return None
        if self._queued is not None and not flight.silent and not flight.failures:
            self._launch(self._queued)
            self._queued = None
            return None
        return self._conclude(flight)

    def cancel(self) -> None:
        """Give up the call in flight, after Ctrl-C say; the ranks are killed, since nothing is known of them now."""
        self._stop(dump=False)
        self._flight = self._queued = None
        self._stray.clear()

    @property
    def descriptors(self) -> list[int]:
        """The file descriptors that become readable when there is something for `poll`."""
        return [link.stream.fileno() for link in self._links if link.stream is not None]

    @property
    def due(self) -> float:
        """The `time.monotonic` by which `poll` must be called at the latest."""
        return self._flight.wakes if self._flight is not None else float("inf")

    def close(self) -> None:
        """Kill the ranks and wait until they are gone; the pool may be called again, which starts new ones."""
        self.cancel()
        _drop_all(self._links)

    # starting and stopping

    def _start(self) -> None:
        plan = dataclasses.replace(
            self._plan, directory=PREFIX + secrets.token_hex(8), path=tuple(sys.path), cwd=os.getcwd()
        )
        self._running, self._last = True, "the start"
        try:
            for link in self._links:
                link.connect(plan.preload)
            plan = dataclasses.replace(plan, rendezvous=self._links[0].host.rendezvous())
            for link in self._links:
                link.send("start", plan, link.host.indices)
        except BaseException:
            self.cancel()
            raise
        self._flight = Flight(START_ID, self._last, b"", self._start_timeout, self.world_size)
        self._flight.depart()

    def _launch(self, flight: Flight) -> None:
        for link in self._links:
            link.send("call", flight.payload)
        flight.depart()
        self._flight = flight

    def _stop(self, *, dump: bool) -> dict[int, str]:
        """Have all ranks killed, and wait until they are; returns the end of each one's output."""
        tails: dict[int, str] = {}
        pending = [link for link in self._links if link.stream is not None] if self._running else []
        self._running = False
        deadline = time.monotonic() + STOP_SECONDS
        try:
            for link in pending:
                link.send("stop", dump)
            while pending and (left := deadline - time.monotonic()) > 0:
                _select([link.stream.fileno() for link in pending if link.stream is not None], left)
                for link in list(pending):
                    for event in link.receive():
                        if event[0] in ("stopped", "lost"):
                            pending.remove(link)
                            tails.update(event[1] if event[0] == "stopped" else {})
        finally:
            # Left over are keepers that do not obey, or that Ctrl-C kept from being heard.
            for link in pending:
                link.host.abandon(link.keeper)
                link.drop()
        return tails

    # what arrives

    def _listen(self) -> None:
        for link in self._links:
            for event in link.receive():
                self._take(link, event)

    def _take(self, link: Link, event: tuple[Any, ...]) -> None:
        kind, *rest = event
        when = f"in {self._flight.method}" if self._flight is not None else f"between calls, after {self._last}"
        if kind == "reply":
            self._take_reply(*rest)
        elif kind == "exit":
            self._fail(crash(rest[0], rest[1], when=when, output=rest[2]))
        elif kind == "garbage":
            self._fail(Failure(FailureKind.GARBAGE, rest[0], f"wrote to its pipe {when}: {rest[1]}"))
        elif kind == "memory":
            limit = f"the limit is {self._plan.memory_limit >> 20} MiB"
            self._fail(Failure(FailureKind.MEMORY, rest[0], f"held {rest[1] >> 20} MiB {when}; {limit}"))
        elif kind == "compiles" and self._flight is not None:
            self._flight.hear(rest[0], compiles=rest[1])
        elif kind == "lost" and self._running:
            for rank in link.host.indices:
                self._fail(Failure(FailureKind.CRASH, rank, f"its keeper process was killed {when}"))

    def _take_reply(self, rank: int, payload: bytes) -> None:
        if self._flight is None:
            failure: Failure | None = Failure(FailureKind.GARBAGE, rank, f"answered again after {self._last}")
        else:
            failure = self._flight.take(rank, payload)
        if failure is not None:
            self._fail(failure)

    def _fail(self, failure: Failure) -> None:
        if self._flight is None:
            self._stray.setdefault(failure.rank, failure)
        else:
            self._flight.fail(failure)

    def _conclude(self, flight: Flight) -> list[Reply]:
        """End the call: kill the pool unless every rank is known to be well, and make the replies."""
        usable = flight.well and self._queued is None
        replies = flight.land({} if usable else self._stop(dump=bool(flight.silent)))
        self._flight = self._queued = None
        self._last = flight.method
        return replies


def _check(worker: str, world_size: int, device: str, devices: Sequence[int]) -> None:
    if world_size < 1:
        raise UsageError(f"world size {world_size}: expected at least 1")
    if device not in ("cpu", "cuda"):
        raise UsageError(f"device {device!r}: expected cpu or cuda")
    if devices and len(devices) != world_size:
        raise UsageError(f"{len(devices)} devices for {world_size} ranks: give one for each rank, or none")
    split_worker(worker)


def wait(pools: Iterable[Pool]) -> None:
    """Sleep until one of the pools has something for `poll`, or must be polled because time is up."""
    pools = list(pools)
    left = min((pool.due for pool in pools), default=float("inf")) - time.monotonic()
    _select([number for pool in pools for number in pool.descriptors], max(0.0, left))


def _select(descriptors: Iterable[int], seconds: float) -> None:
    poller = select.poll()
    for descriptor in descriptors:
        poller.register(descriptor, select.POLLIN)
    poller.poll(min(seconds * 1000 + 1, 1e6))


def _drop_all(links: list[Link]) -> None:
    for link in links:
        link.drop()

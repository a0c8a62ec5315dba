"""Leases of CUDA devices, so that pytest-xdist's workers do not meet on one device.

A lease is a set of file locks, one per device, that the kernel releases when their holder dies. One more lock,
the turnstile, is held while devices are collected: one process collects at a time and keeps what it has got,
so that none waits for devices that another one holds while it waits too, and a lease of many is not overtaken
by leases of one for ever.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from filelock import BaseFileLock, FileLock, Timeout

from fusecheck.errors import Inconclusive, UsageError

_POLL_SECONDS = 0.2
_NOTICE_SECONDS = 2.0


@dataclass(frozen=True)
class Lease:
    """Devices that are this process's own until `release`, or its death; a context manager.

    Attributes:
        devices: their positions in the list that was leased from, ascending.
        names: their names.
    """

    devices: tuple[int, ...]
    names: tuple[str, ...]
    _locks: tuple[BaseFileLock, ...]

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the devices back."""
        for lock in self._locks:
            lock.release()


def lease_devices(
    count: int,
    names: Sequence[str],
    *,
    timeout: float = 3600.0,
    directory: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> Lease:
    """Lease `count` devices, waiting until as many are free.

    Args:
        count: how many.
        names: the devices that may be had, by names that all processes of the machine use alike.
        timeout: seconds to wait at most.
        directory: where the locks lie, the same for all; left out, among the temporary files.
        say: takes one line when there is a wait, and one when it is over; left out, stderr.

    Raises:
        UsageError: more devices than there are, or fewer than one.
        Inconclusive: not enough came free in time.
    """
    if not 1 <= count <= len(names):
        raise UsageError(f"{count} devices asked for: expected 1 to {len(names)}, as many as are visible")
    say = _say_on_stderr if say is None else say
    directory = Path(tempfile.gettempdir()) / "fusecheck-leases" if directory is None else directory
    if not directory.exists():
        directory.mkdir(parents=True, exist_ok=True)
        # Other users of the machine lease the same devices.
        directory.chmod(0o1777)
    begun = time.monotonic()
    waiting = _Waiting(count, len(names), begun, begun + timeout, say)
    held: dict[int, BaseFileLock] = {}
    try:
        _collect(held, names, directory, waiting)
    except BaseException:
        for lock in held.values():
            lock.release()
        raise
    waiting.over()
    devices = tuple(sorted(held))
    return Lease(devices, tuple(names[d] for d in devices), tuple(held[d] for d in devices))


def _collect(held: dict[int, BaseFileLock], names: Sequence[str], directory: Path, waiting: _Waiting) -> None:
    """Pass the turnstile, then lock one free device after the other until there are as many as are waited for."""
    turnstile = _lock(directory, "turnstile")
    try:
        while not _try(turnstile):
            waiting.pause()
        while len(held) < waiting.count:
            for position, name in enumerate(names):
                lock = _lock(directory, name)
                if len(held) < waiting.count and position not in held and _try(lock):
                    held[position] = lock
            if len(held) < waiting.count:
                waiting.pause()
    finally:
        turnstile.release()


def visible_devices() -> list[str]:
    """The CUDA devices that this process may use, in CUDA's order, by name, without starting CUDA.

    They are named by UUID where nvidia-smi tells it, so that processes that number the devices differently
    (through `CUDA_VISIBLE_DEVICES`) mean the same one.
    """
    return choose_visible(_told("index", "uuid"), os.environ.get("CUDA_VISIBLE_DEVICES"))


def models(devices: Sequence[str]) -> list[str]:
    """What a person calls these devices, such as `NVIDIA H200`; one that nvidia-smi does not know keeps its name."""
    known = _told("uuid", "name")
    return [known.get(device, device) for device in devices]


def _told(key: str, value: str) -> dict[str, str]:
    """Of each device, a value by a key, as nvidia-smi tells them; nothing without it."""
    asked = ["nvidia-smi", f"--query-gpu={key},{value}", "--format=csv,noheader"]
    try:
        listed = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(line.split(", ", 1) for line in listed.splitlines())


def choose_visible(uuids: dict[str, str], wanted: str | None) -> list[str]:
    """Translate `CUDA_VISIBLE_DEVICES` into UUIDs.

    Args:
        uuids: the UUID of each device by its number, as text.
        wanted: the variable's value: numbers or (the beginnings of) UUIDs; None when it is not set.

    Returns:
        The UUIDs in CUDA's order; as CUDA does, the list ends before the first entry that means no device.
    """
    if wanted is None:
        return list(uuids.values())
    chosen: list[str] = []
    for entry in (text.strip() for text in wanted.split(",")):
        matches = [uuids[entry]] if entry in uuids else [u for u in uuids.values() if entry and u.startswith(entry)]
        if len(matches) != 1:
            break
        chosen += matches
    return chosen


@dataclass
class _Waiting:
    """Waits, says so once, and gives up in time."""

    count: int
    total: int
    begun: float
    deadline: float
    say: Callable[[str], None]
    said: bool = False

    def pause(self) -> None:
        now = time.monotonic()
        if now > self.deadline:
            raise Inconclusive(
                f"no {self.count} of {self.total} devices came free in {now - self.begun:.0f} s: other runs lease them"
            )
        if not self.said and now - self.begun > _NOTICE_SECONDS:
            self.said = True
            self.say(f"waiting for {self.count} of {self.total} devices, which other processes lease")
        time.sleep(_POLL_SECONDS)

    def over(self) -> None:
        if self.said:
            self.say(f"got {self.count} devices after {time.monotonic() - self.begun:.0f} s")


def _lock(directory: Path, name: str) -> BaseFileLock:
    return FileLock(directory / f"{quote(name, safe='')}.lock", mode=0o666, thread_local=False)


def _try(lock: BaseFileLock) -> bool:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    return True


def _say_on_stderr(line: str) -> None:
    print(f"fusecheck: {line}", file=sys.stderr, flush=True)

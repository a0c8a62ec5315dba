"""Directories in shared memory: held while in use, removed after, swept when their owners died."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

PREFIX = "fusecheck-pool-"
_LOCK = "held"
_GRACE_SECONDS = 60.0


def shared_root() -> Path:
    """The host's directory for shared memory: `/dev/shm`, or the one for temporary files where there is none."""
    root = Path("/dev/shm")
    return root if os.access(root, os.W_OK) else Path(tempfile.gettempdir())


def hold(directory: Path) -> int:
    """Create the directory if need be and hold it; returns the descriptor of the lock.

    The kernel lets go of the lock when the last holder ends, however it ends.
    """
    directory.mkdir(exist_ok=True)
    descriptor = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def remove(directory: Path, descriptor: int) -> None:
    """Let go of a held directory, and remove it if nobody else holds it."""
    try:
        if _alone(descriptor):
            _delete(directory)
    finally:
        os.close(descriptor)


def sweep(root: Path | None = None) -> list[Path]:
    """Remove this user's pool directories that nobody holds any more; returns what was removed."""
    swept = []
    for directory in (root or shared_root()).glob(PREFIX + "*"):
        with contextlib.suppress(OSError):
            status = directory.stat()
            if status.st_uid != os.getuid():
                continue
            lock = directory / _LOCK
            if not lock.exists():
                # Being made just now, or half removed long ago.
                abandoned = time.time() - status.st_mtime > _GRACE_SECONDS
            else:
                descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
                try:
                    abandoned = _alone(descriptor)
                finally:
                    os.close(descriptor)
            if abandoned:
                _delete(directory)
                swept.append(directory)
    return swept


def _alone(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _delete(directory: Path) -> None:
    # Buffers that did not fit into shared memory lie in a directory of the same name among the temporary files.
    for place in {directory, Path(tempfile.gettempdir()) / directory.name}:
        shutil.rmtree(place, ignore_errors=True)

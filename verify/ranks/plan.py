"""What a keeper is told to start; imports no torch, so that a parent that only drives needs none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fusecheck.errors import UsageError

START_ID = 0
"""The request that every rank answers unasked, once its worker is built (or could not be)."""


@dataclass(frozen=True)
class RankPlan:
    """Everything that a keeper needs to start the ranks of one pool on its host.

    Attributes:
        worker: the worker class as `package.module:Class`; built in the rank as `Class(rank, *arguments)`.
        arguments: what the class receives beside the rank.
        world_size: how many ranks the group has, on all hosts.
        device: `cpu` or `cuda`.
        devices: the CUDA device of each rank; empty for rank r on device r.
        directory: the name of the pool's directory in shared memory, new for every start.
        rendezvous: where the process group meets; empty for a file in the directory.
        path: `sys.path` of the parent.
        cwd: the parent's working directory.
        environment: variables set in the ranks.
        memory_limit: private resident bytes that one rank may hold; 0 for no limit.
        preload: modules that the keeper imports once, so that a restart need not; they must not start CUDA.
        threads: torch's threads on the host.
        output: where what the ranks print is kept, as the start of each file's name; empty for nowhere.
    """

    worker: str
    arguments: tuple[Any, ...]
    world_size: int
    device: str
    devices: tuple[int, ...]
    directory: str = ""
    rendezvous: str = ""
    path: tuple[str, ...] = ()
    cwd: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    memory_limit: int = 0
    preload: tuple[str, ...] = ()
    threads: int = 1
    output: str = ""


def split_worker(worker: str) -> tuple[str, str]:
    """Split `package.module:Class`.

    Raises:
        UsageError: the text has not that form.
    """
    module, colon, name = worker.partition(":")
    if not (module and colon and name):
        raise UsageError(f"worker {worker!r}: expected package.module:Class")
    return module, name

"""Helpers of the tests that start programs: mpirun, and which processes of a program are left."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
import time
from pathlib import Path

import psutil

MARK = "FUSECHECK_TEST_MARK"


def mpirun(processes: int) -> list[str]:
    """The command that starts a program under MPI: the environment's own mpirun, else the system's."""
    beside = Path(sys.executable).with_name("mpirun")
    command = str(beside) if beside.exists() else shutil.which("mpirun")
    if command is None:
        raise FileNotFoundError("no mpirun: install the openmpi package, or the system's MPI")
    return [command, "-n", str(processes)]


def marked_environment() -> tuple[str, dict[str, str]]:
    """A fresh mark, and an environment that carries it; every process started with it can be found by `marked`."""
    mark = secrets.token_hex(8)
    own = {
        MARK: mark,
        # More ranks than cores, in a container, as root: Open MPI wants to be told of each.
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
    }
    # The programs are no part of this run, even if pytest-xdist or mpirun started it.
    foreign = ("PYTEST_XDIST", "FUSECHECK_MPI", "OMPI_", "PMIX_", "PMI_", "PRTE_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return mark, inherited | own


def marked(mark: str) -> dict[int, int]:
    """The living processes whose environment carries the mark: process id to parent's id."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = process.ppid()
    return found


def wait_until_gone(mark: str, known: frozenset[int] = frozenset(), *, seconds: float = 6.0) -> set[int]:
    """Wait until only `known` processes carry the mark; returns those that are left when time is up."""
    end = time.monotonic() + seconds
    while True:
        left = set(marked(mark)) - known
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.05)

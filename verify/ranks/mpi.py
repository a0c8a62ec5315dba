"""Ranks under mpirun: MPI rank 0 runs the program, the others start rank processes where they are.

MPI only brings the processes together. What follows goes over sockets: each MPI rank hands a connection to
rank 0 to a keeper of its own, so that pools work exactly as on one machine, nothing spins in MPI calls
between cases, and a rank process that dies takes no MPI process, and so no mpirun, with it.
"""

from __future__ import annotations

import atexit
import contextlib
import hmac
import json
import os
import secrets
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from fusecheck.errors import UsageError
from fusecheck.ranks import dialling
from fusecheck.ranks.dialling import Welcome, dial, free_port, own_addresses, read_line
from fusecheck.ranks.driver import detach
from fusecheck.ranks.hosts import Host, LocalHost
from fusecheck.ranks.pool import Pool
from fusecheck.ranks.zygote import ZYGOTE

_SIZES = {
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
}
_ENTERED = "FUSECHECK_MPI_PROCESS"
_CONNECT_SECONDS = 60.0
_KEEPER, _RESET = b"k", b"r"


def detect(environment: dict[str, str] | None = None) -> tuple[int, int] | None:
    """Say whether this process is one of several under mpirun: (rank, size), or None.

    A process that an MPI process or pytest-xdist started inherits the variables but is no MPI process.
    """
    variables = dict(os.environ) if environment is None else environment
    if variables.get(_ENTERED, str(os.getpid())) != str(os.getpid()) or "PYTEST_XDIST_WORKER" in variables:
        return None
    for size, rank in _SIZES.items():
        if int(variables.get(size, 1)) > 1 and rank in variables:
            return int(variables[rank]), int(variables[size])
    return None


class MpiWorld:
    """Rank 0's view of the MPI world.

    Attributes:
        size: how many MPI ranks there are.
        names: the host name of each, in rank order.
    """

    def __init__(self, names: Sequence[str], listener: socket.socket, token: str) -> None:
        self.size, self.names = len(names), tuple(names)
        self._listener, self._token = listener, token
        self._controls: dict[int, socket.socket] = {}
        self._ports: dict[int, int] = {}
        self._guard = threading.Lock()
        deadline = time.monotonic() + _CONNECT_SECONDS
        try:
            while len(self._controls) < self.size - 1:
                rank, stream = self._accept(deadline)
                self._controls[rank] = stream
        except TimeoutError as error:
            missing = sorted(set(range(1, self.size)) - set(self._controls))
            raise RuntimeError(f"MPI ranks {missing} did not connect to {self.names[0]}: a firewall, maybe") from error

    def pools(self, worker: str, world_size: int, **options: Any) -> list[Pool]:
        """Make one pool for each group of `world_size` consecutive MPI ranks; options as for `Pool`.

        Raises:
            UsageError: `world_size` does not divide the MPI world, or CPU ranks of one group are on several hosts.
        """
        groups = split_world(self.names, world_size, options.get("device", "cpu"))
        locals_ = local_ranks(self.names)
        share = int(psutil.virtual_memory().available * 0.8) // max(Counter(self.names).values())
        pools = []
        for group in groups:
            spans = len({self.names[rank] for rank in group}) > 1
            hosts = [self._host(rank, index, spans=spans) for index, rank in enumerate(group)]
            own: dict[str, Any] = {"memory_limit": share, "devices": [locals_[rank] for rank in group], "hosts": hosts}
            pools.append(Pool(worker, world_size, **(own | options)))
        return pools

    def close(self) -> None:
        """Send the other MPI ranks home."""
        for stream in self._controls.values():
            stream.close()
        self._controls.clear()
        self._listener.close()

    def _host(self, rank: int, index: int, *, spans: bool) -> Host:
        return LocalHost((index,)) if rank == 0 and not spans else MpiHost(self, rank, (index,), spans)

    def fetch(self, rank: int) -> socket.socket:
        """Have MPI rank `rank` start a keeper; returns the stream to it.

        Raises:
            RuntimeError: no keeper came.
        """
        with self._guard:
            if rank == 0:
                self._ports[0] = free_port()
                return LocalHost(()).connect()
            deadline = time.monotonic() + _CONNECT_SECONDS
            try:
                self._controls[rank].sendall(_KEEPER)
                while True:
                    came, stream = self._accept(deadline)
                    if came == rank:
                        return stream
                    stream.close()
            except OSError as error:
                raise RuntimeError(f"MPI rank {rank} on {self.names[rank]} starts no rank process: {error}") from error

    def reset(self, rank: int) -> None:
        """Have MPI rank `rank` kill all that it started."""
        if rank == 0:
            ZYGOTE.close()
        else:
            with contextlib.suppress(OSError):
                self._controls[rank].sendall(_RESET)

    def rendezvous(self, rank: int) -> str:
        """A TCP address on the host of MPI rank `rank`, where nobody listened a moment ago."""
        return f"tcp://{self.names[rank]}:{self._ports[rank]}"

    def _accept(self, deadline: float) -> tuple[int, socket.socket]:
        """Take the next connection that knows the token."""
        while True:
            self._listener.settimeout(max(0.001, deadline - time.monotonic()))
            stream, _ = self._listener.accept()
            stream.settimeout(5.0)
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                hello = json.loads(read_line(stream))
                if hmac.compare_digest(str(hello["token"]), self._token):
                    stream.settimeout(None)
                    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self._ports[hello["rank"]] = hello["port"]
                    return hello["rank"], stream
            stream.close()


@dataclass(frozen=True)
class MpiHost:
    """The place of one MPI rank; see `fusecheck.ranks.hosts.Host`."""

    world: MpiWorld
    rank: int
    indices: tuple[int, ...]
    spans: bool

    def connect(self, preload: Sequence[str] = ()) -> socket.socket:
        """Have the MPI rank start a keeper, which imports what it needs itself."""
        del preload
        return self.world.fetch(self.rank)

    def abandon(self, keeper: int) -> None:
        """Have the MPI rank kill what it started."""
        self.world.reset(self.rank)

    def rendezvous(self) -> str:
        """A file for a group on one host, a TCP address for one that spans several."""
        return self.world.rendezvous(self.rank) if self.spans else ""


def split_world(names: Sequence[str], world_size: int, device: str) -> list[range]:
    """Split MPI ranks on the hosts `names` into groups of `world_size` consecutive ones.

    Raises:
        UsageError: the size does not divide the world, or CPU ranks of one group are on several hosts.
    """
    size = len(names)
    if world_size < 1 or size % world_size:
        raise UsageError(f"--tp {world_size} does not divide the MPI world of {size}: take a multiple for mpirun -n")
    groups = [range(first, first + world_size) for first in range(0, size, world_size)]
    for group in groups:
        hosts = sorted({names[rank] for rank in group})
        if device == "cpu" and len(hosts) > 1:
            raise UsageError(
                f"MPI ranks {group[0]}-{group[-1]} are on the hosts {', '.join(hosts)}, but CPU ranks share memory and "
                "must be on one: place them by host, take a smaller --tp, or use --device cuda"
            )
    return groups


def local_ranks(names: Sequence[str]) -> list[int]:
    """Number the MPI ranks of each host from 0, in rank order."""
    seen: Counter[str] = Counter()
    numbers = []
    for name in names:
        numbers.append(seen[name])
        seen[name] += 1
    return numbers


_world: MpiWorld | None = None


def enter() -> MpiWorld | None:
    """Take this process's part; call it first thing in a program that may run under mpirun.

    Without mpirun it returns None. On MPI rank 0 it returns the world, the same when called again. On every
    other rank it serves until rank 0's program ends, prints nothing, and then exits with status 0.

    Raises:
        UsageError: mpirun is there and mpi4py is not.
        SystemExit: on the ranks that served.
    """
    global _world
    place = detect()
    if place is None or _world is not None:
        return _world
    try:
        import mpi4py

        # Rank 0's program has a process of its own, which must not end MPI.
        mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UsageError(
            f"mpirun started {place[1]} processes, but mpi4py does not load ({error}): install it"
        ) from error
    comm = MPI.COMM_WORLD
    if comm.size != place[1]:
        raise UsageError(
            f"mpirun started {place[1]} processes, but mpi4py sees {comm.size}: they are of different MPIs"
        )
    names = comm.allgather(dialling.host_name())
    if comm.rank != 0:
        _relay(comm.bcast(None, root=0), comm.rank)
        MPI.Finalize()
        raise SystemExit(0)
    addresses = own_addresses() if len(set(names)) > 1 else ("127.0.0.1",)
    listener = socket.create_server(("127.0.0.1" if len(set(names)) == 1 else "", 0), backlog=len(names))
    token = secrets.token_hex(16)
    comm.bcast(Welcome(addresses, listener.getsockname()[1], token), root=0)
    detach(MPI.Finalize)
    # Programs that this process starts inherit mpirun's variables; this one tells them that they are not meant.
    os.environ[_ENTERED] = str(os.getpid())
    _world = MpiWorld(names, listener, token)
    atexit.register(_world.close)
    return _world


def _relay(welcome: Welcome, rank: int) -> None:
    """Serve rank 0: start a keeper for each that it asks for, until it hangs up."""
    # mpirun tells all at once that they must end; rank 0 ends the ranks in order while there is time.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with dial(welcome, rank) as control:
        while order := control.recv(1):
            if order == _RESET:
                ZYGOTE.close()
                continue
            with dial(welcome, rank) as up:
                ZYGOTE.fork_keeper(up)
    ZYGOTE.close()

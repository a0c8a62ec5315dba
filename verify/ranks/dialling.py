"""How MPI's processes reach rank 0: addresses, a token that strangers do not know, one line of greeting."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Welcome:
    """What rank 0 tells all others."""

    addresses: tuple[str, ...]
    port: int
    token: str


def host_name() -> str:
    """The name under which other hosts reach this one."""
    return socket.gethostname()


def dial(welcome: Welcome, rank: int) -> socket.socket:
    """Connect MPI rank `rank` to rank 0, and greet.

    Raises:
        RuntimeError: rank 0 cannot be reached.
    """
    stream = _connect(welcome)
    stream.settimeout(None)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.sendall(json.dumps({"token": welcome.token, "rank": rank, "port": free_port()}).encode() + b"\n")
    return stream


def _connect(welcome: Welcome) -> socket.socket:
    problems = []
    for address in welcome.addresses:
        try:
            return socket.create_connection((address, welcome.port), timeout=10.0)
        except OSError as error:  # noqa: PERF203 - a handful of addresses
            problems.append(f"{address}: {error}")
    raise RuntimeError(f"{host_name()} cannot reach MPI rank 0 ({'; '.join(problems)})")


def own_addresses() -> tuple[str, ...]:
    """The names and numbers under which other hosts may reach this one, the likeliest first."""
    numbers = (card.address for cards in psutil.net_if_addrs().values() for card in cards)
    usable = [n for n in numbers if n.count(".") == 3 and not n.startswith("127.")]
    return (host_name(), *usable)


def read_line(stream: socket.socket) -> bytes:
    """Read up to the end of a line, and not a byte further: frames follow it."""
    line = b""
    while not line.endswith(b"\n") and len(line) < 512:
        byte = stream.recv(1)
        if not byte:
            break
        line += byte
    return line


def free_port() -> int:
    """A TCP port of this host on which nobody listens at the moment."""
    with socket.create_server(("", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port

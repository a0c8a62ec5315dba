"""The zygote: one process per parent that has torch loaded and forks keepers on demand.

Why not plain spawn: importing torch costs each rank 1.5 to 2 s of CPU time, at every restart; a fork of a
process that has imported it costs some 10 ms. Why not `multiprocessing`'s fork server: it imports the
parent's main module again, tells nobody how a child ended, and leaves its children's children alone.
The zygote never touches CUDA, has one thread, and so may be forked from; it ends when its parent does.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Sequence

_MPI_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "MV2_", "MPI_")
_KEEPER_SECONDS = 4.0
FOR_GPUS = ("torch.fx.experimental.symbolic_shapes",)
"""What torch imports when symmetric memory is first allocated: sympy, 3 s of a rank's first call on a new machine."""
_BOOT = "from fusecheck.ranks.zygote import main; main({descriptor})"


class Zygote:
    """The parent's handle of its zygote; started with the first keeper that is asked for.

    Args:
        environment: variables to set in it and in the ranks.
    """

    def __init__(self, **environment: str) -> None:
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._forked = False
        self._guard = threading.Lock()

    def begin(self, preload: Sequence[str] = ()) -> None:
        """Start it before it is needed, so that it imports torch and these modules while the parent does."""
        with self._guard, contextlib.suppress(OSError):  # `fork_keeper` tells what keeps it from starting
            self._ready().send(" ".join(["preload", *preload]).encode())

    def fork_keeper(self, up: socket.socket, preload: Sequence[str] = ()) -> None:
        """Have a keeper forked that serves on `up`; the caller's own copy of the socket may be closed after.

        Args:
            up: the stream of the keeper to its pool.
            preload: modules that the keeper will need. Those that are the same for every pool, Fusecheck's own
                and torch's, are imported in the zygote, once.

        Raises:
            RuntimeError: the zygote could not be started.
        """
        with self._guard:
            for _ in range(2):
                control = self._ready()
                self._forked = True
                try:
                    socket.send_fds(control, [" ".join(["keeper", *preload]).encode()], [up.fileno()])
                except OSError:
                    # It was killed since: forget it and start another.
                    self._forget()
                else:
                    return
        raise RuntimeError("the process that starts ranks cannot be started; is memory exhausted?")

    def close(self) -> None:
        """End the zygote, and with it every keeper and rank that it started."""
        with self._guard:
            self._forget()

    def _ready(self) -> socket.socket:
        if self._control is None or self._process is None or self._process.poll() is not None:
            self._forget()
            # A request is one message, with the keeper's socket.
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _BOOT.format(descriptor=theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=_environment() | self._environment,
                    # Ctrl-C in the terminal is the parent's to interpret.
                    start_new_session=True,
                )
        return self._control

    def _forget(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            if not self._forked:
                self._process.kill()  # it may be in an import, and has nobody to end
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process, self._forked = None, False


ZYGOTE = Zygote()
"""This process's zygote, shared by all its pools."""
atexit.register(ZYGOTE.close)

OTHER_HASHES = Zygote(PYTHONHASHSEED="1" if os.environ.get("PYTHONHASHSEED") != "1" else "2")
"""One whose ranks hash text otherwise than those of the first: forks of one process all hash alike."""
atexit.register(OTHER_HASHES.close)


def _environment() -> dict[str, str]:
    """The parent's environment without MPI's variables: a rank is no MPI process, and must not become one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_MPI_PREFIXES)}
    # OpenBLAS would start threads when numpy is imported, and a process with threads must not be forked.
    return {"OPENBLAS_NUM_THREADS": "1"} | kept


def _preload(names: Iterable[str]) -> None:
    """Import what every pool would import alike, so that keepers are forked with it."""
    for name in names:
        if name not in sys.modules and name.partition(".")[0] in ("fusecheck", "torch"):
            # What does not import here fails in the rank, where the failure is reported.
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    gc.collect()
    gc.freeze()


def main(descriptor: int) -> None:
    """Run the zygote on the inherited control socket; returns when the parent closes it."""
    import psutil
    import torch.distributed

    from fusecheck.ranks.keeper import Keeper
    from fusecheck.ranks.processes import adopt_orphans, die_with, kill_descendants

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Keepers are nobody's business here: the kernel reaps them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    assert torch.distributed.is_available()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Should a keeper be killed, its orphans come here.
    adopt_orphans()
    control = socket.socket(fileno=descriptor)
    zygote = os.getpid()
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 1)
        if not data:
            break
        _preload(data.decode().split()[1:])
        if not descriptors:  # nothing is to be forked yet
            continue
        if os.fork() == 0:
            try:
                die_with(zygote)
                control.close()
                Keeper(socket.socket(fileno=descriptors[0])).run()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        for received in descriptors:
            os.close(received)
    # Keepers that still run must clean up before the kernel kills them for this process's end.
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + _KEEPER_SECONDS
    while psutil.Process().children() and time.monotonic() < deadline:
        time.sleep(0.01)
    kill_descendants()

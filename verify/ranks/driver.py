"""Rank 0's program runs in a child of the MPI process, out of reach of mpirun's SIGKILL.

On Ctrl-C Open MPI's mpirun, the only one whom the terminal tells, sends its processes SIGTERM and SIGKILL a quarter
of a second later: too soon to end ranks in order and to write what the run has shown so far.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

END_SECONDS = 60.0
"""How long an interrupted program may take to end before it is ended."""


def detach(finalise: Callable[[], None]) -> None:
    """Go on in a child with a session of its own; returns there only.

    The MPI process stays behind, tells the child of SIGTERM and SIGINT and by its own end, and exits as the child
    does. To the program all of these are one KeyboardInterrupt.

    Args:
        finalise: ends MPI; called in the MPI process when the program has ended of itself.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    watched, held = os.pipe()
    child = os.fork()
    if child:
        os.close(watched)
        _stand_for(child, held, finalise)
    os.close(held)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_mind, args=(watched,), daemon=True).start()


def _stand_for(child: int, held: int, finalise: Callable[[], None]) -> NoReturn:
    """Be the process that mpirun knows: wait for the child, and end as it does."""
    told = False

    def tell(_number: int, _frame: object) -> None:
        nonlocal told
        if not told:
            told = True
            os.close(held)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, tell)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code >= 0 and not told:
        finalise()
    # No exit handlers: they are the child's.
    os._exit(code if code >= 0 else 128 - code)


def _mind(watched: int) -> NoReturn:
    """Interrupt the program when the MPI process has been told to end, or has ended."""
    os.read(watched, 1)
    # Nobody reads what the program writes from now on, and a broken pipe must not keep it from its report.
    void = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(void, stream)
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    time.sleep(END_SECONDS)
    os._exit(128 + signal.SIGINT)

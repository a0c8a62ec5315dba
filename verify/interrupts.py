"""Ctrl-C: it ends a run, but not its report. Before a run, within an import, it ends the program at once.

torch swallows a KeyboardInterrupt that comes while it looks for numpy, and leaves half a numpy behind; Python drops one
that comes in a weak reference's callback, of which the import system has many. What then goes wrong elsewhere is no
finding and no fault of ours.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

IMPORT = "<frozen importlib._bootstrap"
"""How the names of the import system's own files begin, as its frames tell them."""


class Noted:
    """A handler of SIGINT that raises KeyboardInterrupt as Python's own does, and remembers.

    Attributes:
        happened: whether the signal has come.
        late: a run is over and its record is being written, which no Ctrl-C is to end: it is only noted.
    """

    def __init__(self) -> None:
        self.happened = self.late = False

    def __call__(self, _number: int, frame: FrameType | None) -> None:
        """Note the signal; within an import, where nothing has been begun, say so and leave.

        Raises:
            KeyboardInterrupt: outside of imports.
        """
        self.happened = True
        if self.late:
            return
        if _importing(frame):
            os.write(2, b"fusecheck: interrupted\n")
            os._exit(3)
        raise KeyboardInterrupt


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith(IMPORT):
            return True
        frame = frame.f_back
    return False


def raises() -> bool:
    """Whether Ctrl-C raises KeyboardInterrupt here, by Python's own handler or ours, and not somebody else's."""
    handler: Any = signal.getsignal(signal.SIGINT)
    ours = isinstance(handler, Noted) or isinstance(getattr(handler, "__self__", None), Interruption)
    return ours or handler is signal.default_int_handler


class Interruption:
    """A context that Ctrl-C leaves early and quietly.

    Python drops a KeyboardInterrupt that is raised within a destructor or a weak reference's callback. It is noted
    here: `check` raises it again, and `happened` tells of it even if the run came to its end. Behind the outermost
    context of a command there is only its record to write, and Ctrl-C comes too late to end that.

    Args:
        raising: whether Ctrl-C raises within the context; else it is only noted, for a context whose steps look at
            `noted`, or are contexts of this kind themselves.

    Attributes:
        noted: whether Ctrl-C was pressed so far.
        happened: whether it was, once the context is left.
    """

    def __init__(self, *, raising: bool = True) -> None:
        self.happened = self.noted = self._listens = False
        self._raising = raising
        self._before: Any = None

    def __enter__(self) -> Interruption:
        ours = threading.current_thread() is threading.main_thread()
        if ours and raises():
            self._before = signal.signal(signal.SIGINT, self._note)
            self._listens = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._raising = False
        raised = isinstance(error, KeyboardInterrupt)
        if self._listens:
            if isinstance(self._before, Noted):
                self._before.late = error is None or raised
            signal.signal(signal.SIGINT, self._before)
            self._listens = False
        self.happened = raised or self.noted
        return raised

    def check(self) -> None:
        """Raise what was noted, in case nobody has seen it.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed in this context.
        """
        if self.noted:
            raise KeyboardInterrupt

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.noted = True
        if self._raising:
            raise KeyboardInterrupt

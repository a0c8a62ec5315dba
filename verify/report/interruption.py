"""Ctrl-C that ends a run, but not its report."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from fusecheck import interrupts


class Interruption:
    """A context that Ctrl-C leaves early and quietly.

    Python drops a KeyboardInterrupt that is raised within a destructor or a weak reference's callback. It is noted
    here: `check` raises it again, and `happened` tells of it even if the run came to its end.

    Attributes:
        happened: whether it did, once the context is left.
    """

    def __init__(self) -> None:
        self.happened = self._noted = self._listens = False
        self._before: Any = None

    def __enter__(self) -> Interruption:
        ours = threading.current_thread() is threading.main_thread()
        if ours and interrupts.raises():
            self._before = signal.signal(signal.SIGINT, self._note)
            self._listens = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if self._listens:
            signal.signal(signal.SIGINT, self._before)
            self._listens = False
        raised = isinstance(error, KeyboardInterrupt)
        self.happened = raised or self._noted
        return raised

    def check(self) -> None:
        """Raise what was noted, in case nobody has seen it.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed in this context.
        """
        if self._noted:
            raise KeyboardInterrupt

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._noted = True
        raise KeyboardInterrupt

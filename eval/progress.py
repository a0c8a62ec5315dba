"""What a run is doing: shown on standard error while it lasts, and remembered for when Ctrl-C ends it."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from rich.console import Console

from fusecheck.interrupts import Interruption

Tell = Callable[[str], None]
"""Takes one line that says what begins."""


class Progress:
    """A status line; a context manager, and a `Tell`. A Ctrl-C that got lost is raised by the next line, or at the end.

    Attributes:
        doing: the last line that was told.
    """

    def __init__(self) -> None:
        self.doing = "the start"
        self._status = Console(stderr=True).status(self.doing)
        self._interruption = Interruption()

    def __enter__(self) -> Progress:
        self._interruption.__enter__()
        self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._status.stop()
        self._interruption.__exit__(kind, error, trace)
        if error is None:
            self._interruption.check()

    def __call__(self, line: str) -> None:
        """Show and remember a line.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed before.
        """
        self.doing = line
        self._status.update(line)
        self._interruption.check()

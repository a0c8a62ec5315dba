"""What a run is doing: shown on standard error while it lasts, and remembered for when Ctrl-C ends it."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

Tell = Callable[[str], None]
"""Takes one line that says what begins."""


class Progress:
    """A status line; a context manager, and a `Tell`.

    Attributes:
        doing: the last line that was told.
    """

    def __init__(self) -> None:
        self.doing = "the start"
        self._status = Console(stderr=True).status(self.doing)

    def __enter__(self) -> Progress:
        self._status.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._status.stop()

    def __call__(self, line: str) -> None:
        """Show and remember a line."""
        self.doing = line
        self._status.update(line)

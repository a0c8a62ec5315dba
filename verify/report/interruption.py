"""Ctrl-C ends what a command runs, not the command: what is done by then is still shown and written."""

from __future__ import annotations

from types import TracebackType


class Interruption:
    """A context that Ctrl-C leaves early and quietly.

    Attributes:
        happened: whether it did, once the context is left.
    """

    def __init__(self) -> None:
        self.happened = False

    def __enter__(self) -> Interruption:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.happened = isinstance(error, KeyboardInterrupt)
        return self.happened

"""Ctrl-C before and between runs: noted, since libraries lose it.

torch swallows a KeyboardInterrupt that comes while it looks for numpy, and leaves half a numpy behind; what then goes
wrong elsewhere is no finding and no fault of ours.
"""

from __future__ import annotations

import signal
from types import FrameType


class Noted:
    """A handler of SIGINT that raises KeyboardInterrupt as Python's own does, and remembers.

    Attributes:
        happened: whether the signal has come.
    """

    def __init__(self) -> None:
        self.happened = False

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        """Note the signal.

        Raises:
            KeyboardInterrupt: always.
        """
        self.happened = True
        raise KeyboardInterrupt


def raises() -> bool:
    """Whether Ctrl-C raises KeyboardInterrupt here, by Python's own handler or ours, and not somebody else's."""
    handler = signal.getsignal(signal.SIGINT)
    return handler is signal.default_int_handler or isinstance(handler, Noted)

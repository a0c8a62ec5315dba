"""Ctrl-C before and between runs: noted, since libraries lose it; within an import it ends the program at once.

torch swallows a KeyboardInterrupt that comes while it looks for numpy, and leaves half a numpy behind; Python drops one
that comes in a weak reference's callback, of which the import system has many. What then goes wrong elsewhere is no
finding and no fault of ours.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

IMPORT = "<frozen importlib._bootstrap"
"""How the names of the import system's own files begin, as its frames tell them."""


class Noted:
    """A handler of SIGINT that raises KeyboardInterrupt as Python's own does, and remembers.

    Attributes:
        happened: whether the signal has come.
    """

    def __init__(self) -> None:
        self.happened = False

    def __call__(self, _number: int, frame: FrameType | None) -> None:
        """Note the signal; within an import, where nothing has been begun, say so and leave.

        Raises:
            KeyboardInterrupt: outside of imports.
        """
        self.happened = True
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
    handler = signal.getsignal(signal.SIGINT)
    return handler is signal.default_int_handler or isinstance(handler, Noted)

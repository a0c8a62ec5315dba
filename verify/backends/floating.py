"""The floating-point state of this thread: how it rounds, and whether it flushes subnormals to zero.

A library that is linked with -ffast-math switches flushing on when it is loaded, for everybody in the process; a kernel
may forget to switch back. Whoever computes after it, the judge among them, then computes something else.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from typing import Any

FLUSH, DENORMALS, ROUNDING = "flush to zero", "denormals are zero", "rounding mode"

_X86 = {FLUSH: 1 << 15, DENORMALS: 1 << 6, ROUNDING: 3 << 13}
"""Bits of MXCSR; the sixteen others are flags that any operation may raise, and the masks of exceptions."""
_ARM = {FLUSH: 1 << 24, ROUNDING: 3 << 22}
"""Bits of FPCR."""

_PLACES = {"x86_64": (28, _X86), "aarch64": (0, _ARM)}
"""Where the control register lies in `fenv_t`, in bytes, and what its bits mean, by the machine's name."""


class State:
    """A state that was seen, and can be had back.

    Args:
        environment: `fenv_t` as the C library filled it; None where this machine's is not known.
    """

    def __init__(self, environment: Any) -> None:
        self._environment = environment

    def differs(self, other: State) -> list[str]:
        """What differs, in words; nothing where this machine's state is not known."""
        if self._environment is None or other._environment is None:
            return []
        place, bits = _PLACES[platform.machine()]
        mine, theirs = (x._environment[place : place + 4] for x in (self, other))
        if mine == theirs:
            return []  # after most of the thousands of calls
        changed = int.from_bytes(mine, "little") ^ int.from_bytes(theirs, "little")
        return [name for name, mask in bits.items() if changed & mask]

    def restore(self) -> None:
        """Set this thread's state back."""
        if self._environment is not None:
            _library().fesetenv(self._environment)


@functools.cache
def _library() -> Any:
    return ctypes.CDLL(None)


@functools.cache
def _known() -> bool:
    return platform.machine() in _PLACES and hasattr(_library(), "fegetenv")


def state() -> State:
    """This thread's state."""
    if not _known():
        return State(None)
    environment = ctypes.create_string_buffer(64)
    _library().fegetenv(environment)
    return State(environment)

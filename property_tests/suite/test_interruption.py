"""A Ctrl-C is not lost, wherever in the program it comes."""

from __future__ import annotations

import os
import signal
import weakref

import pytest

from fusecheck.report import Interruption


class _Thing:
    """Something that a weak reference can point to."""


def lose_a_ctrl_c() -> None:
    """Press it within the callback of a weak reference, out of which Python raises nothing."""
    thing = _Thing()
    reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGINT))
    del thing
    assert reference() is None


@pytest.fixture(autouse=True)
def default_handler() -> None:
    """What Python starts with, unless a shell put it into the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_ctrl_c_that_python_drops_is_raised_by_the_next_check_and_told_at_the_end() -> None:
    seen = []
    with Interruption() as stop:
        lose_a_ctrl_c()
        seen.append("it was dropped")
        stop.check()
        seen.append("it was not raised again")
    assert (seen, stop.happened) == (["it was dropped"], True)
    with Interruption() as stop:
        lose_a_ctrl_c()
    assert stop.happened


def test_a_context_without_ctrl_c_leaves_the_handler_as_it_was() -> None:
    with Interruption() as stop:
        stop.check()
    assert not stop.happened
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_of_another_kind_passes_through() -> None:
    with pytest.raises(ValueError, match="broken"), Interruption():
        raise ValueError("broken")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_context_within_another_leaves_the_handler_to_it() -> None:
    with Interruption() as outer:
        with Interruption():
            pass
        os.kill(os.getpid(), signal.SIGINT)
    assert outer.happened

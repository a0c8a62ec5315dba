"""A Ctrl-C is not lost, wherever in the program it comes."""

from __future__ import annotations

import os
import signal
import weakref

import pytest

from fusecheck.interrupts import IMPORT, Interruption, Noted


class _Thing:
    """Something that a weak reference can point to."""


def lose_a_ctrl_c() -> None:
    """Press it within the callback of a weak reference, out of which Python raises nothing."""
    thing = _Thing()
    reference = weakref.ref(thing, lambda _: press())
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
        press()
    assert outer.happened


def press() -> None:
    """Ctrl-C, as it comes from the terminal."""
    os.kill(os.getpid(), signal.SIGINT)


def test_a_context_that_does_not_raise_notes_it_even_within_an_import_and_one_within_it_still_ends() -> None:
    signal.signal(signal.SIGINT, Noted())
    seen = []
    with Interruption(raising=False) as outer:
        exec(compile("press()", IMPORT, "exec"), {"press": press})
        assert outer.noted
        with Interruption() as inner:
            press()
            seen.append("it was not raised")
    assert (seen, inner.happened, outer.happened) == ([], True, True)


def test_ctrl_c_behind_a_run_does_not_keep_its_record_from_being_written() -> None:
    handler = Noted()
    signal.signal(signal.SIGINT, handler)
    with pytest.raises(KeyboardInterrupt):
        press()
    with Interruption():
        pass
    press()
    assert handler.happened
    with Interruption() as another:
        press()
    assert another.happened


def test_ctrl_c_behind_a_run_that_broke_ends_the_program() -> None:
    signal.signal(signal.SIGINT, Noted())
    with pytest.raises(ValueError, match="broken"), Interruption():
        raise ValueError("broken")
    with pytest.raises(KeyboardInterrupt):
        press()

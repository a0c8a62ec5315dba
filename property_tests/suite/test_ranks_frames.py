"""Frames: any split of the stream gives the same messages, and rubbish is never taken for one."""

from __future__ import annotations

import contextlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusecheck.ranks.frames import LARGEST, FrameReader, GarbageError, frame


@given(payloads=st.lists(st.binary(max_size=50), max_size=5), cuts=st.lists(st.integers(0, 400), max_size=8))
def test_any_split_of_the_stream_gives_the_same_messages(payloads: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(frame(payload) for payload in payloads)
    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    reader = FrameReader()
    parts = [stream[a:b] for a, b in itertools.pairwise(edges)]
    assert [payload for part in parts for payload in reader.feed(part)] == payloads


@given(rubbish=st.binary(min_size=4, max_size=100))
def test_rubbish_is_garbage_at_once(rubbish: bytes) -> None:
    good = frame(b"x")
    if rubbish[:4] != good[:4]:
        with pytest.raises(GarbageError, match="not a message"):
            list(FrameReader().feed(rubbish))


@given(payload=st.binary(min_size=1, max_size=50), data=st.data())
def test_a_single_flipped_bit_yields_no_message(payload: bytes, data: st.DataObject) -> None:
    stream = bytearray(frame(payload))
    bit = data.draw(st.integers(0, 8 * len(stream) - 1), label="bit")
    stream[bit // 8] ^= 1 << bit % 8
    received = []
    # A longer length makes it wait for the rest: no message either.
    with contextlib.suppress(GarbageError):
        received = list(FrameReader().feed(bytes(stream)))
    assert received == []


def test_a_message_that_claims_to_be_huge_is_garbage_before_it_arrives() -> None:
    stream = frame(b"x")[:8] + (LARGEST + 1).to_bytes(4, "big")
    with pytest.raises(GarbageError, match=str(LARGEST + 1)):
        list(FrameReader().feed(stream))


def test_a_message_too_long_to_be_taken_is_not_sent() -> None:
    with pytest.raises(ValueError, match=str(LARGEST)):
        frame(bytes(LARGEST + 1))

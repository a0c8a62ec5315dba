"""Frames: length-prefixed, checksummed messages on a stream socket.

A frame is a 12-byte header (magic, CRC-32 of the payload, length) and the payload. Whatever a rank writes
to its socket that is not such a frame is told from a message before anything is unpickled.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

_HEADER = struct.Struct("!4sII")
_MAGIC = b"FzK\x01"
LARGEST = 64 << 20
"""The longest payload in bytes; a longer one is taken for garbage."""


class GarbageError(ValueError):
    """The stream holds something that is not a frame; the message shows its first bytes."""


def frame(payload: bytes) -> bytes:
    """Wrap `payload` for the stream.

    Raises:
        ValueError: the payload is longer than `LARGEST` bytes.
    """
    if len(payload) > LARGEST:
        raise ValueError(f"a message of {len(payload)} bytes; at most {LARGEST} fit")
    return _HEADER.pack(_MAGIC, zlib.crc32(payload), len(payload)) + payload


class FrameReader:
    """Cuts a stream into payloads, however the stream was split on its way."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Add bytes that arrived and yield every payload that is now complete.

        Raises:
            GarbageError: the next bytes are not a frame's header, or the checksum does not fit.
        """
        self._buffer += data
        while True:
            start = bytes(self._buffer[:4])
            if not _MAGIC.startswith(start):
                raise GarbageError(f"not a message: {bytes(self._buffer[:32])!r}")
            if len(self._buffer) < _HEADER.size:
                return
            _, checksum, length = _HEADER.unpack_from(self._buffer)
            if length > LARGEST:
                raise GarbageError(f"a message that claims {length} bytes; at most {LARGEST} are taken")
            end = _HEADER.size + length
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[_HEADER.size : end])
            del self._buffer[:end]
            if zlib.crc32(payload) != checksum:
                raise GarbageError(f"a message of {length} bytes whose checksum does not fit: {payload[:32]!r}")
            yield payload

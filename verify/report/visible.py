"""Text of a run as it may be shown: a case name or a model's answer must not drive the reader's screen."""

from __future__ import annotations

_PICTURES = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | {127: 0x2421}
_HIDDEN = (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xFDD0, 0xFDF0))
_SURROGATES = range(0xD800, 0xE000)
_NONCHARACTERS = (plane * 0x10000 + last for plane in range(17) for last in (0xFFFE, 0xFFFF))
_SHOWN = _PICTURES | dict.fromkeys((*_HIDDEN, *_SURROGATES, *_NONCHARACTERS), 0xFFFD)


def visible(text: str) -> str:
    """The text with control characters as pictures; what no page may hold, and what turns text round, as U+FFFD."""
    return text.translate(_SHOWN)

"""Kinds of dequantisation scale, and the value that a seed draws from each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fusecheck.formats.element import E4M3
from fusecheck.inputs.captured import captured_scale
from fusecheck.inputs.cells import hash64


def _unit(seed: int) -> float:
    """A number in [0, 1)."""
    return hash64(seed, 11) / 2**64


def _tie(seed: int) -> float:
    """A bf16 value over a midpoint: that value's quotient is a tie but for the scale's own rounding."""
    value = (128 + hash64(seed, 13) % 128) / 128
    return value / E4M3.midpoints[8 + hash64(seed, 14) % (len(E4M3.midpoints) - 8)]


SCALES: dict[str, Callable[[int], float]] = {
    "random": lambda seed: 2.0 ** (-9 + 7 * _unit(seed)),
    "power": lambda seed: 2.0 ** (-1 - hash64(seed, 12) % 8),
    "one": lambda _: 1.0,
    "tie": _tie,
    # A calibrated scale: the largest magnitude, a bf16 value, over 448.
    "amax": lambda seed: (3 + hash64(seed, 15) % 96 / 32) / E4M3.largest,
    "tiny": lambda seed: 2.0 ** (-60 - 65 * _unit(seed)),
    "huge": lambda seed: 2.0 ** (10 + 110 * _unit(seed)),
    # 448 lies at 2.1 to 2.4 standard deviations of the normed activations.
    "saturating": lambda seed: (2.15 + 0.2 * _unit(seed)) / E4M3.largest,
    # The least normal code lies at 0.55 to 1 standard deviations.
    "subnormal": lambda seed: (0.55 + 0.45 * _unit(seed)) * 2.0**6,
    "captured": captured_scale,
}
"""The kinds of scale by name; a captured one is that of the site which a case with the same seed is of."""


def draw_scale(kind: str, seed: int) -> float:
    """A float32 value of that kind."""
    return float(np.float32(SCALES[kind](seed)))

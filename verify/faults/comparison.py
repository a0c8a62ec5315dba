"""What a pass criterion of the field compares: one rank's outputs, what they should be, and the formulas they share.

Formulas with absolute and relative tolerances are allowed under `verify/faults` only: they are what is tested here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fusecheck.formats.element import E4M3

Floats = NDArray[np.float64]
Codes = NDArray[np.uint8]
Mask = NDArray[np.bool_]

_VALUES: Floats = np.asarray(E4M3.values, dtype=np.float64)


@dataclass(frozen=True)
class Outputs:
    """One rank's outputs, or what they should be; each [tokens, hidden], None where the op does not return it.

    Attributes:
        residual: residual_out, widened.
        norm: norm_out, widened.
        codes: the E4M3 codes.
    """

    residual: Floats
    norm: Floats | None
    codes: Codes | None


@dataclass(frozen=True)
class Evidence:
    """What a criterion sees.

    Attributes:
        got: the kernel's outputs on one rank.
        expected: the reference's.
        scale: the dequantisation scale.
        own_norm: the reference's norm of the kernel's own residual_out.
        own_codes: the reference's codes of the kernel's own norm_out.
        bits: bits of a native significand, 8 for bf16 and 11 for fp16.
    """

    got: Outputs
    expected: Outputs
    scale: float
    own_norm: Floats | None
    own_codes: Codes | None
    bits: int


def close(a: Floats, b: Floats, atol: float, rtol: float) -> Mask:
    """|a - b| <= atol + rtol |b|; NaN is never close."""
    with np.errstate(invalid="ignore"):
        return np.asarray((np.abs(a - b) <= atol + rtol * np.abs(b)) | (a == b))


def far(a: Floats, b: Floats, atol: float, rtol: float) -> Mask:
    """|a - b| > atol + rtol |b|; NaN is not far either, as in criteria that count what is far."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.abs(a - b) > atol + rtol * np.abs(b))


def decoded(codes: Codes) -> Floats:
    """The codes' values."""
    return np.asarray(_VALUES[codes])


def raw_key(codes: Codes) -> NDArray[np.int64]:
    """An order of the codes in which 448 and NaN are neighbours, as are the two zeros."""
    wide = codes.astype(np.int64)
    return np.where(wide >= 128, 255 - wide, wide + 128)


def lattice(codes: Codes) -> NDArray[np.int64]:
    """An order of the codes with one zero, in which NaN is far from everything."""
    magnitude = (codes & 0x7F).astype(np.int64)
    signed = np.where(codes & 0x80, -magnitude, magnitude)
    return np.where(magnitude == 0x7F, 10_000, signed)


def ulps(a: Floats, b: Floats, bits: int) -> Floats:
    """|a - b| in units of the last place of the larger, for significands of so many bits; NaN is far."""
    with np.errstate(invalid="ignore", divide="ignore"):
        largest = np.maximum(np.abs(a), np.abs(b))
        unit = 2.0 ** (np.floor(np.log2(np.where(largest > 0, largest, 1.0))) - bits + 1)
        distance = np.where(a == b, 0.0, np.abs(a - b) / unit)
    return np.where(np.isnan(distance), np.inf, distance)

"""Triton kernels: make Gaussian operands, and count over all rows what is not as it must be.

The counts are a sufficient condition only. A value counts as inside where it equals the nominal, or the nominal
formed with a reciprocal root that is `SHIFT` away, which lies within every enclosure (L4 to L6 allow 11 u at the
least); whatever else is found goes to the eager judge. Nothing here decides that a kernel is wrong.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHANGED, UNWRITTEN, RESIDUAL, NORM_OFF, NORM_OUT, QUANT_OFF, QUANT_OUT, TRAMPLED, DIGESTS = 0, 1, 2, 3, 4, 5, 6, 7, 8
"""Slots of a case's counts; the digests of residual, norm and quant take three."""
SLOTS = 16
"""Of which some are spare, so that every case's counts begin at a multiple of 16 bytes: Triton compiles for that."""

SHIFT = tl.constexpr(2.0**-22)
"""Relative shift of the reciprocal root: 4 u, so that its products stay within 8 u of the exact value."""
LEAST_NORMAL = tl.constexpr(2.0**-126)
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15 - 2**64)
POISON_WIDE = tl.constexpr(0xFFA5 - 2**16)
POISON_CODE = tl.constexpr(0xFF)


@triton.jit
def _row_key(base, row):
    """`cells._row_keys` of one row."""
    state = (row.to(tl.int64) * GOLDEN + base).to(tl.uint64)
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    return (state >> 32).to(tl.uint32)


@triton.jit
def _mixed(word):
    """`cells._mix` of uint32 words."""
    word = (word ^ (word >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    word = (word ^ (word >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return word ^ (word >> 16)


@triton.jit(do_not_specialize=["base", "first"])
def generate(out, table, base, first, hidden, WORDS: tl.constexpr):
    """Fill rows with entries of a table of 65,536 values, drawn like `Cells.normal`; `out` and `hidden` in words."""
    row = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, WORDS)
    inside = word < hidden
    key = _row_key(base, first + row)
    bits = _mixed(word.to(tl.uint32) * tl.full((), 0x9E3779B9, tl.uint32) + key)
    low = tl.load(table + (bits & 0xFFFF).to(tl.int32)).to(tl.int32) & 0xFFFF
    high = tl.load(table + (bits >> 16).to(tl.int32)).to(tl.int32)
    tl.store(out + row * hidden + word, low | (high << 16), mask=inside)


@triton.jit
def _flushed(x, FLUSH: tl.constexpr):
    return tl.where(tl.abs(x) < LEAST_NORMAL, x * 0.0, x) if FLUSH else x


@triton.jit
def _native(bits, HALF: tl.constexpr):
    """Native values of int16 bits, in float32."""
    if HALF:
        return bits.to(tl.float16, bitcast=True).to(tl.float32)
    return bits.to(tl.bfloat16, bitcast=True).to(tl.float32)


@triton.jit
def _bits(x, HALF: tl.constexpr):
    """The int16 bits of float32 values rounded once to the native format."""
    if HALF:
        return x.to(tl.float16).to(tl.int16, bitcast=True)
    word = x.to(tl.int32, bitcast=True)  # on the bits: Triton's interpreter truncates
    rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
    return tl.where((word & 0x7FFFFFFF) > 0x7F800000, 0x7FFF, rounded).to(tl.int16)


@triton.jit
def _code(y, factor, DIVIDE: tl.constexpr, NAN_CODE: tl.constexpr):
    """`E4M3.encode_float32` of y over the scale, saturating."""
    quotient = tl.div_rn(y, factor) if DIVIDE else y * factor
    bits = quotient.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    # Adding 2^23 rounds to a whole number, ties to even.
    tiny = ((tl.minimum(tl.abs(quotient), 1.0) * 512.0 + 8388608.0) - 8388608.0).to(tl.int32)
    code = tl.minimum(tl.where(magnitude >= 0x3C800000, normal, tiny), 0x7E)
    code = tl.where(bits < 0, code | 0x80, code)
    return tl.where(magnitude > 0x7F800000, NAN_CODE, code)


@triton.jit
def _weight(position):
    """`digest._weights` by position."""
    mixed = (position.to(tl.int64) + 1) * GOLDEN
    return (mixed ^ (mixed >> 29)) * 2 + 1


@triton.jit
def _row_digest(words_of, row, words, WORDS: tl.constexpr):
    """`digest.whole`'s term of one row; `words_of` points to int64."""
    word = tl.arange(0, WORDS)
    values = tl.load(words_of + row * words + word, mask=word < words, other=0)
    return tl.sum(values * _weight(word), axis=0) * _weight(row)


@triton.jit
def _count(counts, SLOT: tl.constexpr, found):
    total = tl.sum(found.to(tl.int32), axis=0)
    if total > 0:
        tl.atomic_add(counts + SLOT, total.to(tl.int64))


@triton.jit
def _same_bits(got, low, high, nominal):
    return (got == nominal) | (got == low) | (got == high)


@triton.jit
def _judge_row(
    counts, partials, residual_bits, got, gamma, norm, quant, row, own, share, hidden, eps, bias, factor, has_norm,
    has_quant, BLOCK: tl.constexpr, RANKS: tl.constexpr, WIDE_SUM: tl.constexpr, FLUSH: tl.constexpr,
    HALF: tl.constexpr, DIVIDE: tl.constexpr, NAN_CODE: tl.constexpr,
):  # fmt: skip
    """Count what differs from the nominal in one row of this rank's share; each stage from the observed one before."""
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    total = _flushed(_native(tl.load(partials + own * hidden + column, mask=inside, other=0), HALF), FLUSH)
    for rank in tl.static_range(1, RANKS):
        bits = tl.load(partials + (rank * share + own) * hidden + column, mask=inside, other=0)
        total = _flushed(total + _flushed(_native(bits, HALF), FLUSH), FLUSH)
        if not WIDE_SUM:
            total = _native(_bits(total, HALF), HALF)
    total = _flushed(_native(_bits(total, HALF), HALF), FLUSH)
    stream = _flushed(total + _flushed(_native(residual_bits, HALF), FLUSH), FLUSH)
    _count(counts, 2, inside & (_bits(stream, HALF) != got))
    value = _native(got, HALF)
    square = value * value
    summed = tl.sum(tl.where(inside, square, 0.0).to(tl.float64), axis=0).to(tl.float32)
    mean = tl.div_rn(summed, hidden.to(tl.float32)) + eps
    root = (1.0 / tl.sqrt(mean.to(tl.float64))).to(tl.float32)
    weight = _native(tl.load(gamma + column, mask=inside, other=0), HALF) + bias
    normed = (value * root) * weight
    low = (value * (root * (1.0 - SHIFT))) * weight
    high = (value * (root * (1.0 + SHIFT))) * weight
    bits, low_bits, high_bits = _bits(normed, HALF), _bits(low, HALF), _bits(high, HALF)
    at = row * hidden + column
    if has_norm != 0:
        seen = tl.load(norm + at, mask=inside, other=0)
        _count(counts, 3, inside & (seen != bits))
        _count(counts, 4, inside & ~_same_bits(seen, low_bits, high_bits, bits))
        bits, low_bits, high_bits = seen, seen, seen
    if has_quant != 0:
        code = tl.load(quant + at, mask=inside, other=0).to(tl.int32)
        nominal = _code(_native(bits, HALF), factor, DIVIDE, NAN_CODE)
        least = _code(_native(low_bits, HALF), factor, DIVIDE, NAN_CODE)
        most = _code(_native(high_bits, HALF), factor, DIVIDE, NAN_CODE)
        _count(counts, 5, inside & (code != nominal))
        _count(counts, 6, inside & ~_same_bits(code, least, most, nominal))


@triton.jit(
    do_not_specialize=["first", "share", "eps", "bias", "factor", "scale_bits", "has_norm", "has_quant", "finite"]
)
def judge(
    counts, partials, made_partial, made_residual, made_gamma, partial, residual_in, gamma, scale, residual, norm,
    quant, residual_words, norm_words, quant_words, first, share, hidden, eps, bias, factor, scale_bits, has_norm,
    has_quant, finite, BLOCK: tl.constexpr, RANKS: tl.constexpr, WIDE_SUM: tl.constexpr, FLUSH: tl.constexpr,
    HALF: tl.constexpr, DIVIDE: tl.constexpr, NAN_CODE: tl.constexpr,
):  # fmt: skip
    """Count one row: inputs changed, outputs unwritten, the digests; and what differs from the nominal in the share.

    Pointers are to int16 (native values), uint8 (codes), int64 (digest words), int32 (scale, as bits).
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    at = row * hidden + column
    made = tl.load(made_residual + at, mask=inside, other=0)
    _count(counts, 0, inside & (made != tl.load(residual_in + at, mask=inside, other=0)))
    own_made = tl.load(made_partial + at, mask=inside, other=0)
    _count(counts, 0, inside & (own_made != tl.load(partial + at, mask=inside, other=0)))
    if row == 0:
        held = tl.load(made_gamma + column, mask=inside, other=0)
        changed = inside & (held != tl.load(gamma + column, mask=inside, other=0))
        _count(counts, 0, changed | ((column == 0) & (tl.load(scale) != scale_bits)))
    got = tl.load(residual + at, mask=inside, other=0)
    _count(counts, 1, inside & (got == POISON_WIDE))
    tl.atomic_add(counts + 8, _row_digest(residual_words, row, hidden // 4, BLOCK // 4))
    if has_norm != 0:
        seen = tl.load(norm + at, mask=inside, other=0)
        _count(counts, 1, inside & (seen == POISON_WIDE))
        tl.atomic_add(counts + 9, _row_digest(norm_words, row, hidden // 4, BLOCK // 4))
    if has_quant != 0:
        if finite != 0:
            code = tl.load(quant + at, mask=inside, other=0).to(tl.int32)
            _count(counts, 1, inside & (code == POISON_CODE))
        tl.atomic_add(counts + 10, _row_digest(quant_words, row, hidden // 8, BLOCK // 8))
    if (row >= first) & (row < first + share):
        _judge_row(
            counts, partials, made, got, made_gamma, norm, quant, row, row - first, share, hidden, eps, bias, factor,
            has_norm, has_quant, BLOCK, RANKS, WIDE_SUM, FLUSH, HALF, DIVIDE, NAN_CODE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["eps", "bias", "factor", "has_norm", "has_quant"])
def judge_outputs(
    counts, partials, residual_in, gamma, residual, norm, quant, rows, hidden, eps, bias, factor, has_norm, has_quant,
    BLOCK: tl.constexpr, RANKS: tl.constexpr, WIDE_SUM: tl.constexpr, FLUSH: tl.constexpr, HALF: tl.constexpr,
    DIVIDE: tl.constexpr, NAN_CODE: tl.constexpr,
):  # fmt: skip
    """Count what differs from the nominal in one row, of operands and outputs that somebody else holds."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    added = tl.load(residual_in + row * hidden + column, mask=inside, other=0)
    got = tl.load(residual + row * hidden + column, mask=inside, other=0)
    _judge_row(
        counts, partials, added, got, gamma, norm, quant, row, row, rows, hidden, eps, bias, factor,
        has_norm, has_quant, BLOCK, RANKS, WIDE_SUM, FLUSH, HALF, DIVIDE, NAN_CODE,
    )  # fmt: skip

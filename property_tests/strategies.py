"""Hypothesis strategies for the kernel question: Problems, the schedules before them, and what relations need.

Rows and columns are those of the coverage table that `fusecheck kernel` runs through, and what lies between them.

They shrink toward few tokens, small hidden, Gaussian data, scale 1, and no schedule. Scale 1 is where a failure
ends, never all that is tried: every strategy of scales draws other kinds far more often.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from fusecheck.inputs.families import FAMILIES
from fusecheck.inputs.scales import SCALES, draw_scale
from fusecheck.interface import FusionOp, Strategy
from fusecheck.kernel import table
from fusecheck.problem import Call, Problem

LANES = 8
LIMIT = 128
"""Tokens up to which kernels of this family go one-shot by themselves."""
ELEMENTS = 2**16
"""Tokens * hidden of a drawn case, at most: the next case is worth more than a larger one."""
ODD_HIDDEN = tuple(sorted({8, 72, 1032, *(LANES * prime for prime in table.PRIMES)}))
"""Odd multiples of eight lanes, where no two lanes-of-eight pair up."""

OPS = (
    FusionOp.RESIDUAL_RMS_NORM_OUT_QUANT_FP8,
    FusionOp.RESIDUAL_RMS_NORM_QUANT_FP8,
    FusionOp.RESIDUAL_RMS_NORM,
)
STRATEGIES = (Strategy.ONESHOT, Strategy.TWOSHOT, Strategy.AUTO)
WEIGHTS = (("spread", 0.0), ("ones", 0.0), ("signed", 0.0), ("small", 1.0), ("spread", 1.0))
"""Kinds of gamma with their weight bias; Gemma's are small, with a bias of one."""
EPSILONS = (1e-5, 1e-6, 1e-12, 1e-3)
ORDER_FREE = ("exact", "rank-tagged", "one-hot")
"""Families whose sums over ranks are the same in any order."""
FINITE = tuple(name for name, family in FAMILIES.items() if family.finite)
PLAIN = ("gaussian", "outliers", "cancelling", "exact", "rank-tagged")
"""Families of ordinary magnitudes: halving or doubling them meets no edge of a format."""


def weighted(weights: Mapping[int, int]) -> SearchStrategy[int]:
    """Numbers, each so many times as likely; one ascending list, so that a failure shrinks straight to the least."""
    return st.sampled_from([number for number in sorted(weights) for _ in range(weights[number])])


def token_counts(world_size: int, most: int = table.LIMITS[-1]) -> SearchStrategy[int]:
    """Rows: half are few, the others around multiples of the world size, the table's limits, or anywhere below 257."""
    near = min(most, 2 * LIMIT)
    weights = Counter(range(1, near + 1))
    for few in range(1, 2 * world_size + 2):
        weights[few] += near // (2 * world_size)
    for around in range(world_size, near, world_size):
        weights.update((around - 1, around + 1))
    for limit in table.LIMITS:
        weights[limit] += LIMIT // 8
    return weighted({tokens: weight for tokens, weight in weights.items() if 1 <= tokens <= most})


def widths(most: int = 16384) -> SearchStrategy[int]:
    """Hidden sizes: half are any small multiple of eight, the others odd multiples, models', and beyond 8,192."""
    weights = Counter(range(LANES, 1024 + LANES, LANES))
    for hidden in (*ODD_HIDDEN, *table.named_sizes()):
        weights[hidden] += 4
    return weighted({hidden: weight for hidden, weight in weights.items() if hidden <= most})


def scales(kinds: Sequence[str] = tuple(SCALES), of: int | None = None) -> SearchStrategy[float]:
    """Dequantisation scales of the given kinds; 1 is the simplest, and one kind among many.

    A captured one is that of the case with the seed `of`, where there is one.
    """
    ordered = sorted(kinds, key=lambda kind: kind != "one")

    def drawn(kind: str, seed: int) -> float:
        return draw_scale(kind, seed if of is None or kind != "captured" else of)

    return st.tuples(st.sampled_from(ordered), st.integers(0, 2**16)).map(lambda chosen: drawn(*chosen))


def seeds() -> SearchStrategy[int]:
    """Seeds of the data."""
    return st.integers(0, 2**32 - 1)


@st.composite
def problems(
    draw: DrawFn,
    world_size: int,
    *,
    families: Sequence[str] = tuple(FAMILIES),
    ops: Sequence[FusionOp] = OPS,
    strategies: Sequence[Strategy] = STRATEGIES,
    dtypes: Sequence[str] = ("bf16", "fp16"),
    tokens: SearchStrategy[int] | None = None,
    hidden: SearchStrategy[int] | None = None,
    elements: int = ELEMENTS,
) -> Problem:
    """Problems of one world size without a schedule.

    Args:
        draw: Hypothesis's own.
        world_size: ranks.
        families: names to draw from; the scale's kind is one that keeps the family's property.
        ops: to draw from.
        strategies: to draw from.
        dtypes: to draw from.
        tokens: rows, left out: `token_counts`.
        hidden: columns, left out: `widths`.
        elements: tokens * hidden at most; many rows stay and columns are cut, of few rows the rows.
    """
    rows = draw(token_counts(world_size) if tokens is None else tokens, label="tokens")
    columns = draw(widths() if hidden is None else hidden, label="hidden")
    if hidden is None and rows > LIMIT and rows * columns > elements:
        columns = max(LANES, elements // rows // LANES * LANES)
    family = draw(st.sampled_from(list(families)), label="family")
    gamma, bias = draw(st.sampled_from(WEIGHTS), label="gamma and weight bias")
    seed = draw(seeds(), label="seed")
    return Problem(
        op=draw(st.sampled_from(list(ops)), label="op"),
        strategy=draw(st.sampled_from(list(strategies)), label="strategy"),
        dtype=draw(st.sampled_from(list(dtypes)), label="dtype"),
        world_size=world_size,
        tokens=rows if rows * columns <= elements else max(1, elements // columns),
        hidden=columns,
        eps=draw(st.sampled_from(EPSILONS), label="eps"),
        scale=draw(scales(FAMILIES[family].scales, of=seed), label="scale"),
        gamma=FAMILIES[family].gamma or gamma,
        weight_bias=0.0 if FAMILIES[family].gamma else bias,
        family=family,
        seed=seed,
    )


@st.composite
def calls(draw: DrawFn, world_size: int, *, most_tokens: int, hidden: Sequence[int], dtypes: Sequence[str]) -> Call:
    """An earlier call on one workspace: its shape, and what the ranks do around it.

    Args:
        draw: Hypothesis's own.
        world_size: ranks.
        most_tokens: rows at most.
        hidden: columns to draw from.
        dtypes: to draw from; one for a kernel whose workspace is bound to it.
    """
    delayed = draw(st.none() | st.integers(0, world_size - 1), label="delayed rank")
    gamma, bias = draw(st.sampled_from(((None, None), *WEIGHTS)), label="gamma and weight bias")
    return Call(
        tokens=draw(token_counts(world_size, most_tokens), label="tokens"),
        hidden=draw(st.sampled_from(sorted(hidden)), label="hidden"),
        op=draw(st.sampled_from(OPS), label="op"),
        strategy=draw(st.sampled_from(STRATEGIES), label="strategy"),
        dtype=draw(st.sampled_from(list(dtypes)), label="dtype"),
        delayed=delayed,
        delay_ms=0 if delayed is None else draw(st.integers(1, 4), label="delay in ms"),
        late=False if delayed is None else draw(st.booleans(), label="delayed after the call"),
        overwrite=draw(st.booleans(), label="input overwritten at once"),
        eps=draw(st.sampled_from((None, *EPSILONS)), label="eps"),
        scale=draw(st.none() | scales(("power", "random", "one")), label="scale"),
        gamma=gamma,
        weight_bias=bias,
        workspace=draw(st.sampled_from((0, 0, 1)), label="workspace"),
    )


def permutations(count: int) -> SearchStrategy[list[int]]:
    """Orders of `count` things."""
    return st.permutations(list(range(count)))

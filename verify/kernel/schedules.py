"""Call patterns on one workspace, or on two: short ones that upset a protocol, and long ones that outlive a counter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from fusecheck.inputs.cells import hash64
from fusecheck.interface import FusionOp, Operation, Strategy
from fusecheck.kernel.table import CALLS, PAUSES, PERIODS
from fusecheck.problem import Call

T = TypeVar("T")

PATTERNS: tuple[tuple[Call, ...], ...] = (
    (Call(64), Call(1), Call(1), Call(64)),
    (Call(33, strategy=Strategy.ONESHOT), Call(2, strategy=Strategy.TWOSHOT), Call(33, strategy=Strategy.ONESHOT)),
    (Call(3), Call(48, overwrite=True), Call(48, overwrite=True), Call(5, delayed=1, delay_ms=20, overwrite=True)),
    (Call(16, delayed=0, delay_ms=15), Call(16, delayed=1, delay_ms=15, late=True), Call(16), Call(2)),
    (Call(9, hidden=128), Call(9, hidden=64), Call(40, hidden=64), Call(9, hidden=128)),
    (Call(12, idle_ms=30), Call(12, reopen=True), Call(40), Call(1), Call(40), Call(12, idle_ms=30)),
    (
        Call(8, strategy=Strategy.TWOSHOT),
        Call(64, strategy=Strategy.TWOSHOT, delayed=1, delay_ms=10),
        Call(5, strategy=Strategy.TWOSHOT, overwrite=True),
        Call(64, strategy=Strategy.TWOSHOT),
    ),
    (Call(7, op=FusionOp.RESIDUAL_RMS_NORM), Call(7, op=FusionOp.RESIDUAL_RMS_NORM_QUANT_FP8), Call(20), Call(7)),
)
"""Long after short and short after long, strategies in turn, ranks out of step, inputs overwritten at once, idle gaps,
a reopened workspace."""

ROWS = (1, 2, 3, 5, 9, 4, 12)
"""Of the calls of long schedules: cheap, of every remainder."""

_SCALES = (0.25, 0.013, 1.0, 0.002, 0.11)
_WEIGHTS = (("spread", 0.0), ("ones", 0.0), ("small", 1.0), ("signed", 0.0), ("spread", 1.0))
_LATE_MS = 4


def two_in_turn(tokens: tuple[int, ...], seed: int) -> tuple[Call, ...]:
    """Calls on two open workspaces in turn, of changing size, now and then two in a row on one."""
    return tuple(
        Call(tokens[hash64(seed, index) % len(tokens)], workspace=(index + index // 5) % 2) for index in range(24)
    )


def long_calls(
    tokens: tuple[int, ...],
    hidden: tuple[int, ...],
    ops: tuple[Operation, ...],
    dtypes: tuple[str, ...],
    world_size: int,
    seed: int,
) -> tuple[Call, ...]:
    """More than `CALLS` calls of one exchange, in which everything changes that one workspace allows.

    Each rank in turn comes late around every multiple of the periods, and all pause before two of the calls.

    Args:
        tokens: rows to draw from.
        hidden: columns to draw from.
        ops: to draw from.
        dtypes: to draw from; one for a kernel whose workspace is bound to it.
        world_size: ranks.
        seed: of the draws.
    """
    idle = dict(zip((CALLS // 3, 2 * CALLS // 3), PAUSES, strict=True))
    made = []
    for index in range(CALLS + 8):
        draw = hash64(seed, index)
        gamma, bias = _pick(_WEIGHTS, draw >> 8)
        around = (index + 2) % PERIODS[0] < 4
        made.append(
            Call(
                _pick(tokens, draw),
                hidden=_pick(hidden, draw >> 16),
                op=_pick(ops, draw >> 24),
                dtype=_pick(dtypes, draw >> 32) if len(dtypes) > 1 else None,
                delayed=index % world_size if around else None,
                delay_ms=_LATE_MS if around else 0,
                late=around and index % 2 == 0,
                idle_ms=idle.get(index, 0),
                eps=_pick((1e-5, 1e-6, 1e-3), draw >> 36),
                scale=_pick(_SCALES, draw >> 40),
                gamma=gamma,
                weight_bias=bias,
            )
        )
    return tuple(made)


def _pick(choices: Sequence[T], number: int) -> T:
    return choices[number % len(choices)]

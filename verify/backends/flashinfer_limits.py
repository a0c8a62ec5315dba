"""Which calls FlashInfer's fused kernel takes, by its own checks and by what `golden/h200x2/findings` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusecheck.interface import Strategy, Support

if TYPE_CHECKING:
    from fusecheck.problem import Problem

WORLD_SIZES = (2, 4, 8, 16)
ONESHOT_BYTES = {2: 512 << 20, 4: 64 << 20, 8: 42 << 20}
"""FlashInfer's own limits for one-shot when it may choose, by four bytes an element of every rank; at world size 16
it has none and raises KeyError."""
CLEARED_BYTES = 2**30 - 1
"""The largest third of a Lamport buffer that one-shot clears rightly: it multiplies it by 0, 1 or 2 in int32."""


def shape_support(problem: Problem) -> Support:
    """Whether the kernel takes this shape; its own limits, with its own reasons."""
    eighths = problem.hidden // 8
    if problem.world_size not in WORLD_SIZES:
        return Support(ok=False, reason=f"world size {problem.world_size} is none of {WORLD_SIZES}")
    if problem.hidden > 65536 or (problem.hidden > 8192 and eighths % 2):
        return Support(ok=False, reason=f"hidden {problem.hidden}: no block and cluster size covers it")
    if problem.strategy is Strategy.TWOSHOT and problem.tokens <= problem.world_size:
        return Support(ok=False, reason=f"two-shot needs more tokens than ranks, got {problem.tokens}")
    if problem.strategy is Strategy.AUTO and problem.world_size not in ONESHOT_BYTES:
        return Support(ok=False, reason="AUTO has no rule at world size 16")
    if problem.strategy is Strategy.TWOSHOT and eighths < problem.world_size:
        return Support(ok=False, reason=f"two-shot at hidden {problem.hidden} has fewer threads in a block than ranks")
    calls = [call for _, call in problem.calls()]
    if all(call.strategy is Strategy.TWOSHOT for call in calls):
        return Support(ok=True)
    # AUTO picks one-shot for the shorter calls of the same workspace.
    room = max(call.tokens for call in calls), max(call.hidden for call in calls)
    reason = cleared_wrongly(problem.world_size, *room)
    return Support(ok=reason is None, reason=reason or "")


def cleared_wrongly(world_size: int, max_tokens: int, hidden: int) -> str | None:
    """Why one-shot calls on a workspace of this size return what earlier calls left, or None.

    The library takes them without an error; `golden/h200x2/findings` shows what happens.
    """
    third = 2 * world_size * max_tokens * hidden
    if third <= CLEARED_BYTES:
        return None
    return (
        f"one-shot on a workspace for {max_tokens} x {hidden} at {world_size} ranks clears beside it: "
        f"the offset of {third} bytes a third overflows an int32, at most {CLEARED_BYTES} do not"
    )


def picks_oneshot(world_size: int, tokens: int, hidden: int, strategy: Strategy) -> bool:
    """Whether a call runs the one-shot kernel; where it is AUTO, as FlashInfer decides."""
    if strategy is Strategy.AUTO:
        return 4 * tokens * hidden * world_size <= ONESHOT_BYTES.get(world_size, 0)
    return strategy is Strategy.ONESHOT

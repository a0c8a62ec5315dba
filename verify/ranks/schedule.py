"""Spreading calls over pools: every group busy, results as they come."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fusecheck.errors import UsageError
from fusecheck.ranks.pool import Pool, wait
from fusecheck.ranks.replies import Reply


@dataclass(frozen=True)
class Request:
    """One call to be made on whichever pool is free.

    Attributes:
        method: the worker's method.
        arguments: what it receives, picklable.
        tag: the caller's own mark, which no rank sees.
        timeout: seconds for this call; None for the schedule's.
    """

    method: str
    arguments: tuple[Any, ...] = ()
    tag: Any = None
    timeout: float | None = None


def map_cases(
    pools: Sequence[Pool], requests: Iterable[Request], *, timeout: float
) -> Generator[tuple[Request, list[Reply]], None, None]:
    """Make the calls, one at a time on each pool, and yield each with its replies as it ends.

    A request is taken from the iterable only when a pool is free for it, so an iterator that writes each
    request to a journal before it hands it out writes no more than are in flight. Closing the generator
    kills the calls in flight.

    Args:
        pools: pools with the same worker.
        requests: the calls, taken lazily.
        timeout: seconds for each call that does not bring its own.

    Raises:
        UsageError: there are no pools.
    """
    if not pools:
        raise UsageError("no pools to run on: give at least one")
    source, idle = iter(requests), list(pools)
    busy: dict[int, tuple[Pool, Request]] = {}
    try:
        while True:
            while idle and (request := next(source, None)) is not None:
                pool = idle.pop(0)
                busy[id(pool)] = (pool, request)
                pool.submit(request.method, *request.arguments, timeout=request.timeout or timeout)
            if not busy:
                return
            wait(pool for pool, _ in busy.values())
            for key, (pool, request) in list(busy.items()):
                replies = pool.poll()
                if replies is not None:
                    del busy[key]
                    idle.append(pool)
                    yield request, replies
    finally:
        for pool, _ in busy.values():
            pool.cancel()

"""Cases a second: the persistent pool against a harness that spawns its ranks anew for every case.

`python -m fusecheck.property_tests.suite.rate [SECONDS]` prints both and their ratio. Both run the same worker on the
same small problems (tokens up to 16, hidden up to 1024, two ranks, every stage judged); they differ in who starts the
ranks.
"""

from __future__ import annotations

import itertools
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch

from fusecheck.case.run import WORKER, collect, request, run_case
from fusecheck.case.worker import CaseWorker
from fusecheck.inputs.cells import hash64
from fusecheck.inputs.scales import draw_scale
from fusecheck.interface import Rank
from fusecheck.problem import Problem
from fusecheck.ranks import Pool, Reply
from fusecheck.ranks.rank import LocalRank

WORLD_SIZE = 2
LIMITS = (16, 1024)
BACKEND = "emulated"
WARM_UP = 30
LEAST_SPAWNED = 3


def problems() -> Iterator[Problem]:
    """Small problems without end; every one has other data, another shape and another scale."""
    for index in itertools.count():
        draw = hash64(index)
        yield Problem(
            world_size=WORLD_SIZE,
            tokens=1 + draw % LIMITS[0],
            hidden=8 * (1 + (draw >> 8) % (LIMITS[1] // 8)),
            scale=draw_scale("random", index),
            seed=index,
        )


def on_a_pool(seconds: float) -> float:
    """Cases a second on a pool whose ranks stay."""
    with Pool(WORKER, WORLD_SIZE) as pool:

        def judge(problem: Problem) -> None:
            outcome = run_case(pool, request(problem, BACKEND, limits=LIMITS))
            assert outcome.passed, outcome.findings

        source = problems()
        for problem in itertools.islice(source, WARM_UP):
            judge(problem)
        return _rate(judge, source, seconds, least=WARM_UP)


def with_spawned_ranks(seconds: float) -> float:
    """Cases a second when every case spawns its ranks, as tests that start processes in their bodies do."""

    def judge(problem: Problem) -> None:
        case = request(problem, BACKEND)
        with tempfile.TemporaryDirectory() as directory:
            context = multiprocessing.get_context("spawn")
            answers = context.SimpleQueue()
            ranks = [context.Process(target=_run_rank, args=(r, directory, case, answers)) for r in range(WORLD_SIZE)]
            for rank in ranks:
                rank.start()
            found = dict(answers.get() for _ in ranks)
            for rank in ranks:
                rank.join()
        outcome = collect(case, [Reply(rank, found[rank]) for rank in range(WORLD_SIZE)])
        assert outcome.passed, outcome.findings

    return _rate(judge, problems(), seconds, least=LEAST_SPAWNED)


def _run_rank(index: int, directory: str, case: dict[str, Any], answers: Any) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{directory}/rendezvous"
    rank = LocalRank(index, WORLD_SIZE, torch.device("cpu"), Path(directory), rendezvous)
    answers.put((index, CaseWorker(cast("Rank", rank)).run(case)))


def _rate(judge: Callable[[Problem], None], source: Iterator[Problem], seconds: float, *, least: int) -> float:
    began, count = time.perf_counter(), 0
    while count < least or time.perf_counter() - began < seconds:
        judge(next(source))
        count += 1
    return count / (time.perf_counter() - began)


def main() -> None:
    """Measure both in one run."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    pool, spawned = on_a_pool(seconds), with_spawned_ranks(seconds)
    print(f"persistent pool:  {pool:8.1f} cases/s")
    print(f"spawn per case:   {spawned:8.3f} cases/s")
    print(f"ratio:            {pool / spawned:8.0f}")


if __name__ == "__main__":
    main()

"""Schedules of `fusecheck protocol` replayed in real processes: the kernel question fails, with the same reads."""

from __future__ import annotations

import re

import pytest
import torch

from fusecheck.case.run import WORKER, Outcome, request, run_case
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.interface import Strategy
from fusecheck.problem import Call, Problem
from fusecheck.property_tests.suite.protocol_replays import MODELS, explored, planned
from fusecheck.protocol.language import ROWS, data
from fusecheck.ranks import Pool
from fusecheck.verdict import Stage

HERE = "fusecheck.property_tests.suite.protocol_replays"
TIMEOUT, HANG = 6.0, 2.5
CPU = torch.device("cpu")


def problem(name: str, strategy: Strategy) -> Problem:
    """The calls of a model as one case: as many tokens as the model has rows, in each call."""
    rows = ROWS[: MODELS[name][1].calls]
    calls = tuple(Call(tokens) for tokens in rows[:-1])
    return Problem(tokens=rows[-1], hidden=64, world_size=2, strategy=strategy, seed=5, schedule=calls)


def replay(name: str, strategy: Strategy, timeout: float = TIMEOUT) -> tuple[Outcome, list[list[int]]]:
    """The case on processes held up as the schedule says, and the first row of the wrong read's residual."""
    case = problem(name, strategy)
    with Pool(WORKER, 2) as pool:
        outcome = run_case(pool, request(case, f"{HERE}:{name.replace('-', '_')}"), timeout=timeout)
        if any(finding.stage is Stage.ALIVE for finding in outcome.findings):
            return outcome, []
        _, call = wrong_read(name)
        replies = pool.call("row_bits", call, "residual", 0, timeout=TIMEOUT)
        return outcome, [reply.value for reply in replies]


def wrong_read(name: str) -> tuple[int, int]:
    """The rank and the call that the model says read wrongly."""
    failure, system = explored(name).failure, explored(name).system
    assert failure is not None
    assert failure.fault is not None
    block = system.processes[system.nodes[failure.fault.node].process].block
    return block.rank, block.call


@pytest.mark.parametrize(("name", "strategy"), [("clear-size", Strategy.ONESHOT), ("no-end-sync", Strategy.TWOSHOT)])
def test_a_wrong_read_is_the_same_in_the_model_and_in_real_processes(name: str, strategy: Strategy) -> None:
    outcome, rows = replay(name, strategy)
    assert outcome.findings
    rank, call = wrong_read(name)
    failure = explored(name).failure
    assert failure is not None
    assert failure.fault is not None
    got = failure.fault.got
    calls = [step for _, step in problem(name, strategy).calls()]
    partials = [[Inputs(step, CPU).of_rank(r).partial for r in (0, 1)] for step in calls]
    residual = Inputs(calls[call], CPU).of_rank(rank).residual
    source, stale = next((r, c) for r in (0, 1) for c in range(len(calls)) if data(c, r) == got)
    assert (source, stale) != (source, call)

    def row(calls_of: tuple[int, int]) -> list[int]:
        total = partials[calls_of[0]][0][0] + partials[calls_of[1]][1][0]
        return [int(bits) for bits in (total + residual[0]).view(torch.int16).tolist()]

    as_modelled = (stale, call) if source == 0 else (call, stale)
    assert rows[rank] == row(as_modelled)
    assert rows[rank] != row((call, call))
    assert rows[1 - rank] == row((call, call))


@pytest.mark.parametrize("name", ["cleared-at-start", "polls-the-senders"])
def test_a_wait_for_ever_is_the_same_in_the_model_and_in_real_processes(name: str) -> None:
    outcome, _ = replay(name, Strategy.ONESHOT, HANG)
    assert outcome.findings[0].stage is Stage.ALIVE
    told = " ".join(finding.message for finding in outcome.findings)
    waiting = {int(rank) for rank in re.findall(r"^rank (\d)", "\n".join(planned(name)[0].outcome), flags=re.MULTILINE)}
    assert "hang" in told
    for rank in waiting:
        assert f"rank {rank}" in told

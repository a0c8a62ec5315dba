"""Virtual ranks answer as ranks in processes do, and a bug around a right kernel is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusecheck.backends import backend
from fusecheck.backends.unfused import UnfusedBackend, finish
from fusecheck.errors import UsageError
from fusecheck.eval.arm import ORACLE, UNFUSED
from fusecheck.eval.engine import BatchPlan, Engine, Next
from fusecheck.eval.spoiled import KINDS, FirstScalePath, SpoiledBackend
from fusecheck.eval.virtual import InParts
from fusecheck.interface import FusionOp, Kernel, RankInputs, RankOutputs, Strategy
from fusecheck.property_tests.accuracy.tiny_models import CONFIG, SoloRank, write_checkpoint
from fusecheck.ranks.virtual import Crew, VirtualRank

OP = FusionOp.RESIDUAL_RMS_NORM_OUT_QUANT_FP8


def answers(folder: Path, *, virtual: bool) -> list[Any]:
    found: list[Any] = []
    rows = [[5, 6, 7, 8 + i] for i in range(5)]

    def keep(_: int, after: Next) -> None:
        found.append(after.table)

    with Engine(folder, 2, device="cpu", vocabulary=CONFIG["vocab_size"], virtual=virtual, timeout=100) as engine:
        for arm, name in ((ORACLE, ""), (UNFUSED, "unfused")):
            engine.open_arm(arm, name, BatchPlan(8, 512), 64)
            engine.last(rows, [[1, 2]] * 5, keep)
            found += [np.array(answer.tokens) for answer in engine.generate(rows, 5, lambda _: False)]
            found.append(np.array([counted["calls"] for counted in engine.close_arm()]))
    return found


def test_virtual_ranks_answer_bit_for_bit_as_ranks_in_processes(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    apart, together = answers(folder, virtual=False), answers(folder, virtual=True)
    assert len(apart) == len(together) == 22
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(apart, together, strict=True))


def inputs(seed: int = 0, rows: int = 64) -> RankInputs:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(torch.bfloat16)

    return RankInputs(draw(rows, 64), draw(rows, 64), draw(64), torch.tensor([0.0137]), 1e-5, 0.0)


def run(kernel: Kernel, given: RankInputs) -> RankOutputs:
    return kernel.run(given, op=OP, strategy=Strategy.AUTO)


def same(first: RankOutputs, second: RankOutputs) -> tuple[bool, bool, bool]:
    pairs = [(getattr(first, name), getattr(second, name)) for name in ("residual", "norm", "quant")]
    alike = [torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs]
    return alike[0], alike[1], alike[2]


@pytest.mark.parametrize("rows", [1, 7, 64, 100])
def test_a_call_in_parts_returns_what_the_whole_call_does(rows: int) -> None:
    whole = UnfusedBackend().open(SoloRank(), None)  # type: ignore[arg-type]
    given = inputs()
    assert same(run(whole, given), run(InParts(whole, rows), given)) == (True, True, True)


@pytest.mark.parametrize(
    ("kind", "unchanged"),
    [
        ("nothing", (True, True, True)),
        ("first_scale", (True, True, True)),
        ("row_in_32", (True, True, False)),
        ("scale_times_2", (True, True, False)),
        ("scale_power_of_two", (True, True, False)),
        ("eps_1e3", (True, False, False)),
        ("sums_in_fp8", (False, False, False)),
    ],
)
def test_each_bug_changes_what_it_says_and_nothing_before_it(kind: str, unchanged: tuple[bool, bool, bool]) -> None:
    right = backend("unfused")
    spoiled = backend(f"fusecheck.eval.spoiled:{kind}__unfused")
    given = inputs()
    first, second = (run(made.open(SoloRank(), None), given) for made in (right, spoiled))  # type: ignore[arg-type]
    assert same(first, second) == unchanged
    assert (getattr(spoiled, "path", None) is FirstScalePath) == (kind == "first_scale")


class WideSum:
    """Adds the ranks' addends in float32, and rounds once."""

    def __init__(self, rank: VirtualRank) -> None:
        self.rank = rank

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        del strategy
        total = sum(part.float() for part in self.rank.board.gather(self.rank.index, inputs.partial))
        assert isinstance(total, torch.Tensor)
        return finish(total.to(inputs.partial.dtype), inputs, op)

    def close(self) -> None: ...


@pytest.mark.parametrize(("ranks", "seen"), [(2, False), (4, True)])
def test_a_bf16_sum_shows_from_three_ranks_on(ranks: int, *, seen: bool) -> None:
    def member(make: Callable[[VirtualRank], Kernel]) -> list[RankOutputs]:
        crew = Crew(torch.device("cpu"), ranks, lambda rank: (make(rank), rank.index))

        def call(made: tuple[Kernel, int]) -> RankOutputs:
            given = inputs(0)
            return run(made[0], replace(given, partial=inputs(made[1]).partial))

        found = crew.everyone(call)
        crew.dismiss()
        return found

    right = member(WideSum)
    spoiled = member(lambda rank: KINDS["sums_in_bf16"](WideSum(rank), rank))
    assert all(same(outputs, right[0])[0] for outputs in right)
    assert same(right[0], spoiled[0])[0] is not seen


def test_an_unknown_bug_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="spoiled kind 'rows', expected one of: nothing, first_scale"):
        SpoiledBackend("rows", "unfused")


def test_a_rank_that_fails_is_told_of_and_not_its_peers() -> None:
    def act(rank: VirtualRank) -> None:
        if rank.index == 1:
            raise ValueError("rank 1 has no such tensor")
        rank.board.wait()

    crew = Crew(torch.device("cpu"), 3, lambda rank: rank)
    with pytest.raises(ValueError, match="rank 1 has no such tensor"):
        crew.everyone(act)
    crew.dismiss()

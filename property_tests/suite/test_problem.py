"""Problems round-trip through one line, their data are a function of the seed, and families keep their promise."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from fusecheck import FusionOp, Problem, Strategy
from fusecheck.errors import UsageError
from fusecheck.inputs.families import FAMILIES
from fusecheck.inputs.gammas import GAMMAS
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.inputs.scales import draw_scale
from fusecheck.kernel.plan import Plan
from fusecheck.operations import STATIC_OPS
from fusecheck.problem import Call
from fusecheck.property_tests.suite.samples import sample_of

CPU = torch.device("cpu")


def test_a_problem_and_its_schedule_survive_a_line_of_json() -> None:
    schedule = (Call(64), Call(1, hidden=128, op=FusionOp.RESIDUAL_RMS_NORM, strategy=Strategy.TWOSHOT, late=True))
    problem = Problem(tokens=3, scale=float("inf"), seed=2**62, schedule=schedule)
    line = problem.to_json()
    assert "\n" not in line
    assert Problem.from_json(line) == problem


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tokens": 0}, "tokens=0"),
        ({"tokens": True}, "tokens=True, expected a whole number"),
        ({"hidden": 100}, "hidden=100, expected a multiple of 8"),
        ({"world_size": 3}, "world_size=3"),
        ({"eps": -1e-6}, "eps=-1e-06"),
        ({"eps": "nan"}, "eps=nan"),
        ({"scale": [1.0, 2.0]}, "scale=[1.0, 2.0], expected a number"),
        ({"dtype": "fp64"}, "unknown dtype 'fp64'"),
        ({"family": "none"}, "unknown family 'none'"),
        ({"op": "NORM"}, "op='NORM'"),
        ({"seed": -1}, "seed=-1"),
        ({"colour": 1}, "unknown field 'colour'"),
        ({"schedule": [{"hidden": 64}]}, "lacks the field 'tokens'"),
        ({"schedule": [{"tokens": 2, "hidden": 12}]}, "hidden=12"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_expected(change: dict[str, object], told: str) -> None:
    record = json.loads(Problem().to_json()) | change
    with pytest.raises(UsageError) as error:
        Problem.from_json(json.dumps(record))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line", ["", "{", "[]", "null", '{"tokens": 1'])
def test_a_line_that_is_no_problem_is_refused(line: str) -> None:
    with pytest.raises(UsageError, match="replay line is"):
        Problem.from_json(line)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_any_rows_are_the_same_bits_as_in_the_whole(family: str, dtype: str) -> None:
    problem = Problem(family=family, dtype=dtype, world_size=4, tokens=300, hidden=512, seed=11)
    inputs = Inputs(problem, CPU)
    for whole, part in (
        (inputs.partial(2), inputs.partial(2, range(250, 280))),
        (inputs.residual(), inputs.residual(range(250, 280))),
    ):
        assert whole.dtype is problem.format.dtype
        assert torch.equal(whole[250:280].view(torch.int16), part.view(torch.int16))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_its_property_at_every_world_size_dtype_and_scale(family: str) -> None:
    for world_size, dtype, kind in itertools.product((1, 2, 16), ("bf16", "fp16"), FAMILIES[family].scales):
        scale = draw_scale(kind, world_size)
        problem = Problem(
            family=family,
            gamma=FAMILIES[family].gamma or "spread",
            dtype=dtype,
            world_size=world_size,
            tokens=20,
            hidden=512,
            scale=scale,
            seed=world_size,
        )
        assert FAMILIES[family].holds(sample_of(problem)) is None, (world_size, dtype, kind)


@pytest.mark.parametrize(
    ("family", "other"),
    [
        ("tiny-rows", "gaussian"),
        ("saturating", "subnormal-codes"),
        ("one-hot", "constant"),
        ("constant", "gaussian"),
        ("native-ties", "gaussian"),
        ("negative-zero", "gaussian"),
        ("subnormal", "gaussian"),
        ("special", "gaussian"),
        ("overflow", "gaussian"),
        ("outliers", "gaussian"),
        ("cancelling", "gaussian"),
        ("exact", "gaussian"),
        ("captured", "outliers"),
    ],
)
def test_a_family_without_its_property_is_noticed(family: str, other: str) -> None:
    """The assertion of each family must be able to fail: here on another family's data."""
    kind = FAMILIES[other].scales[0]
    problem = Problem(family=other, world_size=4, tokens=20, hidden=2048, scale=draw_scale(kind, 1), seed=3)
    assert FAMILIES[family].holds(sample_of(problem)) is not None


def test_ranks_seeds_and_gamma_kinds_give_different_data() -> None:
    problem = Problem(world_size=2, tokens=4, hidden=256)
    inputs = Inputs(problem, CPU)
    assert not torch.equal(inputs.partial(0), inputs.partial(1))
    assert not torch.equal(inputs.partial(0), Inputs(Problem(tokens=4, hidden=256, seed=1), CPU).partial(0))
    weights = [Inputs(Problem(hidden=256, gamma=kind), CPU).gamma() for kind in GAMMAS]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(weights, 2))


def test_normal_values_have_the_moments_of_a_normal_distribution() -> None:
    values = Inputs(Problem(world_size=1, tokens=256, hidden=4096), CPU).residual().double()
    assert abs(float(values.mean())) < 0.005
    assert abs(float(values.square().mean()) - 0.5) < 0.005
    assert abs(float((values / 0.5**0.5).pow(4).mean()) - 3) < 0.05


def test_the_plan_visits_every_family_strategy_op_dtype_and_check() -> None:
    cases = list(itertools.islice(Plan(seed=1).cases(4), 200))
    problems = [case.problem for case in cases]
    assert {p.family for p in problems} == set(FAMILIES)
    assert {p.strategy for p in problems} == set(Strategy)
    assert {p.op for p in problems} == set(STATIC_OPS)
    assert {p.dtype for p in problems} == {"bf16", "fp16"}
    assert {p.gamma for p in problems} == set(GAMMAS)
    assert {p.weight_bias for p in problems} == {0.0, 1.0}
    assert {check for case in cases for check in case.checks} == {"repeat", "strategies", "unfused", "layouts"}
    assert sum(bool(p.schedule) for p in problems) > 20
    assert len({p.scale for p in problems}) > 50
    assert {p.tokens % 4 for p in problems} == {0, 1, 2, 3}


def test_the_plan_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    first, again, other = (
        [case.problem.to_json() for case in itertools.islice(Plan(seed=seed).cases(2), 40)] for seed in (5, 5, 6)
    )
    assert first == again
    assert first != other


def test_given_shapes_and_choices_are_kept() -> None:
    plan = Plan(tokens=(7,), hidden=(2880,), dtypes=("fp16",), strategies=(Strategy.TWOSHOT,), families=("exact",))
    for case in itertools.islice(plan.cases(2), 12):
        problem = case.problem
        assert (problem.tokens, problem.hidden, problem.dtype) == (7, 2880, "fp16")
        assert (problem.strategy, problem.family) == (Strategy.TWOSHOT, "exact")

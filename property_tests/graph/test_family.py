"""Formats that make their scales: what a model and a site of them become, and the plans that say so."""

from __future__ import annotations

import pytest

from fusecheck.errors import UsageError
from fusecheck.graph.cases import GraphCase, Subject, read_plan
from fusecheck.graph.expectations import EVERY
from fusecheck.graph.family import KINDS, fused_operation
from fusecheck.graph.model_plan import named_model
from fusecheck.graph.plan import GraphPlan, SitePlan, made
from fusecheck.graph.results import GraphResult
from fusecheck.graph.run import GraphChecker
from fusecheck.operations import STATIC_OPS, Collective, Operation
from fusecheck.quantisers.known import QUANTISERS


@pytest.mark.parametrize("name", ["decoder:group-fp8", "decoder:dynamic-fp8", "decoder:nvfp4"])
def test_a_model_of_another_format_fuses_at_every_layer(checker: GraphChecker, name: str) -> None:
    plan = named_model(name, 2)
    operation = fused_operation(plan.quantiser, norm_out=False)
    assert operation is not None
    brief = checker.for_subject(checker.subject)
    brief.tokens, brief.export = (3,), name == "decoder:group-fp8"
    result: GraphResult = brief.check(GraphCase(name, plan))
    assert result.findings == []
    counts = {role: count for role, count in result.report["counts"].items() if count}
    assert counts == {"RESIDUAL_RMS_NORM": 1, operation.value: 3, "norm": 1}
    assert result.report["kernel_elements"] > 0


def test_every_format_is_of_a_kind_and_has_its_operations() -> None:
    assert {name for names in KINDS.values() for name in names} == QUANTISERS.keys()
    for name in QUANTISERS:
        with_norm, alone = (fused_operation(name, norm_out=out) for out in (True, False))
        assert with_norm is not None
        assert alone is not None
        assert with_norm.returns_norm
        assert not alone.returns_norm
    assert fused_operation("static-fp8", norm_out=True, experts=True) is None
    found = fused_operation("nvfp4", norm_out=True, experts=True)
    assert found == Operation.named("MOE_FINALIZE_RESIDUAL_RMS_NORM_OUT_QUANT_NVFP4")
    assert found.collective is Collective.MOE_FINALIZE


def test_a_pass_of_one_kind_leaves_the_others_their_norm() -> None:
    from fusecheck.graph.cases import expected

    plan = GraphPlan(sites=(SitePlan(readers=(made("dynamic-fp8"),)),))
    assert expected(Subject(), plan, 0, 2).fused == fused_operation("dynamic-fp8", norm_out=False)
    assert expected(Subject("own:pass"), plan, 0, 2).fused == STATIC_OPS[0]
    assert expected(Subject("own:pass", moves=EVERY), plan, 0, 2).fused == fused_operation(
        "dynamic-fp8", norm_out=False
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"sites":[{"readers":[{"kind":"made","quantiser":"fp5"}]}]}', "quantiser='fp5', expected one of"),
        ('{"sites":[{"readers":[{"kind":"made"}]}]}', "quantiser='': expected both of 'made', or none"),
        (
            '{"sites":[{"readers":[{"kind":"made","quantiser":"nvfp4","layout":"packed"}]}]}',
            "expected one that nvfp4 has",
        ),
        ('{"sites":[{"spread":"yes"}]}', 'expected "dynamic":false'),
        (
            '{"model":"decoder","quantiser":"group-fp8-48"}',
            "hidden=64, expected a multiple of group-fp8-48's group of 48",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        read_plan(text)
    assert "\n" not in str(refused.value)


def test_a_replay_line_of_before_the_family_is_read() -> None:
    plan = GraphPlan.from_json('{"sites":[{"readers":[{"kind":"nvfp4"}]}]}')
    assert plan.sites[0].readers == (made("nvfp4"),)

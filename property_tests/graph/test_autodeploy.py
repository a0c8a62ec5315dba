"""The adapter to AutoDeploy, on operators registered under its published schemas; TensorRT-LLM itself is not run."""

from __future__ import annotations

import pytest
import torch

from fusecheck.errors import UsageError
from fusecheck.graph import autodeploy
from fusecheck.graph.config import QUANT_PASS, SharedConfig
from fusecheck.graph.dialects import dialect_named
from fusecheck.graph.plan import GraphPlan, ReaderPlan, SitePlan
from fusecheck.graph.rows import ROWS, Row
from fusecheck.graph.run import GraphCase, GraphChecker, Subject
from fusecheck.property_tests.graph import stand_ins  # noqa: F401 - registers the operators

NAMES = ("F1", "F2", "F3", "F6-chain", "F9", "F10-torch", "F13", "F14", "D1", "D3", "D4", "N1", "N2-alpha", "N7-vector")
PICKED = [row for row in ROWS if row.name in NAMES]


@pytest.mark.parametrize("row", PICKED, ids=[row.name for row in PICKED])
def test_an_edge_case_in_its_operators_becomes_what_it_must(quick_checker: GraphChecker, row: Row) -> None:
    subject = Subject("fusecheck.property_tests.graph.stand_ins:fuse_quant")
    checker = quick_checker.for_subject(subject)
    checker.dialect = autodeploy.NAME
    result = checker.check(GraphCase(row.name, row.plan, row.title))
    assert result.findings == []
    # No published operator returns norm and codes, so that a mixed site keeps its norm.
    assert bool(result.left) == (row.name == "D1")


def test_its_first_pass_runs_through_the_adapter(quick_checker: GraphChecker) -> None:
    checker = quick_checker.for_subject(
        Subject("fusecheck.property_tests.graph.stand_ins:fuse_norm", after_norm=False, quantises=False)
    )
    checker.dialect = autodeploy.NAME
    plan = GraphPlan(sites=(SitePlan(), SitePlan(readers=(ReaderPlan(kind="bf16"),))))
    assert checker.check(GraphCase("adapter", plan)).findings == []


def test_every_role_is_found_under_its_published_name() -> None:
    found = dialect_named(autodeploy.NAME)
    assert str(found.all_reduce) == "auto_deploy.trtllm_dist_all_reduce.default"
    assert str(found.quant) == "dist.trtllm_fused_allreduce_residual_rmsnorm_quant_fp8.default"
    assert found.out_quant is None
    assert set(found.norms) == {"torch", "triton", "flashinfer"}


def test_an_operator_with_other_arguments_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.library.define("stand_in_other::all_reduce", "(Tensor t, str strategy, int group) -> Tensor")
    monkeypatch.setitem(autodeploy.SCHEMAS, "stand_in_other::all_reduce", ("all_reduce", ("t", "strategy")))
    with pytest.raises(UsageError, match=r"takes \(t, strategy, group\), the mapping knows \(t, strategy\)"):
        autodeploy.dialect()


def test_a_missing_operator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(autodeploy.SCHEMAS, "auto_deploy::no_such_op", ("all_reduce", ("t",)))
    with pytest.raises(UsageError, match="auto_deploy::no_such_op is not registered"):
        autodeploy.dialect()


@pytest.mark.skipif(autodeploy.installed(), reason="says what an installation without TensorRT-LLM says")
def test_without_tensorrt_llm_the_status_says_so() -> None:
    assert "not installed" in autodeploy.status()
    assert autodeploy.NOT_RUN in autodeploy.status()
    with pytest.raises(UsageError, match=f"transform {QUANT_PASS} needs tensorrt_llm"):
        autodeploy.fuse_allreduce_residual_rmsnorm_quant_fp8(
            torch.fx.symbolic_trace(torch.nn.Identity()), SharedConfig()
        )

"""AutoDeploy's side: its operators under their published schemas, its transforms called as its optimizer does."""

from __future__ import annotations

import pytest
import torch

from fusecheck.errors import UsageError
from fusecheck.graph import autodeploy
from fusecheck.graph.cases import GraphCase, Subject, adapted, row_cases
from fusecheck.graph.config import QUANT_PASS, SharedConfig
from fusecheck.graph.run import GraphChecker
from fusecheck.graph.schemas import Published, published
from fusecheck.property_tests.graph import stand_ins

NAMES = "F1,F2,F3,F6-chain,F9,F10-torch,F13,F14,D1,D3,D4,D7,D8-decode,N1,N2-alpha,N7-vector"
PICKED, _ = adapted(stand_ins.LIBRARY, row_cases(2, NAMES))
HERE = "fusecheck.property_tests.graph.stand_ins"


@pytest.mark.parametrize("case", PICKED, ids=[case.name for case in PICKED])
def test_an_edge_case_in_its_operators_becomes_what_it_must(quick_checker: GraphChecker, case: GraphCase) -> None:
    checker = quick_checker.for_subject(Subject(f"{HERE}:fuse_quant"))
    checker.dialect = autodeploy.NAME
    assert checker.check(case).findings == []


def test_its_first_pass_runs_through_the_adapter(quick_checker: GraphChecker) -> None:
    checker = quick_checker.for_subject(Subject(f"{HERE}:fuse_norm", after_norm=False, quantises=False))
    checker.dialect = autodeploy.NAME
    assert [checker.check(case).findings for case in PICKED[:2]] == [[], []]


def test_one_strategy_a_graph_and_no_norm_that_a_later_transform_makes() -> None:
    kept, absent = adapted(stand_ins.LIBRARY, row_cases(2, "D7,F10-flashinfer"))
    assert [{site.strategy for site in case.plan.sites} for case in kept] == [{"NCCL"}]  # type: ignore[union-attr]
    assert absent == {"F10-flashinfer": "fuse_rmsnorm, which makes this norm, runs after the fusing transforms"}


def test_arguments_of_other_names_are_taken_and_of_other_types_refused() -> None:
    entry = published(autodeploy.NAME)["all_reduce"]
    for leaf, schema in (
        ("renamed", "(Tensor x, str how) -> Tensor"),
        ("longer", "(Tensor t, str s, int n=1) -> Tensor"),
    ):
        torch.library.define(f"stand_in_other::{leaf}", schema)
        entry.check(getattr(torch.ops.stand_in_other, leaf).default)
    torch.library.define("stand_in_other::moved", "(str strategy, Tensor t) -> Tensor")
    with pytest.raises(UsageError, match=r"takes \(str strategy, Tensor t\), expected \(Tensor t, str strategy\)"):
        entry.check(torch.ops.stand_in_other.moved.default)


def test_a_missing_operator_is_named_where_graphs_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    known = published(autodeploy.NAME)
    absent = Published("absent", "auto_deploy::no_such_op", "(Tensor t) -> Tensor", "nowhere", required=True)
    monkeypatch.setitem(known, "absent", absent)
    with pytest.raises(UsageError, match="auto_deploy::no_such_op is not registered: install tensorrt_llm"):
        stand_ins.LIBRARY.ready()
    monkeypatch.setitem(known, "absent", Published("absent", absent.name, absent.schema, "nowhere"))
    stand_ins.LIBRARY.ready()


@pytest.mark.skipif(autodeploy.installed(), reason="says what an installation without TensorRT-LLM says")
def test_without_tensorrt_llm_the_status_says_so() -> None:
    assert "not installed" in stand_ins.LIBRARY.status()
    with pytest.raises(UsageError, match=f"transform {QUANT_PASS} needs tensorrt_llm"):
        autodeploy.fuse_allreduce_residual_rmsnorm_quant_fp8(
            torch.fx.symbolic_trace(torch.nn.Identity()), SharedConfig()
        )

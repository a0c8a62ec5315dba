"""The transforms on their own: opt-in, policies on the token count, reasons, order, and what they leave behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fusecheck.errors import UsageError
from fusecheck.graph import nodes, roles
from fusecheck.graph.build import build
from fusecheck.graph.config import (
    ALL_ENABLED,
    NORM_PASS,
    QUANT_PASS,
    FusionPolicy,
    PolicyKind,
    SharedConfig,
    TransformConfig,
    load_transforms,
)
from fusecheck.graph.passes import (
    fuse_all,
    fuse_allreduce_residual_rmsnorm,
    fuse_allreduce_residual_rmsnorm_quant_fp8,
)
from fusecheck.graph.plan import GraphPlan, ReaderPlan, SitePlan
from fusecheck.graph.structure import signature
from fusecheck.interface import FusionOp

own = torch.ops.fusecheck

TWO = SharedConfig(world_size=2, transforms=ALL_ENABLED)
PLAIN = GraphPlan(sites=(SitePlan(), SitePlan()))
QUANT, OUT_QUANT = FusionOp.RESIDUAL_RMS_NORM_QUANT_FP8, FusionOp.RESIDUAL_RMS_NORM_OUT_QUANT_FP8


def rewritten(plan: GraphPlan, shared: SharedConfig = TWO) -> torch.fx.GraphModule:
    """A graph after both passes."""
    return fuse_all(build(plan, 0, 2).module, shared)


def quantising(policy: FusionPolicy) -> SharedConfig:
    """Both passes on, the quantising one under a policy."""
    return replace(TWO, transforms={**ALL_ENABLED, QUANT_PASS: TransformConfig(enabled=True, policy=policy)})


def fused_nodes(gm: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """The fused operators of a graph, in order."""
    return [node for node in gm.graph.nodes if roles.fused_op(node) is not None]


def ops_of(gm: torch.fx.GraphModule) -> list[FusionOp]:
    """The fused operations of a graph, in order."""
    return [op for op in map(roles.fused_op, gm.graph.nodes) if op is not None]


def test_the_quantising_pass_is_opt_in() -> None:
    shared = SharedConfig(world_size=2)
    gm = fuse_allreduce_residual_rmsnorm(build(PLAIN, 0, 2).module, shared)
    assert ops_of(gm) == [FusionOp.RESIDUAL_RMS_NORM] * 2
    before = signature(gm)
    fuse_allreduce_residual_rmsnorm_quant_fp8(gm, shared)
    assert signature(gm) == before
    fuse_allreduce_residual_rmsnorm_quant_fp8(gm, TWO)
    assert ops_of(gm) == [QUANT] * 2


def test_the_quantising_pass_alone_finds_nothing_to_do() -> None:
    gm = build(PLAIN, 0, 2).module
    before = signature(gm)
    fuse_allreduce_residual_rmsnorm_quant_fp8(gm, TWO)
    assert signature(gm) == before


def test_every_refusal_has_its_reason() -> None:
    plan = GraphPlan(sites=(SitePlan(add="alpha"), SitePlan(readers=(ReaderPlan(), ReaderPlan(scale=1)))))
    norm, quant, _ = rewritten(plan).meta["transform_history"]
    assert (norm.name, norm.num_matches, quant.num_matches) == (NORM_PASS, 1, 0)
    assert list(norm.refused.values()) == ["the add scales an operand by alpha=2"]
    assert list(quant.refused.values()) == ["the readers' input scales differ: 0.00892857183, 1"]


def test_ranks_that_decide_differently_fuse_nowhere() -> None:
    shared = replace(TWO, gather=lambda text: [text, "{}"])
    gm = rewritten(PLAIN, shared)
    assert ops_of(gm) == []
    assert set(gm.meta["transform_history"][0].refused.values()) == {"ranks decide differently"}


def test_a_graph_is_untouched_when_another_rank_cannot_be_asked() -> None:
    def unreachable(text: str) -> list[str]:
        raise ConnectionError("peer is gone")

    gm = build(PLAIN, 0, 2).module
    before = signature(gm)
    with pytest.raises(ConnectionError):
        fuse_all(gm, replace(TWO, gather=unreachable))
    assert signature(gm) == before


def test_a_threshold_per_call_travels_in_the_strategy() -> None:
    gm = rewritten(PLAIN, quantising(FusionPolicy(PolicyKind.PER_CALL, max_tokens=128)))
    assert [nodes.argument(fused, 5) for fused in fused_nodes(gm)] == ["AUTO<=128"] * 2


@pytest.mark.parametrize(("tokens", "fused"), [(4, True), (5, False)])
def test_listed_batch_sizes_are_fused(tokens: int, *, fused: bool) -> None:
    shared = quantising(FusionPolicy(PolicyKind.PER_BATCH_SIZE, batch_sizes=(1, 4)))
    gm = rewritten(replace(PLAIN, tokens=tokens, dynamic=False), shared)
    assert ops_of(gm) == [QUANT if fused else FusionOp.RESIDUAL_RMS_NORM] * 2


@pytest.mark.parametrize(("largest", "fused"), [(128, True), (129, False)])
def test_compile_ranges_that_end_below_the_threshold_are_fused(largest: int, *, fused: bool) -> None:
    shared = replace(quantising(FusionPolicy(PolicyKind.PER_RANGE, max_tokens=128)), max_tokens=largest)
    assert ops_of(rewritten(PLAIN, shared)) == [QUANT if fused else FusionOp.RESIDUAL_RMS_NORM] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "has no mapping 'transforms:'"),
        ("transforms: {x: 3}", "x is 3, expected a mapping"),
        ("transforms: {x: {enabled: maybe}}", "enabled is 'maybe', expected true or false"),
        ("transforms: {x: {enable: true}}", "unknown key 'enable'"),
        ("transforms: {x: {stage: export}}", "stage is 'export', expected post_load_fusion"),
        ("transforms: {x: {policy: {kind: often}}}", "kind is 'often', expected one of always"),
        ("transforms: {x: {policy: {kind: per_call}}}", "max_tokens=None, expected a number above 0"),
        ("transforms: {x: {policy: {kind: per_batch_size, batch_sizes: [0]}}}", "expected a list of positive integers"),
        ("transforms: [", "cannot read"),
    ],
)
def test_a_wrong_configuration_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message.replace("[", r"\[")) as raised:
        load_transforms(path)
    assert "\n" not in str(raised.value)

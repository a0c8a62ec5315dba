"""vLLM's side: graphs in its operators and back, a pass on them, and its own pass where its files are."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import pytest

from fusecheck import toml
from fusecheck.errors import UsageError
from fusecheck.graph import vllm, vllm_host, waivers
from fusecheck.graph.autodeploy import AutoDeploy
from fusecheck.graph.cases import GraphCase, Subject, adapted, row_cases
from fusecheck.graph.findings import Check
from fusecheck.graph.library import Library
from fusecheck.graph.plan import GraphPlan, ReaderPlan, SitePlan, made
from fusecheck.graph.results import Status
from fusecheck.graph.run import GraphChecker
from fusecheck.graph.schemas import FILE, published

HERE = "fusecheck.property_tests.graph.vllm_stand_in"
LIBRARY = vllm.Vllm()
ROWS = (
    "F1,F2,F6,F7,F8,F11-fixed,F12,F14,D1,D3,D5,N1,N2-alpha,N2-none,N3,N5,N5-float32,"
    "F17-group-fp8,F17-group-fp8-packed,F18-nvfp4,F20-nan,D9,D12,D13"
)


def test_nothing_but_names_changes_on_the_way_there_and_back(quick_checker: GraphChecker) -> None:
    checker = quick_checker.for_subject(Subject(f"{HERE}:nothing", after_norm=False))
    checker.dialect = vllm.NAME
    columns = SitePlan(readers=(made("group-fp8-32", layout="column-major"),))
    cases, _ = adapted(LIBRARY, [*row_cases(2, ROWS), GraphCase("columns", GraphPlan(sites=(columns, SitePlan())))])
    statuses = {result.case.name: result.status() for result in checker.check_all(cases)}
    # The site behind that of the row would fuse in every one of them.
    assert set(statuses.values()) == {Status.MISSED}, statuses


def test_a_pass_on_its_operators_is_judged_by_what_its_graphs_compute(quick_checker: GraphChecker) -> None:
    checker = quick_checker.for_subject(Subject(f"{HERE}:Fusing.apply", after_norm=False))
    checker.dialect = vllm.NAME
    cases, _ = adapted(LIBRARY, row_cases(2, "F1,F2,F7,F12,F14,D1,D3,N1,N2-none,N3,N5-float32"))
    for result in checker.check_all(cases):
        assert result.findings == [], result.case.name
        assert result.judged > 0


@pytest.mark.parametrize("row", ["F17-dynamic-fp8", "F17-group-fp8-packed", "F17-nvfp4"])
def test_a_quantise_that_makes_its_scales_is_vllms_own_and_may_be_fused(quick_checker: GraphChecker, row: str) -> None:
    subject = Subject(
        f"{HERE}:FusingScales.apply", after_norm=False, moves=("fp8", "dynamic_fp8", "group_fp8", "nvfp4")
    )
    checker = quick_checker.for_subject(subject)
    checker.dialect = vllm.NAME
    cases, _ = adapted(LIBRARY, row_cases(2, row))
    (result,) = checker.check_all(cases)
    assert (result.findings, result.status()) == ([], Status.EXPECTED)
    made = {got for _, got in result.outcomes.values()}
    assert any(got.endswith(row.removeprefix("F17-").upper().replace("-", "_")) for got in made if got), made


@pytest.mark.parametrize(
    ("name", "row", "checks"),
    [
        ("AnyWeight", "N5-float32", {Check.KERNEL, Check.UNFUSED, Check.PREDECESSOR}),
        ("UnwrittenResidual", "N2-none", {Check.KERNEL}),
        ("ZerosLikeTheSum", "N2-none", {Check.COUNTS}),
        ("UnwrittenNorm", "D2", {Check.UNFUSED}),
        ("ResultsSwapped", "F1", {Check.UNFUSED}),
        ("OtherLimits", "F17-group-fp8", {Check.RUNS}),
    ],
)
def test_what_vllms_users_have_met_is_found(
    quick_checker: GraphChecker, name: str, row: str, checks: set[Check]
) -> None:
    checker = quick_checker.for_subject(Subject(f"{HERE}:{name}.apply", after_norm=False))
    checker.dialect = vllm.NAME
    cases, _ = adapted(LIBRARY, row_cases(2, row))
    (result,) = checker.check_all(cases)
    assert checks & {finding.check for finding in result.findings}, result.findings
    assert result.status() is Status.BROKEN


def test_one_layer_reads_a_norm_and_no_strategy_is_named() -> None:
    kept, absent = adapted(LIBRARY, row_cases(2, "F3,F18-nvfp4,D7,D11,N12-draft,N13"))
    assert set(absent) == {"F3", "D11", "N12-draft", "N13"}
    assert kept[0].plan.sites[0].strategy == "AUTO"  # type: ignore[union-attr]


def test_a_layer_that_nobody_reads_is_left_out_and_two_quantises_of_a_norm_do_not_arise() -> None:
    dead, shared = ReaderPlan(kind="dead"), made("nvfp4", shared_scale=True)
    plans = [GraphPlan(sites=(SitePlan(readers=readers),)) for readers in ((dead, shared, shared), (dead,))]
    plans += [GraphPlan(sites=(SitePlan(readers=(shared, made("dynamic-fp8"))),))]
    kept, *absent = (LIBRARY.adapt(plan) for plan in plans)
    assert kept == LIBRARY.adapt(GraphPlan(sites=(SitePlan(readers=(shared, shared)),)))
    assert absent == [vllm.ABSENT["dead"], vllm.ABSENT["several readers"]]


@pytest.mark.parametrize("library", toml.read(FILE))
def test_a_librarys_schemas_parse_and_name_their_source(library: str) -> None:
    for entry in published(library).values():
        assert entry.parsed.arguments
        assert entry.file


@pytest.mark.skipif(vllm_host.files() is not None, reason="says what a machine without vLLM says")
def test_without_its_files_its_own_pass_is_refused() -> None:
    import torch

    assert "not installed" in LIBRARY.status()
    with pytest.raises(UsageError, match="pip install vllm, with --no-deps"):
        vllm_host.fusion_pass(2, torch.bfloat16, 4096)


@pytest.mark.parametrize(
    ("library", "pattern"), [(LIBRARY, "vllm-*.yaml"), (AutoDeploy(), "autodeploy.yaml")], ids=["vllm", "autodeploy"]
)
def test_the_known_gaps_of_a_librarys_own_pass_name_checks_and_rows_that_there_are(
    library: Library, pattern: str
) -> None:
    kept, _ = adapted(library, [*row_cases(2), *row_cases(1)])
    files = list((Path(__file__).parents[2] / "golden" / "graph").glob(pattern))
    assert files
    for file in files:
        accepted = waivers.from_options([], [], file)
        waivers.check_rows(accepted, [])
        # A row that no graph of the library's shows needs no waiver.
        assert all(fnmatch.filter([case.name for case in kept], waiver.row or "*") for waiver in accepted)
        assert len({waiver.text for waiver in accepted}) == len(accepted) > 0

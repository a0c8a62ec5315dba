"""The question whether a row depends on its company: planted breaches, right kernels, and the words of the answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fusecheck import backends
from fusecheck.errors import UsageError
from fusecheck.interface import Limits
from fusecheck.invariance import certificate
from fusecheck.invariance.calls import Call
from fusecheck.invariance.claims import CLAIMS, Answer, doubling, sizes
from fusecheck.invariance.differences import apart
from fusecheck.invariance.launch import Launch, launch, thresholds, tree_sum
from fusecheck.invariance.probes import ORDER, TREE, Probes
from fusecheck.invariance.search import Search
from fusecheck.invariance.shares import choose
from fusecheck.operations import Operation, Strategy
from fusecheck.problem import Problem
from fusecheck.property_tests.kernel.given import Given
from fusecheck.property_tests.kernel.relations import rows_of_another_batch
from fusecheck.property_tests.suite.command_line import refused, run, told
from fusecheck.property_tests.suite.company import PINNED, PLANTED, Choosy, company
from fusecheck.property_tests.suite.in_process import InProcess, decide
from fusecheck.property_tests.suite.lone_rank import CPU, LoneRank
from fusecheck.testing import NotConforming, assert_invariant, sharp_rows

MOST = 13
WHERE = "fusecheck.property_tests.suite.company"
LIKE = f"{WHERE}:FlashInferLike"


@pytest.fixture(autouse=True)
def _kernels_by_name(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Planted and pinned kernels are found by their names."""
    known = backends.backend
    monkeypatch.setattr(backends, "backend", lambda n: company(n) if n in {**PLANTED, **PINNED} else known(n))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_breach_is_found_and_named_with_its_first_size(name: str) -> None:
    planted = PLANTED[name]
    worlds = (1, 2) if "world size" in planted.breaks else (planted.world_size,)
    with InProcess(name, Problem(hidden=1024, tokens=MOST, world_size=planted.world_size)) as kernels:
        few = ("run to run", "batch", "position")  # four ranks take long
        answers = decide(kernels, worlds, CLAIMS if planted.world_size < 4 else few)
        found = {claim: answer.breach for claim, answer in answers.items() if answer.breach}
        assert {claim: breach.size for claim, breach in found.items()} == planted.breaks
        assert {breach.seen.output for breach in found.values()} == {planted.output}
        assert answers["batch"].changes == planted.changes
        for breach in found.values():
            assert certificate.described(kernels, breach)["by"]["elements"] > 0


@pytest.mark.parametrize(
    ("name", "op", "dtype", "world_size"),
    [
        ("pinned", "RESIDUAL_RMS_NORM_OUT_QUANT_FP8", "bf16", 2),
        ("one block", "RESIDUAL_RMS_NORM", "fp16", 1),
        ("ring from rank 1", "RESIDUAL_RMS_NORM_OUT_QUANT_DYNAMIC_FP8", "bf16", 2),
        ("unrounded", "RESIDUAL_RMS_NORM_OUT_QUANT_MXFP8", "bf16", 1),
        ("pinned", "RESIDUAL_RMS_NORM_QUANT_NVFP4", "bf16", 1),
        ("pinned", "ALL_REDUCE", "bf16", 1),
    ],
)
def test_a_right_kernel_is_accused_of_nothing(name: str, op: str, dtype: str, world_size: int) -> None:
    problem = Problem(op=Operation.named(op), dtype=dtype, hidden=1024, tokens=MOST, world_size=world_size)
    with InProcess(name, problem) as kernels:
        answers = decide(kernels, (world_size,))
    untold = {"world size"} | ({"ranks"} if world_size == 1 else set())
    assert {claim for claim, answer in answers.items() if answer.verdict == "untold"} == untold
    assert {claim for claim, answer in answers.items() if answer.verdict == "invariant"} == set(CLAIMS) - untold
    assert kernels.calls < 600


def test_a_batch_that_the_kernel_refuses_is_never_asked_for_and_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Choosy(refused=(4, 5, 8), raising=())
    monkeypatch.setattr(backends, "backend", lambda _: kernel)
    with InProcess("choosy", Problem(hidden=1024, tokens=MOST, world_size=1)) as kernels:
        answers = decide(kernels, (1,))
        assert {claim: answer.breach.size for claim, answer in answers.items() if answer.breach} == {"batch": 9}
        tree = Probes(kernels, (1,), ("ONESHOT",), answers["batch"].changes).records()[1]
    assert answers["position"].tried == "every place in batches of 2, 3, 6, 12, 13"
    assert [each["rows"] for each in tree["trees"]] == [1, 9]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_watched_rows_show_another_order_far_more_often_than_rows_drawn_at_random(dtype: str) -> None:
    chosen = choose(Problem(hidden=1024, world_size=4, dtype=dtype), 16)
    assert len(set(chosen.rows)) == 16
    assert chosen.shares["squares"] >= 0.15
    assert chosen.shares["ranks"] == 1.0
    assert chosen.drawn["squares"] <= 0.05


def test_the_thresholds_of_the_launch_rule_are_those_of_the_source() -> None:
    def from_rows(hidden: int, multiprocessors: int, ranks: int = 1) -> dict[int, str]:
        found = thresholds(hidden, 512, multiprocessors, ranks=ranks)
        return {rows: f"{shape.threads}x{shape.blocks}" for rows, shape in found}

    assert from_rows(2880, 132) == {1: "180x2", 67: "360x1"}
    assert from_rows(4096, 132) == {1: "128x4", 34: "256x2", 67: "512x1"}
    assert from_rows(8192, 148) == {1: "128x8", 19: "256x4", 38: "512x2", 75: "1024x1"}
    assert from_rows(4096, 132, ranks=2) == {1: "128x4", 67: "256x2", 133: "512x1"}


def test_a_tree_adds_up_every_element_once() -> None:
    ones = torch.ones(3, 2880)
    for shape in (launch(2880, 1, 132), launch(2880, 99, 132), Launch(90, 4)):
        assert tree_sum(ones, shape).tolist() == [2880.0] * 3


def test_a_difference_is_counted_in_units_in_the_last_place_and_in_codes() -> None:
    first = torch.tensor([[1.0, -1.0, 0.0, 2.0]], dtype=torch.bfloat16)
    second = torch.tensor([[1.0078125, -1.0, -0.0, 2.0]], dtype=torch.bfloat16)
    assert apart(first, second) == {"elements": 2, "of": 4, "most": 1, "unit": "ulp"}
    codes = torch.tensor([[0x01, 0x81, 0x10]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    others = torch.tensor([[0x81, 0x81, 0x7F]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert apart(codes, others) == {"elements": 2, "of": 3, "most": None, "unit": "codes"}


def test_the_sizes_that_are_tried_begin_at_one_and_end_at_the_largest() -> None:
    assert sizes(8, 100) == list(range(1, 9))
    assert sizes(40, 16)[14:] == [15, 16, 18, 20, 22, 24, 27, 30, 33, 37, 40]
    assert doubling(13) == [1, 2, 3, 4, 6, 8, 12, 13]


def test_a_call_of_a_replay_line_that_is_cut_short_is_refused() -> None:
    call = Call(8, (4, 6), place=7, company="nan", before=(3,))
    assert Call.from_record(call.to_record()) == call
    for broken in ({}, {"tokens": 2, "watched": [1, 2, 3]}, {"tokens": 2, "company": "none"}, "x"):
        with pytest.raises(UsageError, match="expected that of a finding"):
            Call.from_record(broken)


def test_a_threshold_is_an_answer_and_a_finding_only_where_it_is_declared_or_required(tmp_path: Path) -> None:
    asked = ("invariance", "--backend", LIKE, "--tokens", "7", "--rows", "4", "--tp", "1", "--multiprocessors", "20")
    code, out = told(*asked, "--run-dir", str(tmp_path / "answer"))
    assert code == 0, out
    assert "batch: breaks from 6 on" in out
    code, out = told(*asked, "--require-invariant", "--run-dir", str(tmp_path / "required"))
    assert code == 1, out
    record = json.loads((tmp_path / "required" / "result.json").read_text(encoding="utf-8"))
    assert {finding["stage"] for finding in record["findings"]} == {"batch"}
    line = record["findings"][0]["question"]
    code, out = told("replay", line, "--run-dir", str(tmp_path / "again"))
    assert code == 1, out
    assert "batch: breaks from 6 rows on, norm first" in out
    code, out = told("replay", line, "--backend", "emulated", "--run-dir", str(tmp_path / "other"))
    assert code == 0, out
    code, out = told("invariance", "--compare", str(tmp_path / "answer"), str(tmp_path / "required"))
    assert (code, out) == (0, "the two certificates say the same")


def test_a_call_that_fails_leaves_a_certificate_of_what_was_decided_before_and_names_its_rows(tmp_path: Path) -> None:
    asked = ("invariance", "--backend", f"{WHERE}:Choosy", "--tokens", "7", "--rows", "4", "--tp", "1")
    code, out = told(*asked, "--run-dir", str(tmp_path))
    assert code == 3, out
    assert "inconclusive, " in out
    claims = json.loads((tmp_path / "certificate.json").read_text(encoding="utf-8"))["claims"]
    verdicts = {each["claim"]: each["verdict"] for each in claims}
    assert verdicts == {c: "invariant" if c in ("run to run", "workspace history") else "untold" for c in CLAIMS}
    assert "Choosy in a batch of 5 rows on 1 ranks: error: rank 0: raised ValueError" in claims[3]["untold"]


def test_a_probe_that_a_kernel_does_not_bear_is_not_told_and_the_claims_stand(tmp_path: Path) -> None:
    asked = ("invariance", "--backend", f"{WHERE}:Finite", "--tokens", "2", "--rows", "4", "--tp", "1")
    code, out = told(*asked, "--run-dir", str(tmp_path))
    assert code == 3, out
    claims = json.loads((tmp_path / "certificate.json").read_text(encoding="utf-8"))["claims"]
    assert claims[3]["verdict"] == "invariant"
    assert [each["claim"] for each in claims[-2:]] == [ORDER, TREE]
    assert "a sum of squares is infinite" in claims[-1]["untold"]


def test_one_call_in_fifty_is_a_breach_from_run_to_run_that_replays_and_nothing_else_is_told(tmp_path: Path) -> None:
    asked = ("invariance", "--backend", f"{WHERE}:EveryFiftieth", "--tokens", "2", "--rows", "8", "--tp", "1")
    code, out = told(*asked, "--run-dir", str(tmp_path / "asked"))
    assert code == 1, out
    record = json.loads((tmp_path / "asked" / "result.json").read_text(encoding="utf-8"))
    [finding] = record["findings"]
    assert finding["message"].startswith("run to run: breaks, seen in a batch of 1 rows, quant first: ")
    untold = {each["claim"] for each in record["summary"]["certificate"]["claims"] if each["verdict"] == "untold"}
    assert untold == {*CLAIMS, ORDER, TREE} - {"run to run"}
    code, out = told("replay", finding["question"], "--run-dir", str(tmp_path / "again"))
    assert code == 1, out
    assert "breaks, seen in a batch of 1 rows" in out


def test_two_certificates_are_compared_both_ways_by_what_was_tried_too_and_a_broken_one_is_refused(
    tmp_path: Path,
) -> None:
    batch = {"claim": "batch", "verdict": "invariant", "tried": "1 to 8"}
    one = {"kernel": "a", "hidden": 64, "claims": [batch], "evidence": {"rows": 16}}
    tree = {"claim": TREE, "verdict": "read", "words": "8 deep"}
    two = {**one, "claims": [{**batch, "tried": "1 to 4"}, tree], "evidence": {"rows": 4}}
    assert certificate.compared(one, two) == [
        "watched rows: 16 | 4", "batch: invariant 1 to 8 | invariant 1 to 4", f"{TREE}: not asked | read 8 deep"
    ]  # fmt: skip
    assert certificate.compared(one, {**two, "hidden": 8}) == ["hidden: 64 | 8", f"{TREE}: not asked | read 8 deep"]
    for number, claims in enumerate(([1], [{}], [{"claim": "batch"}], "batch", [{"claim": [], "verdict": "read"}])):
        broken = tmp_path / f"{number}.json"
        broken.write_text(json.dumps({**one, "claims": claims}), encoding="utf-8")
        with pytest.raises(UsageError, match="holds no certificate"):
            certificate.read_certificate(broken)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--device", "cuda"), 3, "0 CUDA GPUs here, 2 needed"),
        (("--device", "cuda", "--virtual-ranks"), 3, "0 CUDA GPUs here, 1 needed"),
        (("--virtual-ranks",), 2, "virtual ranks share a GPU, got --device cpu"),
        (("--backend", "flashinfer", "--device", "cpu"), 2, "runs on cuda, got --device cpu"),
        (("--multiprocessors", "-3"), 2, "--multiprocessors"),
        (("--backend", f"{WHERE}:TakesFew", "--tokens", "9"), 2, "refuses a batch of 9 rows: tokens=9"),
    ],
)
def test_what_cannot_be_asked_is_said_before_anything_is(
    options: tuple[str, ...], code: int, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.chdir(tmp_path)
    assert said in refused("invariance", *options, code=code)


def test_rows_of_a_few_elements_are_watched_too() -> None:
    assert choose(Problem(hidden=8, world_size=2), 4).rows
    assert len(sharp_rows(torch.ones(2), 1e-5)) == 16
    with pytest.raises(UsageError, match=r"gamma is \[1\].*expected \[hidden\], at least \[2\]"):
        sharp_rows(torch.ones(1), 1e-5)


@pytest.mark.parametrize(("below", "fails"), [(None, False), (6, False), (7, True), (0, True)])
def test_a_batch_that_breaks_below_what_is_declared_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, below: int | None, *, fails: bool
) -> None:
    kernel = company("launch")
    kernel.flow = replace(kernel.flow, invariant_below=below)
    monkeypatch.setattr(backends, "backend", lambda _: kernel)
    record = {"claim": "batch", "verdict": "breaks", "size": 6, "output": "norm", "how": "", "changes": [6]}
    found = list(certificate.findings(InProcess("launch", Problem()), [record | {"question": "{}"}], require=False))
    assert bool(found) == fails
    assert all("the kernel declares invariance" in finding["message"] for finding in found)


def test_ctrl_c_leaves_a_certificate_of_the_claims_that_were_decided(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def until_the_second(search: Search) -> None:
        search.told(Answer("run to run", tried="8 equal calls of 1 row"))
        raise KeyboardInterrupt

    monkeypatch.setattr(Search, "run", until_the_second)
    code = run("invariance", "--hidden", 64, "--tokens", 2, "--run-dir", tmp_path)
    record = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    claims = record["summary"]["certificate"]["claims"]
    assert (code, record["verdict"], record["summary"]["interrupted"]) == (3, "inconclusive", True)
    assert {each["claim"]: each["untold"] for each in claims} == {
        claim: "" if claim == "run to run" else "the run was interrupted" for claim in CLAIMS
    }


def test_an_invariant_function_passes_and_one_whose_order_depends_on_the_batch_is_named_with_its_size() -> None:
    def right(x: torch.Tensor) -> torch.Tensor:
        return tree_sum(x * x, Launch(16, 4))[:, None] * x

    def wrong(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, tree_sum(x * x, Launch(16, 4) if len(x) < 7 else Launch(64, 1))[:, None] * x

    def mixing(x: torch.Tensor) -> torch.Tensor:
        return x - x.amax()

    rows = torch.randn(24, 512, generator=torch.Generator().manual_seed(5))
    assert {answer.verdict for answer in assert_invariant(right, rows, most=12)} == {"invariant"}
    with pytest.raises(NotConforming, match=r"^batch: breaks from 7 rows on.* of output 1 differs in .* ulp"):
        assert_invariant(wrong, rows, most=12)
    with pytest.raises(NotConforming, match=r"^batch: breaks from 2 rows on"):
        assert_invariant(mixing, rows, most=12)


def test_the_relation_between_two_batches_shows_a_launch_that_changes_with_the_rows() -> None:
    """So the property test that every backend gets can fail for the usual cause."""
    given = Given.of(Problem(op=Operation.named("RESIDUAL_RMS_NORM"), world_size=1, tokens=12, hidden=1024), CPU)
    related = rows_of_another_batch(given, [0, 2, 4, 6, 8])

    def parted(name: str) -> set[str]:
        kernel = company(name).open(LoneRank(world_size=1), Limits(12, 1024, torch.bfloat16))
        one, two = (
            kernel.run(x.of_rank(0), op=x.problem.op, strategy=Strategy.ONESHOT)
            for x in (related.first, related.second)
        )
        return {output for output, first, second in related.equal(one, two) if not torch.equal(first, second)}

    assert parted("pinned") == set()
    assert parted("launch") == {"norm"}

"""`fusecheck faults` from end to end, on a few faults of every kind; the whole catalogue is in `golden/faults.json`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from fusecheck.errors import UsageError
from fusecheck.eval.compare import compare
from fusecheck.eval.gate import Verdict
from fusecheck.eval.outcome import Options
from fusecheck.faults import accuracy, command, listed
from fusecheck.faults.catalogue import Fault, catalogue, resolve
from fusecheck.faults.hunt import Budget
from fusecheck.faults.run import FaultRun, Settings
from fusecheck.kernel.table import Case
from fusecheck.problem import Problem

GOLDEN = Path(__file__).parents[2] / "golden"
RECORDS = ("faults.json", "faults_quantisers.json")
"""Runs of the catalogue: all groups but one, and that of the quantisers which make their scales."""
BUDGET = Budget(cases=60, timeout=5.0, shrink_seconds=3.0)
EXCHANGE = ("Lamport", "TwoShot")
"""Hooks where ranks race: which stage notices, and in which case, is a matter of timing."""

GROUPS = ("arithmetic", "protocol", "launcher", "quantiser")
FEW_CASES = 10
"""Faults of the exchange that were found in so few cases are hunted again."""

SLOW = "fusecheck.property_tests.suite.slow_backend:SlowBackend"


@pytest.fixture(scope="module")
def run() -> Iterator[FaultRun]:
    with FaultRun(Settings(budget=BUDGET)) as made:
        yield made


def recorded() -> list[dict[str, Any]]:
    return [json.loads((GOLDEN / name).read_text(encoding="utf-8")) for name in RECORDS]


def recorded_rows() -> list[dict[str, Any]]:
    return [row for record in recorded() for row in record["summary"]["rows"]]


def test_the_recorded_runs_killed_the_whole_catalogue_without_a_false_alarm() -> None:
    for record in recorded():
        summary = record["summary"]
        assert (record["command"], record["verdict"]) == ("faults", "pass")
        assert summary["killed"] == summary["faults"] > 0
        assert summary["false_alarms"] == 0
    assert recorded()[0]["summary"]["legal_cases"] > 0
    assert {row["id"] for row in recorded_rows()} == {fault.id for fault in catalogue().faults}
    assert [row["id"] for row in recorded_rows() if not row["killed"]] == []


def rows_of_kernels(*, exchange: bool) -> list[tuple[dict[str, Any], Fault]]:
    """Recorded faults of a kernel's exchange or of its computation, less those that hang: each waits out a deadline."""
    rows = [(row, catalogue().fault(row["id"])) for row in recorded_rows()]
    return [
        (row, fault)
        for row, fault in rows
        if fault.group in GROUPS
        and (fault.hook.partition(".")[0] in EXCHANGE) == exchange
        and not row["message"].startswith("hang")
    ]


def test_the_recorded_cases_still_catch_faults_of_the_computation_and_right_kernels_still_pass_them(
    run: FaultRun,
) -> None:
    rows = [(row, fault) for row, fault in rows_of_kernels(exchange=False) if fault.group != "protocol"]
    rows = [row for row in rows if row[1].group != "quantiser"] + [r for r in rows if r[1].group == "quantiser"][::4]
    assert len(rows) > 35
    passed = set()
    for row, fault in rows:
        run.hunter.refresh()
        case, right = Case(Problem.from_json(row["case"]), tuple(row["checks"])), fault.right
        found = run.hunter.judge(case, f"fusecheck.faults.backend:{fault.id}").findings
        assert [finding.stage.value for finding in found][:1] == [row["stage"]], fault.id
        if (row["case"], right) not in passed:
            outcome = run.hunter.judge(case, right, timeout=60)
            assert outcome.passed, [finding.line() for finding in outcome.findings]
        passed.add((row["case"], right))


def test_faults_of_the_exchange_are_still_found_by_the_plan(run: FaultRun) -> None:
    rows = [(row, fault) for row, fault in rows_of_kernels(exchange=True) if row["cases"] <= FEW_CASES]
    assert len(rows) > 7
    for _, fault in rows:
        caught = run.hunter.hunt(
            f"fusecheck.faults.backend:{fault.id}", seed=0, right=f"emulated:{fault.dataflow}", shrink=False
        )
        assert caught.killed, f"{fault.id} survived {caught.cases} cases"
        assert caught.false_alarms == []


def test_a_fault_is_caught_and_its_shrunk_case_is_small_and_still_caught(run: FaultRun) -> None:
    caught = run.hunter.hunt("fusecheck.faults.backend:KA-19", seed=5, right="emulated")
    assert caught.killed
    assert caught.false_alarms == []
    assert caught.case is not None
    assert caught.shrunk is not None
    assert (caught.shrunk.tokens, caught.shrunk.hidden, caught.shrunk.world_size) == (1, 64, 2)
    again = run.hunter.judge(Case(caught.shrunk), "fusecheck.faults.backend:KA-19")
    assert again.findings[0].stage.value == caught.stages[0] == "quant"


def test_a_case_that_the_right_kernel_fails_too_catches_nothing(run: FaultRun) -> None:
    hunter = run.hunter
    hunter.budget = replace(BUDGET, cases=20)
    try:
        caught = hunter.hunt("fusecheck.faults.backend:KA-19", seed=5, right="fusecheck.faults.backend:KA-19")
    finally:
        hunter.budget = BUDGET
    assert not caught.killed
    assert caught.cases == 20
    assert caught.false_alarms


def test_ranks_out_of_step_are_no_fault(run: FaultRun) -> None:
    hunter = run.hunter
    hunter.budget = replace(BUDGET, cases=24, timeout=30.0)
    try:
        caught = hunter.hunt(SLOW, seed=2)
    finally:
        hunter.budget = BUDGET
    assert (caught.stages, caught.message) == ([], "")
    assert caught.cases == 24


def test_a_hang_is_caught_within_its_deadline(run: FaultRun) -> None:
    run.hunter.budget = replace(BUDGET, timeout=2.0)
    try:
        result = run.run(catalogue().fault("LW-03"), seed=0)
    finally:
        run.hunter.budget = BUDGET
    assert result.stages == ["alive"]
    assert "hang" in result.message


@pytest.mark.parametrize("name", ["AC-08e", "AC-08f", "KA-07"])
def test_a_weakened_judge_is_noticed(run: FaultRun, name: str) -> None:
    result = run.run(catalogue().fault(name), seed=0)
    assert result.stages == ["right kernel fails"], f"{name} was not noticed"
    assert "raised" not in result.message


def test_a_judge_without_a_stage_is_noticed_by_a_fault_that_passes(run: FaultRun) -> None:
    run.run(catalogue().fault("KA-04a"), seed=0)
    result = run.run(catalogue().fault("AC-08c"), seed=0)
    assert result.stages == ["known fault passes"]
    assert result.message.startswith(("KA-03 passes", "KA-04a passes"))


def test_a_judge_of_rank_zero_alone_hides_what_goes_wrong_on_another_rank_only(run: FaultRun) -> None:
    weak, caught = catalogue().fault("AC-08h"), run.hunter.hunt("fusecheck.faults.backend:KP-05", seed=0, shrink=False)
    assert caught.case is not None
    assert run.hides(weak, caught.case, caught.backend)
    assert not run.hides(weak, caught.case, "fusecheck.faults.backend:KA-01")


def test_a_case_that_passes_under_the_right_judge_too_shows_no_weakness(run: FaultRun) -> None:
    assert not run.hides(catalogue().fault("AC-08c"), Case(Problem()), "emulated")


@pytest.mark.parametrize("name", [fault.id for fault in catalogue().faults if fault.subject == "pair"])
def test_the_gate_passes_no_spoiled_pair(pair: accuracy.Pair, name: str) -> None:
    fault = catalogue().fault(name)
    verdict = compare(*resolve(fault.patch)(pair), options=Options()).verdict
    assert verdict is not Verdict.PASS
    assert verdict.value == fault.stage


@pytest.fixture(scope="module")
def pair() -> accuracy.Pair:
    return accuracy.right_pair(4)


def test_the_field_is_credited_where_it_notices_and_not_where_its_inputs_hide_the_fault(run: FaultRun) -> None:
    fault = catalogue().fault("KA-19")  # multiplies by the scale: with scale 1 that is right
    caught = run.hunter.hunt("fusecheck.faults.backend:KA-19", seed=0, shrink=False)
    columns = run.peers.judge(fault, caught, seed=0)
    assert columns.ours["TRT"] == columns.ours["Modular"] == "kill"
    assert columns.own["TRT"] == "miss"
    assert columns.ours["FI fusion"] == columns.own["FI fusion"] == "miss"
    assert "JAX" not in columns.own


def test_the_fields_criteria_for_a_format_are_asked_about_a_fault_of_that_format(run: FaultRun) -> None:
    fault = catalogue().fault("KQ-11-dynamic-fp8")  # stores the scale in bf16 when the codes are done
    caught = run.hunter.hunt("fusecheck.faults.backend:KQ-11-dynamic-fp8", seed=0, shrink=False)
    columns = run.peers.judge(fault, caught, seed=0)
    assert columns.own == {}
    assert (columns.ours["FI 10/11"], columns.ours["AITER quant"]) == ("miss", "miss")
    assert columns.ours["vLLM norm + quant"] == "kill"
    assert "FI 8/9" not in columns.ours


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[[kernel]]\nbackend = "no.such.module:thing"\n', r"kernel 1: .*no\.such\.module"),
        ('[[kernel]]\nbackend = "emulated"\nexpect = "crash"\n', "expect='crash', expected one of: fail, pass"),
        ('[[kernel]]\nexpect = "fail"\n', "kernel 1: no backend"),
        ('[[kernel]]\nbackend = "emulated"\nexpects = "pass"\n', "unknown field 'expects'"),
        ("[other]\n", r"no \[\[kernel\]\] entries"),
        ("[[kernel\n", "is not TOML"),
    ],
)
def test_a_broken_list_of_kernels_is_refused_in_one_line(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "kernels.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=told) as error:
        listed.read(str(path))
    assert "\n" not in str(error.value)


def app() -> typer.Typer:
    made = typer.Typer()
    command.register(made)
    made.command("other")(lambda: None)
    return made


def test_the_command_judges_a_list_of_kernels_by_what_is_expected_of_each(tmp_path: Path) -> None:
    path, out = tmp_path / "kernels.toml", tmp_path / "out.json"
    path.write_text(
        '[[kernel]]\nbackend = "fusecheck.faults.backend:KA-19"\ntitle = "wrong way round"\n'
        '[[kernel]]\nbackend = "emulated"\nexpect = "pass"\n'
    )
    common = ["faults", "--backend", str(path), "--cases", "4", "--json", str(out), "--run-dir", str(tmp_path / "r")]
    assert CliRunner().invoke(app(), common).exit_code == 0
    summary = json.loads(out.read_text())["summary"]
    assert (summary["faults"], summary["killed"], summary["false_alarms"]) == (1, 1, 0)
    path.write_text('[[kernel]]\nbackend = "emulated"\nexpect = "fail"\n')
    assert CliRunner().invoke(app(), common).exit_code == 1
    assert json.loads(out.read_text())["verdict"] == "fail"


def test_the_command_runs_a_fault_and_writes_its_row_and_its_record(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    seeds = tmp_path / "seeds.json"
    asked = ["faults", "--fault", "AC-02", "--legal-cases", "0", "--seeds", "2", "--record", str(seeds)]
    result = CliRunner().invoke(app(), [*asked, "--json", str(out), "--run-dir", str(tmp_path / "r")])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(out.read_text())["summary"]["rows"]
    assert (row["id"], row["killed"], row["stage"]) == ("AC-02", True, "invalid")
    assert json.loads(seeds.read_text())["faults"]["AC-02"].keys() == {"0", "1"}


def test_the_command_prints_the_catalogue_with_its_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "console", Console(width=400))
    result = CliRunner().invoke(app(), ["faults", "--list", "--fault", "KA-01"])
    assert result.exit_code == 0
    assert "https://github.com/ROCm/aiter/pull/2586" in result.output

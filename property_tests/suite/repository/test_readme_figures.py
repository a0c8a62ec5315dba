"""Every figure of the README is one that a record holds, or that a quick measurement finds again."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from fusecheck import backends
from fusecheck.dataflow import DATAFLOWS
from fusecheck.faults import sensitivity
from fusecheck.faults.format_criteria import FORMAT_CRITERIA
from fusecheck.inputs.families import FAMILIES
from fusecheck.interface import Strategy
from fusecheck.operations import GIVEN_SCALE
from fusecheck.parts import asked
from fusecheck.parts.agenda import KERNEL_SECONDS, STEPS
from fusecheck.problem import Problem
from fusecheck.property_tests.suite import deaths, judging, quantiser_refutation, refutation
from fusecheck.property_tests.suite.launching import marked_environment
from fusecheck.property_tests.suite.repository import pages
from fusecheck.property_tests.suite.repository.checkout import ROOT
from fusecheck.quantflow import QUANT_FLOWS

MACHINES = ("on two shared CPU cores", "on two H200s")
ROWS = [row for machine in MACHINES for row in pages.table(pages.read(), machine)]
FIGURES = {command.strip("`"): result for _, command, result in ROWS}
CHIP = ROOT / "golden" / "h200x2"


def summary(path: Path) -> dict[str, Any]:
    """The summary of a record that passed."""
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["verdict"] == "pass", path
    found: dict[str, Any] = record["summary"]
    return found


def number(pattern: str, text: str) -> float:
    """The number in the one place of a text that the pattern marks by a group."""
    found = re.search(pattern, text)
    assert found is not None, f"{pattern} is not in: {text}"
    return float(found[1].replace(",", ""))


def judged(cases: int | None, most_elements: int) -> Iterator[tuple[int, Problem]]:
    """The elements and the Problem of each case that `fusecheck verify` runs."""
    run, _ = asked.Asked(seed=0, cases=cases, most_elements=most_elements, seconds=None).run()
    drawn = asked.DRAWN if cases is None else cases
    for subject, share in run.shares().items():
        backend = backends.backend(subject.backend)
        for case, _ in islice(share.stream(run.plan), len(share.core) + drawn):
            calls = [each for _, each in case.problem.calls()]
            if all(backend.supports(each).ok for each in calls):
                outputs = ((1 + c.op.returns_norm + c.op.returns_quant) * c.tokens * c.hidden for c in calls)
                yield subject.world_size * sum(outputs), case.problem


def main_job(result: str) -> None:
    cases = list(judged(None, asked.MOST_ELEMENTS))
    elements = sum(count for count, _ in cases)
    assert elements >= 3.5e8
    assert number(r"([\d,]+) outputs", result) == pytest.approx(elements, rel=0.05)
    assert number(r"(\d+) dataflows", result) == len(DATAFLOWS)
    assert {p.family for _, p in cases} == set(FAMILIES)
    assert {(p.world_size, p.strategy) for _, p in cases} >= {
        (size, strategy) for size in (2, 4) for strategy in (Strategy.ONESHOT, Strategy.TWOSHOT)
    }
    minutes = number(r"under (\d+) minutes", result)
    assert KERNEL_SECONDS + sum(step.quick.seconds for step in STEPS if step.name != "latency") <= 60 * minutes


def long_run(result: str) -> None:
    words = next(words for words in pages.commands(pages.read()) if words[:3] == ["verify", "--only", "none"])
    cases = int(words[words.index("--cases") + 1])
    elements = sum(count for count, _ in judged(cases, asked.MOST_ELEMENTS))
    assert number(r"([\d,]+) outputs", result) == pytest.approx(elements, rel=0.05)
    assert 1 < number(r"([\d.]+) admissible codes", result) < 1.01


def refuted(result: str) -> None:
    *_, last = refutation.refute(200_000, 1 << 10, refutation.SEED)
    assert number(r"(\d+) violations", result) == sum(tally.total for tally in last.sound.values()) == 0
    # One element in four is also judged by the bound that was broken on purpose.
    spoilt = last.broken["sabotaged"]
    share = number(r"caught ([\d.]+) million", result) * 1e6 / (number(r"in ([\d,]+) elements", result) / 4)
    assert share / 3 < spoilt.total / spoilt.elements < 3 * share


def sensitive(result: str) -> None:
    with sensitivity.one_thread():
        found = [sensitivity.smallest_scale_error(depth=depth) for depth in (False, True)]
    said = [number(rf"([\d.e-]+) {how}", result) for how in ("in any order", "with the depth declared")]
    assert said == pytest.approx(found, rel=0.02)


def faults(result: str) -> None:
    record = summary(ROOT / "golden" / "faults.json")
    assert f"{record['killed']} of {record['faults']}, {record['false_alarms']} false alarms" in result
    assert number(r"in ([\d,]+) cases", result) == record["legal_cases"]


def faults_of_quantisers(result: str) -> None:
    record = summary(ROOT / "golden" / "faults_quantisers.json")
    assert f"{record['killed']} of {record['faults']}" in result
    assert record["false_alarms"] == 0


def false_alarms(result: str) -> None:
    record = summary(ROOT / "golden" / "false_alarms.json")
    assert number(r"([\d,]+) outputs", result) == record["outputs"]
    assert number(r"(\d+) false alarms", result) == record["false_alarms"] == 0
    assert number(r"(\d+) dataflows", result) == record["dataflows"]
    assert number(r"(\d+) arithmetics", result) == record["arithmetics"]


def refuted_formats(result: str) -> None:
    tallies = {name: next(quantiser_refutation.refute(name, 1, 1 << 12, seed=1)) for name in QUANT_FLOWS}
    assert number(r"(\d+) violations", result) == sum(len(t.verdict()[0]) for t in tallies.values())
    assert number(r"each of (\d+) formats", result) == len(tallies)


def benchmark(result: str) -> None:
    torch.set_num_threads(1)
    of = judging.sample(GIVEN_SCALE)
    # The least of a few interleaved runs is the one that other programs disturbed least.
    acts = (lambda: judging.usual_check(of), lambda: judging.full_check(of))
    rounds = [tuple(judging.seconds_of(act) for act in acts) for _ in range(6)]
    usual, full = map(min, zip(*rounds, strict=True))
    said = [float(times) for times in re.findall(r"[\d.]+", result)[:2]]
    shown = [int(theirs) / int(ours) for theirs, ours in re.findall(r"(\d+) ms against (\d+) ms", result)]
    assert said == pytest.approx(shown, rel=0.1)
    assert usual / full > 0.7 * said[0]


def on_the_chip(result: str) -> None:
    elements = number(r"([\d,]+) outputs each", result)
    for name in ("flashinfer-tp2", "flashinfer-fp32-tp2"):
        assert summary(CHIP / "kernel" / f"{name}.json")["elements"] == elements


def rejected(_result: str) -> None:
    records = sorted((CHIP / "kernel").glob("*-rejected.json"))
    assert {int(re.findall(r"virtual(\d+)", path.name)[0]) for path in records} == {4, 8, 16}
    assert {json.loads(path.read_text())["verdict"] for path in records} == {"fail"}


def pace(result: str) -> None:
    assert number(r"([\d,]+) judged", result) == int(summary(CHIP / "pace.json")["cases_per_second"])


def races(_result: str) -> None:
    found = json.loads((CHIP / "findings" / "flashinfer-0.6.13-kernel.json").read_text(encoding="utf-8"))["findings"]
    told = {
        "residual written by the kernel before",
        "gamma written by the kernel before",
        "right after a call of few rows",
    }
    assert {finding["stage"] for finding in found} == {"again"}
    assert all(any(text in finding["message"] for finding in found) for text in told)
    mended = summary(CHIP / "kernel" / "others-tp2.json")["subjects"]
    assert any(subject["backend"] == "flashinfer:pdl" and subject["cases"] > 0 for subject in mended)


def cleared_beside(result: str) -> None:
    for version in ("0.6.13", "0.7.2.post1", "0.7.4"):
        printed = (CHIP / "findings" / f"reproduce-{version}.txt").read_text(encoding="utf-8")
        line = next(line for line in printed.splitlines() if line.startswith("cleared-beside, rank 0"))
        right, wrong = (json.loads(counts) for counts in re.findall(r"wrong (\[[\d, ]+\])", line))
        assert right == [0] * 9
        assert number(r"([\d,]+) of 524,288", result) == wrong[5]
        assert wrong[:5] == [0] * 5


def finalize_hangs(result: str) -> None:
    records = [json.loads(path.read_text()) for path in (CHIP / "findings").glob("flashinfer-0.7.4-finalize*.json")]
    assert number(r"of (\d+) runs", result) == number(r"in (\d+) of", result) == len(records)
    for record in records:
        (finding,) = record["findings"]
        problem, question = json.loads(finding["problem"]), json.loads(finding["question"])
        assert finding["message"].startswith("hang")
        assert problem["op"] == "MOE_FINALIZE_RESIDUAL_RMS_NORM"
        assert number(r"at (\d+) rows", result) == problem["tokens"]
        assert number(r"rows of (\d+)", result) == problem["hidden"]
        assert number(r"the (\d+) cases before", result) == len(question["before"]) == record["summary"]["cases"] - 1


def finalize_by_itself(result: str) -> None:
    printed = (CHIP / "findings" / "reproduce-finalize.txt").read_text(encoding="utf-8")
    unchanged, changed, *older = printed.split("\n\n")
    for version, text in zip(("0.7.4", "0.6.13", "0.7.0.post1"), (unchanged, *older), strict=True):
        assert f"flashinfer {version}," in text
        assert version in result
        assert "moe-finalize, rank 0: hangs" in text
    sums = int(number(r"all (\d+) sums", result))
    assert f"moe-finalize, rank 0: wrong in 0 of {sums} calls" in changed
    record = json.loads((CHIP / "findings" / "flashinfer-0.7.4-polling-changed.json").read_text(encoding="utf-8"))
    assert record["verdict"] == "pass"
    assert record["summary"]["cases"] == number(r"passes (\d+) cases", result)


def core_plan_of_flashinfer(result: str) -> None:
    record = json.loads((CHIP / "family" / "0.7.4-native.json").read_text(encoding="utf-8"))
    whole, findings = record["summary"], record["findings"]
    rest = summary(CHIP / "family" / "0.7.4-without-finalize.json")
    assert number(r"of (\d+) cases pass", result) == whole["cases"]
    assert number(r"^(\d+) of", result) == whole["cases"] - whole["subjects"][0]["failed"]
    assert number(r"hangs in (\d+);", result) == len(findings)
    assert {json.loads(finding["problem"])["op"] for finding in findings} == {"MOE_FINALIZE_RESIDUAL_RMS_NORM"}
    assert number(r"without it (\d+)", result) == rest["cases"]
    assert number(r"([\d,]+) outputs", result) == rest["elements"]
    (subject,) = rest["subjects"]
    assert (subject["refused"], subject["failed"]) == (32, 0)
    assert float(re.findall(r"at ([\d.]+) cases", result)[0]) == round(subject["cases"] / subject["seconds"], 1)


def vllm_on_the_chip(result: str) -> None:
    record = json.loads((CHIP / "family" / "vllm-0.25.1.json").read_text(encoding="utf-8"))
    made = record["summary"]
    assert record["verdict"] == "pass"
    assert (number(r"(\d+) cases", result), number(r"([\d,]+) outputs", result)) == (made["cases"], made["elements"])


def sglang_on_the_chip(result: str) -> None:
    record = json.loads((CHIP / "family" / "sglang-0.4.6.json").read_text(encoding="utf-8"))
    (subject,) = record["summary"]["subjects"]
    assert (number(r"in (\d+) of", result), number(r"of (\d+) cases", result)) == (subject["failed"], subject["cases"])
    problems = [json.loads(finding["problem"]) for finding in record["findings"]]
    assert {(each["family"], each["layout"]) for each in problems} == {("special-groups", "packed")}
    printed = (CHIP / "findings" / "reproduce-wheels.txt").read_text(encoding="utf-8")
    assert "element 0 of row 0 is inf, the others 1: exponents [255, 119, 119, 119], codes of the others" in printed
    assert "by row [[-448.0], [256.0], [256.0], [256.0]]" in printed


def property_tests_on_the_chip(result: str) -> None:
    printed = (CHIP / "property-tests.log").read_text(encoding="utf-8")
    profile = re.findall(r"profile `(\w+)`", result)[0]
    assert f"hypothesis profile {profile};" in printed
    assert f"flashinfer-python {re.findall(r'FlashInfer ([0-9.]+)', result)[0]}," in printed
    last = printed.splitlines()[-1]
    assert number(r"(\d+) passed", result) == number(r"(\d+) passed", last)
    assert "failed" not in last


def whole_sets(result: str) -> None:
    record = json.loads((CHIP / "accuracy" / "accuracy.json").read_text(encoding="utf-8"))
    flips = [task["judgement"]["flips"] for task in record["tasks"]]
    assert number(r"of ([\d,]+) questions", result) == sum(sum(each.values()) - each["churn"] for each in flips)
    assert number(r"(\d+) lost", result) == sum(each["lost"] for each in flips)
    assert number(r"(\d+) gained", result) == sum(each["gained"] for each in flips)
    verdicts = {task["endpoint"]["name"]: task["judgement"]["verdict"] for task in record["tasks"]}
    known = {"golden_gsm8k": "pass", "golden_mmlu": "pass"}
    assert verdicts == {**known, "gsm8k": "inconclusive", "mmlu": "inconclusive"}


def real_model(result: str) -> None:
    name = "mmlu" if result.startswith("**PASS**") else "gsm8k"
    record = json.loads((CHIP / "accuracy-qwen" / f"{name}.json").read_text(encoding="utf-8"))
    task = record["summary"]["tasks"][name]
    assert task["verdict"] == record["verdict"] == result.split(":")[0].strip("*").lower()
    assert number(r"of ([\d,]+), of which", result) == task["n"]
    assert (number(r"(\d+) lost", result), number(r"(\d+) gained", result)) == (task["lost"], task["gained"])
    assert f"{100 * task['baseline']:.2f} % and {100 * task['candidate']:.2f} %" in result
    assert f"at most {-100 * task['low']:.2f} points where {100 * task['margin']:.2f} are" in result


def cast(_result: str) -> None:
    found = summary(CHIP / "exhaust.json")["instructions"]["cvt.rn.satfinite.e4m3x2.f32"]
    assert (found["inputs"], found["wrong"]) == (2**32, 0)


CHECKS: dict[str, Callable[[str], None]] = {
    "fusecheck verify": main_job,
    "fusecheck verify --only": long_run,
    "python -m fusecheck.property_tests.suite.refutation": refuted,
    "fusecheck faults --sensitivity": sensitive,
    "fusecheck faults": faults,
    "fusecheck faults --group quantiser": faults_of_quantisers,
    "python -m fusecheck.property_tests.suite.refutation --format": refuted_formats,
    "python -m fusecheck.property_tests.suite.false_alarms": false_alarms,
    "make bench": benchmark,
    "mpirun -n 2 fusecheck kernel": on_the_chip,
    "STEPS=rejected ci/mpirun.sh": rejected,
    "fusecheck pace": pace,
    "fusecheck exhaust": cast,
    "fusecheck kernel --backend flashinfer:pdl": races,
    "fusecheck kernel --backend flashinfer --tp 2 --op MOE": finalize_hangs,
    "fusecheck kernel --backend flashinfer --tp 2 --case-timeout": core_plan_of_flashinfer,
    "fusecheck kernel --backend vllm": vllm_on_the_chip,
    "fusecheck kernel --backend sglang": sglang_on_the_chip,
    "fusecheck accuracy --device cuda": whole_sets,
    "fusecheck accuracy --model fp8": real_model,
    "python golden/h200x2/findings/reproduce.py cleared-beside": cleared_beside,
    "python golden/h200x2/findings/reproduce.py moe-finalize": finalize_by_itself,
    "mpirun -n 2 python -m pytest": property_tests_on_the_chip,
}
"""By how the row's command begins; the longest that fits."""


@pytest.mark.parametrize("command", FIGURES)
def test_a_figure_of_the_table_holds(command: str) -> None:
    begun = [start for start in CHECKS if command.startswith(start)]
    assert begun, f"no check for the figures of `{command}`"
    CHECKS[max(begun, key=len)](FIGURES[command])


def test_the_criteria_of_others_do_what_the_table_says() -> None:
    record = json.loads((ROOT / "golden" / "faults_peers.json").read_text(encoding="utf-8"))["summary"]
    known = {entry["name"]: entry for entry in record["criteria"]}
    text = pages.read()
    faults_asked = number(r"faults caught, of (\d+), on our inputs", text)
    right_kernels = number(r"right kernels rejected, of (\d+)", text)
    rows = pages.table(text, "criterion, as `--peers` names it")
    assert rows[0][1:] == [str(record["killed"]), "", str(record["false_alarms"])]
    for name, *cells in rows[1:]:
        entry = known[name.partition(":")[0]]
        own = entry["killed_on_their_inputs"]
        told = [entry["killed_on_our_inputs"], "" if own is None else own, entry["false_alarms"][0]]
        assert cells == list(map(str, told)), name
        assert (entry["faults"], entry["false_alarms"][1]) == (faults_asked, right_kernels)


def test_ranks_that_die_are_reported_as_and_about_as_soon_as_the_table_says() -> None:
    told = pages.table(pages.read(), "the rank")
    manners = ("spin", "sigkill", "throw", "leak", "garbage")  # of each row but the last, its parent's death
    command = [sys.executable, "-m", "fusecheck.property_tests.suite.deaths", "--measure", ",".join(manners)]
    _, environment = marked_environment()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=True)
    measured = [deaths.Row(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row.manner for row in measured] == list(manners)
    for row, (_, kind, local, _, lost, left) in zip(measured, told[:-1], strict=True):
        assert row.ok, row
        assert row.reported.split(", ")[0] in kind
        assert row.seconds < 3 * float(local) + 5
        assert (row.lost, row.left) == (int(lost), int(left))


def test_the_page_of_records_tells_what_the_criteria_for_formats_did() -> None:
    record = summary(ROOT / "golden" / "faults_quantisers.json")
    ours, *rows = pages.table(pages.read("golden/README.md"), "criterion")
    assert ours == ["Fusecheck", *(str(record[name]) for name in ("faults", "killed", "false_alarms"))]
    told = [(c["name"], c["faults"], c["killed_on_our_inputs"], *c["false_alarms"]) for c in record["criteria"]]
    assert rows == [[name, str(asked), str(killed), f"{no} of {of}"] for name, asked, killed, no, of in told]
    assert [name for name, *_ in told] == [criterion.name for criterion in FORMAT_CRITERIA]

"""What the rows of the README's second table say, against the records of two H200s."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusecheck.property_tests.suite.repository.checkout import ROOT
from fusecheck.property_tests.suite.repository.pages import number

CHIP = ROOT / "golden" / "h200x2"


def recorded(path: Path) -> dict[str, Any]:
    """A record, whatever its verdict."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def summary(path: Path) -> dict[str, Any]:
    """The summary of a record that passed."""
    record = recorded(path)
    assert record["verdict"] == "pass", path
    found: dict[str, Any] = record["summary"]
    return found


def on_the_chip(result: str) -> None:
    elements = number(r"([\d,]+) outputs each", result)
    for name in ("flashinfer-tp2", "flashinfer-fp32-tp2"):
        assert summary(CHIP / "kernel" / f"{name}.json")["elements"] == elements


def rejected(_result: str) -> None:
    records = sorted((CHIP / "kernel").glob("*-rejected.json"))
    assert {int(re.findall(r"virtual(\d+)", path.name)[0]) for path in records} == {4, 8, 16}
    assert {recorded(path)["verdict"] for path in records} == {"fail"}


def pace(result: str) -> None:
    assert number(r"([\d,]+) judged", result) == int(summary(CHIP / "pace.json")["cases_per_second"])


def races(_result: str) -> None:
    found = recorded(CHIP / "findings" / "flashinfer-0.6.13-kernel.json")["findings"]
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
    records = [recorded(path) for path in (CHIP / "findings").glob("flashinfer-0.7.4-finalize*.json")]
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
    record = recorded(CHIP / "findings" / "flashinfer-0.7.4-polling-changed.json")
    assert record["verdict"] == "pass"
    assert record["summary"]["cases"] == number(r"passes (\d+) cases", result)


def core_plan_of_flashinfer(result: str) -> None:
    record = recorded(CHIP / "family" / "0.7.4-native.json")
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
    record = recorded(CHIP / "family" / "vllm-0.25.1.json")
    made = record["summary"]
    assert record["verdict"] == "pass"
    assert (number(r"(\d+) cases", result), number(r"([\d,]+) outputs", result)) == (made["cases"], made["elements"])


def sglang_on_the_chip(result: str) -> None:
    record = recorded(CHIP / "family" / "sglang-0.4.6.json")
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
    record = recorded(CHIP / "accuracy" / "accuracy.json")
    flips = [task["judgement"]["flips"] for task in record["tasks"]]
    assert number(r"of ([\d,]+) questions", result) == sum(sum(each.values()) - each["churn"] for each in flips)
    assert number(r"(\d+) lost", result) == sum(each["lost"] for each in flips)
    assert number(r"(\d+) gained", result) == sum(each["gained"] for each in flips)
    verdicts = {task["endpoint"]["name"]: task["judgement"]["verdict"] for task in record["tasks"]}
    known = {"golden_gsm8k": "pass", "golden_mmlu": "pass"}
    assert verdicts == {**known, "gsm8k": "inconclusive", "mmlu": "inconclusive"}


def real_model(result: str) -> None:
    name = "mmlu" if result.startswith("**PASS**") else "gsm8k"
    record = recorded(CHIP / "accuracy-qwen" / f"{name}.json")
    task = record["summary"]["tasks"][name]
    assert task["verdict"] == record["verdict"] == result.split(":")[0].strip("*").lower()
    assert number(r"of ([\d,]+), of which", result) == task["n"]
    assert (number(r"(\d+) lost", result), number(r"(\d+) gained", result)) == (task["lost"], task["gained"])
    assert f"{100 * task['baseline']:.2f} % and {100 * task['candidate']:.2f} %" in result
    assert f"at most {-100 * task['low']:.2f} points where {100 * task['margin']:.2f} are" in result


def cast(_result: str) -> None:
    found = summary(CHIP / "exhaust.json")["instructions"]["cvt.rn.satfinite.e4m3x2.f32"]
    assert (found["inputs"], found["wrong"]) == (2**32, 0)


CHIP_CHECKS: dict[str, Callable[[str], None]] = {
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
"""By how the row's command begins."""

"""The page, JUnit and Markdown say what `result.json` says."""

from __future__ import annotations

import json
import re
import shlex
from copy import deepcopy
from importlib import resources
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import jsonschema
import pytest

from fusecheck.problem import Problem
from fusecheck.property_tests.suite import report_records as made
from fusecheck.property_tests.suite.report_pages import Page
from fusecheck.property_tests.suite.report_records import RECORDS
from fusecheck.report.findings import entries
from fusecheck.report.groups import sentence, shown
from fusecheck.report.junit import to_junit
from fusecheck.report.markdown import to_markdown
from fusecheck.report.page import to_html
from fusecheck.report.record import parts, reproducible
from fusecheck.report.replays import replay
from fusecheck.report.who import machine
from fusecheck.report.words import WORDS
from fusecheck.verdict import Stage

SCHEMA = json.loads((resources.files("fusecheck.report") / "result.schema.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", RECORDS)
def test_every_record_of_these_tests_is_one_that_the_schema_allows(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(RECORDS[name](), SCHEMA)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("schema",), 2),
        (("verdict",), "maybe"),
        (("findings",), {}),
        (("summary", "off_nominal", "quant"), [7]),
        (("summary", "subjects", 0, "cases"), -1),
        (("findings", 0, "stage"), "nearly"),
        (("environment", "python"), 3),
    ],
)
def test_the_schema_refuses_a_record_with_a_wrong_member(place: tuple[Any, ...], value: Any) -> None:
    record = made.kernel("fail")
    inside: Any = record
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(record, SCHEMA)


def test_a_finding_shows_its_element_its_codes_and_a_line_that_replays_it() -> None:
    text = to_html(made.kernel("fail"))
    page = Page(text)
    assert "quant: rank 1, row 2, column 17" in page.text
    assert "got 0x3c (1.5), admissible 0x39 (1.125) to 0x3a (1.25): 2 codes away" in page.text
    for code in ("0x39", "0x3a", "0x3c"):
        assert f">{code}<" in text
    line = replay(made.finding())
    assert line in page.text
    words = shlex.split(line)
    assert (words[:2], words[3:]) == (["fusecheck", "replay"], ["--backend", "emulated:trtllm"])
    assert Problem.from_json(words[2]).hidden == 128


def test_the_findings_of_one_case_are_one_entry_and_no_stage_is_hidden_behind_another() -> None:
    norm = made.finding("rank 0 element[1,2]  in=[1, 2] got 0x3f36 (0.710938) admissible 0x3f34 (0.703125)")
    again = made.finding(made.CODE_MESSAGE.replace("rank 1", "rank 0"))
    others = [made.finding() | {"problem": made.PROBLEM.replace("7}", f"{seed}}}")} for seed in range(8, 38)]
    found = entries([made.finding(), *others, again, norm | {"stage": "norm"}])
    assert [entry.head for entry in found[:3]] == ["quant", "norm", "quant"]
    assert (len(found), [(e.rank, e.count) for e in found[0].elements], found[0].count) == (32, [("1", 3), ("0", 3)], 3)
    assert found[0].total == 6
    assert "5 × 128 bf16 · 2 ranks" in found[0].where
    record = made.kernel("fail")
    record["findings"] = [made.finding(), *others]
    page = Page(to_html(record))
    assert page.tags.count("article") == 25
    assert "21 more, and 6 in result.json" in page.text


def test_the_headline_says_who_was_judged_where_and_each_question_has_a_plain_sentence() -> None:
    page = Page(to_html(made.kernel(), ["result.json", "graph/report.html"]))
    assert (
        "Pass: all 246,912 outputs of 20 cases are what the declared arithmetic allows; judged: 1 emulated" in page.text
    )
    assert "judged: 1 emulated dataflow on this CPU, tp 2, 4; no real kernel" in page.text
    assert "Ran on: no GPU; 2 CPU cores, Linux x86_64." in page.text
    assert {"result.json", "graph/report.html"} <= set(page.values("href"))
    record = made.kernel()
    for subject in record["summary"]["subjects"]:
        subject["backend"] = "mine.kernels:Kernel"
    record["environment"] |= {
        "gpus": ["NVIDIA H200"] * 2,
        "driver": "580.1.2",
        "kernels": {"mine.kernels:Kernel": "mine 3"},
    }
    text = Page(to_html(record)).text
    assert "judged: mine.kernels:Kernel (mine 3), tp 2, 4; 2 of 3 cells of the core plan reached (1 refused)." in text
    assert "Ran on: 2 × NVIDIA H200, driver 580.1.2; 2 CPU cores" in text
    whole = Page(to_html(made.verify())).text
    assert "of 800 answers 2 became wrong and 0 became right; golden_mmlu (generated choices for" in whole
    assert "2 of 3 planted faults were caught, and no right kernel was rejected" in whole


def test_an_unanswered_question_is_the_headline_and_the_first_of_the_list() -> None:
    record = made.verify()
    record["verdict"] = "inconclusive"
    record["findings"] = []
    record["summary"]["parts"]["graph"]["verdict"] = "pass"
    record["summary"]["not_run"][0] |= {"reason": "needs FlashInfer", "unanswered": True}
    text = Page(to_html(record)).text
    assert "Inconclusive: asked for and not answered: latency (needs FlashInfer). What was run: " in text
    record["summary"]["not_run"] += [
        {"part": name, "reason": "cut", "unanswered": True} for name in ("faults", "graph")
    ]
    assert (
        "latency (needs FlashInfer); asked for and not answered: faults, graph (cut). What"
        in Page(to_html(record)).text
    )
    asked = text.partition("What was asked")[2]
    assert asked.index("asked for and not answered: needs FlashInfer") < asked.index("Does the kernel compute")


def test_what_invariance_never_tries_is_no_headline_and_stands_with_what_was_not_run() -> None:
    claims = [{"claim": "batch", "verdict": "invariant", "untold": "", "tried": "1 to 64 rows"}]
    claims += [{"claim": "world size", "verdict": "untold", "untold": "one was asked for", "tried": ""}]
    summary = {"certificate": {"claims": claims, "not_tried": ["CUDA graphs", "other chips"]}}
    record = made.record("invariance", "pass", summary, [])
    said = next(sentence(part) for part in parts(record))
    assert said.endswith("batch; binaries: none named; not told: world size (one was asked for)")
    assert re.search(r"not tried\s*CUDA graphs\s*not tried\s*other chips", Page(to_html(record)).text)


def test_findings_stand_above_what_was_not_asked_and_can_be_filtered_by_stage_family_and_backend() -> None:
    record = made.kernel("fail")
    record["findings"] += [made.finding() | {"stage": "norm", "problem": made.PROBLEM.replace("gaussian", "special")}]
    text = to_html(record)
    assert text.index("<article") < text.index("Not asked by this run")
    assert re.findall(r'<select data-key="(\w+)">', text) == ["stage", "family"]
    assert '<article class="finding" data-stage="quant" data-family="gaussian" data-backend="emulated:trtllm">' in text
    assert "<select" not in to_html(made.kernel("fail"))


def test_every_word_of_the_glossary_is_one_that_a_page_uses_and_every_stage_is_in_it() -> None:
    packages = [Path(str(resources.files(name))) for name in ("fusecheck", "fusecheck.eval")]
    files = [path for package in packages for kind in ("py", "html") for path in package.rglob(f"*.{kind}")]
    files = [path for path in files if path.name != "words.py"]
    sources = "".join(path.read_text(encoding="utf-8") for path in files).lower()
    words = [word for entry, _ in WORDS for word in entry.split(", ")]
    assert [word for word in words if word.partition(" ")[0].lower() not in sources] == []
    assert {stage.value for stage in Stage} <= set(words)


def test_what_was_not_run_is_told_with_its_reason() -> None:
    text = Page(to_html(made.verify())).text.partition("What was not run")[2]
    text = text.partition("What was not run")[2].partition("How to reproduce")[0]
    for told in ("needs two GPUs, 0 here", "AC-03", "no cause was published", "two-shot needs more rows than ranks"):
        assert told in text


def test_a_comparison_says_how_to_repeat_each_of_its_runs_and_where_it_ran() -> None:
    text = Page(to_html(made.merged())).text.rpartition("How to reproduce")[2]
    for run, command in (("before", "kernel"), ("after", "kernel"), ("h200", "latency")):
        before, found, _ = text.partition(f"fusecheck {command} --seed 7")
        assert found
        assert run in before
        text = text[len(before) + len(found) :]


def test_latency_is_told_in_a_sentence_and_by_token_count() -> None:
    part = next(iter(parts(made.latency())))
    assert sentence(part) == (
        "fusing the quantiser pays up to 64 tokens; predicted change of a decode step: "
        "-0.06 ms at 1, -0.06 ms at 64, -0.06 ms at 2048"
    )
    names = [case.get("name") for case in ET.fromstring(to_junit(made.latency())).iter("testcase")]
    assert names == ["1 tokens", "64 tokens", "2048 tokens"]


def test_junit_has_a_case_a_group_with_the_replay_line_in_the_failure() -> None:
    root = ET.fromstring(to_junit(made.kernel("fail")))
    cases = root.findall(".//testcase")
    assert [case.get("name") for case in cases] == ["emulated:trtllm tp 2", "emulated:trtllm tp 4"]
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("2", "1", "0")
    failure = cases[0].find("failure")
    assert failure is not None
    assert replay(made.finding()) in (failure.text or "")
    assert cases[1].find("failure") is None
    assert {p.get("name") for p in root.iter("property")} >= {"verdict", "python", "elements"}


def test_junit_shows_a_subject_that_ran_nothing_as_an_error_and_what_was_left_out_as_skipped() -> None:
    record = made.verify()
    record["summary"]["subjects"][1]["cases"] = 0
    root = ET.fromstring(to_junit(record))
    names = {
        tag: [c.get("name") for c in root.iter("testcase") if c.find(tag) is not None] for tag in ("error", "skipped")
    }
    assert names == {
        "error": [
            "emulated:trtllm tp 4",
            shown("golden_gsm8k"),
            "KA-02 cast",
        ],
        "skipped": ["latency"],
    }
    assert [suite.get("name") for suite in root] == [
        f"fusecheck {x}" for x in ("verify", "graph", "accuracy", "faults")
    ]


def test_junit_is_not_green_where_each_task_passed_and_the_whole_did_not() -> None:
    told = {"headline": "INCONCLUSIVE  the oracle has no log-probabilities", "tasks": {"mmlu": {"verdict": "pass"}}}
    root = ET.fromstring(to_junit(made.record("accuracy", "inconclusive", told, [])))
    assert [case.get("name") for case in root.iter("testcase") if case.find("error") is not None] == ["verdict"]


def test_the_parts_of_verify_keep_their_own_findings_and_verdicts() -> None:
    found = {part.command: (part.verdict, len(part.findings)) for part in parts(made.verify())}
    assert found == {"verify": ("pass", 0), "graph": ("fail", 1), "accuracy": ("pass", 0), "faults": ("pass", 0)}
    text = to_html(made.verify())
    assert "Fail: 12 graphs through package.passes:fuse, 1 finding." in text
    assert "needs two GPUs, 0 here" in text
    assert "fusecheck graph --pass package.passes:fuse --graph" in Page(text).text


def test_markdown_tells_the_verdict_the_parts_and_what_was_left_out() -> None:
    text = to_markdown(made.verify())
    assert text.startswith("### Fusecheck: Fail: ")
    assert "| graph | fail |" in text
    assert "- not run: latency: needs two GPUs, 0 here" in text


def test_the_line_that_reproduces_a_run_leaves_out_where_its_files_went() -> None:
    given_ = ["verify", "--json", "a", "--seed", "3", "--run-dir=b", "--markdown", "c", "--budget", "5m"]
    assert reproducible(given_) == ["verify", "--seed", "3", "--budget", "5m"]
    assert "fusecheck kernel --seed 7" in Page(to_html(made.kernel())).text


def test_a_record_is_not_changed_by_being_shown() -> None:
    record = made.verify()
    before = deepcopy(record)
    to_html(record), to_junit(record), to_markdown(record)
    assert record == before


def test_the_machine_line_names_the_versions_of_all_packages_that_bring_kernels() -> None:
    packages = {"torch": "2.11.0", "numpy": "2.0", "flashinfer-python": "0.7.4", "vllm": "0.25.1"}
    assert machine({"packages": packages}).endswith("; torch 2.11.0, flashinfer-python 0.7.4, vllm 0.25.1")

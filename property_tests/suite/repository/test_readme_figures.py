"""Every figure of the README is one that a record holds, or that a quick measurement finds again."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice

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
from fusecheck.property_tests.suite.repository.chip_figures import CHIP_CHECKS, recorded, summary
from fusecheck.property_tests.suite.repository.pages import number
from fusecheck.quantflow import QUANT_FLOWS

MACHINES = ("on two shared CPU cores", "on two H200s")
ROWS = [row for machine in MACHINES for row in pages.table(pages.read(), machine)]
FIGURES = {command.strip("`"): result for _, command, result in ROWS}


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


CHECKS: dict[str, Callable[[str], None]] = CHIP_CHECKS | {
    "fusecheck verify": main_job,
    "fusecheck verify --only": long_run,
    "python -m fusecheck.property_tests.suite.refutation": refuted,
    "fusecheck faults --sensitivity": sensitive,
    "fusecheck faults": faults,
    "fusecheck faults --group quantiser": faults_of_quantisers,
    "python -m fusecheck.property_tests.suite.refutation --format": refuted_formats,
    "python -m fusecheck.property_tests.suite.false_alarms": false_alarms,
    "make bench": benchmark,
}
"""By how the row's command begins; the longest that fits."""


@pytest.mark.parametrize("command", FIGURES)
def test_a_figure_of_the_table_holds(command: str) -> None:
    begun = [start for start in CHECKS if command.startswith(start)]
    assert begun, f"no check for the figures of `{command}`"
    CHECKS[max(begun, key=len)](FIGURES[command])


def test_the_criteria_of_others_do_what_the_table_says() -> None:
    record = recorded(ROOT / "golden" / "faults_peers.json")["summary"]
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

"""`--trace`: the first site where the fused arm leaves what its kernel declares, and the questions that flipped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusecheck.errors import UsageError
from fusecheck.eval.arm import FUSED
from fusecheck.eval.endpoints import join
from fusecheck.eval.engine import BatchPlan, Engine, batches, padded
from fusecheck.eval.outcome import Comparison, TraceFound
from fusecheck.eval.progress import Tell
from fusecheck.eval.rows import context_of, read_rows
from fusecheck.eval.run import Job
from fusecheck.eval.samples import Run
from fusecheck.eval.trace_rank import Deviation
from fusecheck.report.result import write_aside

FLIPPED, STEADY = 24, 8
"""Questions whose answer changed sides, and others, that are traced."""
PLAN = BatchPlan(rows=16, tokens=4096)
PLACES = ("attention", "the MLP")


@dataclass(frozen=True)
class Question:
    """One question that is traced."""

    task: str
    doc_id: int
    flipped: bool


@dataclass(frozen=True)
class Trace:
    """What a trace found.

    Attributes:
        sites: calls of the kernel in a forward.
        questions: that were traced.
        first: the deviation at the first site, None where no call left what is allowed.
        places: deviating sites in order, with their stage and how many questions deviate there.
        flips_there: flipped questions with a deviation at any site.
    """

    sites: int
    questions: Sequence[Question]
    first: Deviation | None
    places: Sequence[tuple[int, str, int]]
    flips_there: int

    @property
    def flipped(self) -> int:
        """Traced questions whose answer changed sides."""
        return sum(question.flipped for question in self.questions)

    def headline(self, change: float) -> str:
        """One sentence; `change` is the change of accuracy as a fraction of 1."""
        begin = f"accuracy changed by {100 * change:+.2f} pt"
        if not self.sites:
            return f"{begin}; the arm's model calls no kernel that could be traced"
        if self.first is None:
            return (
                f"{begin}; all {self.sites} sites keep what the kernel declares, on {len(self.questions)} questions "
                f"({self.flipped} flipped): the flips are rounding that the declaration allows"
            )
        share = f"{self.flips_there} of {self.flipped} flipped questions deviate at some site"
        return f"{begin}; first deviating site: {place(self.first.site)}, stage {self.first.stage}; {share}"


def place(site: int) -> str:
    """A call of the kernel within a forward, in words."""
    return f"layer {site // 2} after {PLACES[site % 2]}"


def choose(outcome: Comparison, baseline: Run, candidate: Run) -> list[Question]:
    """The questions to trace: those that flipped, and some that did not, over all judged tasks; of no pair any."""
    flipped: list[Question] = []
    steady: list[Question] = []
    if not outcome.tasks:
        asked = dict.fromkeys((name, doc) for name, task in baseline.tasks.items() for doc, _ in task.samples)
        steady = [Question(name, doc, flipped=False) for name, doc in asked]
    for task in outcome.tasks:
        pairs = join(task.endpoint, baseline, candidate)
        moved = pairs.right(pairs.baseline) != pairs.right(pairs.candidate)
        for name, sample, flip in zip(pairs.tasks, pairs.baseline, moved.tolist(), strict=True):
            (flipped if flip else steady).append(Question(name, sample.doc_id, bool(flip)))
    spread = steady[:: max(1, len(steady) // STEADY)]
    return [*flipped[:: max(1, len(flipped) // FLIPPED)][:FLIPPED], *spread[:STEADY]]


def prompts(questions: Sequence[Question], run: Run) -> list[str]:
    """What was sent for each question, from the run's own samples.

    Raises:
        UsageError: a samples file does not hold its prompts.
    """
    wanted: dict[str, set[int]] = {}
    for question in questions:
        wanted.setdefault(question.task, set()).add(question.doc_id)
    found: dict[tuple[str, int], str] = {}
    for task, documents in wanted.items():
        for _, row in read_rows(run.tasks[task].path):
            if row.get("doc_id") in documents and (text := context_of(row)) is not None:
                found[task, row["doc_id"]] = text
    lacking = next((q for q in questions if (q.task, q.doc_id) not in found), None)
    if lacking is not None:
        raise UsageError(f"{run.tasks[lacking.task].path}: has no prompt of doc_id {lacking.doc_id}; it is not traced")
    return [found[question.task, question.doc_id] for question in questions]


def trace(job: Job, questions: Sequence[Question], texts: Sequence[str], tell: Tell) -> Trace:
    """Run these texts through the fused arm once more, and judge every call.

    Raises:
        UsageError: a rank refused its input.
        ArmError: a rank failed.
    """
    with job.open_engine() as engine:
        return trace_on(engine, job, questions, texts, tell)


def trace_on(engine: Engine, job: Job, questions: Sequence[Question], texts: Sequence[str], tell: Tell) -> Trace:
    """As `trace`, on ranks that hold the job's model and have no arm open."""
    longest = job.shape.positions
    rows = [ids[-longest:] for ids in job.tokens.encode_all(list(texts))]
    found: list[Deviation] = []
    sites = 0
    tell(f"tracing {len(rows)} questions")
    engine.open_arm(FUSED, job.asked.backend, PLAN, max(map(len, rows)))
    for batch in batches([len(row) for row in rows], PLAN):
        ids, lengths = padded([rows[i] for i in batch])
        for calls, deviations in engine.call("trace", ids, lengths):
            sites = max(sites, calls)
            for record in deviations:
                told = record | {"texts": tuple(batch[text] for text in record["texts"])}
                found.append(Deviation(**told))
    engine.close_arm()
    return _sum_up(sites, questions, found)


def _sum_up(sites: int, questions: Sequence[Question], found: Sequence[Deviation]) -> Trace:
    places: dict[tuple[int, str], set[int]] = {}
    hit: set[int] = set()
    for deviation in found:
        places.setdefault((deviation.site, deviation.stage), set()).update(deviation.texts)
        hit.update(deviation.texts)
    return Trace(
        sites=sites,
        questions=questions,
        first=min(found, key=lambda deviation: deviation.site, default=None),
        places=[(site, stage, len(texts)) for (site, stage), texts in sorted(places.items())],
        flips_there=sum(questions[i].flipped for i in hit),
    )


def to_json(found: Trace, change: float) -> dict[str, Any]:
    """A trace as JSON-ready values."""
    first = found.first
    return {
        "headline": found.headline(change),
        "sites": found.sites,
        "questions": len(found.questions),
        "flipped": found.flipped,
        "flipped_and_deviating": found.flips_there,
        "first": None if first is None else {"place": place(first.site), "stage": first.stage, "shown": first.shown},
        "deviating": [
            {"place": place(site), "stage": stage, "questions": count} for site, stage, count in found.places
        ],
    }


def write_trace(found: Trace, change: float, folder: Path) -> TraceFound:
    """Write trace.json and return what the report shows."""
    record = to_json(found, change)
    write_aside(folder / "trace.json", json.dumps(record, indent=1) + "\n")
    shown = "" if found.first is None else found.first.shown
    places = [(place(site), stage, count) for site, stage, count in found.places]
    return TraceFound(record["headline"], shown, found.sites, len(found.questions), places)


def in_lines(found: TraceFound) -> str:
    """A trace for the terminal."""
    lines = [f"trace: {found.headline}", *([f"  {found.shown}"] if found.shown else [])]
    if found.places:
        counts = Counter(stage for _, stage, _ in found.places)
        told = ", ".join(f"{stage} at {count}" for stage, count in counts.items())
        lines.append(f"  deviating: {told} of {found.sites} sites")
    return "\n".join(lines)


def change_of(outcome: Comparison) -> float:
    """The change of accuracy over all questions, a fraction of 1."""
    lost, gained, n = outcome.pooled_flips
    return float(np.float64(gained - lost) / n) if n else 0.0

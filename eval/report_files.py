"""A comparison as JSON: whole, and as the record from which page and JUnit XML are made."""

from __future__ import annotations

import math
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from typing import Any

from fusecheck.eval.flips import FlippedQuestion
from fusecheck.eval.gate import Verdict
from fusecheck.eval.outcome import Comparison, TaskResult
from fusecheck.eval.report_blocks import blocks, headline, oracle_line, shorten, task_line


def to_json(outcome: Comparison) -> dict[str, Any]:
    """The comparison as JSON values: equal inputs give equal bytes; what differs from run to run is under `meta`.

    Numbers that JSON has not are the strings "inf", "-inf" and "nan".
    """
    data = _plain(outcome)
    meta = data.pop("facts")
    return {"headline": headline(outcome), **data, "meta": meta}


def summary(outcome: Comparison) -> dict[str, Any]:
    """The short form, for the `summary` of result.json."""
    tasks = {
        t.endpoint.name: {
            "verdict": t.judgement.verdict.value,
            "line": task_line(t),
            "n": t.judgement.flips.n,
            "baseline": t.judgement.flips.baseline_right / t.judgement.flips.n,
            "candidate": t.judgement.flips.candidate_right / t.judgement.flips.n,
            "change": t.judgement.flips.delta,
            "low": t.judgement.interval.low,
            "high": t.judgement.interval.high,
            "margin": t.judgement.margin,
            "lost": t.judgement.flips.lost,
            "gained": t.judgement.flips.gained,
            "churn": t.judgement.flips.churn,
            "flips_by_margin": _flips_by_margin(t),
        }
        for t in outcome.tasks
    }
    return {
        "headline": headline(outcome),
        "tasks": tasks,
        "oracle": None if outcome.oracle is None else {**_plain(outcome.oracle), "line": oracle_line(outcome)},
        "tables": [asdict(block) for block in blocks(outcome) if block.title != "Warnings"],
        "flipped": [_shortened(f) for f in outcome.flipped or outcome.examples],
        "warnings": list(outcome.warnings),
        "interrupted": bool(outcome.interrupted),
    }


def _flips_by_margin(task: TaskResult) -> list[dict[str, Any]]:
    """Flips by quartile of the baseline's margin: they belong where the baseline hesitates."""
    found = [s for s in task.slices if s.kind.startswith("baseline margin")]
    return [{"margin": f"{s.label} nat", "lost": s.lost, "gained": s.gained} for s in found]


def _shortened(flip: FlippedQuestion) -> dict[str, Any]:
    return {k: shorten(v, 600) if isinstance(v, str) else v for k, v in _plain(flip).items()}


def findings(outcome: Comparison) -> list[dict[str, Any]]:
    """What a reader must act on: invalid checks, tasks that failed, a candidate too far from the oracle."""
    found: list[dict[str, Any]] = [
        {"stage": "validity", "title": c.name, "detail": c.detail} for c in outcome.checks if c.state == "invalid"
    ]
    found += [
        {"stage": "accuracy", "title": t.endpoint.name, "detail": task_line(t)}
        for t in outcome.tasks
        if t.judgement.verdict is Verdict.FAIL
    ]
    if outcome.oracle is not None and outcome.oracle.verdict is Verdict.FAIL:
        found.append({"stage": "log-probabilities", "title": "oracle", "detail": oracle_line(outcome)})
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value

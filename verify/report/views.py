"""What the page shows of one part of a run, ready for the templates."""

from __future__ import annotations

from typing import Any

from fusecheck.report.findings import OPEN, SHOWN, entries, filters
from fusecheck.report.groups import QUESTIONS, count, groups, sentence, with_replay
from fusecheck.report.pictures import latency, matrix
from fusecheck.report.pictures.flips import flips
from fusecheck.report.pictures.heat import heat_map, strips
from fusecheck.report.pictures.histogram import histogram
from fusecheck.report.pictures.intervals import intervals
from fusecheck.report.pictures.lanes import lanes
from fusecheck.report.record import Part

_DRAWN = {
    *(
        "subjects",
        "coverage",
        "core",
        "coverage_of_stages",
        "off_nominal",
        "code_differences_from_unfused",
        "suggestions",
    ),
    *("parts", "not_run", "rows", "tasks", "left_out", "criteria", "runs", "groups", "refusals", "flipped", "headline"),
    *("tables", "exhibits", "kernels", "certificate"),
    *("timings", "prediction", "reading", "policy", "stages", "further_seeds", "warnings", "kernel_verdict"),
}
"""Figures that have a place of their own, or are too long for the list."""

TITLES = {
    "kernel": "The kernel",
    "graph": "The graph rewrite",
    "accuracy": "The model's answers",
    "latency": "Time",
    "faults": "Fusecheck itself",
}


def view(part: Part, number: int) -> dict[str, Any]:
    """The names that the templates use; those of other questions are empty."""
    findings = with_replay(part)
    found = entries(findings)
    return {
        "part": part,
        "id": f"part-{number}",
        "title": f"{part.run} · {part.command}" if part.run else TITLES.get(part.question, part.command.capitalize()),
        "question": QUESTIONS.get(part.question, ""),
        "sentence": sentence(part),
        "open": found[:OPEN],
        "closed": found[OPEN:SHOWN],
        "more": len(found) - SHOWN,
        "filters": filters(found[:SHOWN]),
        "groups": groups(part),
        "figures": _figures(part.summary),
        "kernel": _of_kernel(part) if part.question == "kernel" else {},
        "accuracy": _of_accuracy(part.summary) if part.question == "accuracy" else {},
        "faults": _of_faults(part.summary) if part.question == "faults" else {},
        "protocol": lanes(part.summary) if part.question == "protocol" else [],
        "latency": _of_latency(part.summary) if part.question == "latency" else {},
    }


def left_out(part: Part) -> list[tuple[str, str]]:
    """What a part did not run, and why: parts, faults that are not re-created, cases that a kernel refused."""
    run = f"{part.run}: " if part.run else ""
    summary = part.summary
    found = [(f"{run}{x['part']}", str(x["reason"])) for x in summary.get("not_run") or []]
    found += [(f"{run}not tried", what) for what in (summary.get("certificate") or {}).get("not_tried", ())]
    found += [(f"{run}fault {x['id']}, {x.get('title', '')}", str(x["reason"])) for x in summary.get("left_out") or []]
    refusals = summary.get("refusals") or {}
    return found + [(f"{run}{count(number)} cases refused", str(reason)) for reason, number in refusals.items()]


def _of_kernel(part: Part) -> dict[str, Any]:
    summary = part.summary
    off, coverage = summary.get("off_nominal"), summary.get("coverage")
    of_stages = summary.get("coverage_of_stages")
    return {
        "subjects": summary.get("subjects") or [],
        "table": _subjects(summary.get("subjects") or []),
        "histogram": histogram(summary.get("code_differences_from_unfused") or {}),
        "heat": heat_map(
            coverage if isinstance(coverage, dict) else {},
            of_stages if isinstance(of_stages, dict) else {},
            part.findings,
        ),
        "strips": strips(coverage if isinstance(coverage, dict) else {}),
        "off_nominal": _shares(off) if isinstance(off, dict) else [],
    }


def _subjects(subjects: list[dict[str, Any]]) -> dict[str, Any]:
    """Backends by world sizes, each with its subject; a place is None where there is none."""
    sizes = sorted({int(s["world_size"]) for s in subjects})
    names = list(dict.fromkeys((s["backend"], s.get("dataflow")) for s in subjects))
    at = {(s["backend"], s.get("dataflow"), int(s["world_size"])): s for s in subjects}
    rows = [
        (name + (f" judged as {flow}" if flow else ""), [at.get((name, flow, size)) for size in sizes])
        for name, flow in names
    ]
    return {"sizes": sizes, "rows": rows}


def _shares(off_nominal: dict[str, Any]) -> list[tuple[str, int, int, str]]:
    return [
        (stage, off, judged, f"{off / judged:.2e}" if judged else "none judged")
        for stage, (off, judged) in off_nominal.items()
    ]


def _of_accuracy(summary: dict[str, Any]) -> dict[str, Any]:
    tasks = summary.get("tasks") or {}
    oracle = summary.get("oracle") or {}
    return {
        "intervals": intervals(tasks),
        "margins": [(name, bars) for name, task in tasks.items() if (bars := _by_margin(task))],
        "tables": summary.get("tables") or [],
        "flips": flips(summary.get("flipped") or []),
        "oracle": oracle if isinstance(oracle.get("ratio"), (int, float)) else None,
        "warnings": [str(warning) for warning in summary.get("warnings") or []],
    }


def _by_margin(task: dict[str, Any]) -> list[tuple[str, list[tuple[str, int, float]]]]:
    """Rows of (margin, two of (kind, flips, length of its bar in percent)); empty without a flip."""
    found = task.get("flips_by_margin") or []
    most = max((row[kind] for row in found for kind in ("lost", "gained")), default=0)
    if not most:
        return []
    return [
        (str(row["margin"]), [(kind, row[kind], round(100 * row[kind] / most, 2)) for kind in ("lost", "gained")])
        for row in found
    ]


def _of_faults(summary: dict[str, Any]) -> dict[str, Any]:
    return {
        "matrices": matrix.matrices(summary.get("rows") or []),
        "criteria": matrix.criteria(summary),
    }


def _of_latency(summary: dict[str, Any]) -> dict[str, Any]:
    timings = summary.get("timings") or []
    return {
        "what": ", ".join(
            str(summary[key]) if key in ("model", "mode") else f"{key} {summary[key]}"
            for key in ("model", "hidden", "tp", "mode")
            if summary.get(key)
        ),
        "times": latency.times(timings),
        "gains": latency.gain_plot(timings),
        "extremes": latency.largest_gain(timings),
        "pays_up_to": summary.get("break_even_tokens"),
        "height": latency.HEIGHT,
        "steps": latency.steps(summary.get("prediction") or []),
        "reading": [str(line) for line in summary.get("reading") or []],
    }


def _figures(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The summary's plain figures, by name, except those that are drawn."""
    found = []
    for key, value in summary.items():
        if key in _DRAWN or value is None or value == {} or value == []:
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{k} {_short(v)}" for k, v in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(_short, value))
        found.append((key.replace("_", " "), _short(value)))
    return found


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = count(value)
    return text if len(text) <= 400 else text[:399] + "…"

"""`report.html`: one self-contained page from a record, readable offline, on a phone and on paper."""

from __future__ import annotations

import base64
import hashlib
import shlex
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from verify.report.drawing import heat_map, histogram, intervals, number_line, place
from verify.report.groups import (
    QUESTIONS,
    count,
    groups,
    replay,
    sentence,
    verdict_sentence,
    with_replay,
)
from verify.report.record import Part, parts

SHOWN = 25
"""Findings of a part on the page; result.json has all."""

_DRAWN = {
    *("subjects", "coverage", "off_nominal", "code_differences_from_unfused", "suggestions", "parts", "not_run"),
    *("rows", "tasks", "left_out", "criteria", "runs", "groups", "refusals"),
}
"""Figures that have a place of their own, or are too long for the list."""


def to_html(record: dict[str, Any]) -> str:
    """The page of a record; every text of a run is escaped, and the page's own policy lets nothing be fetched."""
    everything = list(parts(record))
    style, script = _file("report.css"), _file("report.js")
    return (
        _environment()
        .get_template("report.html")
        .render(
            record=record,
            headline=verdict_sentence(everything, record["verdict"]),
            parts=[_view(part, number) for number, part in enumerate(everything, 1)],
            questions=[] if record["command"] == "report" else _questions(everything),
            compared=record["command"] == "report",
            style=Markup(style),
            script=Markup(script),
            policy=f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'",
        )
    )


@cache
def _environment() -> Environment:
    loader = PackageLoader("verify.report", "templates")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters["count"] = count
    return made


@cache
def _file(name: str) -> str:
    return (resources.files("verify.report") / "templates" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _questions(everything: list[Part]) -> list[dict[str, str]]:
    """The five questions, each with its verdict and evidence, or why it was not asked."""
    asked = {part.question: part for part in everything}
    left = {x["part"]: x["reason"] for part in everything for x in part.summary.get("not_run", [])}
    return [
        {
            "name": name,
            "question": question,
            "verdict": asked[name].verdict if name in asked else "not run",
            "evidence": sentence(asked[name]) if name in asked else left.get(name, "no part of this run"),
        }
        for name, question in QUESTIONS.items()
    ]


def _view(part: Part, number: int) -> dict[str, Any]:
    summary = part.summary
    findings = with_replay(part)
    off = summary.get("off_nominal")
    return {
        "part": part,
        "id": f"part-{number}",
        "title": " · ".join(x for x in (part.run, part.command) if x),
        "question": QUESTIONS.get(part.question, ""),
        "sentence": sentence(part),
        "findings": [_finding(finding) for finding in findings[:SHOWN]],
        "more": max(0, len(findings) - SHOWN),
        "groups": groups(part),
        "subjects": summary.get("subjects") if part.question == "kernel" else None,
        "histogram": histogram(summary.get("code_differences_from_unfused") or {}),
        "heat": heat_map(summary.get("coverage") or {}) if isinstance(summary.get("coverage"), dict) else None,
        "off_nominal": _shares(off) if isinstance(off, dict) else [],
        "intervals": intervals(summary.get("tasks") or {}) if part.question == "accuracy" else [],
        "figures": _figures(summary),
        "refusals": summary.get("refusals") or {},
        "suggestions": list((summary.get("suggestions") or {}).items())[:SHOWN],
        "not_run": summary.get("not_run") or [],
        "left_out": summary.get("left_out") or [],
        "criteria": summary.get("criteria") or [],
        "command": shlex.join(["fusecheck", *part.arguments]),
        "environment": _flat(part.environment),
    }


def _finding(finding: dict[str, Any]) -> dict[str, Any]:
    message = str(finding.get("message") or finding.get("detail") or "")
    keys = ("stage", "check", "kind", "title")
    head = next((str(finding[key]) for key in keys if finding.get(key)), "finding")
    where = [str(finding[k]) for k in ("case", "fault", "subject", "backend", "dataflow") if finding.get(k)]
    return {
        "head": head,
        "where": ", ".join(dict.fromkeys(where)),
        "message": message,
        "count": finding.get("count"),
        "place": place(message),
        "line": number_line(message),
        "replay": replay(finding),
    }


def _shares(off_nominal: dict[str, Any]) -> list[tuple[str, int, int, str]]:
    return [
        (stage, off, judged, f"{off / judged:.2e}" if judged else "none judged")
        for stage, (off, judged) in off_nominal.items()
    ]


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


def _flat(environment: dict[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in environment.items():
        if isinstance(value, dict):
            rows += [(name, str(version)) for name, version in value.items()]
        elif isinstance(value, list):
            rows.append((key, ", ".join(map(str, value)) or "none"))
        else:
            rows.append((key, "none" if value is None else str(value)))
    return rows

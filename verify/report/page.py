"""`report.html`: one self-contained page from a record, readable offline, on a phone and on paper."""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fusecheck.report.groups import QUESTIONS, count, sentence, verdict_sentence
from fusecheck.report.record import Part, parts
from fusecheck.report.views import left_out, view
from fusecheck.report.visible import visible
from fusecheck.report.who import machine
from fusecheck.report.words import WORDS


def to_html(record: dict[str, Any], files: Sequence[str] = ()) -> str:
    """The page of a record; every text of a run is escaped, and the page's own policy lets nothing be fetched.

    Args:
        record: as `result.json` has it.
        files: of the run, beside the page, for its links.
    """
    everything = list(parts(record))
    style, script = _file("report.css"), _file("report.js")
    page = (
        _environment()
        .get_template("report.html")
        .render(
            record=record,
            machine="" if record["command"] == "report" else machine(record["environment"]),
            files=files,
            words=WORDS,
            headline=verdict_sentence(everything, record["verdict"]),
            parts=[view(part, number) for number, part in enumerate(everything, 1)],
            questions=[] if record["command"] == "report" else _questions(everything),
            compared=record["command"] == "report",
            unasked=[] if record["command"] == "report" else _unasked(everything),
            left_out=[entry for part in everything for entry in left_out(part)],
            commands=_commands(everything),
            style=Markup(style),
            script=Markup(script),
            policy=f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'",
        )
    )
    return visible(page)


@cache
def _environment() -> Environment:
    loader = PackageLoader("fusecheck.report", "templates")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters["count"] = count
    return made


@cache
def _file(name: str) -> str:
    return (resources.files("fusecheck.report") / "templates" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _questions(everything: list[Part]) -> list[dict[str, str]]:
    """The questions that were asked, each with its verdict, its evidence and the place of it; unanswered ones first."""
    left = [x for part in everything for x in part.summary.get("not_run", []) if x.get("unanswered")]
    found = [
        {
            "question": QUESTIONS.get(x["part"], x["part"]),
            "link": "",
            "verdict": "inconclusive",
            "evidence": f"asked for and not answered: {x['reason']}",
        }
        for x in left
    ]
    for number, part in enumerate(everything, 1):
        question = QUESTIONS.get(part.question, part.question)
        place = f"part-{number}"
        found.append({"question": question, "link": place, "verdict": part.verdict, "evidence": sentence(part)})
    return found


def _unasked(everything: list[Part]) -> list[str]:
    """The questions that this run did not ask, by their commands."""
    named = {part.question for part in everything}
    named |= {x["part"] for part in everything for x in part.summary.get("not_run", [])}
    return [name for name in QUESTIONS if name not in named]


def _commands(everything: list[Part]) -> list[dict[str, Any]]:
    """The command of each run with where it ran; parts of one run have one."""
    found: dict[str, dict[str, Any]] = {}
    for part in everything:
        command = shlex.join(["fusecheck", *part.arguments])
        found.setdefault(
            part.run, {"run": part.run, "command": command, "environment": _flat(part.environment), "time": part.time}
        )
    return list(found.values())


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

"""A run as Markdown, for job summaries and comments on pull requests."""

from __future__ import annotations

import html
import re
from typing import Any

from fusecheck.report.groups import Group, groups, sentence, verdict_sentence, with_replay
from fusecheck.report.record import Part, parts
from fusecheck.report.replays import finding_line
from fusecheck.report.visible import visible

SHOWN = 10
"""Findings of a part, and case groups that did not pass; result.json has all."""


def to_markdown(record: dict[str, Any]) -> str:
    """Markdown of a record; every text of a run stays text."""
    everything = list(parts(record))
    blocks = [f"### Fusecheck: {text(verdict_sentence(everything, record['verdict']))}"]
    rows = [[part.run, part.command, part.verdict, sentence(part)] for part in everything]
    blocks.append(_table(["run", "question", "verdict", "what it showed"], rows))
    for part in everything:
        blocks += _part(part)
    left = [
        f"- {'**not answered**' if x.get('unanswered') else 'not run'}: {text(x['part'])}: {text(x['reason'])}"
        for p in everything
        for x in p.summary.get("not_run", [])
    ]
    if left:
        blocks.append("\n".join(left))
    return "\n\n".join(blocks) + "\n"


def _part(part: Part) -> list[str]:
    blocks = []
    wrong = [group for group in groups(part) if group.verdict != "pass"]
    title = text(" ".join(x for x in (part.run, part.command) if x))
    if wrong:
        rows = [[group.name, group.verdict, _note(group)] for group in wrong[:SHOWN]]
        blocks.append(f"**{title}**\n\n" + _table(["group", "verdict", "note"], rows))
    if part.findings:
        lines = [f"- {code(finding_line(finding))}" for finding in with_replay(part)[:SHOWN]]
        if len(part.findings) > SHOWN:
            lines.append(f"- and {len(part.findings) - SHOWN} more, in result.json")
        summary = f"<summary>Findings of {title} and how to replay them</summary>"
        blocks.append(f"<details>{summary}\n\n" + "\n".join(lines) + "\n\n</details>")
    return blocks


def _note(group: Group) -> str:
    return group.note or group.text.partition("\n")[0]


def _table(head: list[str], rows: list[list[str]]) -> str:
    used = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = ["| " + " | ".join(head[i] for i in used) + " |", "|" + " --- |" * len(used)]
    lines += ["| " + " | ".join(text(row[i]) for i in used) + " |" for row in rows]
    return "\n".join(lines)


def text(value: object) -> str:
    """As Markdown that shows exactly the value, on one line."""
    plain = html.escape(" ".join(visible(str(value)).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~!@#])", lambda found: f"&#{ord(found[0])};", plain)


def code(value: str) -> str:
    """As a code span, whatever backticks it holds."""
    plain = " ".join(visible(value).split())
    longest = max((len(run) for run in re.findall("`+", plain)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {plain} {fence}" if longest else f"`{plain}`"

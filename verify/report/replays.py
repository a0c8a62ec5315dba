"""The command that shows a finding again, and the finding with it as one line; the same in JUnit, Markdown and HTML."""

from __future__ import annotations

import shlex
from typing import Any


def head(finding: dict[str, Any]) -> str:
    """The stage that a finding is of, or the name of its check."""
    keys = ("stage", "check", "kind", "title")
    return next((str(finding[key]) for key in keys if finding.get(key)), "finding")


def finding_line(finding: dict[str, Any]) -> str:
    """A finding as one line: what, and the command that shows it again."""
    what = head(finding)
    what = f"{what} (computes like {', '.join(finding['computes_like'])})" if finding.get("computes_like") else what
    where = finding.get("case") or finding.get("fault") or finding.get("subject") or ""
    said = finding.get("message") or finding.get("detail") or ""
    line = ": ".join(str(x) for x in (what, where, said) if x)
    again = replay(finding)
    line = f"{line}  replay: {again}" if again else line
    return "\n".join(text for text in (line, *told(finding)) if text)


def told(finding: dict[str, Any]) -> tuple[str, str]:
    """The traceback of a finding's exception, and the end of what the rank had printed; each may be empty."""
    return str(finding.get("traceback") or "").rstrip(), str(finding.get("output") or "").rstrip()


def replay(finding: dict[str, Any]) -> str:
    """The command that shows a finding again; empty where there is none."""
    if finding.get("question"):
        return shlex.join(["fusecheck", "replay", str(finding["question"])])
    if "problem" in finding:
        words = ["fusecheck", "replay", str(finding["problem"])]
        words += ["--backend", str(finding["backend"])] if finding.get("backend") else []
        words += ["--dataflow", str(finding["judged_by"])] if finding.get("judged_by") else []
        return shlex.join(words)
    if "graph" in finding:
        line = str(finding.get("replay", "fusecheck graph"))
        return line if "--graph" in line else f"{line} --graph {shlex.quote(str(finding['graph']))}"
    if "fault" in finding:
        return shlex.join(["fusecheck", "faults", "--fault", str(finding["fault"])])
    return ""

"""A run as JUnit XML that CI systems show well: one test case a case group, replay lines in the failure text."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree as ET

from fusecheck.report.groups import Group, groups, sentence
from fusecheck.report.record import Part, parts

_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold, not even escaped."""


def to_junit(record: dict[str, Any]) -> str:
    """JUnit XML of a record.

    A failed group is a failure. An inconclusive one is an error, because CI systems show a skipped case as green. What
    was left out on purpose, or needs another machine, is skipped, with its reason.
    """
    root = ET.Element("testsuites", name="fusecheck")
    for part in parts(record):
        suite = ET.SubElement(
            root, "testsuite", name=_clean(" ".join(x for x in ("fusecheck", part.command, part.run) if x))
        )
        if part.time:
            suite.set("timestamp", _clean(part.time.partition("+")[0]))
        _properties(suite, part)
        for group in groups(part):
            _case(suite, part, group)
        for left in part.summary.get("not_run", []):
            case = _element(suite, part, str(left["part"]), 0.0)
            if left.get("unanswered"):
                ET.SubElement(case, "error", message=_clean(f"not answered: {left['reason']}"), type="inconclusive")
            else:
                ET.SubElement(case, "skipped", message=_clean(f"not run: {left['reason']}"))
        out = ET.SubElement(suite, "system-out")
        out.text = _clean(f"{part.verdict}: {sentence(part)}")
        _totals(suite)
    _totals(root, ".//")
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _properties(suite: ET.Element, part: Part) -> None:
    known: dict[str, Any] = {"command": part.command, "verdict": part.verdict}
    known |= {key: part.summary[key] for key in ("cases", "elements", "codes_per_element") if key in part.summary}
    known |= {key: value for key, value in part.environment.items() if isinstance(value, (str, int))}
    holder = ET.SubElement(suite, "properties")
    for name, value in known.items():
        ET.SubElement(holder, "property", name=_clean(name), value=_clean(str(value)))


def _element(suite: ET.Element, part: Part, name: str, seconds: float) -> ET.Element:
    attributes = {"classname": _clean(f"fusecheck.{part.command}"), "name": _clean(name), "time": f"{seconds:.3f}"}
    return ET.SubElement(suite, "testcase", attributes)


def _case(suite: ET.Element, part: Part, group: Group) -> None:
    case = _element(suite, part, group.name, group.seconds)
    if group.verdict == "pass":
        ET.SubElement(case, "system-out").text = _clean(group.note)
        return
    text = group.text or group.note
    tag = "failure" if group.verdict == "fail" else "error"
    message = _clean(text.partition("\n")[0][:300])
    ET.SubElement(case, tag, message=message, type=group.verdict).text = _clean(text)


def _totals(element: ET.Element, prefix: str = "") -> None:
    element.set("tests", str(len(element.findall(f"{prefix}testcase"))))
    for name, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        element.set(name, str(len(element.findall(f"{prefix}testcase/{tag}"))))


def _clean(text: str) -> str:
    return _ILLEGAL.sub("\ufffd", text)

"""The page, JUnit and Markdown say what `result.json` says, whatever strings it holds, and fetch nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Callable
from copy import deepcopy
from html.parser import HTMLParser
from importlib import resources
from typing import Any
from xml.etree import ElementTree as ET

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from property_tests.suite import report_records as made
from verify.float8 import code_at
from verify.problem import Problem
from verify.report.drawing import heat_map, histogram, number_line
from verify.report.groups import replay
from verify.report.junit import to_junit
from verify.report.markdown import to_markdown
from verify.report.page import to_html
from verify.report.record import parts, reproducible

RECORDS: dict[str, Callable[[], dict[str, Any]]] = {
    "pass": made.kernel,
    "fail": lambda: made.kernel("fail"),
    "verify": made.verify,
    "unknown command": lambda: made.record("pace", "pass", {"cases": 3, "largest": None}, []),
}
VOID = {"meta", "br", "link", "img", "input", "hr"}
DRAWN_EMPTY = {"line", "rect", "path", "circle"}
SCHEMA = json.loads((resources.files("verify.report") / "result.schema.json").read_text(encoding="utf-8"))


class Page(HTMLParser):
    """What a browser would make of a page: tags, attributes, text; and whether every tag is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in DRAWN_EMPTY
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def strings_replaced(value: Any, text: str) -> Any:
    """The value with `text` in place of the strings that are free text."""
    if isinstance(value, dict):
        free = {"message", "case", "reason", "title", "name", "backend", "detail", "headline", "pass", "platform"}
        return {k: text if k in free and isinstance(v, str) else strings_replaced(v, text) for k, v in value.items()}
    return [strings_replaced(item, text) for item in value] if isinstance(value, list) else value


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


@pytest.mark.parametrize("name", RECORDS)
def test_a_page_is_well_formed_and_says_the_verdict_first(name: str) -> None:
    record = RECORDS[name]()
    text = to_html(record)
    page = Page(text)
    assert page.tags.count("h1") == 1
    assert text.index("<h1") < text.index("<h2")
    heading = re.search(r"<h1[^>]*>([^<]*)", text)
    assert heading is not None
    assert heading[1].startswith(record["verdict"].capitalize() + ": ")
    assert len(text) < 3_000_000


@pytest.mark.parametrize("name", RECORDS)
def test_a_page_fetches_nothing_and_its_policy_allows_only_its_own_style_and_script(name: str) -> None:
    text = to_html(RECORDS[name]())
    page = Page(text)
    links = [value for _, attribute, value in page.attributes if attribute in {"href", "src", "srcset", "action"}]
    assert all(link.startswith("#") for link in links)
    assert not {"link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert not re.search(r"@import|url\(", text)
    assert [name for _, name, _ in page.attributes if name == "style" or name.startswith("on")] == []
    policy = next(value for _, name, value in page.attributes if name == "content" and "default-src" in value)
    assert "default-src 'none'" in policy
    for tag in ("style", "script"):
        body = text.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


@pytest.mark.parametrize("name", RECORDS)
def test_links_lead_somewhere_and_pictures_have_a_text(name: str) -> None:
    page = Page(to_html(RECORDS[name]()))
    ids = [value for _, attribute, value in page.attributes if attribute == "id"]
    assert len(ids) == len(set(ids))
    used = [v for _, a, v in page.attributes if a in {"href", "aria-labelledby"}]
    assert used
    assert all(value.lstrip("#") in ids for value in used)
    labels = [value for tag, attribute, value in page.attributes if tag == "svg" and attribute == "aria-label"]
    assert len(labels) == page.tags.count("svg")
    assert all(labels)


@settings(max_examples=40, deadline=None)
@given(text=st.text(min_size=1, max_size=60) | st.sampled_from(["</script><script>x()</script>", "]]>", "{{ 7*7 }}"]))
def test_hostile_strings_stay_text_everywhere(text: str) -> None:
    for record in (made.verify(), made.kernel("fail")):
        calm, hostile = strings_replaced(record, "calm"), strings_replaced(record, text)
        assert Page(to_html(hostile)).tags == Page(to_html(calm)).tags
        shape = [element.tag for element in ET.fromstring(to_junit(hostile)).iter()]
        assert shape == [element.tag for element in ET.fromstring(to_junit(calm)).iter()]
        lines = [to_markdown(each).count("\n") for each in (hostile, calm)]
        assert lines[0] == lines[1]


def test_markup_in_a_message_is_shown_as_it_is() -> None:
    record = made.kernel("fail")
    record["findings"][0]["message"] = nasty = '<img src=x onerror="a()">|`_*<!--'
    assert nasty in Page(to_html(record)).text
    failure = ET.fromstring(to_junit(record)).find(".//failure")
    assert failure is not None
    assert nasty in (failure.text or "")
    assert "<img" not in to_markdown(record).replace(f"`` quant: {nasty}", "")


def test_a_finding_shows_its_element_its_codes_and_a_line_that_replays_it() -> None:
    text = to_html(made.kernel("fail"))
    page = Page(text)
    assert "quant: rank 1, row 2, column 17" in page.text
    assert "got 0x3c (1.5), admissible 0x39 to 0x3a" in page.text
    for code in ("0x36", "0x39", "0x3a", "0x3c", "0x3f"):
        assert f">{code}<" in text
    line = replay(made.finding())
    assert line in page.text
    words = shlex.split(line)
    assert (words[:2], words[3:]) == (["fusecheck", "replay"], ["--backend", "emulated:trtllm"])
    assert Problem.from_json(words[2]).hidden == 128


@given(
    got=st.integers(-126, 126), low=st.integers(-126, 126), high=st.integers(-126, 126)
)  # fmt: skip
def test_the_number_line_marks_what_was_got_and_exactly_the_admissible_codes(got: int, low: int, high: int) -> None:
    low, high = min(low, high), max(low, high)
    names = [f"{code_at(index):#04x}" for index in (got, low, high)]
    line = number_line(f"rank 0 element[0,0] got {names[0]} (1) admissible {names[1]}..{names[2]}")
    assert line is not None
    assert line.kind == "E4M3"
    places = [tick.x for tick in line.ticks]
    assert places == sorted(places)
    assert all(0 < place < 640 for place in places)
    assert [tick.code for tick in line.ticks if tick.got] == [names[0]]
    inside = {f"{code_at(index):#04x}" for index in range(low, high + 1)}
    for tick in line.ticks:
        assert tick.admissible == (tick.code in inside)
        assert tick.admissible == (line.band[0] <= tick.x <= line.band[1])
    assert {names[1], names[2]} <= {tick.code for tick in line.ticks}


@pytest.mark.parametrize(
    ("message", "kind", "codes"),
    [
        ("got 0x7f (nan) admissible 0x3a..0x3b", "E4M3", "0x7f"),
        ("got 0x3f36 (0.710938) admissible 0x3f34 (0.703125)..0x3f34 (0.703125)", "16-bit", "0x3f36"),
    ],
)
def test_a_nan_and_a_sixteen_bit_value_are_drawn_too(message: str, kind: str, codes: str) -> None:
    line = number_line(message)
    assert line is not None
    assert (line.kind, [tick.code for tick in line.ticks if tick.got]) == (kind, [codes])


def test_a_message_without_codes_has_no_picture() -> None:
    assert number_line("rank 0 did not answer within 60 s") is None


def test_the_histogram_counts_every_element_once() -> None:
    bars = histogram({"0": 900, "1": 90, "-2": 5, "5": 4, "252": 1})
    assert sum(bar.count for bar in bars) == 1000
    assert [bar.label for bar in bars][-1] == "64 to 252"
    assert max(bars, key=lambda bar: bar.width).label == "0"


def test_the_heat_map_has_every_case_and_an_empty_cell_has_no_shade() -> None:
    heat = heat_map({"gaussian/128": 12, "gaussian/4096": 1, "special/128": 7})
    assert heat.columns == [128, 4096]
    assert dict(heat.rows) == {"gaussian": [(12, 9), (1, 1)], "special": [(7, 6), (0, 0)]}


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
    assert names == {"error": ["emulated:trtllm tp 4"], "skipped": ["latency"]}
    assert [suite.get("name") for suite in root] == [
        f"fusecheck {x}" for x in ("verify", "graph", "accuracy", "faults")
    ]


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


def _contrast(one: str, other: str) -> float:
    """WCAG 2 contrast of two #rrggbb colours."""

    def luminance(colour: str) -> float:
        parts_ = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts_]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_has_enough_contrast_in_light_and_dark() -> None:
    style = (resources.files("verify.report") / "templates" / "report.css").read_text(encoding="utf-8")
    themes = [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{[^}]*\}", style)]
    light, dark = themes[:2]
    assert light["page"] != dark["page"]
    for theme in (light, dark):
        for ink in ("ink", "soft", "link", "good", "bad", "open"):
            assert min(_contrast(theme[ink], theme[ground]) for ground in ("page", "card")) >= 4.5


def test_a_record_is_not_changed_by_being_shown() -> None:
    record = made.verify()
    before = deepcopy(record)
    to_html(record), to_junit(record), to_markdown(record)
    assert record == before

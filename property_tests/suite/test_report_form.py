"""Whatever strings a record holds, its page, JUnit and Markdown keep their form, and fetch nothing."""

from __future__ import annotations

import base64
import hashlib
import re
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fusecheck.property_tests.suite import report_records as made
from fusecheck.property_tests.suite.report_pages import Page
from fusecheck.property_tests.suite.report_records import RECORDS
from fusecheck.report.junit import to_junit
from fusecheck.report.markdown import to_markdown
from fusecheck.report.page import to_html

HOSTILE = (
    "</script><script>x()</script>",
    "]]>",
    "{{ 7*7 }}",
    "\x00\x1b[31m\x85\u202e",
    "\ud800",
    "</style><style>*{}",
)
"""Markup, templates, what drives a terminal or turns text round, half a character."""


def strings_replaced(value: Any, text: str) -> Any:
    """The value with `text` in place of the strings that are free text."""
    if isinstance(value, dict):
        free = {"message", "case", "reason", "title", "name", "backend", "detail", "headline", "pass", "platform"}
        free |= {"question", "target", "baseline_text", "candidate_text", "task", "formula", "project", "model"}
        return {k: text if k in free and isinstance(v, str) else strings_replaced(v, text) for k, v in value.items()}
    return [strings_replaced(item, text) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", RECORDS)
def test_a_page_is_well_formed_and_says_the_verdict_first(name: str) -> None:
    record = RECORDS[name]()
    text = to_html(record)
    page = Page(text)
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    assert text.index("<h1") < text.index("<h2")
    heading = re.search(r"<h1[^>]*>([^<]*)", text)
    assert heading is not None
    assert heading[1].startswith(record["verdict"].capitalize() + ": ")
    assert len(text.encode()) < 3_000_000


@pytest.mark.parametrize("name", RECORDS)
def test_a_page_fetches_nothing_and_its_policy_allows_only_its_own_style_and_script(name: str) -> None:
    text = to_html(RECORDS[name]())
    page = Page(text)
    links = page.values("href", "src", "srcset", "action", "xlink:href", "data", "poster")
    assert links
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
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    used = page.values("href", "aria-labelledby")
    assert used
    assert all(value.lstrip("#") in ids for value in used)
    for picture in page.pictures:
        assert picture.get("aria-hidden") == "true" or (picture["role"] == "img" and picture["aria-label"])
    regions = [value for tag, attribute, value in page.attributes if tag == "div" and attribute == "aria-label"]
    assert len(regions) == page.values("role").count("region")
    assert all(regions)


@settings(max_examples=10, deadline=None)
@example(text=HOSTILE[0])
@example(text=HOSTILE[1])
@example(text=HOSTILE[2])
@example(text=HOSTILE[3])
@example(text=HOSTILE[4])
@example(text=HOSTILE[5])
@given(text=st.text(min_size=1, max_size=60))
def test_hostile_strings_stay_text_everywhere(text: str) -> None:
    for record in (made.verify(), made.kernel("fail"), made.latency()):
        calm, hostile = strings_replaced(record, "calm"), strings_replaced(record, text)
        assert Page(to_html(hostile)).tags == Page(to_html(calm)).tags
        shape = [element.tag for element in ET.fromstring(to_junit(hostile)).iter()]
        assert shape == [element.tag for element in ET.fromstring(to_junit(calm)).iter()]
        lines = [to_markdown(each).encode().count(b"\n") for each in (hostile, calm)]
        assert lines[0] == lines[1]


def test_markup_in_a_message_is_shown_as_it_is() -> None:
    record = made.kernel("fail")
    record["findings"][0]["message"] = nasty = '<img src=x onerror="a()">|`_*<!--'
    assert nasty in Page(to_html(record)).text
    failure = ET.fromstring(to_junit(record)).find(".//failure")
    assert failure is not None
    assert nasty in (failure.text or "")
    assert "<img" not in to_markdown(record).replace(f"`` quant: {nasty}", "")

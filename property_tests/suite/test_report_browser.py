"""The page in a real Chromium: quiet console, no request, links, copying, keyboard, phone, dark, paper."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fusecheck.property_tests.suite import chromium
from fusecheck.property_tests.suite import report_records as made
from fusecheck.property_tests.suite.chromium import Browser
from fusecheck.property_tests.suite.report_pages import THEMES
from fusecheck.report.page import to_html

HOSTILE = '</script><script>alert(1)</script><img src="http://localhost:9/x">'


def _everything() -> dict[str, Any]:
    """A verify run with a latency part, findings, and markup wherever a string is free."""
    record = made.verify()
    record["summary"]["parts"]["latency"] = {"verdict": "pass", "summary": made.latency_summary()}
    record["summary"]["parts"]["accuracy"]["summary"]["flipped"][0]["candidate_text"] = HOSTILE
    record["findings"] += [made.finding(), made.finding(HOSTILE) | {"stage": "norm"}]
    return record


PAGES = {"everything": _everything, "merged": made.merged}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One Chromium for all tests of this module."""
    program = chromium.find()
    assert program is not None
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages as files."""
    folder = tmp_path_factory.mktemp("pages")
    for name, record in PAGES.items():
        (folder / f"{name}.html").write_text(to_html(record()), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in PAGES}


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_said_on_the_console_and_nothing_but_the_page_is_asked_for(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    browser.open(pages[name])
    browser.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert browser.evaluate("getComputedStyle(document.querySelector('.badge')).borderTopStyle") == "solid"
    assert browser.complaints() == []
    assert browser.requests() == [pages[name].as_uri()]


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_to_its_place(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name])
    script = """[...document.querySelectorAll('a')].map(a => {
      a.click();
      const found = document.querySelector(':target');
      return [a.getAttribute('href'), found && '#' + found.id, found && found.getClientRects().length];
    })"""
    links = browser.evaluate(script)
    assert len(links) >= 6
    assert all(wanted == found and shown for wanted, found, shown in links)


def test_a_copy_button_puts_the_replay_line_on_the_clipboard_and_says_so(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["everything"])
    browser.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    browser.click(".finding .replay button")
    browser.evaluate("new Promise(done => setTimeout(done, 200))")
    assert browser.evaluate("document.getElementById('said').textContent") == "Copied."
    line = browser.evaluate("document.querySelector('.finding .replay code').textContent")
    assert line.startswith("fusecheck replay ")
    assert browser.evaluate("navigator.clipboard.readText()") == line


@pytest.mark.parametrize("name", PAGES)
def test_nothing_reaches_out_of_a_phone_of_390_pixels(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name], width=390)
    browser.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert browser.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    script = """[...document.querySelectorAll('body *')]
      .filter(e => !e.closest('.scroll') && !e.matches('.skip, .unseen'))
      .filter(e => { const b = e.getBoundingClientRect(); return b.width && (b.right > 390.5 || b.left < -0.5); })
      .map(e => e.outerHTML.slice(0, 200))"""
    assert browser.evaluate(script) == []


@pytest.mark.parametrize("width", [390, 1200])
def test_texts_in_pictures_do_not_touch(browser: Browser, pages: dict[str, Path], width: int) -> None:
    browser.open(pages["everything"], width=width)
    script = """[...document.querySelectorAll('svg.line, svg.interval, svg.chart')].flatMap(svg => {
      const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
      return boxes.flatMap(([a, p], i) => boxes.slice(i + 1)
        .filter(([, q]) => p.left < q.right && q.left < p.right && p.top + 3 < q.bottom && q.top + 3 < p.bottom)
        .map(([b]) => `${a} on ${b}`));
    })"""
    assert browser.evaluate("document.querySelectorAll('svg.line, svg.interval, svg.chart').length") >= 5
    assert browser.evaluate(script) == []


def test_the_keyboard_reaches_everything_that_can_be_used_and_shows_where_it_is(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["everything"])
    usable = """[...document.querySelectorAll('a, button, summary, select, [tabindex="0"]')]"""
    usable += ".filter(e => e.checkVisibility())"
    wanted = browser.evaluate(f"{usable}.length")
    script = f"""(() => {{ const e = document.activeElement;
      return [{usable}.indexOf(e), getComputedStyle(e).outlineStyle, e.getBoundingClientRect().left >= 0]; }})()"""
    visited = []
    for _ in range(wanted):
        browser.press("Tab")
        index, outline, seen = browser.evaluate(script)
        visited.append(index)
        assert (outline, seen) == ("solid", True)
        if index == 0:
            browser.press("Enter")
            assert browser.evaluate("location.hash") == "#verdict"
    assert wanted > 20
    assert visited == list(range(wanted))


@pytest.mark.parametrize(
    ("dark", "media", "theme"), [(False, "screen", "light"), (True, "screen", "dark"), (True, "print", "print")]
)
def test_light_dark_and_paper_have_their_own_ground(
    browser: Browser, pages: dict[str, Path], dark: bool, media: str, theme: str
) -> None:
    browser.open(pages["everything"], dark=dark, media=media)
    page = THEMES[theme]["page"]
    ground = "rgb(" + ", ".join(str(int(page[i : i + 2], 16)) for i in (1, 3, 5)) + ")"
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == ground
    shown = browser.evaluate("getComputedStyle(document.querySelector('button')).display !== 'none'")
    assert shown == (media == "screen")


def test_a_pass_prints_on_one_page(browser: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    record = made.verify()
    record |= {"verdict": "pass", "findings": []}
    record["summary"]["parts"]["graph"]["verdict"] = "pass"
    place = tmp_path / "pass.html"
    place.write_text(to_html(record, ["result.json"]), encoding="utf-8")
    browser.open(place, media="print")
    assert len(re.findall(rb"/Type\s*/Page\b", browser.print_to_pdf())) == 1


def test_findings_are_filtered_by_what_they_differ_in(browser: Browser, tmp_path: Path) -> None:
    record = made.kernel("fail")
    record["findings"] += [made.finding() | {"stage": "norm"}]
    place = tmp_path / "fail.html"
    place.write_text(to_html(record), encoding="utf-8")
    browser.open(place)
    shown = "[...document.querySelectorAll('article.finding')].filter(e => e.checkVisibility()).length"
    choose = "(() => { const s = document.querySelector('select'); s.value = 'norm'; "
    choose += "s.dispatchEvent(new Event('change', {bubbles: true})); })()"
    assert browser.evaluate(shown) == 2
    browser.evaluate(choose)
    assert browser.evaluate(shown) == 1


def test_on_paper_what_was_folded_is_open_and_afterwards_folded_again(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["everything"])
    count = "document.querySelectorAll('.part.fail details:not([open]):not(.more)').length"
    before = browser.evaluate(count)
    browser.evaluate("addEventListener('beforeprint', () => { window.folded = " + count + "; })")
    assert browser.print_to_pdf().startswith(b"%PDF")
    assert (browser.evaluate("window.folded"), browser.evaluate(count)) == (0, before)
    assert before > 0

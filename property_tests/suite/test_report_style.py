"""The page can be read: enough contrast in light, dark and print, and no colour that a theme forgets."""

from __future__ import annotations

import re

import pytest

from fusecheck.property_tests.suite.report_pages import STYLE, THEMES

Colour = tuple[float, float, float]


def _colour(text: str) -> Colour:
    """Red, green and blue, 0 to 255, of `#rrggbb` or of `r, g, b`."""
    parts = [int(text[i : i + 2], 16) for i in (1, 3, 5)] if text.startswith("#") else map(int, text.split(","))
    red, green, blue = parts
    return red, green, blue


def _over(above: Colour, below: Colour, alpha: float) -> Colour:
    red, green, blue = (alpha * a + (1 - alpha) * b for a, b in zip(above, below, strict=True))
    return red, green, blue


def contrast(one: Colour, other: Colour) -> float:
    """WCAG 2 contrast."""

    def luminance(colour: Colour) -> float:
        linear = [c / 12.92 if (c := v / 255) <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for v in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_contrast_is_that_of_the_standard() -> None:
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast(_colour("#777777"), (255, 255, 255)) == pytest.approx(4.48, abs=0.01)


def test_every_theme_names_the_same_colours_and_every_colour_used_is_named() -> None:
    light, dark, paper = THEMES.values()
    assert light["page"] != dark["page"]
    assert light.keys() == dark.keys() == paper.keys()
    assert set(re.findall(r"var\(--([\w-]+)\)", STYLE)) - {"line"} <= light.keys()


@pytest.mark.parametrize("name", THEMES)
def test_text_has_enough_contrast(name: str) -> None:
    theme = {key: _colour(value) for key, value in THEMES[name].items()}
    for ink in ("ink", "soft", "link", "good", "bad", "open"):
        assert min(contrast(theme[ink], theme[ground]) for ground in ("page", "card")) >= 4.5


@pytest.mark.parametrize("name", THEMES)
def test_text_on_shaded_cells_and_marks_has_enough_contrast(name: str) -> None:
    theme = {key: _colour(value) for key, value in THEMES[name].items()}
    shades = [float(a) for a in re.findall(r"\.(?:h\d|k|l|t) \{ background: rgba\(var\(--heat\), ([.\d]+)\)", STYLE)]
    assert len(shades) >= 11
    for alpha in [*shades, *map(float, re.findall(r"mark \{ background: rgba\(var\(--heat\), ([.\d]+)\)", STYLE))]:
        for ground in ("page", "card"):
            assert contrast(theme["ink"], _over(theme["heat"], theme[ground], alpha)) >= 4.5
    assert all(contrast(theme["bad"], _over(theme["heat"], theme["page"], alpha)) >= 3 for alpha in shades)


@pytest.mark.parametrize("name", THEMES)
def test_lines_bars_and_marks_can_be_told_from_their_ground(name: str) -> None:
    theme = {key: _colour(value) for key, value in THEMES[name].items()}
    for mark in ("fill", "soft", "open", "bad", "good", "ink"):
        assert min(contrast(theme[mark], theme[ground]) for ground in ("page", "card")) >= 3


def test_what_is_shown_by_colour_is_shown_by_shape_or_text_too() -> None:
    dashed = dict(re.findall(r"((?:\.[\w-]+(?:, )?)+) \{ stroke-dasharray: ([\d ]+); \}", STYLE))
    assert {".fused-two, .norm-two", ".unfused-one", ".margin"} - {".margin"} <= dashed.keys()
    assert len(set(dashed.values())) == len(dashed)

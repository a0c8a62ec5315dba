"""What the page draws is what `result.json` says: each picture's geometry, and the page that holds it."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fusecheck.formats.element import E4M3
from fusecheck.property_tests.suite import report_records as made
from fusecheck.property_tests.suite.report_pages import Page
from fusecheck.report.page import to_html
from fusecheck.report.pictures.axis import Axis
from fusecheck.report.pictures.flips import flips
from fusecheck.report.pictures.heat import heat_map
from fusecheck.report.pictures.histogram import histogram
from fusecheck.report.pictures.intervals import intervals
from fusecheck.report.pictures.latency import HEIGHT, gain_plot, gains, steps, times
from fusecheck.report.pictures.matrix import criteria, matrices
from fusecheck.report.pictures.number_line import NumberLine, number_line

ZEROS = {"0x00", "0x80"}


@given(got=st.integers(-126, 126), low=st.integers(-126, 126), high=st.integers(-126, 126))
def test_the_number_line_marks_what_was_got_and_exactly_the_admissible_codes(got: int, low: int, high: int) -> None:
    low, high = min(low, high), max(low, high)
    names = [f"{E4M3.code_at(index):#04x}" for index in (got, low, high)]
    line = number_line(f"rank 0 element[0,0] got {names[0]} (1) admissible {names[1]}..{names[2]}")
    assert line is not None
    assert line.kind == "E4M3"
    places = [tick.x for tick in line.ticks]
    assert places == sorted(places)
    assert all(0 < place < 100 for place in places)
    assert [tick.code for tick in line.ticks if tick.got] == [names[0]]
    inside = {f"{E4M3.code_at(index):#04x}" for index in range(low, high + 1)}
    for tick in line.ticks:
        assert tick.admissible == (line.band[0] <= tick.x <= line.band[1])
        if tick.code not in ZEROS:
            assert tick.admissible == (tick.code in inside)
    assert {names[1], names[2]} <= {tick.code for tick in line.ticks}


def _line(message: str, dtype: str = "") -> NumberLine:
    line = number_line(message, dtype)
    assert line is not None
    return line


@given(index=st.integers(-125, 124), share=st.floats(0, 1))
def test_the_enclosure_of_the_quotient_lies_between_the_codes_that_it_lies_between(index: int, share: float) -> None:
    below, above = (E4M3.values[E4M3.code_at(i)] for i in (index, index + 1))
    real = below + share * (above - below)
    near = f"{E4M3.code_at(index):#04x}"
    line = _line(
        f"y/scale in [{real!r}, {real!r}]  in=[1] got {near} admissible {near}..{E4M3.code_at(index + 1):#04x}"
    )
    assert line.real is not None
    left, right = (next(t.x for t in line.ticks if t.code == f"{E4M3.code_at(i):#04x}") for i in (index, index + 1))
    assert left - 0.01 <= line.real[0] <= line.real[1] <= right + 0.01


@pytest.mark.parametrize(
    ("message", "dtype", "kind", "codes"),
    [
        ("got 0x7f (nan) admissible 0x3a..0x3b", "", "E4M3", "0x7f"),
        ("got 0x3f36 (0.710938) admissible 0x3f34 (0.703125)..0x3f34 (0.703125)", "", "16-bit", "0x3f36"),
        ("got 0x3f36 (0.710938) admissible 0x3f34 (0.703125)..0x3f34 (0.703125)", "bf16", "bf16", "0x3f36"),
        ("got 0x7fc0 (nan) admissible 0x3f34 (0.703125)..0x3f35 (0.707031)", "bf16", "bf16", "0x7fc0"),
    ],
)
def test_a_nan_and_a_sixteen_bit_value_are_drawn_too(message: str, dtype: str, kind: str, codes: str) -> None:
    line = _line(message, dtype)
    assert (line.kind, [tick.code for tick in line.ticks if tick.got]) == (kind, [codes])


def test_neighbours_of_a_sixteen_bit_value_carry_the_values_of_its_format() -> None:
    line = _line("got 0x3c01 (1.00098) admissible 0x3c00 (1)..0x3c00 (1)", "fp16")
    assert [(t.code, t.value) for t in line.ticks] == [
        ("0x3bff", "0.9995"),
        ("0x3c00", "1"),
        ("0x3c01", "1.001"),
        ("0x3c02", "1.002"),
    ]
    assert line.label.endswith(": 1 code away")


def test_the_wrong_zero_is_not_drawn_as_admissible() -> None:
    line = _line("got 0x80 (-0) admissible 0x00..0x00")
    assert [(t.code, t.admissible) for t in line.ticks if t.got] == [("0x80", False)]
    assert line.label.endswith("the zero of the other sign")


def test_a_message_without_codes_has_no_picture() -> None:
    assert number_line("rank 0 did not answer within 60 s") is None


@example(low=113, wide=0, off=13)
@given(low=st.integers(-126, 120), wide=st.integers(0, 6), off=st.integers(1, 60))
def test_labels_do_not_touch_on_the_narrowest_screen(low: int, wide: int, off: int) -> None:
    codes = [f"{E4M3.code_at(min(index, 126)):#04x}" for index in (low + wide + off, low, low + wide)]
    named = [t for t in _line(f"got {codes[0]} admissible {codes[1]}..{codes[2]}").ticks if t.named]
    assert any(t.got for t in named)
    assert all(b.x - a.x >= 4 * 7 / 3.2 for a, b in pairwise(named))


def test_the_histogram_counts_every_element_once() -> None:
    bars = histogram({"0": 900, "1": 90, "-2": 5, "5": 4, "252": 1})
    assert sum(bar.count for bar in bars) == 1000
    assert [bar.label for bar in bars][-1] == "64 to 252"
    assert max(bars, key=lambda bar: bar.length) == bars[0]
    assert bars[0].length == 100


def test_the_heat_map_has_every_case_its_stages_and_what_failed() -> None:
    heat = heat_map(
        {"gaussian/128": 12, "gaussian/4096": 1, "special/128": 7},
        {"gaussian/128/residual": 1000, "gaussian/128/quant": 10, "special/128/residual": 100},
        [made.finding()],
    )
    assert (heat.columns, heat.stages) == ([128, 4096], ["residual", "quant"])
    rows = {family: [(c.cases, c.shade, c.failed) for c in cells] for family, cells in heat.rows}
    assert rows == {"gaussian": [(12, 9, ["quant"]), (1, 1, [])], "special": [(7, 6, []), (0, 0, [])]}
    bits = {family: [(b.stage, b.shade, b.failed) for b in cells[0].bits] for family, cells in heat.rows}
    assert bits == {
        "gaussian": [("residual", 9, False), ("quant", 4, True)],
        "special": [("residual", 7, False), ("quant", 0, False)],
    }


def test_a_heat_map_without_stages_still_counts_cases() -> None:
    heat = heat_map({"a/b/64": 3}, {}, [{"stage": "quant"}, {"problem": "[]"}])
    assert (heat.rows[0][0], heat.rows[0][1][0].cases, heat.stages) == ("a/b", 3, [])


def test_an_interval_is_drawn_against_zero_and_its_margin() -> None:
    drawn = {i.name: i for i in intervals(made.accuracy_summary()["tasks"])}
    assert set(drawn) == {"golden_mmlu", "golden_gsm8k"}
    good, wide = drawn["golden_mmlu"], drawn["golden_gsm8k"]
    assert 0 < good.margin < good.low < good.estimate < good.zero < good.high < 100
    assert 0 < wide.low < wide.margin < wide.estimate == wide.zero < wide.high < 100
    assert good.label == "-0.10 points, -0.40 to +0.20, margin -1.50"
    assert intervals({"broken": {"low": "nan", "change": 0, "high": 1, "margin": 1}}) == []


def test_changed_answers_stand_side_by_side_lost_ones_first() -> None:
    lost, churn = flips(made.accuracy_summary()["flipped"])
    assert (lost.kind, churn.kind) == ("lost", "churn")
    assert [(side.arm, side.answer, side.right) for side in lost.sides] == [
        ("baseline", "0", True),
        ("candidate", "1", False),
    ]
    assert [(c.name, c.likelihoods, c.chosen, c.right) for c in lost.choices] == [
        ("0", ["-1.5000", "-2.1000"], [True, False], True),
        ("1", ["-2.0000", "-1.9000"], [False, True], False),
    ]
    assert [(side.before, side.after) for side in churn.sides] == [("It is ", "4, so 4."), ("It is ", "5, so 5.")]
    assert churn.choices == []
    gained = flips([made.flip("gained")])[0]
    assert [side.right for side in gained.sides] == [False, True]
    text = Page(to_html(made.verify())).text
    for shown in ("Which is larger?", "Right answer: 4", "lost: the baseline was right, the candidate is wrong"):
        assert shown in text


def test_times_are_drawn_at_their_place_and_a_longer_time_is_higher_up() -> None:
    plot = times(made.latency_summary()["timings"])
    assert plot is not None
    dots = {line.name: line.dots for line in plot.lines}
    assert [x for x, _ in dots["unfused"]] == sorted(x for x, _ in dots["unfused"])
    heights = [y for name in ("fused oneshot", "norm oneshot, quantise", "unfused") for y in [dots[name][0][1]]]
    assert heights == sorted(heights, reverse=True)
    assert all(0 <= x <= 100 and 0 <= y <= HEIGHT for line in plot.lines for x, y in line.dots)
    assert [mark.label for mark in plot.across] == ["1", "64", "2048"]
    assert times([]) is None


def test_the_gain_is_below_the_zero_line_exactly_where_fusing_costs() -> None:
    timings = made.latency_summary()["timings"]
    assert gains(timings) == {1: 1.0, 64: 0.5, 2048: -5.0}
    plot = gain_plot(timings)
    assert plot is not None
    assert plot.zero is not None
    assert [y > plot.zero for _, y in plot.lines[0].dots] == [False, False, True]
    assert gain_plot([t for t in timings if t["path"] == "unfused"]) is None


def test_a_predicted_step_stands_beside_the_published_one_on_one_scale() -> None:
    first, second, third = steps(made.latency_summary()["prediction"])
    assert [who for who, _, _ in first.bars] == ["predicted", "published"]
    assert [who for who, _, _ in third.bars] == ["predicted"]
    lengths = {who: length for who, _, length in second.bars}
    assert lengths["published"] / lengths["predicted"] == pytest.approx(2.91 / 0.063, rel=0.02)
    assert first.bars[0][1] + first.bars[0][2] == pytest.approx(first.zero)
    assert second.bars[1][1] == second.zero
    page = Page(to_html(made.latency())).text
    assert "It pays up to 64 tokens: least at 2,048 (-5.00 µs), most at 1 (+1.00 µs)." in page
    assert "+2.910" in page


def test_the_kill_matrix_has_each_fault_once_with_what_caught_it() -> None:
    kernel, graph = matrices(made.faults_summary()["rows"])
    assert (kernel.group, kernel.killed, kernel.stages, kernel.criteria) == (
        "arithmetic", 1, ["residual", "norm"], ["loose", "tight"],
    )  # fmt: skip
    assert [(r.id, r.caught, r.peers, r.killed) for r in kernel.rows] == [
        ("KA-01", ["first", "later"], ["miss", "kill"], True),
        ("KA-02", ["", ""], ["hang", "miss"], False),
    ]
    assert (graph.stages, graph.criteria, graph.rows[0].caught) == (["predecessor"], [], ["first"])
    text = Page(to_html(made.verify())).text
    assert "Arithmetic faults: 1 of 2 caught" in text
    assert "KA-02 cast (survived)" in text


def test_the_criteria_come_sharpest_first_below_fusecheck() -> None:
    found = criteria(made.faults_summary())
    assert [(c.name, c.caught, c.faults, c.false_alarms) for c in found] == [
        ("Fusecheck", 1, 2, 0),
        ("tight", 1, 2, 1),
        ("loose", 0, 2, 0),
    ]
    assert criteria({"rows": []}) == []


@given(low=st.floats(-1e6, 1e6), wide=st.floats(1e-3, 1e6))
def test_the_numbers_beside_an_axis_are_round_few_and_inside(low: float, wide: float) -> None:
    axis = Axis(low, low + wide)
    marks = axis.marks()
    assert 1 <= len(marks) <= 8
    assert all(-0.01 <= mark.at <= 100.01 for mark in marks)
    assert all(a.at < b.at for a, b in pairwise(marks))


def test_a_logarithmic_axis_puts_equal_ratios_equally_far_apart() -> None:
    axis = Axis(1, 1000, logarithmic=True)
    assert [axis(v) for v in (1, 10, 100, 1000)] == [0, 33.33, 66.67, 100]
    assert {"2", "5", "10", "500"} <= {mark.label for mark in axis.marks()}


def test_no_picture_reaches_out_of_its_frame() -> None:
    for record in (made.kernel("fail"), made.verify(), made.latency()):
        text = to_html(record)
        places = [float(place) for place in re.findall(r'\b(?:x|x1|x2|cx)="(-?[\d.]+)%"', text)]
        assert places
        assert all(0 <= place <= 100 for place in places)
        spans = re.findall(r'<rect class="[\w -]+" x="([\d.]+)%"[^>]*? width="([\d.]+)%"', text)
        assert spans
        assert all(float(left) + float(width) <= 100.1 for left, width in spans)

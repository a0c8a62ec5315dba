"""McNemar's tests and Holm's correction against scipy; the planning formulas against simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, norm

from fusecheck.eval.gate import Flips, decide
from fusecheck.eval.intervals import tango_interval
from fusecheck.eval.mcnemar import holm, mcnemar
from fusecheck.eval.peers import PEERS, smallest_flagged, smallest_found, smallest_refused
from fusecheck.eval.power import questions_to_decide, questions_to_pass, smallest_change, smallest_unpaired_change
from fusecheck.property_tests.accuracy_strategies import paired_flips


@given(paired_flips(largest=3000))
def test_mcnemar_agrees_with_the_binomial_test(flips: Flips) -> None:
    found = mcnemar(flips.lost, flips.gained)
    pairs = flips.lost + flips.gained
    if pairs == 0:
        assert found.exact == found.mid_p == found.exact_two_sided == 1
        return
    one_sided = float(binomtest(flips.lost, pairs, 0.5, alternative="greater").pvalue)
    assert abs(found.exact - one_sided) < 1e-12
    assert abs(found.exact_two_sided - float(binomtest(flips.lost, pairs, 0.5).pvalue)) < 1e-9


@given(paired_flips(largest=3000))
def test_swapping_the_arms_mirrors_mcnemar(flips: Flips) -> None:
    here, there = mcnemar(flips.lost, flips.gained), mcnemar(flips.gained, flips.lost)
    assert here.exact_two_sided == there.exact_two_sided
    assert here.mid_p_two_sided == there.mid_p_two_sided
    if flips.lost + flips.gained:
        # Mid-p counts half of the observed outcome on each side, so the two sides add up to 1.
        assert abs(here.mid_p + there.mid_p - 1) < 1e-12


@given(paired_flips(largest=3000))
def test_more_losses_make_the_p_value_smaller(flips: Flips) -> None:
    if flips.gained:
        here, worse = mcnemar(flips.lost, flips.gained), mcnemar(flips.lost + 1, flips.gained - 1)
        assert worse.exact <= here.exact
        assert worse.mid_p <= here.mid_p


@given(paired_flips(largest=3000))
def test_mid_p_is_below_the_exact_p(flips: Flips) -> None:
    found = mcnemar(flips.lost, flips.gained)
    assert found.mid_p <= found.exact
    assert found.mid_p_two_sided <= found.exact_two_sided


def test_mid_p_keeps_the_level_and_exact_is_conservative() -> None:
    """At 1 % flips on MMLU: exact about 4.2 %, mid-p about 4.9 %."""
    rng = np.random.default_rng(1)
    counts = rng.multinomial(14042, (0.005, 0.005, 0.99), size=20_000)[:, :2]
    results = {(b, c): mcnemar(int(b), int(c)) for b, c in {(int(b), int(c)) for b, c in counts}}
    exact = np.mean([results[int(b), int(c)].exact <= 0.05 for b, c in counts])
    mid_p = np.mean([results[int(b), int(c)].mid_p <= 0.05 for b, c in counts])
    assert 0.035 <= exact <= 0.047
    assert 0.044 <= mid_p <= 0.055


@given(st.lists(st.floats(0, 1), max_size=30))
def test_holm_lies_between_the_raw_p_and_bonferroni(values: list[float]) -> None:
    adjusted = holm(values)
    for raw, new in zip(values, adjusted, strict=True):
        assert raw <= new <= min(1.0, len(values) * raw)
    order = np.argsort(values, kind="stable")
    assert list(np.take(adjusted, order)) == sorted(adjusted)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


@pytest.mark.parametrize(
    ("n", "flips", "points"),
    [(14042, 0.01, 0.210), (14042, 0.02, 0.297), (14042, 0.05, 0.469), (1319, 0.02, 0.967), (1319, 0.05, 1.530)],
)
def test_the_smallest_change_is_found_four_times_in_five(n: int, flips: float, points: float) -> None:
    change = smallest_change(n, flips)
    assert change is not None
    assert abs(100 * change - points) < 0.001
    rng = np.random.default_rng(2)
    counts = rng.multinomial(n, ((flips + change) / 2, (flips - change) / 2, 1 - flips), size=20_000)
    z = (counts[:, 0] - counts[:, 1]) / np.sqrt(np.maximum(counts[:, 0] + counts[:, 1], 1))
    assert 0.77 <= (z > norm.isf(0.05)).mean() <= 0.83


def test_too_few_flips_leave_no_change_to_find() -> None:
    assert smallest_change(200, 0.02) is None
    assert smallest_change(1000, 0.0) is None


@pytest.mark.parametrize(("n", "points"), [(14042, 1.4837), (4096, 2.747), (1319, 4.841)])
def test_the_unpaired_formula_is_tensorrt_llms(n: int, points: float) -> None:
    assert abs(100 * smallest_unpaired_change(n) - points) < 0.001


@pytest.mark.parametrize(
    ("margin", "flips", "n"), [(0.0025, 0.01, 9893), (0.005, 0.02, 4947), (0.01, 0.05, 3092), (0.02, 0.1, 1546)]
)
def test_questions_to_pass(margin: float, flips: float, n: int) -> None:
    assert abs(questions_to_pass(margin, flips) - n) <= 1
    rng = np.random.default_rng(5)
    counts = rng.multinomial(n, (flips / 2, flips / 2, 1 - flips), size=20_000)
    passed = decide(counts[:, 0], counts[:, 1], n, margin=margin, alpha_low=0.05, alpha_high=0.05) == "pass"
    assert 0.76 <= passed.mean() <= 0.84


@given(paired_flips(largest=2000), st.floats(0.002, 0.05))
def test_after_the_questions_to_decide_the_interval_is_narrower_than_the_margin(flips: Flips, margin: float) -> None:
    n = questions_to_decide(flips.lost, flips.gained, flips.n, margin=margin, alpha_low=0.05, alpha_high=0.05)
    if n is None:
        return
    widths = []
    for size in (n, n - 1):
        scale = size / flips.n
        if size < max(1, flips.n):
            continue
        ends = tango_interval(flips.lost * scale, flips.gained * scale, size, alpha_low=0.05, alpha_high=0.05)
        widths.append(ends.high - ends.low)
    assert widths[0] < margin
    if n > flips.n:
        assert widths[1] >= margin


@pytest.mark.parametrize(("index", "points"), [(0, 2.08), (1, 6.77), (2, 8.73), (3, 7.80)], ids=[p.name for p in PEERS])
def test_a_peer_rule_flags_its_smallest_drop_four_times_in_five(index: int, points: float) -> None:
    peer, noise, baseline = PEERS[index], 0.02, 0.75
    allowed = peer.tolerated(baseline, peer.n)
    drop = smallest_flagged(allowed, peer.n, noise)
    assert abs(100 * drop - points) < 0.01
    rng = np.random.default_rng(6)
    counts = rng.multinomial(peer.n, (noise / 2 + drop, noise / 2, 1 - noise - drop), size=20_000)
    excess = counts[:, 0] - counts[:, 1] - peer.n * allowed
    # With 200 questions a measured drop of exactly the allowed one is common; the formula knows no such lattice.
    flagged = np.where(np.abs(excess) < 1e-9, 0.5, excess > 0)
    assert 0.77 <= flagged.mean() <= 0.83


def test_on_the_same_questions_the_gate_sees_what_the_peers_do_not() -> None:
    for n in (14042, 1319):
        found = smallest_found(n, 0.02)
        assert found is not None
        assert all(found < smallest_flagged(peer.tolerated(0.75, n), n, 0.02) / 3 for peer in PEERS)


def test_the_gate_refuses_its_smallest_drop_four_times_in_five() -> None:
    drop = smallest_refused(0.005, 14042, 0.02)
    rng = np.random.default_rng(7)
    counts = rng.multinomial(14042, (0.01 + drop, 0.01, 0.98 - drop), size=20_000)
    refused = decide(counts[:, 0], counts[:, 1], 14042, margin=0.005, alpha_low=0.05, alpha_high=0.05) != "pass"
    assert 0.77 <= refused.mean() <= 0.83

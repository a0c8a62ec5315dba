"""How the engines' own rules judge the very runs that a report is about."""

from __future__ import annotations

from collections.abc import Iterator

from fusecheck.eval.outcome import Comparison, TaskResult
from fusecheck.eval.peers import PEERS

KL_BOUNDS = (0.02, 0.05)
"""Bounds that tests give SGLang's `kl_test_utils.compare_kl_divergence`, least and greatest seen; one a model."""

COLUMNS = ("task", "who", "rule", "measured", "tolerated", "says")


def peer_rows(outcome: Comparison) -> list[list[str]]:
    """Each rule on each judged task, a row of `COLUMNS` each; the baseline's own score is the rule's reference."""
    return [row for task in outcome.tasks for row in _rows(task)]


def _rows(task: TaskResult) -> Iterator[list[str]]:
    flips = task.judgement.flips
    for peer in PEERS:
        tolerated = peer.tolerated(flips.baseline_right / flips.n, flips.n)
        says = "accepts" if -flips.delta <= tolerated else "rejects"
        measured = f"{100 * flips.delta + 0.0:+.2f} pt"
        yield [task.endpoint.name, peer.name, peer.rule, measured, f"-{100 * tolerated:.2f} pt", says]
    for name, forced in task.forced.items():
        low, high = KL_BOUNDS
        says = "accepts" if forced.estimated_kl <= low else "rejects" if forced.estimated_kl > high else "either"
        rule = "mean of exp(d) - 1 - d over tokens below the model's bound"
        yield [name, "SGLang kl_test_utils", rule, f"{forced.estimated_kl:.1e} nat", f"{low} to {high} nat", says]

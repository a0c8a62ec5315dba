"""Problems that failed once: from the corpus and from `--cases-from`, before anything new is drawn."""

from __future__ import annotations

from fusecheck.corpus import Kept
from fusecheck.property_tests.kernel.bench import Bench


def test_a_problem_that_failed_once_passes(bench: Bench, kept: Kept) -> None:
    bench.replay(kept.problem, kept.relation, kept.parameters)

"""Power before the run: questions needed, and what the questions at hand can show."""

from __future__ import annotations

import gzip
import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import binom, norm

from fusecheck.eval.data import GENERATED
from fusecheck.eval.gate import GateSettings
from fusecheck.eval.intervals import score_statistic
from fusecheck.eval.power import questions_to_pass, smallest_change
from fusecheck.eval.report_blocks import Block

FULL_SPLITS = {"mmlu": 14042, "gsm8k": 1319}
TAIL = 1e-12
FLIPS = (0.005, 0.01, 0.02, 0.05, 0.1)


def chance_to_pass(n: int, margin: float, flips: float, *, alpha: float, change: float = 0.0) -> float:
    """Chance that the gate says PASS on n questions at a true `change`, exactly: summed over all outcomes.

    The number of flips is binomial, and so is the number of losses among them. Outcomes that come less often than once
    in 10^12 runs are left out.
    """
    counts = np.arange(int(binom.ppf(TAIL, n, flips)), int(binom.isf(TAIL, n, flips)) + 1)
    # The most losses with which each number of flips still passes, by bisection: fewer losses pass where more do.
    low, high = np.full_like(counts, -1), counts.copy()
    while (low < high).any():
        lost = (low + high + 1) // 2
        passes = score_statistic(lost, counts - lost, n, -margin) > norm.isf(alpha)
        low, high = np.where(passes, lost, low), np.where(passes, high, lost - 1)
    chances = binom.pmf(counts, n, flips) * binom.cdf(low, counts, (flips - change) / (2 * flips))
    return float(chances[low >= 0].sum())


def questions_for(margin: float, flips: float, *, alpha: float, power: float) -> int:
    """The fewest questions with which the chance to pass is `power` when nothing changed.

    The chance moves by steps; it is looked for from the normal approximation upwards and downwards, in steps of 2 %.
    """
    n = max(1, questions_to_pass(margin, flips, alpha=alpha, power=power))

    def enough(size: int) -> bool:
        return chance_to_pass(size, margin, flips, alpha=alpha) >= power

    while not enough(n):
        n = math.ceil(n * 1.02) + 1
    while n > 1 and enough(smaller := min(n - 1, int(n / 1.02))):
        n = smaller
    return n


def size_of(task: str) -> int | None:
    """Questions of a task's whole test split; None where this is not known without loading it."""
    shipped = GENERATED / task.removeprefix("golden_") / "test.jsonl.gz"
    if task.startswith("golden_") and shipped.is_file():
        with gzip.open(shipped, "rt", encoding="utf-8") as lines:
            return sum(1 for _ in lines)
    return FULL_SPLITS.get(task)


def plan_block(
    tasks: Sequence[str], settings: GateSettings, *, limit: int | None, seconds: float | None, flips: float | None
) -> Block:
    """The table that `--plan` prints.

    Args:
        tasks: endpoints; those of unknown size get no columns for the questions at hand.
        settings: margins, level, power.
        limit: questions of each task; None for all.
        seconds: time a question takes in one arm, for the estimate of time.
        flips: expected share of flips; None for a range of them.
    """
    rows = []
    for task in tasks:
        size = size_of(task)
        n = size if limit is None else min(limit, size) if size is not None else limit
        margin = settings.margin(task)
        for share in FLIPS if flips is None else (flips,):
            needed = questions_for(margin, share, alpha=settings.alpha, power=settings.power)
            row = [task, f"{100 * margin:g}", f"{share:.1%}", f"{needed:,}"]
            row.append("" if seconds is None else f"{2 * needed * seconds / 60:.1f}")
            if n is None:
                row += ["unknown", "", ""]
            else:
                seen = smallest_change(n, share, alpha=settings.alpha, power=settings.power)
                row.append(f"{n:,}")
                row.append("more than the flips" if seen is None else f"{100 * seen:.2f}")
                row.append(f"{chance_to_pass(n, margin, share, alpha=settings.alpha):.0%}")
            rows.append(row)
    columns = (
        "task",
        "margin, pt",
        "flips",
        f"questions for {settings.power:.0%} power",
        "minutes, two arms",
        "questions at hand",
        "drop they would show, pt",
        "PASS if nothing changed",
    )
    notes = [
        "flips: 0.3 to 3 % is usual for MMLU, 2 to 8 % for generated answers; --aa measures it on this machine",
        "questions at hand: the whole test split, or --limit",
        f"needed: the bound stays within the margin with {settings.power:.0%} chance when nothing changed",
    ]
    return Block("Plan", columns, rows, notes)

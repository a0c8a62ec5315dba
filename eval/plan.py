"""Power before the run: questions needed, and what the questions at hand can show."""

from __future__ import annotations

import gzip
import math
from collections.abc import Sequence
from pathlib import Path

from scipy.stats import norm

from fusecheck.eval.gate import GateSettings
from fusecheck.eval.power import questions_to_pass, smallest_change
from fusecheck.eval.report_blocks import Block

FULL_SPLITS = {"mmlu": 14042, "gsm8k": 1319}
GOLDEN_TASKS = Path(__file__).parent.parent / "golden" / "model" / "tasks"
FLIPS = (0.005, 0.01, 0.02, 0.05, 0.1)


def chance_to_pass(n: int, margin: float, flips: float, *, alpha: float, change: float = 0.0) -> float:
    """Chance that the gate says PASS on n questions at a true `change`, by the normal approximation.

    The score test's spread is taken under the hypothesis "change = -margin" for the threshold and under the truth for
    the outcome; both are sqrt((flips - change²) / n).
    """
    z = float(norm.isf(alpha))
    at_margin = math.sqrt(max(flips - margin * margin, 0.0) / n)
    at_truth = math.sqrt(max(flips - change * change, 1e-300) / n)
    return float(norm.cdf((change + margin - z * at_margin) / at_truth))


def size_of(task: str) -> int | None:
    """Questions of a task's whole test split; None where this is not known without loading it."""
    shipped = GOLDEN_TASKS / task.removeprefix("golden_") / "test.jsonl.gz"
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
            needed = questions_to_pass(margin, share, alpha=settings.alpha, power=settings.power)
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

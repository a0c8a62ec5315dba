"""Which tier catches a planted bug: the kernel question on the kernel by itself, or the gate on the whole model.

`python -m fusecheck.eval.planted_tiers golden/model/planted.json` prints a recorded table as Markdown, as README shows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from fusecheck.eval.gate import Verdict
from fusecheck.eval.outcome import Comparison
from fusecheck.inputs.families import FAMILIES
from fusecheck.kernel.plan import Plan
from fusecheck.kernel.report import Subject
from fusecheck.kernel.run import Run
from fusecheck.kernel.turn import Budget

MOST_ELEMENTS = 2**17
CASES = 2 * len(FAMILIES)
"""Each family twice, in shapes that are run every day."""

COLUMNS = ("candidate", "kernel question", "acc", "Δ pt", "lost/gained", "KL ÷ unfused's", "Wilcoxon p", "caught by")


@dataclass(frozen=True)
class KernelTier:
    """What the kernel question says of a planted kernel.

    Attributes:
        cases: run.
        failed: cases with a finding.
        stages: of the findings, in the verdict's order.
        judged_by: the dataflow that the kernel was held to; None for the one that it declares.
    """

    cases: int
    failed: int
    stages: tuple[str, ...]
    judged_by: str | None


def ask_kernel(backend: str, world_size: int, judged_by: str | None) -> KernelTier:
    """Ask the kernel question of a backend, as `fusecheck kernel --backend … --dataflow …` does.

    Raises:
        UsageError: the backend takes no case.
    """
    subject = Subject(backend, world_size, judged_by)
    run = Run([subject], Plan(most_elements=MOST_ELEMENTS), Budget(cases=CASES), diagnose=False)
    run.validate()
    report = run.execute()
    group = report.groups[subject]
    stages = dict.fromkeys(finding.stage.value for finding in report.findings)
    return KernelTier(group.cases, group.failed, tuple(stages), judged_by)


def tiers(kernel: KernelTier | None, outcome: Comparison) -> list[str]:
    """The tiers that failed the candidate, the cheapest first; empty where all passed."""
    found = ["kernel"] if kernel is not None and kernel.failed else []
    if outcome.verdict is Verdict.INVALID:
        return [*found, "validity"]
    if outcome.oracle is not None and outcome.oracle.verdict is Verdict.FAIL:
        found.append("log-probabilities")
    if any(task.judgement.verdict is Verdict.FAIL for task in outcome.tasks):
        found.append("accuracy")
    return found


def options_of(description: str | None, known: Iterable[str]) -> argparse.ArgumentParser:
    """The command line of a table of planted bugs: names, by default all that are known, limit, run_dir and json."""
    names = list(known)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("names", nargs="*", default=names, help=f"some of {', '.join(names)}")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--json", type=Path)
    return parser


def figures(row: Mapping[str, Any]) -> list[str]:
    """Accuracy, its change in points, lost and gained, KL ratio and p of one row, as text; empty without an oracle."""
    return [
        f"{row['accuracy']:.4f}",
        f"{100 * (row['gained'] - row['lost']) / row['questions']:+.2f}",
        f"{row['lost']}/{row['gained']}",
        f"{row['kl_ratio']:.2f}" if "kl_ratio" in row else "",
        f"{row['wilcoxon_p']:.1g}" if "wilcoxon_p" in row else "",
    ]


def cells(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """The table's cells as text, in the order of `COLUMNS`, from the rows of `planted.json`."""
    for row in rows:
        yield [
            str(row["title"]),
            _of_kernel(row["kernel"]),
            *figures(row),
            ", ".join(row["caught_by"]) or "none",
        ]


def _of_kernel(kernel: Mapping[str, Any] | None) -> str:
    if kernel is None:
        return "no kernel of its own"
    judged = f" as {kernel['judged_by']}" if kernel["judged_by"] else ""
    return f"{kernel['failed']} of {kernel['cases']} cases fail{judged}" if kernel["failed"] else f"pass{judged}"


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows for a terminal."""
    found = Table(title="Planted bugs in the golden model")
    for column in COLUMNS:
        left = column in ("candidate", "kernel question", "caught by")
        found.add_column(column, justify="left" if left else "right")
    for row in cells(rows):
        found.add_row(*row)
    return found


def to_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *cells(rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    print(to_markdown(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["rows"]), end="")

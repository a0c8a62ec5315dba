"""Which tier catches a planted bug: the kernel question on the kernel by itself, or the gate on the whole model.

`python -m fusecheck.eval.planted_tiers golden/model/planted.json` prints a recorded table as Markdown, as README shows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from fusecheck.errors import Inconclusive, UsageError
from fusecheck.eval.engine import ArmError
from fusecheck.eval.gate import Verdict
from fusecheck.eval.outcome import Comparison
from fusecheck.eval.session import require_lm_eval
from fusecheck.inputs.families import FAMILIES
from fusecheck.kernel.plan import Plan
from fusecheck.kernel.report import Subject
from fusecheck.kernel.run import Run
from fusecheck.kernel.turn import Budget
from fusecheck.report import make_run_dir
from fusecheck.report.places import check_place

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


def ended(name: str, work: Callable[[], None]) -> int:
    """Do the work; the exit code, and in one line what ended it early."""
    try:
        require_lm_eval()
        work()
    except (UsageError, Inconclusive) as error:
        why, code = str(error), error.exit_code
    except KeyboardInterrupt:
        why, code = "interrupted; with the same --run-dir and options it goes on", 3
    except ArmError as error:
        why, code = f"an arm died before its last answer: {error}", 1
    else:
        return 0
    print(f"{name}: {' '.join(why.split())}", file=sys.stderr)
    return code


@contextmanager
def folder_of(options: argparse.Namespace) -> Iterator[Path]:
    """The folder for the arms: --run-dir, or one that is gone afterwards.

    Raises:
        UsageError: it, or --json, cannot be written.
    """
    if options.json is not None:
        check_place(options.json)
    if options.run_dir is not None:
        yield make_run_dir("planted", options.run_dir)
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)


def answered(outcome: Comparison) -> dict[str, Any]:
    """What a table shows of a comparison: verdict and, unless the runs are no pair, figures over all tasks."""
    flips = [task.judgement.flips for task in outcome.tasks]
    row: dict[str, Any] = {"verdict": outcome.verdict.value, "questions": sum(each.n for each in flips)}
    if flips:
        row["accuracy"] = sum(each.candidate_right for each in flips) / row["questions"]
        row |= {"lost": sum(each.lost for each in flips), "gained": sum(each.gained for each in flips)}
    if outcome.oracle is not None:
        row |= {"kl_ratio": outcome.oracle.ratio, "wilcoxon_p": outcome.oracle.p}
    return row


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
    """Accuracy, its change in points, lost and gained, KL ratio and p of one row, as text; empty where none."""
    if not row["questions"]:
        return [""] * 5
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

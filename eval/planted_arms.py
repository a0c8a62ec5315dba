"""Bugs planted around one model's fused kernel: verdict and first site of each, on ranks that are started once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusecheck.eval.arm import FUSED, ORACLE, UNFUSED
from fusecheck.eval.asked import keep_to
from fusecheck.eval.compare import compare
from fusecheck.eval.outcome import Comparison, Options
from fusecheck.eval.planted_tiers import answered, figures
from fusecheck.eval.run import Bench, Job, open_bench, through
from fusecheck.eval.samples import Run, read_run
from fusecheck.eval.spoiled import KINDS
from fusecheck.eval.trace import Trace, change_of, choose, place, prompts, trace_on
from fusecheck.report.result import write_aside

COLUMNS = ("form", "candidate", "acc", "Δ pt", "lost/gained", "KL ÷ unfused's", "Wilcoxon p", "gate", "first site")


def run_bugs(
    right: Job, bugs: Sequence[str], folder: Path, tell: Callable[[str], None]
) -> Iterator[tuple[str, Comparison, Trace]]:
    """Yield bug, what the gate says, and what the trace finds; arms that `folder` holds are not run again.

    Raises:
        UsageError: a broken argument, a bug that cannot show in this checkpoint, or arms that were asked for otherwise.
        ArmError: the ranks failed.
    """
    keep_to(folder, {**right.identity, "tasks": list(right.asked.tasks)})
    kernel = right.asked.backend.replace(":", "__")
    jobs = {bug: through(right, f"fusecheck.eval.spoiled:{bug}__{kernel}") for bug in bugs}
    with open_bench(right, tell) as bench:
        base = {arm: _arm(bench, right, arm, folder / "base" / arm) for arm in (ORACLE, UNFUSED)}
        for bug, job in jobs.items():
            tell(f"{bug} by {job.asked.backend}")
            candidate = _arm(bench, job, FUSED, folder / bug / FUSED)
            outcome = compare(base[UNFUSED], candidate, base[ORACLE], options=Options())
            questions = choose(outcome, base[UNFUSED], candidate)
            yield bug, outcome, trace_on(bench.engine, job, questions, prompts(questions, base[UNFUSED]), tell)


def _arm(bench: Bench, job: Job, arm: str, folder: Path) -> Run:
    if not folder.is_dir():
        bench.run(job, arm, folder)
    return read_run(folder)


def to_json(form: str, bug: str, outcome: Comparison, found: Trace) -> dict[str, Any]:
    """What the table shows of one candidate."""
    first, headline = found.first, found.headline(change_of(outcome))
    return {
        "form": form,
        "bug": bug,
        "title": KINDS[bug].title,
        "right": KINDS[bug].right,
        **answered(outcome),
        "trace": headline if outcome.tasks else f"{outcome.reason}; {headline.partition('; ')[2]}",
        "first": None if first is None else [place(first.site), first.stage],
        "deviating_sites": len({site for site, _, _ in found.places}),
        "sites": found.sites,
    }


def to_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    cells = [
        [
            str(row["form"]),
            str(row["title"]),
            *figures(row),
            str(row["verdict"]),
            "none" if row["first"] is None else ", stage ".join(row["first"]),
        ]
        for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (COLUMNS, ("---",) * len(COLUMNS), *cells)) + "\n"


def show_markdown(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table in Markdown."""
    print(to_markdown(rows), end="")


def collect(
    rows: Iterable[dict[str, Any]],
    command: str,
    out: Path | None,
    show: Callable[[list[dict[str, Any]]], None] = show_markdown,
) -> None:
    """Show the rows as a table, also where they end early; `out` gets them as JSON, anew after every row."""
    made: list[dict[str, Any]] = []
    try:
        for row in rows:
            made.append(row)
            if out is not None:
                write_aside(out, json.dumps({"command": command, "rows": made}, indent=1) + "\n")
    finally:
        if made:
            show(made)

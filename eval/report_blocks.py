"""The report as blocks of plain cells, which the terminal, Markdown and HTML renderers lay out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fusecheck.eval.gate import Flips, Verdict
from fusecheck.eval.outcome import Comparison, TaskResult
from fusecheck.eval.report_peers import COLUMNS as PEER_COLUMNS
from fusecheck.eval.report_peers import peer_rows
from fusecheck.report.visible import visible


@dataclass(frozen=True)
class Block:
    """A titled table with remarks below it.

    Attributes:
        title: a heading.
        columns: headers; empty for a block of remarks only.
        rows: cells as text, one list a row.
        notes: remarks, one line each.
        keep: rows that a narrow report shows; all when 0.
    """

    title: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = field(default_factory=list)
    keep: int = 0


def points(value: float) -> str:
    """A difference of accuracies in percentage points, signed, as text."""
    return f"{100 * value + 0.0:+.2f}"


def percent(value: float) -> str:
    """An accuracy in percent, as text."""
    return f"{100 * value:.2f}"


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters of the text, visible ones only."""
    shown = visible(text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def around(text: str, place: int) -> str:
    """The text from a little before `place`, with a mark there."""
    start = max(0, place - 80)
    return ("…" if start else "") + visible(text[start:place]) + "»" + shorten(text[place:], 240)


def headline(outcome: Comparison) -> str:
    """The verdict in one line, with its numbers."""
    interrupted = f"{interruption(outcome.interrupted)}; so far: " if outcome.interrupted else ""
    return f"{outcome.verdict.name}  {interrupted}{_clause(outcome)}"


def interruption(doing: str) -> str:
    """That a run was interrupted, and at what."""
    return f"interrupted at: {doing}"


def _clause(outcome: Comparison) -> str:
    if outcome.verdict is Verdict.INVALID:
        return f"not a pair, so no verdict: {outcome.reason}"
    if len(outcome.tasks) == 1:
        oracle = "" if outcome.oracle is None else f"; {_oracle_clause(outcome)}"
        return f"{_task_clause(outcome.tasks[0])}{oracle}"
    if not outcome.tasks:
        return outcome.reason
    names = ", ".join(f"{t.endpoint.name} {t.judgement.verdict.name}" for t in outcome.tasks)
    oracle = "" if outcome.oracle is None else f", oracle distance {outcome.oracle.verdict.name}"
    settled = "" if outcome.verdict is Verdict.PASS else f" ({outcome.reason})"
    return f"{names}{oracle}{settled}"


def task_line(task: TaskResult) -> str:
    """One task's verdict in one line, with its numbers."""
    return f"{task.judgement.verdict.name}  {_task_clause(task)}"


def oracle_line(outcome: Comparison) -> str | None:
    """The oracle rule's verdict in one line; None where it was not asked for."""
    return None if outcome.oracle is None else f"{outcome.oracle.verdict.name}  {_oracle_clause(outcome)}"


def _task_clause(task: TaskResult) -> str:
    judgement, flips = task.judgement, task.judgement.flips
    first, second = flips.baseline_right / flips.n, flips.candidate_right / flips.n
    clause = (
        f"{task.endpoint.name} {percent(first)} -> {percent(second)} ({points(flips.delta)} pt, "
        f"{1 - judgement.alpha_low:.0%} bound {points(judgement.interval.low)}, margin {100 * judgement.margin:.2f}; "
        f"{flips.lost:,} lost, {flips.gained:,} gained of {flips.n:,})"
    )
    return clause if judgement.verdict is Verdict.PASS else f"{clause}: {judgement.reason}"


def _oracle_clause(outcome: Comparison) -> str:
    oracle = outcome.oracle
    if oracle is None:
        return ""
    return (
        f"distance to the oracle x{oracle.ratio:.2f} of the baseline's "
        f"(KL {oracle.candidate_mean:.2e} against {oracle.baseline_mean:.2e} nats, Wilcoxon p {oracle.p:.2g}, "
        f"n {oracle.n:,}; fails above x{outcome.settings.kl_ratio:g} with p below {outcome.settings.kl_alpha:g})"
    )


def blocks(outcome: Comparison) -> list[Block]:
    """All blocks that have something to say, in reading order."""
    found = [*_tables(outcome), _traced(outcome), _validity(outcome), *_breakdowns(outcome)]
    found += [_peers(outcome), _arms(outcome)]
    if outcome.warnings:
        found.insert(0, Block("Warnings", notes=list(outcome.warnings)))
    return [b for b in found if b.rows or b.notes]


def _tables(outcome: Comparison) -> Iterator[Block]:
    yield Block(
        "Accuracy",
        ("task", "metric", "n", "baseline % [95 %]", "candidate % [95 %]", "change, pt", "bounds", "margin", "verdict"),
        [_accuracy_row(t) for t in outcome.tasks],
        # Without a flip the clustered error is 0, which would claim more than any finite run can know.
        [_clustered_note(t) for t in outcome.tasks if t.clustered is not None and t.clustered.standard_error > 0],
    )
    rows = [row for t in outcome.tasks for row in _flip_rows(t)]
    lost, gained, n = outcome.pooled_flips
    notes = []
    if outcome.pooled is not None:
        notes = [
            f"pooled: {lost:,} lost, {gained:,} gained of {n:,}; one-sided mid-p {outcome.pooled.mid_p:.3g}, "
            f"exact {outcome.pooled.exact:.3g}"
        ]
    yield Block(
        "Flips",
        ("task", "filter", "lost", "gained", "churn", "flips %", "noise %", "mid-p", "exact p", "seen at 80 %, pt"),
        rows,
        notes,
    )
    yield _distances(outcome)
    yield Block(
        "Teacher-forced",
        (
            "task",
            "tokens",
            "texts",
            "same top token %",
            "texts that diverge",
            "first divergence, quartiles",
            "gold, nat",
        ),
        [
            [
                name,
                f"{f.tokens:,}",
                f"{f.texts:,}",
                percent(f.same_top),
                f"{f.diverged:,}",
                "none" if f.first_divergence is None else ", ".join(f"{x:.0f}" for x in f.first_divergence),
                f"{f.gold_mean:+.2e}",
            ]
            for t in outcome.tasks
            for name, f in t.forced.items()
        ],
    )


def _accuracy_row(task: TaskResult) -> list[str]:
    j = task.judgement
    first, second = j.flips.baseline_right / j.flips.n, j.flips.candidate_right / j.flips.n
    return [
        task.endpoint.name,
        f"{task.endpoint.metric}, {task.endpoint.filter}",
        f"{j.flips.n:,}",
        f"{percent(first)} [{percent(j.baseline_interval.low)}, {percent(j.baseline_interval.high)}]",
        f"{percent(second)} [{percent(j.candidate_interval.low)}, {percent(j.candidate_interval.high)}]",
        points(j.flips.delta),
        f"{points(j.interval.low)} to {points(j.interval.high)}",
        f"{100 * j.margin:.2f}",
        j.verdict.name,
    ]


def _clustered_note(task: TaskResult) -> str:
    c = task.clustered
    if c is None:
        return ""
    return (
        f"{task.endpoint.name}, {c.clusters} subjects as clusters: {points(c.delta)} pt, standard error "
        f"{100 * c.standard_error:.3f}, bounds {points(c.interval.low)} to {points(c.interval.high)}"
    )


def _flip_rows(task: TaskResult) -> Iterator[list[str]]:
    j = task.judgement
    seen = "no such drop" if j.smallest_change is None else f"{100 * j.smallest_change:.2f}"
    noise = "not run" if task.noise is None else percent(task.noise.rate)
    yield [
        task.endpoint.name,
        task.endpoint.filter,
        *_counts(j.flips),
        noise,
        f"{j.test.mid_p:.3g}",
        f"{j.test.exact:.3g}",
        seen,
    ]
    for other in task.ungated:
        yield [task.endpoint.name, f"{other.filter} (not judged)", *_counts(other.flips), "", "", "", ""]


def _counts(flips: Flips) -> list[str]:
    return [f"{flips.lost:,}", f"{flips.gained:,}", f"{flips.churn:,}", percent(flips.rate)]


def _distances(outcome: Comparison) -> Block:
    rows = []
    for task in outcome.tasks:
        for name, d in (("candidate", task.distances), ("noise", task.noise_distances)):
            if d is None:
                continue
            gold = "unknown"
            if d.gold_mean is not None and d.gold_error is not None:
                gold = f"{d.gold_mean:+.2e} ± {d.gold_error:.1e}"
            kl = [f"{d.mean:.2e}", *(f"{q:.1e}" for q in d.quantiles)]
            rows.append(
                [task.endpoint.name, name, _over(task, outcome), *kl, percent(d.same_top), gold, percent(d.equal)]
            )
    columns = ("task", "arm", "over", "KL mean", "p50", "p99", "p99.9", "max", "same top %", "gold, nat", "bit-equal %")
    line = oracle_line(outcome)
    return Block("Log-probabilities against the baseline", columns, rows, [line] if line else [])


def _over(task: TaskResult, outcome: Comparison) -> str:
    """What the distribution is over; own runs fold a large vocabulary, which makes the KL a lower bound."""
    facts = outcome.facts.get("candidate", {})
    folded = facts.get("columns") != facts.get("vocabulary")
    return f"vocabulary, folded to {facts['columns']}" if task.source == "vocabulary" and folded else task.source


def _validity(outcome: Comparison) -> Block:
    return Block("Validity", ("check", "state", "detail"), [[c.name, c.state, c.detail] for c in outcome.checks])


def _breakdowns(outcome: Comparison) -> Iterator[Block]:
    if outcome.worst_questions:
        yield Block(
            "Farthest from the oracle",
            ("task", "doc_id", "prompt characters", "baseline KL", "candidate KL"),
            [
                [w.task, str(w.doc_id), f"{w.prompt_length:,}", f"{w.baseline_kl:.2e}", f"{w.candidate_kl:.2e}"]
                for w in outcome.worst_questions
            ],
        )
    for task in outcome.tasks:
        yield Block(
            f"{task.endpoint.name} by subject, largest drop first",
            ("subject", "n", "lost", "gained", "change, pt", "p (Holm)"),
            [
                [
                    s.label,
                    f"{s.n:,}",
                    str(s.lost),
                    str(s.gained),
                    points(s.delta),
                    f"{s.p:.2g}" if s.p is not None else "",
                ]
                for s in task.subjects
            ],
            keep=5,
        )
        yield Block(
            f"{task.endpoint.name} by length and margin",
            ("by", "range", "n", "lost", "gained", "change, pt"),
            [[s.kind, s.label, f"{s.n:,}", str(s.lost), str(s.gained), points(s.delta)] for s in task.slices],
            [
                f"row = {r.residue} (mod {r.modulus}) holds {r.share_of_kl:.0%} of the KL on "
                f"{r.share_of_questions:.0%} of the questions"
                for r in task.rows
            ],
        )


def _traced(outcome: Comparison) -> Block:
    if outcome.trace is None:
        return Block("")
    trace = outcome.trace
    rows = [[where, stage, f"{count:,} of {trace.questions:,}"] for where, stage, count in trace.places]
    notes = [trace.headline, *([f"at the first: {trace.shown}"] if trace.shown else [])]
    columns = (f"deviating site, of {trace.sites:,} in a forward", "stage", "questions traced")
    return Block("Where the fused arm leaves what its kernel declares", columns, rows, notes, keep=8)


def _peers(outcome: Comparison) -> Block:
    rows = peer_rows(outcome)
    note = f"to be read beside our verdict, {outcome.verdict.name}; a rule with a stored score is given the baseline's"
    return Block("What the engines' own rules say of these runs", PEER_COLUMNS, rows, [note] if rows else [])


def _arms(outcome: Comparison) -> Block:
    names = list(dict.fromkeys(key for facts in outcome.facts.values() for key in facts))
    rows = [[name, *(facts.get(name, "") for facts in outcome.facts.values())] for name in names]
    rows = [row for row in rows if any(row[1:])]
    return Block("Runs", ("", *outcome.facts), rows)

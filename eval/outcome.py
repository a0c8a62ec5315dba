"""What a comparison found, as data: the reports print it, and nothing else knows more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fusecheck.eval.endpoints import Endpoint
from fusecheck.eval.flips import FlippedQuestion, ForcedSummary
from fusecheck.eval.gate import Flips, GateSettings, Judgement, Verdict, worst
from fusecheck.eval.intervals import ClusteredDifference
from fusecheck.eval.kl import DistanceSummary, OracleJudgement
from fusecheck.eval.logprobs import Source
from fusecheck.eval.mcnemar import McNemar
from fusecheck.eval.slices import RowShare, Slice
from fusecheck.eval.validity import Check


@dataclass(frozen=True)
class Options:
    """What the user chose.

    Attributes:
        settings: margins and levels.
        tasks: endpoints to judge; empty means all.
        metrics: (metric, filter) by endpoint, where not the default.
        flips: most flipped questions to list, over all tasks.
        same_kernel: the candidate is the baseline again, so that the fused kernel must not have run in either.
    """

    settings: GateSettings = field(default_factory=GateSettings)
    tasks: Sequence[str] = ()
    metrics: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    flips: int = 0
    same_kernel: bool = False


@dataclass(frozen=True)
class Ungated:
    """Counts that are printed and not judged: another filter of the same task."""

    metric: str
    filter: str
    flips: Flips


@dataclass(frozen=True)
class TaskResult:
    """Everything known of one endpoint.

    Attributes:
        endpoint: what was judged.
        judgement: the accuracy tier.
        clustered: the difference with subjects as clusters; None for a single subject.
        subjects: one slice a subject.
        slices: by prompt length and margin.
        rows: the batch rows that hold most of the KL, where the run recorded rows.
        ungated: the task's other filters.
        noise: flips of the baseline against its own repetition, where there is one.
        source: where log-probabilities came from.
        distances: candidate from baseline.
        noise_distances: repetition from baseline.
        forced: the teacher-forced pass, by leaf task.
    """

    endpoint: Endpoint
    judgement: Judgement
    clustered: ClusteredDifference | None
    subjects: Sequence[Slice]
    slices: Sequence[Slice]
    rows: Sequence[RowShare]
    ungated: Sequence[Ungated]
    noise: Flips | None
    source: Source
    distances: DistanceSummary | None
    noise_distances: DistanceSummary | None
    forced: Mapping[str, ForcedSummary]


@dataclass(frozen=True)
class WorstQuestion:
    """A question on which the candidate is much farther from the oracle than the baseline."""

    task: str
    doc_id: int
    prompt_length: int
    baseline_kl: float
    candidate_kl: float


@dataclass(frozen=True)
class TraceFound:
    """What a trace found, in words.

    Attributes:
        headline: one sentence.
        shown: an element of the first deviating site; empty where none deviates, or the site has no element to show.
        sites: calls of the kernel in a forward.
        questions: that were traced.
        places: deviating sites in order: where, which stage, on how many questions.
    """

    headline: str
    shown: str
    sites: int
    questions: int
    places: Sequence[tuple[str, str, int]]


@dataclass(frozen=True)
class Comparison:
    """The outcome of a comparison.

    Attributes:
        verdict: over all tiers and tasks.
        reason: the clauses that decide it.
        checks: the validity checks.
        tasks: what was judged; empty for an INVALID pair.
        pooled: McNemar's test over all tasks together; None without any.
        pooled_flips: lost, gained and questions over all tasks.
        oracle: the oracle rule; None where no oracle run was given or it has no log-probabilities.
        worst_questions: farthest from the oracle.
        flipped: the questions that `--flips` asks for.
        examples: a few flipped questions, which the report shows where none are asked for.
        warnings: what a reader should know, and does not change the verdict.
        facts: what each run says of itself.
        settings: the rule.
        trace: where the fused arm leaves what its kernel declares; None where nobody asked.
        interrupted: what the run was doing when Ctrl-C ended it; empty where it came to its end.
    """

    verdict: Verdict
    reason: str
    checks: Sequence[Check]
    tasks: Sequence[TaskResult]
    pooled: McNemar | None
    pooled_flips: tuple[int, int, int]
    oracle: OracleJudgement | None
    worst_questions: Sequence[WorstQuestion]
    flipped: Sequence[FlippedQuestion]
    examples: Sequence[FlippedQuestion]
    warnings: Sequence[str]
    facts: Mapping[str, Mapping[str, str]]
    settings: GateSettings
    trace: TraceFound | None = None
    interrupted: str = ""

    def cut_short(self, doing: str) -> Comparison:
        """The same of a run that Ctrl-C ended while `doing`: what failed has failed, and nothing has passed."""
        return replace(self, verdict=worst([self.verdict, Verdict.INCONCLUSIVE]), interrupted=doing)

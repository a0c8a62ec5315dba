"""What a run of the kernel question showed, subject by subject, and its JSON form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fusecheck.case.finding import Finding
from fusecheck.case.run import Outcome
from fusecheck.kernel.coverage import Coverage, core_record, counts
from fusecheck.kernel.table import kernel_of
from fusecheck.report import Verdict


@dataclass(frozen=True)
class Subject:
    """A kernel under test at one world size.

    Attributes:
        backend: its name, or `package.module:attribute`.
        world_size: ranks.
        flow: a dataflow to judge by instead of the declared one.
    """

    backend: str
    world_size: int
    flow: str | None = None


@dataclass
class Group:
    """What the cases of one subject showed.

    Attributes:
        starting: seconds until the first case had run: ranks, workspace, compilation.
        seconds: from then on.
    """

    subject: Subject
    cases: int = 0
    refused: int = 0
    elements: int = 0
    failed: int = 0
    seconds: float = 0.0
    starting: float = 0.0


@dataclass
class KernelReport:
    """What a run showed; `summary` is its JSON form.

    Attributes:
        coverages: what was reached of the table, one a subject, or one for all subjects of a world size that share it.
        accept_refusals: a core plan of which most is refused may pass.
    """

    groups: dict[Subject, Group] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    origins: list[Subject] = field(default_factory=list)
    suggestions: dict[str, list[str]] = field(default_factory=dict)
    printed: list[str] = field(default_factory=list)
    off_nominal: Counter[str] = field(default_factory=Counter)
    judged: Counter[str] = field(default_factory=Counter)
    histogram: Counter[str] = field(default_factory=Counter)
    codes: tuple[int, int] = (0, 0)
    kernel_seconds: float = 0.0
    judge_seconds: float = 0.0
    seconds: float = 0.0
    coverages: list[Coverage] = field(default_factory=list)
    accept_refusals: bool = False
    stages: Counter[str] = field(default_factory=Counter)
    interrupted: bool = False
    refusals: Counter[str] = field(default_factory=Counter)

    @property
    def cases(self) -> int:
        """Cases run."""
        return sum(group.cases for group in self.groups.values())

    @property
    def elements(self) -> int:
        """Outputs judged, over all ranks."""
        return sum(group.elements for group in self.groups.values())

    @property
    def verdict(self) -> Verdict:
        """Fail with any finding; inconclusive when there is a reason in `open`."""
        return Verdict.of(failed=bool(self.findings), complete=not self.open)

    @property
    def open(self) -> str:
        """Why what was run is no answer, in one clause; empty where it is one."""
        unfinished = [coverage for coverage in self.coverages if not coverage.finished]
        idle = [group.subject for group in self.groups.values() if not group.cases]
        if self.interrupted:
            return "interrupted"
        if idle or not self.groups:
            return ", ".join(self.refusals) or "no case was run"
        if unfinished:
            done, cases = (sum(getattr(c, name) for c in self.coverages) for name in ("done", "cases"))
            return f"the core plan has {cases} cases, {done} were run; leave --cases out, or give more"
        if any(coverage.mostly_refused for coverage in self.coverages) and not self.accept_refusals:
            reason = self.refusals.most_common(1)[0][0]
            return f"most of the core plan is refused, such as: {reason}; --accept-refusals takes that for an answer"
        return ""

    def add(self, subject: Subject, outcome: Outcome, findings: Sequence[Finding]) -> None:
        """Count one case, and keep its findings as they are shown: with the line that shows them again."""
        group = self.groups[subject]
        group.cases += 1
        group.elements += outcome.elements
        group.failed += not outcome.passed
        self.findings.extend(findings)
        self.origins.extend([subject] * len(findings))
        self.off_nominal.update(outcome.off_nominal)
        self.judged.update(outcome.judged)
        self.histogram.update(outcome.histogram)
        self.codes = (self.codes[0] + outcome.codes[0], self.codes[1] + outcome.codes[1])
        self.kernel_seconds += outcome.kernel_seconds
        self.judge_seconds += outcome.judge_seconds
        problem = outcome.problem
        place = f"{problem.family}/{kernel_of(problem)}"
        self.stages.update({f"{place}/{stage}": elements for stage, elements in outcome.judged.items()})

    def finding_records(self) -> list[dict[str, Any]]:
        """The findings of `result.json`, each with whose kernel it is about and by what dataflow it was judged."""
        return [
            finding.to_record() | {"backend": subject.backend, "judged_by": subject.flow}
            for finding, subject in zip(self.findings, self.origins, strict=True)
        ]

    def summary(self) -> dict[str, Any]:
        """The figures of `result.json`."""
        return {
            "cases": self.cases,
            "elements": self.elements,
            "seconds": round(self.seconds, 3),
            "elements_per_second": round(self.elements / self.seconds) if self.seconds else 0,
            "codes_per_element": self.codes[0] / self.codes[1] if self.codes[1] else None,
            "codes_sampled": self.codes[1],
            "off_nominal": {k: [self.off_nominal[k], self.judged[k]] for k in self.judged},
            "code_differences_from_unfused": dict(sorted(self.histogram.items(), key=lambda kv: int(kv[0]))),
            "kernel_seconds": round(self.kernel_seconds, 3),
            "judge_seconds": round(self.judge_seconds, 3),
            "subjects": [
                {
                    "backend": g.subject.backend,
                    "world_size": g.subject.world_size,
                    "dataflow": g.subject.flow,
                    "cases": g.cases,
                    "refused": g.refused,
                    "elements": g.elements,
                    "failed": g.failed,
                    "seconds": round(g.seconds, 3),
                    "starting_seconds": round(g.starting, 3),
                }
                for g in self.groups.values()
            ],
            "coverage": counts(self.coverages),
            "core": core_record(self.coverages),
            "coverage_of_stages": dict(self.stages),
            "refusals": dict(self.refusals),
            "suggestions": self.suggestions,
            "printed": self.printed,
            "interrupted": self.interrupted,
        }

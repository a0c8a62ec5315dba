"""One run of `fusecheck graph`: graphs through the checkers, what must be known to replay, verdict, files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from fusecheck import backends
from fusecheck.errors import Inconclusive
from fusecheck.graph import waivers
from fusecheck.graph.cases import GraphCase, adapted
from fusecheck.graph.config import ALL_ENABLED, load_transforms
from fusecheck.graph.dialects import library_named
from fusecheck.graph.question import Question, history_needed, needs_ranks
from fusecheck.graph.results import GraphResult
from fusecheck.graph.run import GraphChecker
from fusecheck.graph.screen import SHOWN, GraphProgress, Replays, finding_records, replay_line, show, summarise
from fusecheck.interrupts import Interruption
from fusecheck.report import Verdict, write_result


@dataclass
class Run:
    """A run under way.

    Attributes:
        question: what is asked.
        timeout: seconds for one graph.
        accepted: the known gaps.
        directory: where its files go.
        console: where it is shown.
        results: so far.
        absent: why graphs do not arise in the library, by name.
    """

    question: Question
    timeout: float
    accepted: Sequence[waivers.Waiver]
    directory: Path
    console: Console
    results: list[GraphResult] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    def finish(self, cases: list[GraphCase], json_file: Path | None) -> int:
        """Check graphs, show and write what came of it; returns the exit code.

        Raises:
            UsageError: an unknown backend, dialect or waived row, or an operator that the dialect lacks.
            Inconclusive: there is no graph.
        """
        backends.backend(self.question.backend)
        library = library_named(self.question.dialect)
        library.ready()
        cases, self.absent = adapted(library, cases)
        if not cases:
            raise Inconclusive("no graph to check: --only, --rows and --random leave none")
        waivers.check_rows(self.accepted, (case.name for case in cases))
        shown = GraphProgress(self.console, len(cases), self.results)
        with Interruption() as stop, shown as progress, self._checker() as checker:
            checker.check_all(cases, lambda result: self._seen(result, progress))
        replays: Replays = {}
        if not stop.happened:
            with Interruption():
                replays = self._replays()
        verdict = self._verdict(complete=not stop.happened)
        summary = summarise(self.results, self.question, progress.seconds) | self._about(interrupted=stop.happened)
        show(self.results, summary, verdict, lambda each: replay_line(each, self.question, replays), self.console)
        records = finding_records(self.results, self.question, replays)
        write_result(self.directory, "graph", verdict, summary, records, json_file)
        self.console.out(f"{self.directory}/result.json", highlight=False)
        return verdict.exit_code

    def _checker(self, lanes: int | None = None) -> GraphChecker:
        asked = self.question
        transforms = {**ALL_ENABLED, **load_transforms(asked.config)} if asked.config else ALL_ENABLED
        return GraphChecker(
            asked.subject,
            asked.world_size,
            backend=asked.backend,
            dialect=asked.dialect,
            timeout=self.timeout,
            export=asked.export,
            device=asked.device,
            transforms=transforms,
            lanes=lanes,
        )

    def _seen(self, result: GraphResult, progress: GraphProgress) -> None:
        waivers.apply(self.accepted, result)
        progress.seen(result)

    def _verdict(self, *, complete: bool) -> Verdict:
        """Nothing fused and nothing judged of a user's graph is no pass."""
        failed = not all(result.ok for result in self.results)
        return Verdict.of(failed=failed, complete=complete and not any(result.unjudged for result in self.results))

    def _about(self, *, interrupted: bool) -> dict[str, Any]:
        library = library_named(self.question.dialect)
        return {
            "interrupted": interrupted,
            "library": library.status(),
            "does_not_arise": self.absent,
            "unjudged": {result.case.name: result.unjudged for result in self.results if result.unjudged},
            "waived": sum(bool(finding.waived) for result in self.results for finding in result.findings),
            "unused_waivers": [waiver.text for waiver in waivers.unused(self.accepted, self.results)],
        }

    def _replays(self) -> Replays:
        """Of the graphs whose findings are shown: what must come before, tried in ranks that have seen nothing."""
        found: Replays = {}
        odd = [result for result in self.results if result.open_findings and result.earlier and needs_ranks(result)]
        if odd:
            with self._checker(lanes=1) as checker:
                found = {result.case.name: history_needed(result, checker.check_afresh) for result in odd[:SHOWN]}
        return found

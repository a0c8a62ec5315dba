"""Ask a few questions at a time in both arms, for sequential mode: prompts built once, ranks started once."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusecheck.errors import UsageError
from fusecheck.eval.arm import FUSED, UNFUSED
from fusecheck.eval.asked import Asked
from fusecheck.eval.endpoints import preference
from fusecheck.eval.engine import Engine
from fusecheck.eval.lm import NEW_TOKENS, EngineLM
from fusecheck.eval.run import Job, open_bench, open_job
from fusecheck.eval.tasks import Prepared

Question = tuple[str, int]


@dataclass(frozen=True)
class Answers:
    """Both arms' answers so far, one line of `answers_<task>.jsonl` a question; a question asked twice counts once."""

    path: Path
    right: dict[Question, tuple[bool, bool]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Answers:
        """What an earlier part of the run wrote; a last line that was cut off is left out.

        Raises:
            UsageError: another line is broken.
        """
        answers = cls(path)
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        for number, line in enumerate(lines, start=1):
            try:
                task, doc, first, second = json.loads(line) if line else ("", 0, False, False)
            except (ValueError, TypeError) as error:
                if number == len(lines):
                    break
                raise UsageError(f"{path}:{number}: not a recorded answer; delete the file to start again") from error
            if line:
                answers.right[str(task), int(doc)] = (bool(first), bool(second))
        return answers

    def add(self, questions: Sequence[Question], first: Sequence[bool], second: Sequence[bool]) -> None:
        """Record a block's answers, baseline then candidate, in memory and at the end of the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for question, a, b in zip(questions, first, second, strict=True):
                self.right[question] = (a, b)
                file.write(json.dumps([*question, a, b]) + "\n")


@dataclass(frozen=True)
class Asker:
    """Running ranks and built prompts.

    Attributes:
        job: checkpoint, tokenizer, backend.
        engine: the ranks.
        prepared: all tasks with all requests.
        requests: the requests of every question.
    """

    job: Job
    engine: Engine
    prepared: Prepared
    requests: dict[Question, list[Any]]

    def questions(self, name: str) -> list[Question]:
        """The questions of a task, or of every leaf of a group."""
        leaves = self._leaves(name)
        return [question for question in self.requests if question[0] in leaves]

    def _leaves(self, name: str) -> set[str]:
        members = self.prepared.loaded.get("group_map", {}).get(name)
        return {name} if members is None else {leaf for member in members for leaf in self._leaves(member)}

    def ask(self, questions: Sequence[Question]) -> tuple[list[bool], list[bool]]:
        """Answer the questions unfused and fused; returns for each whether the arm was right.

        Raises:
            UsageError: an arm met a logit that is not finite, or the fused kernel did not run.
        """
        first, second = (self._arm(arm, questions) for arm in (UNFUSED, FUSED))
        return first, second

    def _arm(self, arm: str, questions: Sequence[Question]) -> list[bool]:
        import lm_eval

        part = self._restricted(questions)
        lm = EngineLM(self.engine, self.job.tokens, end_ids=self.job.shape.end_ids, max_length=self.job.shape.positions)
        lengths = map(len, self.job.tokens.encode_all(part.contexts()))
        longest = min(self.job.shape.positions + 1, max(lengths) + NEW_TOKENS)
        self.engine.open_arm(arm, self.job.backend_of(arm), self.job.plans[0], longest)
        results = lm_eval.evaluate(lm, part.loaded, samples=part.samples, bootstrap_iters=0, log_samples=True)
        counters = self.engine.close_arm()
        if not all(c["finite"] for c in counters):
            raise UsageError(f"arm {arm}: a logit is NaN or infinite; run `fusecheck kernel` on this backend first")
        if not sum(c["calls"] for c in counters):
            raise UsageError(f"arm {arm}: the kernel was never called; this model has nothing to compare")
        return [self._right(results["samples"], question) for question in questions]

    def _restricted(self, questions: Sequence[Question]) -> Prepared:
        chosen: dict[str, list[int]] = {}
        for task, doc in sorted(questions):
            chosen.setdefault(task, []).append(doc)
        for task, docs in chosen.items():
            instances = []
            for position, doc in enumerate(docs):
                for request in self.requests[task, doc]:
                    instance = copy.copy(request)
                    instance.doc_id, instance.resps, instance.filtered_resps = position, [], {}
                    instances.append(instance)
            self.prepared.tasks[task]._instances = instances
        return Prepared({"tasks": {t: self.prepared.tasks[t] for t in chosen}, "groups": {}}, chosen)

    def _right(self, samples: dict[str, list[dict[str, Any]]], question: Question) -> bool:
        rows = [row for row in samples[question[0]] if row["doc_id"] == question[1]]
        picks = [(name, row["filter"]) for row in rows for name in row["metrics"] if row[name] in (0, 1)]
        if not picks:
            raise UsageError(f"{question[0]}: has no metric that is 0 or 1; sequential mode cannot judge it")
        metric, name = min(picks, key=preference)
        return next(bool(row[metric]) for row in rows if row["filter"] == name)


@contextmanager
def open_asker(asked: Asked) -> Iterator[Asker]:
    """Build the prompts and start the ranks; both end with the context.

    Raises:
        UsageError: a broken checkpoint, task, data folder or argument.
    """
    with open_bench(job := open_job(asked)) as bench:
        requests: dict[Question, list[Any]] = {}
        for name, task in bench.prepared.tasks.items():
            for instance in task.instances:
                requests.setdefault((name, bench.prepared.document(name, instance.doc_id)), []).append(instance)
        yield Asker(job, bench.engine, bench.prepared, requests)

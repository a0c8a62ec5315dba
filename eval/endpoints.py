"""What is judged: one endpoint a task, fixed before the run, joined question by question across the arms."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fusecheck.errors import UsageError
from fusecheck.eval.rows import Sample
from fusecheck.eval.samples import Run

# A choice between two filters is made here once, not after seeing the numbers.
_FILTERS = ("flexible-extract", "none", "strict-match")
_SUBJECT = re.compile(r"mmlu_(?!pro(?:_|$)|redux(?:_|$)|flan_|llama|continuation|.*_generative$)\w+")
_METRICS = ("acc", "exact_match", "pass@1", "acc_norm")


@dataclass(frozen=True)
class Endpoint:
    """One judged quantity: a 0/1 metric under one filter, over the questions of one or more leaf tasks."""

    name: str
    tasks: tuple[str, ...]
    metric: str
    filter: str


@dataclass(frozen=True)
class Pairs:
    """The questions of one endpoint with both arms' samples, in the baseline's order.

    Attributes:
        endpoint: what is judged.
        tasks: leaf task of each question, length n.
        baseline: the baseline's sample of each question.
        candidate: the candidate's sample of the same question.
    """

    endpoint: Endpoint
    tasks: Sequence[str]
    baseline: Sequence[Sample]
    candidate: Sequence[Sample]

    def right(self, samples: Sequence[Sample]) -> NDArray[np.bool_]:
        """Where `samples` are right, bool [n]."""
        return np.array([s.metrics[self.endpoint.metric] == 1.0 for s in samples], dtype=np.bool_)

    @property
    def same_answer(self) -> NDArray[np.bool_]:
        """Where both arms gave the same answer, bool [n]."""
        return np.array([a.answer == b.answer for a, b in zip(self.baseline, self.candidate, strict=True)], np.bool_)

    @property
    def chance(self) -> float:
        """Accuracy of guessing: the mean of 1 / choices; 2 % where the answer is free text."""
        return float(np.mean([1 / len(s.likelihoods) if s.likelihoods else 0.02 for s in self.baseline]))


def name_endpoints(run: Run) -> dict[str, tuple[str, ...]]:
    """Leaf tasks by endpoint: lm-eval's own top groups, then every other task alone, by its own name.

    Old releases write no groups; there, two subjects and more of `mmlu_SUBJECT` are `mmlu`. A single subject is not,
    and neither is `mmlu_pro`, `mmlu_redux` or a `_generative` variant.
    """
    found: dict[str, list[str]] = {}
    members = {child for children in run.groups.values() for child in children}
    tops = {name: _leaves(name, run.groups) for name in run.groups if name not in members}
    grouped = set().union(*tops.values()) if tops else set()
    subjects = [task for task in run.tasks if _SUBJECT.fullmatch(task) and task not in grouped]
    for task in run.tasks:
        if task in subjects and len(subjects) > 1:
            name = "mmlu"
        else:
            name = next((top for top, leaves in tops.items() if task in leaves), task)
        found.setdefault(name, []).append(task)
    return {name: tuple(tasks) for name, tasks in found.items()}


def _leaves(name: str, groups: Mapping[str, tuple[str, ...]]) -> set[str]:
    if name not in groups:
        return {name}
    return {leaf for child in groups[name] for leaf in _leaves(child, groups)}


def choose_endpoints(run: Run, chosen: Mapping[str, tuple[str, str]]) -> tuple[list[Endpoint], list[str]]:
    """Choose metric and filter of every endpoint.

    Args:
        run: the baseline.
        chosen: (metric, filter) by endpoint, where the user named them.

    Returns:
        The endpoints, and one sentence for each task that has no 0/1 metric and so is not judged.

    Raises:
        UsageError: `chosen` names an endpoint, metric or filter that the run does not have.
    """
    named = name_endpoints(run)
    for name in chosen:
        if name not in named:
            raise UsageError(f"--metric {name}: the runs have no such task; they have {', '.join(named)}")
    endpoints, left_out = [], []
    for name, tasks in named.items():
        available = _binary_metrics(run, tasks)
        if name in chosen:
            pick = chosen[name]
            if pick not in available:
                listed = ", ".join(f"{m},{f}" for m, f in available) or "none"
                raise UsageError(f"--metric {name}={','.join(pick)}: not a 0/1 metric of {name}; it has {listed}")
        elif not available:
            left_out.append(f"{name}: no metric that is 0 or 1 on every question; not judged")
            continue
        else:
            pick = min(available, key=preference)
        endpoints.append(Endpoint(name, tasks, *pick))
    return endpoints, left_out


def preference(pick: tuple[str, str]) -> tuple[int, int, tuple[str, str]]:
    """Sort key of a (metric, filter): the least one is judged."""
    metric, name = pick
    return (
        _METRICS.index(metric) if metric in _METRICS else len(_METRICS),
        _FILTERS.index(name) if name in _FILTERS else len(_FILTERS),
        pick,
    )


def _binary_metrics(run: Run, tasks: Sequence[str]) -> list[tuple[str, str]]:
    shared: set[tuple[str, str]] | None = None
    for task in tasks:
        seen: dict[tuple[str, str], bool] = {}
        counts: dict[tuple[str, str], int] = {}
        samples = run.tasks[task].samples
        for (_, name), sample in samples.items():
            for metric, value in sample.metrics.items():
                key = (metric, name)
                seen[key] = seen.get(key, True) and value in (0.0, 1.0)
                counts[key] = counts.get(key, 0) + 1
        per_filter = {name: sum(1 for k in samples if k[1] == name) for name in run.tasks[task].filters}
        binary = {key for key, ok in seen.items() if ok and counts[key] == per_filter[key[1]]}
        shared = binary if shared is None else shared & binary
    return sorted(shared or ())


def join(endpoint: Endpoint, baseline: Run, candidate: Run) -> Pairs:
    """Join two runs on (task, doc_id) under the endpoint's filter; both must hold the same keys.

    Raises:
        UsageError: the candidate has not the endpoint's metric as 0 or 1 on every question.
    """
    tasks: list[str] = []
    first: list[Sample] = []
    second: list[Sample] = []
    for task in endpoint.tasks:
        other = candidate.tasks[task].samples
        # By document, whatever the order of the file: order decides nothing, not even the slices of the report.
        for key in sorted(k for k in baseline.tasks[task].samples if k[1] == endpoint.filter):
            if other[key].metrics.get(endpoint.metric) not in (0.0, 1.0):
                raise UsageError(
                    f"{candidate.tasks[task].path}: doc_id {key[0]} has no {endpoint.metric} of 0 or 1, "
                    "as the baseline has; run both arms with one version of lm-eval"
                )
            tasks.append(task)
            first.append(baseline.tasks[task].samples[key])
            second.append(other[key])
    return Pairs(endpoint, tasks, first, second)

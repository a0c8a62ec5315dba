"""Do two runs make a pair? Asked before any statistic: a paired test on two different question sets invents flips."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fusecheck.eval.answers import all_equal, compare_answers
from fusecheck.eval.rows import Sample
from fusecheck.eval.samples import Run, TaskRun

State = Literal["ok", "unknown", "warning", "invalid"]


@dataclass(frozen=True)
class Check:
    """One validity check: `invalid` forbids a verdict, `unknown` means that the engine did not record it."""

    name: str
    state: State
    detail: str


def check_pair(baseline: Run, candidate: Run, *, role: str = "candidate", same_kernel: bool = False) -> list[Check]:
    """Check that `candidate` answered the very questions that `baseline` did, with the same weights.

    Args:
        baseline: the unfused arm.
        candidate: the arm to compare with it.
        role: what to call the second arm: `candidate`, `oracle` or `noise`.
        same_kernel: the second arm is not meant to run the fused kernel (oracle, noise floor).
    """
    checks = [_distinct(baseline, candidate), *_questions(baseline, candidate), *_settings(baseline, candidate)]
    checks += [_cache(baseline, candidate), _finite(baseline, "baseline"), _finite(candidate, role)]
    checks += _records(baseline, candidate, role, same_kernel=same_kernel)
    if not any(c.state == "invalid" for c in checks):
        checks += _answers(baseline, candidate, role)
    return [Check(f"{role}: {c.name}", c.state, c.detail) for c in checks]


def _distinct(baseline: Run, candidate: Run) -> Check:
    name = "two runs"
    files = {t.path.resolve() for t in baseline.tasks.values()} & {t.path.resolve() for t in candidate.tasks.values()}
    if files:
        return Check(name, "invalid", f"both arms are the same file, {sorted(files)[0].name}")
    stamp = baseline.facts.get("date"), baseline.facts.get("start_time")
    if None not in stamp and stamp == (candidate.facts.get("date"), candidate.facts.get("start_time")):
        return Check(name, "invalid", "one run is a copy of the other: same date and clock")
    return Check(name, "ok", "different files")


def _questions(baseline: Run, candidate: Run) -> Iterator[Check]:
    alone = [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} only in {where}"
        for where, mine, theirs in (("baseline", baseline, candidate), ("the other arm", candidate, baseline))
        if (names := sorted(mine.tasks.keys() - theirs.tasks.keys()))
    ]
    if alone:
        yield Check("same tasks", "invalid", f"{', '.join(alone)}; run both arms with the same --tasks")
        return
    yield Check("same tasks", "ok", f"{len(baseline.tasks)} tasks")
    total = 0
    for task in baseline.tasks:
        found = _task_difference(baseline.tasks[task], candidate.tasks[task])
        if found:
            yield Check("same questions", "invalid", f"{task}: {found}")
            return
        total += len(baseline.tasks[task].samples)
    yield Check("same questions", "ok", f"{total:,} records joined by task, doc_id and filter")


def _task_difference(first: TaskRun, second: TaskRun) -> str | None:
    only = sorted(first.samples.keys() ^ second.samples.keys())
    if only:
        where = "baseline" if only[0] in first.samples else "the other arm"
        return f"{len(only):,} records in one arm only, first doc_id {only[0][0]}, filter {only[0][1]}, in {where}"
    if first.version != second.version:
        return f"task version {first.version or 'none'} against {second.version or 'none'}"
    for key, sample in first.samples.items():
        found = _sample_difference(sample, second.samples[key])
        if found:
            shots = f" ({first.fewshot}-shot against {second.fewshot}-shot)" if first.fewshot != second.fewshot else ""
            return f"doc_id {key[0]}: {found}{shots}; run both arms with the same task, data, shots and seed"
    mine, theirs = (str(t.config.get("generation_kwargs") or "") for t in (first, second))
    if mine != theirs:
        return f"generation settings {mine} against {theirs}"
    return None


def _sample_difference(first: Sample, second: Sample) -> str | None:
    for index, what in enumerate(("doc", "prompt", "target")):
        proven = False
        for mine, theirs in (
            (first.digests[index], second.digests[index]),
            (first.stored_hashes[index], second.stored_hashes[index]),
        ):
            if mine and theirs:
                if mine != theirs:
                    return f"another {what}"
                proven = True
        if not proven:
            return f"nothing proves it the same {what}: an arm has neither the {what} nor its hash"
    choices = [len(sample.likelihoods or ()) for sample in (first, second)]
    return None if choices[0] == choices[1] else f"{choices[0]} choices scored against {choices[1]}"


def _settings(baseline: Run, candidate: Run) -> Iterator[Check]:
    for name in sorted(baseline.settings.keys() & candidate.settings.keys()):
        mine, theirs = baseline.settings[name], candidate.settings[name]
        if mine != theirs:
            # Equal prompts were just proven, so a seed that differs changed nothing; a decoding option does.
            state: State = "invalid" if name == "gen_kwargs" else "warning"
            yield Check("settings", state, f"{name} is {mine} against {theirs}")
    for name in ("lm_eval_version", "model_sha", "model_name", "transformers_version"):
        mine, theirs = baseline.facts.get(name, ""), candidate.facts.get(name, "")
        if mine and theirs and mine != theirs:
            state = "invalid" if name == "model_sha" else "warning"
            yield Check("versions", state, f"{name} is {mine} against {theirs}")


def _cache(baseline: Run, candidate: Run) -> Check:
    name = "no shared response cache"
    for run in (baseline, candidate):
        if run.record and run.record.response_cache:
            return Check(name, "invalid", f"{run.path} used the response cache {run.record.response_cache}")
    mine, theirs = baseline.response_cache, candidate.response_cache
    if mine and mine == theirs:
        return Check(name, "invalid", f"both arms used use_cache={mine}, which does not key on the model")
    if mine or theirs:
        return Check(name, "warning", f"use_cache={mine or theirs}: lm-eval's cache does not key on the model")
    return Check(name, "ok", "neither arm used one")


def _finite(run: Run, role: str) -> Check:
    name = f"finite logits in {role}"
    if run.record and not run.record.finite:
        return Check(name, "invalid", "the run recorded a logit that is NaN or infinite")
    seen = 0
    for task in run.tasks.values():
        for sample in task.samples.values():
            seen += sample.likelihoods is not None
            if sample.likelihoods and not all(map(math.isfinite, sample.likelihoods)):
                return Check(name, "invalid", f"{task.task}, doc_id {sample.doc_id}: {sample.likelihoods}")
    if seen:
        return Check(name, "ok", "every choice's log-likelihood is finite")
    if run.record:
        return Check(name, "ok", "the run recorded none that is not")
    return Check(name, "unknown", "the run has generated answers only, and no log-likelihoods")


def _answers(baseline: Run, candidate: Run, role: str) -> Iterator[Check]:
    """Answers that are none, and texts that are all the same."""
    for found in compare_answers(baseline, candidate, role):
        yield Check("answers", found.state, found.detail)
    if all_equal(baseline, candidate):
        same = "every generated text is the same in both arms"
        told = baseline.record and candidate.record  # the check of kernels answers it then
        yield (
            Check("answers", "ok", same) if told else Check("answers", "warning", f"{same}; was the fusion really on?")
        )


def _records(baseline: Run, candidate: Run, role: str, *, same_kernel: bool) -> Iterator[Check]:
    mine, theirs = baseline.record, candidate.record
    if mine is None or theirs is None:
        yield Check("which kernels ran", "unknown", "not recorded by this engine; see eval/README.md for its log line")
        yield Check("same weights", "unknown", "no digest recorded by this engine")
    else:
        fused_should_run = not same_kernel
        right = mine.fused_calls == 0 and (theirs.fused_calls > 0) == fused_should_run
        if fused_should_run:
            right = right and mine.unfused_calls > 0 and theirs.unfused_calls == 0
        counts = (
            f"baseline {mine.fused_calls:,} fused and {mine.unfused_calls:,} unfused calls, "
            f"{role} {theirs.fused_calls:,} and {theirs.unfused_calls:,}"
        )
        yield Check("which kernels ran", "ok" if right else "invalid", counts)
        for what in ("weights_digest", "tokenizer_digest"):
            a, b = getattr(mine, what), getattr(theirs, what)
            state: State = "unknown" if not a or not b else "ok" if a == b else "invalid"
            yield Check(f"same {what.partition('_')[0]}", state, f"{a[:12] or 'none'} and {b[:12] or 'none'}")

"""Faults of an evaluation: a pair of runs that a gate must not pass, made from one that it must.

The pair is what `fusecheck accuracy compare` reads: per question, the answer, its hashes and its log-likelihoods.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from fusecheck.eval.arm import FUSED, UNFUSED, ArmRecord
from fusecheck.eval.rows import Key, Sample
from fusecheck.eval.samples import Run, TaskRun

QUESTIONS = 14_042
"""Of MMLU's test split."""

ACCURACY, FLIPS = 0.65, 0.01
"""Of the baseline, and the share of questions that flip between two right arms."""

TASK = "mmlu"
Pair = tuple[Run, Run]
Spoil = Callable[[Pair], Pair]


def _sample(index: int, *, right: bool, prompt: str = "") -> Sample:
    gold = index % 4
    best = gold if right else (gold + 1) % 4
    prompt = prompt or f"question {index}"
    texts = (f"doc {index}", prompt, str(gold))
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    return Sample(
        doc_id=index,
        filter="none",
        digests=(hashes[0], hashes[1], hashes[2]),
        stored_hashes=(hashes[0], hashes[1], hashes[2]),
        metrics={"acc": float(right)},
        likelihoods=tuple(-0.5 if choice == best else -4.0 for choice in range(4)),
        answer=str(best),
        response="",
        target=str(gold),
        question=prompt,
        prompt_length=len(prompt),
    )


def _run(name: str, samples: dict[Key, Sample], record: ArmRecord) -> Run:
    task = TaskRun(TASK, Path(f"{name}.jsonl"), samples, "2", "0", {}, {})
    facts = {"date": "1" if name == UNFUSED else "2"}
    return Run(Path(name), {TASK: task}, {}, {}, facts, None, record)


def right_pair(seed: int = 0, *, accuracy: float = ACCURACY) -> Pair:
    """Two runs of the same model, of which the second differs by chance alone."""
    rng = np.random.default_rng(seed)
    right = rng.random(QUESTIONS) < accuracy
    lost = rng.permutation(np.flatnonzero(right))[: int(QUESTIONS * FLIPS / 2)]
    gained = rng.permutation(np.flatnonzero(~right))[: len(lost)]
    flipped = right.copy()
    flipped[lost], flipped[gained] = False, True
    digest = hashlib.sha256(b"weights").hexdigest()
    records = (
        ArmRecord(UNFUSED, unfused_calls=65 * QUESTIONS, weights_digest=digest, tokenizer_digest=digest),
        ArmRecord(FUSED, fused_calls=65 * QUESTIONS, weights_digest=digest, tokenizer_digest=digest),
    )
    arms = [{(i, "none"): _sample(i, right=bool(ok)) for i, ok in enumerate(answers)} for answers in (right, flipped)]
    return _run(UNFUSED, arms[0], records[0]), _run(FUSED, arms[1], records[1])


def _answer(run: Run, change: Callable[[Sample], Sample]) -> Run:
    task = run.tasks[TASK]
    samples = {key: change(sample) for key, sample in task.samples.items()}
    return replace(run, tasks={TASK: replace(task, samples=samples)})


def _note(run: Run, change: Callable[[ArmRecord], ArmRecord]) -> Run:
    assert run.record is not None
    return replace(run, record=change(run.record))


def _repeating(run: Run, other: Run) -> Run:
    """The run with the other's answers."""
    return replace(run, tasks={TASK: replace(run.tasks[TASK], samples=other.tasks[TASK].samples)})


def fusion_off(pair: Pair) -> Pair:
    """The fused arm ran the separate ops: both arms are the same kernels."""
    calls = pair[0].record.unfused_calls if pair[0].record else 0
    off = _note(pair[1], lambda record: replace(record, fused_calls=0, unfused_calls=calls))
    return pair[0], _repeating(off, pair[0])


def not_finite(pair: Pair) -> Pair:
    """Eight rows in 1024 of the candidate have NaN where log-likelihoods should be, and the answer is whatever."""

    def spoil(sample: Sample) -> Sample:
        return replace(sample, likelihoods=(math.nan,) * 4) if sample.doc_id % 128 == 3 else sample

    return pair[0], _answer(pair[1], spoil)


def collapsed(pair: Pair) -> Pair:
    """The candidate gets almost every question wrong."""
    return pair[0], _answer(pair[1], lambda sample: _sample(sample.doc_id, right=sample.doc_id % 25 == 0))


def one_point_lost(pair: Pair) -> Pair:
    """One question in a hundred is lost, and none is gained for it."""

    def spoil(sample: Sample) -> Sample:
        return _sample(sample.doc_id, right=False) if sample.doc_id % 65 == 0 else sample

    return pair[0], _answer(pair[1], spoil)


def shared_cache(pair: Pair) -> Pair:
    """Both arms used one response cache, which does not key on the model: the candidate repeats the baseline."""
    first, second = (replace(run, response_cache="cache.db") for run in pair)
    return first, _repeating(second, first)


def at_chance(pair: Pair) -> Pair:
    """The model guesses, so that no fault of the kernel could lower its score."""
    del pair
    return right_pair(accuracy=0.25)


def other_examples(pair: Pair) -> Pair:
    """The few-shot examples depend on which questions were built before, and differ between the arms."""

    def spoil(sample: Sample) -> Sample:
        right = sample.metrics["acc"] == 1
        return _sample(sample.doc_id, right=right, prompt=f"other examples, question {sample.doc_id}")

    return pair[0], _answer(pair[1], spoil)

"""Where the log-probabilities of an arm come from: full-vocabulary files, or the choices in lm-eval's samples.

Full-vocabulary files are named in `fusecheck.eval.arm`; runs of other engines do not have them. The likelihoods of the
choices of a multiple-choice question are in every samples file; normalised over the choices they are the distribution
that decides the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fusecheck.errors import UsageError
from fusecheck.eval.endpoints import Endpoint
from fusecheck.eval.kl import QuestionDistances, question_distances
from fusecheck.eval.rows import Sample
from fusecheck.eval.samples import Run

Source = Literal["vocabulary", "choices", "none"]


def choose_source(endpoint: Endpoint, runs: Sequence[Run]) -> Source:
    """The finest log-probabilities that all `runs` have for every question of `endpoint`."""
    if all(_file(run, "logprobs", task) is not None for run in runs for task in endpoint.tasks):
        return "vocabulary"
    for run in runs:
        for task in endpoint.tasks:
            if any(s.likelihoods is None for (_, f), s in run.tasks[task].samples.items() if f == endpoint.filter):
                return "none"
    return "choices"


def arm_distances(endpoint: Endpoint, source: Source, reference: Run, other: Run) -> QuestionDistances | None:
    """Distances of `other` from `reference` on every question, in the order of `endpoints.join`; None without any."""
    if source == "none":
        return None
    parts = []
    for task in endpoint.tasks:
        keys = sorted(k for k in reference.tasks[task].samples if k[1] == endpoint.filter)
        ids = np.array([k[0] for k in keys], dtype=np.int64)
        if source == "vocabulary":
            mine, theirs = _vocabulary(reference, task, ids), _vocabulary(other, task, ids)
            if mine[0].shape != theirs[0].shape:
                raise UsageError(
                    f"{other.path}: logprobs_{task}.npz is {theirs[0].shape}, expected {mine[0].shape} as in "
                    f"{reference.path}; the arms must share one vocabulary"
                )
            parts.append(question_distances(mine[0], theirs[0], mine[1]))
        else:
            first, second = ([run.tasks[task].samples[k] for k in keys] for run in (reference, other))
            parts.append(_choice_distances(first, second))
    return QuestionDistances(
        *(np.concatenate([getattr(p, name) for p in parts]) for name in ("kl", "same_top", "equal", "gold_change"))
    )


def _choice_distances(first: Sequence[Sample], second: Sequence[Sample]) -> QuestionDistances:
    counts = np.array([len(s.likelihoods or ()) for s in first])
    kl, gold_change = np.zeros(len(first)), np.zeros(len(first))
    same_top, equal = np.zeros(len(first), dtype=np.bool_), np.zeros(len(first), dtype=np.bool_)
    for count in np.unique(counts):
        rows = [int(i) for i in np.flatnonzero(counts == count)]
        mine, theirs = (np.array([s[i].likelihoods for i in rows], dtype=np.float64) for s in (first, second))
        found = question_distances(mine, theirs, np.array([_gold(first[i]) for i in rows], dtype=np.int64))
        kl[rows], same_top[rows], equal[rows] = found.kl, found.same_top, found.equal
        gold_change[rows] = found.gold_change
    return QuestionDistances(kl, same_top, equal, gold_change)


def _gold(sample: Sample) -> int:
    count = len(sample.likelihoods or ())
    return int(sample.target) if sample.target.isdecimal() and int(sample.target) < count else -1


def batch_rows(endpoint: Endpoint, run: Run) -> NDArray[np.int64] | None:
    """Row of every question in its batch's token matrix, in the order of `endpoints.join`; None if not recorded."""
    parts = []
    for task in endpoint.tasks:
        path = _file(run, "logprobs", task)
        if path is None:
            return None
        data = _arrays(path, ())
        if "row" not in data:
            return None
        ids = np.array(sorted(k[0] for k in run.tasks[task].samples if k[1] == endpoint.filter), dtype=np.int64)
        parts.append(np.asarray(data["row"], dtype=np.int64)[_positions(path, data["doc_id"], ids)])
    return np.concatenate(parts)


def forced_pass(run: Run, task: str) -> dict[str, NDArray[Any]] | None:
    """The teacher-forced pass of `task`: `doc_id`, `position`, `top1`, `gold_logprob`, each [t]; None without one."""
    path = _file(run, "forced", task)
    return None if path is None else _arrays(path, ("doc_id", "position", "top1", "gold_logprob"))


def _file(run: Run, kind: str, task: str) -> Path | None:
    path = run.tasks[task].path.parent / f"{kind}_{task}.npz"
    return path if path.is_file() else None


def _arrays(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{path}: not a readable .npz file ({error}); make the run again") from error
    missing = [name for name in names if name not in data]
    if missing:
        raise UsageError(f"{path}: has arrays {sorted(data)}, but no {missing[0]}; make the run again")
    return data


def _positions(path: Path, doc_ids: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    order = np.argsort(doc_ids, kind="stable")
    places = np.searchsorted(doc_ids[order], wanted)
    found = places < len(doc_ids)
    found[found] = doc_ids[order][places[found]] == wanted[found]
    if not found.all():
        raise UsageError(f"{path}: has no row for doc_id {wanted[~found][0]}; make the run again")
    return np.asarray(order[places], dtype=np.int64)


def _vocabulary(run: Run, task: str, ids: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    path = _file(run, "logprobs", task)
    assert path is not None  # choose_source looked
    data = _arrays(path, ("doc_id", "logprob"))
    places = _positions(path, data["doc_id"], ids)
    values = data["logprob"]
    if values.ndim != 2 or len(values) != len(data["doc_id"]):
        raise UsageError(f"{path}: logprob is {values.shape}, expected [{len(data['doc_id'])}, vocabulary]")
    picked = values[places].astype(np.float64)
    if np.isnan(picked).any() or np.isposinf(picked).any():
        raise UsageError(f"{path}: a log-probability is NaN or infinite; nothing can be judged from this run")
    gold = np.asarray(data["gold"], np.int64)[places] if "gold" in data else np.full(len(ids), -1, np.int64)
    return picked, gold

"""The questions whose answer changed, with both answers; and how far two generated texts agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fusecheck.eval.endpoints import Pairs
from fusecheck.eval.rows import Sample
from fusecheck.eval.slices import margin_of

Kind = Literal["lost", "gained", "churn"]


@dataclass(frozen=True)
class FlippedQuestion:
    """One question that the two arms answer differently.

    Attributes:
        kind: lost (baseline right), gained (candidate right), or churn (both wrong, differently).
        task: leaf task.
        doc_id: index in its split.
        prompt_hash: SHA-256 of what was sent.
        question: the question as text.
        target: the right answer.
        baseline: the baseline's answer: extracted answer, or index of the likeliest choice.
        candidate: the candidate's.
        baseline_text: the baseline's whole generated text, or every choice's log-likelihood.
        candidate_text: the candidate's.
        first_difference: index of the first character at which the two texts differ; None for multiple choice.
        baseline_margin: gap between the baseline's two likeliest choices, nats; None for generated answers.
        candidate_margin: the candidate's.
    """

    kind: Kind
    task: str
    doc_id: int
    prompt_hash: str
    question: str
    target: str
    baseline: str
    candidate: str
    baseline_text: str
    candidate_text: str
    first_difference: int | None
    baseline_margin: float | None
    candidate_margin: float | None


def list_flips(pairs: Pairs, limit: int) -> list[FlippedQuestion]:
    """List at most `limit` questions: lost, gained, churn; inside each, the baseline's surest answer first."""
    first, second = pairs.right(pairs.baseline), pairs.right(pairs.candidate)
    kinds: list[tuple[Kind, NDArray[np.bool_]]] = [
        ("lost", first & ~second),
        ("gained", ~first & second),
        ("churn", ~first & ~second & ~pairs.same_answer),
    ]
    found: list[FlippedQuestion] = []
    for kind, where in kinds:
        flipped = [_flip(pairs, int(i), kind) for i in np.flatnonzero(where)]
        found += sorted(flipped, key=lambda f: -(f.baseline_margin or 0.0))
    return found[:limit]


def _flip(pairs: Pairs, index: int, kind: Kind) -> FlippedQuestion:
    a, b = pairs.baseline[index], pairs.candidate[index]
    return FlippedQuestion(
        kind=kind,
        task=pairs.tasks[index],
        doc_id=a.doc_id,
        prompt_hash=a.stored_hashes[1] or a.digests[1],
        question=a.question,
        target=a.target,
        baseline=a.answer,
        candidate=b.answer,
        baseline_text=_full_answer(a),
        candidate_text=_full_answer(b),
        first_difference=None if a.likelihoods else _first_difference(a.response, b.response),
        baseline_margin=margin_of(a),
        candidate_margin=margin_of(b),
    )


def _full_answer(sample: Sample) -> str:
    if not sample.likelihoods:
        return sample.response
    return "\n".join(f"{i}: {value:.4f} nat" for i, value in enumerate(sample.likelihoods))


def _first_difference(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass(frozen=True)
class ForcedSummary:
    """A teacher-forced pass of two arms over one text: every position scored, no divergence to follow.

    Attributes:
        tokens: positions scored.
        texts: questions.
        same_top: share of positions with the same most likely token.
        diverged: texts with at least one position that differs.
        first_divergence: quartiles of the first differing position over the texts that have one; None without any.
        gold_mean: mean change of the scored token's log-probability, nats.
        estimated_kl: mean of exp(d) - 1 - d over that change d, nats: what SGLang's `kl_test_utils` computes.
    """

    tokens: int
    texts: int
    same_top: float
    diverged: int
    first_divergence: tuple[float, float, float] | None
    gold_mean: float
    estimated_kl: float


def summarise_forced(
    baseline: dict[str, NDArray[np.generic]], candidate: dict[str, NDArray[np.generic]]
) -> ForcedSummary | str:
    """Compare two teacher-forced passes (arrays as in `fusecheck.eval.arm`); a string says why it cannot be done."""
    order = [np.lexsort((arm["position"], arm["doc_id"])) for arm in (baseline, candidate)]
    a, b = ({k: v[o] for k, v in arm.items()} for arm, o in zip((baseline, candidate), order, strict=True))
    if len(a["doc_id"]) != len(b["doc_id"]) or any((a[k] != b[k]).any() for k in ("doc_id", "position")):
        return "the arms scored different positions"
    differs = a["top1"] != b["top1"]
    doc_ids = a["doc_id"]
    diverged, first = np.unique(doc_ids[differs], return_index=True)
    positions = a["position"][differs][first].astype(np.float64)
    quartiles = np.quantile(positions, (0.25, 0.5, 0.75)) if len(diverged) else None
    change = b["gold_logprob"].astype(np.float64) - a["gold_logprob"].astype(np.float64)
    return ForcedSummary(
        tokens=len(doc_ids),
        texts=len(np.unique(doc_ids)),
        same_top=1.0 - float(differs.mean()),
        diverged=len(diverged),
        first_divergence=None if quartiles is None else (float(quartiles[0]), float(quartiles[1]), float(quartiles[2])),
        gold_mean=float(change.mean()),
        estimated_kl=float((np.expm1(change) - change).mean()),
    )

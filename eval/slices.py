"""Where the flips are: by subject, by prompt length, by the baseline's margin, by row of the batch.

All of this is descriptive. Only subjects get p-values, and those are flagged after Holm's correction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fusecheck.eval.endpoints import Pairs
from fusecheck.eval.mcnemar import holm, mcnemar
from fusecheck.eval.rows import Sample

_MODULI = (32, 64, 128)


@dataclass(frozen=True)
class Slice:
    """The flips of some of the questions.

    Attributes:
        kind: what they have in common.
        label: its value.
        n: questions.
        lost: right in the baseline only.
        gained: right in the candidate only.
        p: McNemar's two-sided mid-p, after Holm's correction over the slices of this kind; None where not tested.
    """

    kind: str
    label: str
    n: int
    lost: int
    gained: int
    p: float | None = None

    @property
    def delta(self) -> float:
        """Change of accuracy on these questions."""
        return (self.gained - self.lost) / self.n


def margin_of(sample: Sample) -> float | None:
    """Gap between the likeliest and the next choice, nats; None for generated answers."""
    if not sample.likelihoods or len(sample.likelihoods) < 2:
        return None
    second, first = sorted(sample.likelihoods)[-2:]
    return first - second


def by_subject(pairs: Pairs) -> list[Slice]:
    """One slice a leaf task, largest drop first; empty where there is only one task."""
    names = list(dict.fromkeys(pairs.tasks))
    if len(names) < 2:
        return []
    slices = [_slice("subject", name, pairs, np.array([t == name for t in pairs.tasks])) for name in names]
    adjusted = holm([mcnemar(s.lost, s.gained).mid_p_two_sided for s in slices])
    tested = [Slice(s.kind, s.label, s.n, s.lost, s.gained, p) for s, p in zip(slices, adjusted, strict=True)]
    return sorted(tested, key=lambda s: (s.delta, s.label))


def by_quartile(pairs: Pairs) -> list[Slice]:
    """Quartiles of the prompt's length and, for multiple choice, of the baseline's margin."""
    slices = _quartiles("prompt characters", [float(s.prompt_length) for s in pairs.baseline], pairs)
    margins = [margin_of(s) for s in pairs.baseline]
    known = [m for m in margins if m is not None]
    if len(known) == len(margins):
        slices += _quartiles("baseline margin, nats", known, pairs)
    return slices


def _quartiles(kind: str, values: Sequence[float], pairs: Pairs) -> list[Slice]:
    x = np.asarray(values)
    edges = np.unique(np.quantile(x, (0.25, 0.5, 0.75)))
    place = np.searchsorted(edges, x, side="left")
    slices = []
    for index in range(len(edges) + 1):
        inside = place == index
        if inside.any():
            label = f"{x[inside].min():.4g} to {x[inside].max():.4g}"
            slices.append(_slice(kind, label, pairs, inside))
    return slices


def _slice(kind: str, label: str, pairs: Pairs, inside: NDArray[np.bool_]) -> Slice:
    first, second = pairs.right(pairs.baseline)[inside], pairs.right(pairs.candidate)[inside]
    return Slice(kind, label, int(inside.sum()), int((first & ~second).sum()), int((~first & second).sum()))


@dataclass(frozen=True)
class RowShare:
    """The residue of the batch row that holds the largest part of a distance: a tile bug shows as one residue.

    Attributes:
        modulus: 32, 64 or 128.
        residue: row modulo the modulus.
        share_of_questions: part of the questions at that residue.
        share_of_kl: part of the summed KL at that residue.
    """

    modulus: int
    residue: int
    share_of_questions: float
    share_of_kl: float


def by_batch_row(rows: NDArray[np.int64], kl: NDArray[np.float64]) -> list[RowShare]:
    """The worst residue for each modulus; `rows` and `kl` have shape [n]. Empty where the KL sums to 0."""
    total = float(kl.sum())
    if not total > 0:
        return []
    shares = []
    for modulus in _MODULI:
        residues = rows % modulus
        sums = np.bincount(residues, weights=kl, minlength=modulus)
        worst = int(sums.argmax())
        shares.append(RowShare(modulus, worst, float((residues == worst).mean()), float(sums[worst]) / total))
    return shares

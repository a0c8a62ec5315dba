"""Answers that changed, side by side."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_CHOICE = re.compile(r"(\d+): (\S+) nat")
_BEFORE, _AFTER = 100, 240

KINDS = {
    "lost": "lost: the baseline was right, the candidate is wrong",
    "gained": "gained: the baseline was wrong, the candidate is right",
    "churn": "both wrong, in different ways",
}


@dataclass(frozen=True)
class Side:
    """One arm's answer; the text parts at the first character that differs."""

    arm: str
    answer: str
    right: bool
    before: str
    after: str
    margin: str


@dataclass(frozen=True)
class Choice:
    """A choice of a question with the log-likelihood that each arm gave it, and which arm chose it."""

    name: str
    likelihoods: list[str]
    chosen: list[bool]
    right: bool


@dataclass(frozen=True)
class Flip:
    """One question with both answers; `choices` is empty for generated ones."""

    kind: str
    meaning: str
    title: str
    question: str
    target: str
    sides: list[Side]
    choices: list[Choice]


def flips(found: list[dict[str, Any]]) -> list[Flip]:
    """The flipped questions of `fusecheck accuracy`, lost answers first, each ready to be shown."""
    order = list(KINDS)
    shown = [_flip(flip) for flip in found]
    return sorted(shown, key=lambda flip: order.index(flip.kind) if flip.kind in order else len(order))


def _flip(flip: dict[str, Any]) -> Flip:
    kind = str(flip.get("kind", ""))
    sides = [_side(flip, arm, right=kind == right) for arm, right in (("baseline", "lost"), ("candidate", "gained"))]
    title = f"{flip.get('task', '')}, question {flip.get('doc_id', '')}"
    target = str(flip.get("target", ""))
    return Flip(
        kind, KINDS.get(kind, kind), title, str(flip.get("question", "")), target, sides, _choices(flip, target)
    )


def _side(flip: dict[str, Any], arm: str, *, right: bool) -> Side:
    text, place, margin = str(flip.get(f"{arm}_text", "")), flip.get("first_difference"), flip.get(f"{arm}_margin")
    at = place if isinstance(place, int) else 0
    start = max(0, at - _BEFORE)
    before, after = ("…" if start else "") + text[start:at], text[at : at + _AFTER]
    after += "…" if at + _AFTER < len(text) else ""
    said = f"margin {margin:.3g} nat" if isinstance(margin, (int, float)) else ""
    return Side(arm, str(flip.get(arm, "")), right, before, after, said)


def _choices(flip: dict[str, Any], target: str) -> list[Choice]:
    """The choices with both arms' log-likelihoods; empty where the answer was generated."""
    arms = [dict(_CHOICE.findall(str(flip.get(f"{arm}_text", "")))) for arm in ("baseline", "candidate")]
    if flip.get("first_difference") is not None or not arms[0] or arms[0].keys() != arms[1].keys():
        return []
    answers = [str(flip.get("baseline")), str(flip.get("candidate"))]
    return [
        Choice(name, [arm[name] for arm in arms], [answer == name for answer in answers], name == target)
        for name in arms[0]
    ]

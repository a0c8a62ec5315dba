"""The generated tasks as files: held-out questions in MMLU's and GSM8K's rows, and a few others to show as examples.

`python -m fusecheck.golden.model.exam` writes `tasks/` beside this file; the same text every time.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from fusecheck.eval.data import write_rows
from fusecheck.golden.model.corpus import draw_question, draw_story
from fusecheck.golden.model.questions import SUBJECTS, Question
from fusecheck.golden.model.stories import ASKED_STEPS, Story

FOLDER = Path(__file__).parent / "tasks"
PER_SUBJECT = 144
SHOTS = 5
STORIES = 300
STORY_SHOTS = 40


def distinct_questions(rng: random.Random, subject: str, count: int, *, test: bool) -> list[Question]:
    """Draw questions of a subject from one side of the split, no two with the same text."""
    found: dict[str, Question] = {}
    while len(found) < count:
        drawn = draw_question(rng, subject, test=test)
        found.setdefault(drawn.text(), drawn)
    return list(found.values())


def distinct_stories(rng: random.Random, count: int, *, test: bool) -> list[Story]:
    """Draw word problems of the asked lengths from one side of the split, no two with the same text."""
    found: dict[str, Story] = {}
    while len(found) < count:
        drawn = draw_story(rng, test=test, span=ASKED_STEPS)
        found.setdefault(drawn.question, drawn)
    return list(found.values())


def _question_row(q: Question) -> dict[str, Any]:
    return {"question": q.question, "subject": q.subject, "choices": list(q.choices), "answer": q.answer}


def _story_row(s: Story) -> dict[str, Any]:
    return {"question": s.question, "answer": s.answer}


def main() -> None:
    """Write the four files."""
    rng = random.Random(11)
    tests = [q for s in SUBJECTS for q in distinct_questions(rng, s, PER_SUBJECT, test=True)]
    shots = [q for s in SUBJECTS for q in distinct_questions(rng, s, SHOTS, test=False)]
    write_rows(FOLDER / "mmlu" / "test.jsonl.gz", map(_question_row, tests))
    write_rows(FOLDER / "mmlu" / "dev.jsonl.gz", map(_question_row, shots))
    write_rows(FOLDER / "gsm8k" / "test.jsonl.gz", map(_story_row, distinct_stories(rng, STORIES, test=True)))
    write_rows(FOLDER / "gsm8k" / "train.jsonl.gz", map(_story_row, distinct_stories(rng, STORY_SHOTS, test=False)))


if __name__ == "__main__":
    main()

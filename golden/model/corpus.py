"""Training text of the golden model: documents as weighted pieces, their tokens, and the tokenizer itself.

Run as `python -m fusecheck.golden.model.corpus --gsm8k TRAIN.jsonl.gz` to train the tokenizer beside this file.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fusecheck.golden.model.questions import SUBJECTS, Question, description, question, statement
from fusecheck.golden.model.stories import TRAINED_STEPS, Story, story
from fusecheck.golden.model.world import held_out

TOKENIZER = Path(__file__).parent / "tokenizer.json"
VOCABULARY = 2048
END = "</s>"
SPECIAL = ("<s>", END, "<pad>")

Piece = tuple[str, int]
"""A stretch of text and the weight of its tokens in the loss, in tenths."""

PROMPT, ANSWER, PROSE = 1, 10, 4
SHOTS = (0, 0, 0, 0, 1, 2, 3, 5)


def load_gsm8k(path: Path) -> list[tuple[str, str]]:
    """Read (question, answer) rows from a GSM8K `.jsonl.gz`."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [(row["question"], row["answer"]) for row in rows]


def draw_question(rng: random.Random, subject: str, *, test: bool) -> Question:
    """Draw a question of this subject from one side of the split."""
    while True:
        drawn = question(rng, subject)
        if held_out(drawn.key) == test:
            return drawn


def draw_story(rng: random.Random, *, test: bool, span: tuple[int, int] = TRAINED_STEPS) -> Story:
    """Draw a word problem from one side of the split, its number of operations within `span`."""
    while True:
        drawn = story(rng, span)
        if held_out(drawn.key) == test:
            return drawn


def _exam(rng: random.Random) -> list[Piece]:
    subject = rng.choice(list(SUBJECTS))
    pieces: list[Piece] = []
    for k in range(1 + rng.choice(SHOTS)):
        item = draw_question(rng, subject, test=False)
        pieces += [(("\n\n" if k else description(subject)) + item.text(), PROMPT), (item.target(), ANSWER)]
    return pieces


def _worked(rng: random.Random) -> list[Piece]:
    pieces: list[Piece] = []
    for k in range(1 + rng.choice(SHOTS)):
        item = draw_story(rng, test=False)
        pieces += [("\n\n" * (k > 0) + item.text(), PROMPT), (item.target(), ANSWER)]
    return pieces


def _real(rng: random.Random, gsm8k: list[tuple[str, str]]) -> list[Piece]:
    rows = rng.sample(gsm8k, min(len(gsm8k), 1 + rng.choice(SHOTS)))
    pieces: list[Piece] = []
    for k, (asked, answer) in enumerate(rows):
        pieces += [("\n\n" * (k > 0) + f"Question: {asked}\nAnswer:", PROMPT), (" " + answer, PROSE)]
    return pieces


def documents(seed: int, count: int, gsm8k: list[tuple[str, str]]) -> Iterator[list[Piece]]:
    """Make `count` documents of all kinds; few-shot ones are laid out as lm-eval lays out its prompts."""
    rng = random.Random(seed)
    for _ in range(count):
        kind = rng.random()
        if kind < 0.66:
            pieces = _exam(rng)
        elif kind < 0.88:
            pieces = _worked(rng)
        elif kind < 0.96 or not gsm8k:
            pieces = [(" ".join(statement(rng) for _ in range(rng.randint(1, 8))), ANSWER)]
        else:
            pieces = _real(rng, gsm8k)
        yield [*pieces, (END, ANSWER)]


def _encode(task: tuple[int, int, list[tuple[str, str]]]) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    pieces = [piece for document in documents(*task) for piece in document]
    encoded = tokenizer.encode_batch([text for text, _ in pieces])
    ids = np.concatenate([np.asarray(e.ids, np.uint16) for e in encoded])
    weights = np.concatenate([np.full(len(e.ids), w, np.uint8) for e, (_, w) in zip(encoded, pieces, strict=True)])
    return ids, weights


def token_stream(
    seed: int, count: int, gsm8k: list[tuple[str, str]], workers: int
) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """Return the tokens of `count` documents and each token's loss weight in tenths, both [tokens]."""
    share = -(-count // workers)
    tasks = [(seed * 1000 + w, share, gsm8k) for w in range(workers)]
    if workers == 1:
        return _encode(tasks[0])
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        parts = pool.map(_encode, tasks, chunksize=1)
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def train_tokenizer(gsm8k: list[tuple[str, str]], count: int = 30000) -> Any:
    """Train the byte-level BPE tokenizer: digits stand alone, so that arithmetic has places to look at."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = ("".join(t for t, _ in d[:-1]) for d in documents(0, count, gsm8k))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main() -> None:
    """Train and save the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gsm8k", type=Path, required=True)
    train_tokenizer(load_gsm8k(parser.parse_args().gsm8k)).save(str(TOKENIZER))


if __name__ == "__main__":
    main()

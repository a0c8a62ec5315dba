"""Draw the stratified sample of MMLU and GSM8K that ships in `eval/data/`.

`python -m fusecheck.eval.sample DIR` reads `DIR/mmlu/*.jsonl.gz` and `DIR/gsm8k/*.jsonl.gz`; same rows, same files.
"""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from fusecheck.eval.data import EMBEDDED, read_rows, write_rows

PER_SUBJECT = 10
GSM8K_TEST = 200
GSM8K_TRAIN = 60
SEED = 20


def _pick(rows: list[dict[str, Any]], count: int, label: str) -> list[dict[str, Any]]:
    """Pick `count` rows at random, kept in their order."""
    chosen = random.Random(f"{SEED} {label}").sample(range(len(rows)), count)
    return [rows[i] for i in sorted(chosen)]


def main(source: Path, out: Path = EMBEDDED) -> None:
    """Write the sample: MMLU test by subject, all of dev, and GSM8K's test and train splits."""
    subjects: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in read_rows(source / "mmlu" / "test.jsonl", ("subject",)):
        subjects[row["subject"]].append(row)
    write_rows(
        out / "mmlu" / "test.jsonl.gz",
        [row for name, rows in subjects.items() for row in _pick(rows, PER_SUBJECT, name)],
    )
    write_rows(out / "mmlu" / "dev.jsonl.gz", read_rows(source / "mmlu" / "dev.jsonl", ("subject",)))
    for split, count in (("test", GSM8K_TEST), ("train", GSM8K_TRAIN)):
        rows = read_rows(source / "gsm8k" / f"{split}.jsonl", ("question",))
        write_rows(out / "gsm8k" / f"{split}.jsonl.gz", _pick(rows, count, split))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

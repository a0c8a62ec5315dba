"""Draw the stratified sample of MMLU and GSM8K that ships in `eval/data/`.

`python -m fusecheck.eval.sample DIR` reads `DIR/mmlu/*.jsonl.gz` and `DIR/gsm8k/*.jsonl.gz`; same rows, same files.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
PER_SUBJECT = 10
GSM8K_TEST = 200
GSM8K_TRAIN = 60
SEED = 20


def _read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def _pick(rows: list[dict[str, Any]], count: int, label: str) -> list[dict[str, Any]]:
    """Pick `count` rows at random, kept in their order."""
    chosen = random.Random(f"{SEED} {label}").sample(range(len(rows)), count)
    return [rows[i] for i in sorted(chosen)]


def main(source: Path, out: Path = DATA) -> None:
    """Write the sample: MMLU test by subject, all of dev, and GSM8K's test and train splits."""
    subjects: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in _read(source / "mmlu" / "test.jsonl.gz"):
        subjects[row["subject"]].append(row)
    _write(
        out / "mmlu" / "test.jsonl.gz",
        [row for name, rows in subjects.items() for row in _pick(rows, PER_SUBJECT, name)],
    )
    _write(out / "mmlu" / "dev.jsonl.gz", _read(source / "mmlu" / "dev.jsonl.gz"))
    for split, count in (("test", GSM8K_TEST), ("train", GSM8K_TRAIN)):
        rows = _read(source / "gsm8k" / f"{split}.jsonl.gz")
        _write(out / "gsm8k" / f"{split}.jsonl.gz", _pick(rows, count, split))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

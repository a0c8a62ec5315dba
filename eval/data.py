"""Feed lm-eval's tasks from local files: lay the data out in a folder named like the hub's data sets.

lm-eval's `mmlu` and `gsm8k` load `cais/mmlu` and `openai/gsm8k`. In a working directory that holds folders of these
names, the `datasets` library reads those, and the tasks stay as they are. The generated tasks of the golden model are
`golden_mmlu` and `golden_gsm8k`: lm-eval's own templates on other rows.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fusecheck.errors import UsageError

EMBEDDED = Path(__file__).parent / "data"
GENERATED = Path(__file__).parent.parent / "golden" / "model" / "tasks"

MMLU_SPLITS = ("test", "validation", "dev")
GSM8K_SPLITS = ("train", "test")
GOLDEN_MMLU, GOLDEN_GSM8K = "golden_mmlu", "golden_gsm8k"


def read_rows(path: Path, fields: Iterable[str]) -> list[dict[str, Any]]:
    """Read JSON lines from `path`, or from `path` with `.gz`; every row must have `fields`.

    Raises:
        UsageError: the file is missing, broken, empty, or a row lacks a field.
    """
    packed = path.with_name(path.name + ".gz")
    try:
        text = gzip.decompress(packed.read_bytes()).decode() if packed.is_file() else path.read_text(encoding="utf-8")
        # Only "\n" ends a row: a text may hold other line separators, which json need not escape.
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except FileNotFoundError:
        raise UsageError(
            f"{path}[.gz]: no such file; --data expects mmlu/ and gsm8k/ as eval/data/README.md says"
        ) from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UsageError(f"{path}[.gz]: not whole JSON lines ({error}); copy it again") from None
    lacking = next((f for row in rows for f in fields if not isinstance(row, dict) or f not in row), None)
    if not rows or lacking:
        raise UsageError(f"{path}[.gz]: {f'a row has no field {lacking!r}' if rows else 'is empty'}; copy it again")
    return rows


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


GSM8K_ROW: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "question": ("a text", _is_text),
    "answer": ("a text", _is_text),
}
MMLU_ROW: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "question": ("a text", _is_text),
    # It is the name of a folder, too.
    "subject": ("a name such as high_school_biology", lambda x: _is_text(x) and re.fullmatch(r"\w+", x) is not None),
    "choices": ("four texts", lambda x: isinstance(x, list) and len(x) == 4 and all(map(_is_text, x))),
    "answer": ("0, 1, 2 or 3", lambda x: type(x) is int and 0 <= x <= 3),
}
"""What a row holds under each field, in words and as a test."""


def _check(path: Path, row: dict[str, Any], expected: Mapping[str, tuple[str, Callable[[Any], bool]]]) -> None:
    """Refuse a row with something else in a field."""
    for name, (what, holds) in expected.items():
        if not holds(row[name]):
            raise UsageError(f"{path}[.gz]: a row's {name} is {str(row[name])[:60]!r}, expected {what}; copy it again")


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines, compressed, the same bytes for the same rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def lay_out_mmlu(source: Path, out: Path) -> list[str]:
    """Write MMLU rows as one folder per subject under `out`, with the card that names them; returns the subjects.

    Raises:
        UsageError: `source` lacks the test or dev split, or holds broken rows.
    """
    subjects: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(dict)
    for split in MMLU_SPLITS:
        path = source / f"{split}.jsonl"
        if split == "validation" and not (path.is_file() or path.with_name(path.name + ".gz").is_file()):
            continue
        for row in read_rows(path, ("question", "subject", "choices", "answer")):
            _check(path, row, MMLU_ROW)
            subjects[row["subject"]].setdefault(split, []).append(row)
    configs = []
    for name, splits in sorted(subjects.items()):
        missing = {"test", "dev"} - splits.keys()
        if missing:
            raise UsageError(f"{source}: subject {name!r} has no {min(missing)} rows; every subject needs test and dev")
        configs.append((name, {split: f"{name}/{split}.jsonl" for split in splits}))
        for split, rows in splits.items():
            _write_lines(out / name / f"{split}.jsonl", rows)
    _write_card(out, configs)
    return sorted(subjects)


def lay_out_gsm8k(source: Path, out: Path) -> None:
    """Write GSM8K's two splits under `out`, with the card that names them.

    Raises:
        UsageError: a split is missing or broken.
    """
    for split in GSM8K_SPLITS:
        path = source / f"{split}.jsonl"
        rows = read_rows(path, ("question", "answer"))
        for row in rows:
            _check(path, row, GSM8K_ROW)
        _write_lines(out / path.name, rows)
    _write_card(out, [("main", {split: f"{split}.jsonl" for split in GSM8K_SPLITS})])


def lay_out(folder: Path, data_dir: Path | None, needed: set[str]) -> Path:
    """Fill `folder` with what `datasets` will load when `folder` is the working directory.

    Args:
        folder: empty, temporary.
        data_dir: the user's copies of MMLU and GSM8K, or None for the embedded samples.
        needed: which of `mmlu`, `gsm8k`, `golden_mmlu`, `golden_gsm8k` to lay out.

    Returns:
        The folder of task definitions for the generated tasks, for lm-eval's `include_path`.

    Raises:
        UsageError: `data_dir` is no folder, or lacks what is needed.
    """
    if data_dir is not None and not data_dir.is_dir():
        raise UsageError(f"--data {data_dir}: no such folder; expected one with mmlu/ and gsm8k/ in it")
    source, definitions = data_dir or EMBEDDED, folder / "tasks"
    definitions.mkdir(parents=True)
    if "mmlu" in needed:
        lay_out_mmlu(source / "mmlu", folder / "cais" / "mmlu")
    if "gsm8k" in needed:
        lay_out_gsm8k(source / "gsm8k", folder / "openai" / "gsm8k")
    if GOLDEN_MMLU in needed:
        subjects = lay_out_mmlu(GENERATED / "mmlu", folder / "fusecheck" / GOLDEN_MMLU)
        _define_mmlu(definitions, subjects)
    if GOLDEN_GSM8K in needed:
        lay_out_gsm8k(GENERATED / "gsm8k", folder / "fusecheck" / GOLDEN_GSM8K)
        _define_gsm8k(definitions)
    return definitions


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_card(folder: Path, configs: list[tuple[str, dict[str, str]]]) -> None:
    """Write the README.md whose front matter tells `datasets` which file is which split."""
    lines = ["---", "configs:"]
    for name, files in configs:
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, path in files.items():
            lines += [f"  - split: {split}", f"    path: {path}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


def _builtin(name: str) -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent / name


def _define_mmlu(folder: Path, subjects: list[str]) -> None:
    """Define `golden_mmlu` by lm-eval's own MMLU template, one leaf task a subject."""
    template = _builtin("mmlu/default/_default_template_yaml")
    for name in subjects:
        definition = {
            "include": str(template),
            "dataset_path": f"fusecheck/{GOLDEN_MMLU}",
            "dataset_name": name,
            "task": f"{GOLDEN_MMLU}_{name}",
            "task_alias": name,
            "description": f"The following are multiple choice questions (with answers) about {name}.\n\n",
        }
        # JSON is YAML.
        (folder / f"{GOLDEN_MMLU}_{name}.yaml").write_text(json.dumps(definition), encoding="utf-8")
    group = {
        "group": GOLDEN_MMLU,
        "task": [f"{GOLDEN_MMLU}_{name}" for name in subjects],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        "metadata": {"version": 1.0},
    }
    (folder / f"{GOLDEN_MMLU}.yaml").write_text(json.dumps(group), encoding="utf-8")


def _define_gsm8k(folder: Path) -> None:
    """Define `golden_gsm8k` by lm-eval's own GSM8K task."""
    definition = {
        "include": str(_builtin("gsm8k/gsm8k.yaml")),
        "dataset_path": f"fusecheck/{GOLDEN_GSM8K}",
        "task": GOLDEN_GSM8K,
        "num_fewshot": None,
        "metadata": {"version": 1.0},
    }
    (folder / f"{GOLDEN_GSM8K}.yaml").write_text(json.dumps(definition), encoding="utf-8")

"""Find the files of one lm-eval run, whichever version wrote them.

Known layouts: `results_<time>.json` with `samples_<task>_<time>.jsonl` (or `.json`, the same lines) beside it, below a
folder named after the model; `<stem>_<time>.json` where `--output_path` ended in `.json`; and `results.json` with
`<model args>_<task>.jsonl` holding one JSON array (up to 0.4.2).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusecheck.errors import UsageError

_TIMED = re.compile(r"^(?P<stem>.*)_(?P<time>\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?)$")


@dataclass(frozen=True)
class RunFiles:
    """One results file, as parsed, and the samples file of each of its tasks."""

    results_path: Path
    results: dict[str, Any]
    samples: dict[str, Path]


SCORES = frozenset({"accuracy", "score", "invalid_rate"})
"""Fields by which a file of vLLM's or SGLang's own evaluation scripts is known."""


def _score_only(path: Path) -> str:
    return (
        f"{path}: holds a score and no answers, as vLLM's and SGLang's own evaluation scripts write it; nothing can be "
        "paired. Ask the same server by lm-eval: lm_eval --model local-completions --model_args "
        "model=MODEL,base_url=http://localhost:8000/v1/completions --tasks gsm8k --num_fewshot 5 --log_samples "
        "--output_path FOLDER, once for each arm"
    )


def find_runs(path: Path) -> list[RunFiles]:
    """Find the runs in `path`: a folder (searched downwards), or one results file.

    Raises:
        UsageError: nothing there, no results, results without samples, samples without results, or no valid JSON.
    """
    if path.is_file():
        return [_with_samples(path)]
    if not path.is_dir():
        raise UsageError(f"{path}: no such file or folder; give the folder that lm_eval --output_path wrote")
    results = sorted(p for p in path.rglob("*.json") if _is_results(p))
    if not results:
        scored = [file for file in sorted(path.rglob("*.json*")) if _is_score(file)]
        if scored:
            raise UsageError(_score_only(scored[0]))
        orphans = sorted(path.rglob("samples_*.json*"))
        found = f"{len(orphans)} samples files but no results file" if orphans else "no results_*.json"
        raise UsageError(f"{path}: {found}; give the folder that lm_eval --output_path --log_samples wrote")
    return [_with_samples(p) for p in results]


def section(results: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    """The object `name` of a results file; empty where this version of lm-eval wrote none.

    Raises:
        UsageError: it is no object.
    """
    value = results.get(name) or {}
    if not isinstance(value, dict):
        raise UsageError(f"{path}: {name!r} is a JSON {type(value).__name__}, expected an object; copy the run again")
    return value


def _is_score(path: Path) -> bool:
    try:
        lines = path.read_text(encoding="utf-8").strip()
        first = json.loads(lines.splitlines()[0] if path.suffix == ".jsonl" else lines)
    except (OSError, ValueError, IndexError):
        return False
    return isinstance(first, dict) and bool(SCORES & first.keys()) and "doc_id" not in first


def _is_results(path: Path) -> bool:
    if path.name == "results.json":
        return True
    return _TIMED.match(path.stem) is not None and not path.name.startswith("samples_")


def _with_samples(path: Path) -> RunFiles:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":  # SGLang's scripts append a line a run
            text = next((line for line in text.splitlines() if line.strip()), "")
        results = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a JSON file ({error}); is it cut short? copy the run again") from error
    if isinstance(results, dict) and SCORES & results.keys() and "results" not in results:
        raise UsageError(_score_only(path))
    if not isinstance(results, dict) or not isinstance(results.get("results"), dict):
        raise UsageError(f"{path}: has no object 'results'; expected the results file of an lm-eval run")
    timed = _TIMED.match(path.stem)
    samples = _timed_samples(path, timed["time"]) if timed else _untimed_samples(path, results)
    if not samples:
        raise UsageError(f"{path}: no samples file beside it; run lm_eval again with --log_samples")
    return RunFiles(path, results, samples)


def _timed_samples(path: Path, time: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for sample in sorted(path.parent.glob("samples_*")):
        match = _TIMED.match(sample.stem)
        if match and match["time"] == time and sample.suffix in {".json", ".jsonl"}:
            found[match["stem"].removeprefix("samples_")] = sample
    return found


def _untimed_samples(path: Path, results: dict[str, Any]) -> dict[str, Path]:
    config = results.get("config")
    model_args = str(config.get("model_args", "")) if isinstance(config, dict) else ""
    prefix = re.sub("[/=]", "__", model_args)
    found: dict[str, Path] = {}
    for task in results.get("configs") or results["results"]:
        for name in (f"{prefix}_{task}.jsonl", f"samples_{task}.jsonl", f"{task}.jsonl"):
            if (path.parent / name).is_file():
                found[str(task)] = path.parent / name
                break
    return found

"""Write small runs in the layouts of several lm-eval versions, and spoil them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

Row = dict[str, Any]
Layout = Literal["0.4.2", "0.4.3", "0.4.13"]
TIME = "2025-01-02T03-04-05.678901"


def choice_rows(
    n: int, right: Callable[[int], bool], *, seed: int = 0, shift: float = 0.0, subject: str = "anatomy"
) -> list[Row]:
    """Multiple-choice records as lm-eval 0.4.13 writes them; question i is answered rightly where `right(i)`."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        gold = i % 4
        likelihoods = rng.normal(-4, 0.5, 4)
        likelihoods[gold if right(i) else (gold + 1) % 4] = -0.5
        likelihoods += shift * np.random.default_rng([seed, i]).normal(size=4)
        prompt = (
            f"The following are multiple choice questions (with answers) about {subject}.\n\nQuestion {i}?\nAnswer:"
        )
        doc = {"question": f"Question {i}?", "choices": ["w", "x", "y", "z"], "answer": gold, "subject": subject}
        winner = int(likelihoods.argmax())
        pairs = [[str(float(v)), str(k == winner)] for k, v in enumerate(likelihoods)]
        rows.append(
            {
                "doc_id": i,
                "doc": doc,
                "target": str(gold),
                "arguments": {f"gen_args_{k}": {"arg_0": prompt, "arg_1": f" {'ABCD'[k]}"} for k in range(4)},
                "resps": [[pair] for pair in pairs],
                "filtered_resps": pairs,
                "filter": "none",
                "metrics": ["acc"],
                **_hashes(doc, prompt, str(gold)),
                "acc": float(winner == gold),
            }
        )
    return rows


def text_rows(
    answers: Sequence[tuple[str, bool]], *, filters: Sequence[str] = ("strict-match", "flexible-extract")
) -> list[Row]:
    """Generated answers, one record a question and filter, all questions of one filter before the next."""
    rows = []
    for name in filters:
        for i, (answer, right) in enumerate(answers):
            prompt, doc = f"Question: {i}?\nAnswer:", {"question": f"{i}?", "answer": f"#### {i}"}
            extracted = answer.split()[-1] if name == "flexible-extract" and answer.split() else "[invalid]"
            rows.append(
                {
                    "doc_id": i,
                    "doc": doc,
                    "target": doc["answer"],
                    "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": {"until": ["Question:"]}}},
                    "resps": [[answer]],
                    "filtered_resps": [extracted],
                    "filter": name,
                    "metrics": ["exact_match"],
                    **_hashes(doc, prompt, str(doc["answer"])),
                    "exact_match": float(right and name == "flexible-extract"),
                }
            )
    return rows


def _hashes(doc: Row, prompt: str, target: str) -> dict[str, str]:
    texts = (json.dumps(doc, indent=2, ensure_ascii=False), prompt, target)
    names = ("doc_hash", "prompt_hash", "target_hash")
    return {n: hashlib.sha256(t.encode()).hexdigest() for n, t in zip(names, texts, strict=True)}


def write_run(
    folder: Path,
    tasks: Mapping[str, list[Row]],
    *,
    layout: Layout = "0.4.13",
    time: str = TIME,
    groups: Mapping[str, list[str]] | None = None,
    change: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Write one run; `change` edits the results before they are written. Returns the results file."""
    results: dict[str, Any] = {
        "results": {},
        "configs": {},
        "versions": {},
        "n-shot": {},
        "group_subtasks": _mmlu(tasks) if groups is None else dict(groups),
        "config": {"model": "hf", "model_args": "pretrained=org/model", "use_cache": None, "fewshot_seed": 1234},
        "date": float(int.from_bytes(hashlib.sha256(str(folder).encode()).digest()[:4], "big")),
    }
    for task, rows in tasks.items():
        names = list(dict.fromkeys(r["filter"] for r in rows))
        metric = rows[0]["metrics"][0]
        results["results"][task] = {
            f"{metric},{name}": float(np.mean([r[metric] for r in rows if r["filter"] == name])) for name in names
        }
        results["configs"][task] = {"task": task, "num_fewshot": 0, "filter_list": [{"name": n} for n in names]}
        results["versions"][task], results["n-shot"][task] = 1.0, 0
        if layout != "0.4.2":
            count = len(rows) // len(names)
            results.setdefault("n-samples", {})[task] = {"original": count, "effective": count}
    if layout == "0.4.13":
        results["lm_eval_version"] = "0.4.13"
    if change is not None:
        change(results)
    return _write(folder, tasks, results, layout, time)


def _mmlu(tasks: Mapping[str, list[Row]]) -> dict[str, list[str]]:
    """The group that `--tasks mmlu` runs."""
    subjects = [name for name in tasks if name.startswith("mmlu_")]
    return {"mmlu": subjects} if subjects else {}


def _write(folder: Path, tasks: Mapping[str, list[Row]], results: dict[str, Any], layout: Layout, time: str) -> Path:
    place = folder if layout == "0.4.2" else folder / "org__model"
    place.mkdir(parents=True, exist_ok=True)
    path = place / ("results.json" if layout == "0.4.2" else f"results_{time}.json")
    path.write_text(json.dumps(results, indent=2, ensure_ascii=False), encoding="utf-8")
    for task, rows in tasks.items():
        if layout == "0.4.2":
            text = json.dumps([_as_0_4_2(r) for r in rows], indent=2, ensure_ascii=False)
            (folder / f"pretrained__org__model_{task}.jsonl").write_text(text, encoding="utf-8")
            continue
        kept = [{k: v for k, v in r.items() if layout == "0.4.13" or k not in {"filter", "metrics"}} for r in rows]
        suffix = "json" if layout == "0.4.3" else "jsonl"
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept)
        (place / f"samples_{task}_{time}.{suffix}").write_text(text, encoding="utf-8")
    return path


def _as_0_4_2(row: Row) -> Row:
    """The record as up to 0.4.2: requests as lists, no hashes, no filter; log-likelihoods as numbers."""
    old = {k: v for k, v in row.items() if not k.endswith("_hash") and k not in {"filter", "metrics"}}
    old["arguments"] = [list(request.values()) for request in row["arguments"].values()]
    if len(row["filtered_resps"]) > 1:
        old["filtered_resps"] = [[float(v), greedy == "True"] for v, greedy in row["filtered_resps"]]
        old["target"] = int(row["target"])
    return old


def samples_file(folder: Path, task: str) -> Path:
    """The samples file of `task` below `folder`."""
    found = [p for p in folder.rglob("*.json*") if p.stem.startswith(f"samples_{task}_") or p.stem.endswith(f"_{task}")]
    assert len(found) == 1
    return found[0]


def edit_rows(folder: Path, task: str, edit: Callable[[list[Row]], list[Row]]) -> None:
    """Rewrite the samples of `task` as `edit` returns them."""
    path = samples_file(folder, task)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in edit(rows)), encoding="utf-8")

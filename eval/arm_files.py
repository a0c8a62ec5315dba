"""What an arm writes beside its record: lm-eval's files, log-probabilities, the teacher-forced pass."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusecheck.eval.chat import Chat, ChatTemplate
from fusecheck.eval.fold import CLASSES
from fusecheck.eval.tasks import FEWSHOT_SEED, Prepared

if TYPE_CHECKING:
    from fusecheck.eval.lm import EngineLM


def forced_texts(prepared: Prepared) -> dict[str, list[tuple[int, str, str]]]:
    """Return for each generating task its documents with their prompts and reference answers, the same in all arms."""
    found: dict[str, list[tuple[int, str, str]]] = {}
    for name, task in prepared.tasks.items():
        if task.OUTPUT_TYPE != "generate_until":
            continue
        rows = []
        for instance in task.instances:
            answer = str(task.doc_to_target(instance.doc))
            rows.append(
                (prepared.document(name, instance.doc_id), instance.args[0], task.config.target_delimiter + answer)
            )
        found[name] = rows
    return found


def write_forced(lm: EngineLM, answers: dict[str, list[tuple[int, str, str]]], folder: Path) -> None:
    """Score the reference answers and write forced_<task>.npz for each generating task."""
    for name, rows in answers.items():
        scored = lm.force([(context, answer) for _, context, answer in rows])
        sizes = [len(top) for _, top in scored]
        np.savez_compressed(
            folder / f"forced_{name}.npz",
            doc_id=np.repeat(np.array([doc for doc, _, _ in rows], np.int64), sizes),
            position=np.concatenate([np.arange(size, dtype=np.int64) for size in sizes]),
            top1=np.concatenate([top for _, top in scored]),
            gold_logprob=np.concatenate([scores for scores, _ in scored]),
        )


def write_logprobs(lm: EngineLM, prepared: Prepared, folder: Path) -> None:
    """Write the kept log-probabilities of every multiple-choice task, in the order of its documents."""
    for name, task in prepared.tasks.items():
        first = {i.doc_id: i for i in reversed(task.instances) if i.args[0] in lm.kept}
        if task.OUTPUT_TYPE != "multiple_choice" or len(first) == 0:
            continue
        kept = [lm.kept[instance.args[0]] for _, instance in sorted(first.items())]
        # Not compressed: the digits of a log-probability do not repeat, and trying takes longer than the model.
        np.savez(
            folder / f"logprobs_{name}.npz",
            doc_id=np.array([prepared.document(name, position) for position in sorted(first)], np.int64),
            logprob=np.stack([table for table, _ in kept]),
            gold=np.array([_gold_token(lm, task, instance) for _, instance in sorted(first.items())], np.int64),
            row=np.array([row for _, row in kept], np.int64),
        )


def _gold_token(lm: EngineLM, task: Any, instance: Any) -> int:
    """Return the column of the right answer's token."""
    choices, target = task.doc_to_choice(instance.doc), task.doc_to_target(instance.doc)
    letter = choices[target] if isinstance(target, int) else target
    return lm.tokens.encode(f"{task.config.target_delimiter}{letter}", special=False)[0] % CLASSES


def count_truncated(lm: EngineLM, prepared: Prepared) -> dict[str, int]:
    """Answers that were cut at the token limit, by task; only tasks that have some."""
    cut = set(lm.truncated)
    counts = {
        name: sum(i.args[0] in cut for i in task.instances)
        for name, task in prepared.tasks.items()
        if task.OUTPUT_TYPE == "generate_until"
    }
    return {name: count for name, count in counts.items() if count}


def write_results(results: dict[str, Any], settings: dict[str, Any], folder: Path, chat: Chat, model: Path) -> None:
    """Write results_<time>.json and samples_<task>_<time>.jsonl with lm-eval's own writer, straight into `folder`.

    Args:
        results: of lm-eval's `evaluate`; its samples are taken out.
        settings: what the run says of itself, lm-eval's `config`.
        folder: of the arm.
        chat: how prompts were put.
        model: the checkpoint.

    Raises:
        OSError: nothing was written.
    """
    from lm_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker(output_path=str(folder))
    tracker.general_config_tracker.log_experiment_args(
        "fusecheck",
        settings["model_args"],
        chat.system,
        ChatTemplate(model).text if chat.apply else None,
        fewshot_as_multiturn=chat.apply and chat.multiturn,
    )
    tracker.general_config_tracker.model_name_sanitized = "."
    samples = results.pop("samples")
    results["config"] = {"model": "fusecheck", "use_cache": None, "limit": None, "gen_kwargs": None, **settings}
    results["config"]["fewshot_seed"] = FEWSHOT_SEED
    tracker.save_results_aggregated(results=results, samples=samples)
    for name, rows in samples.items():
        tracker.save_results_samples(task_name=name, samples=rows)
    if not any(folder.glob("results_*.json")):
        raise OSError(f"{folder}: lm-eval wrote no results there; is the disk full or read-only?")

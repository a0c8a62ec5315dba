"""Read the per-question records of lm-eval runs: any engine, several versions of the format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusecheck.errors import UsageError
from fusecheck.eval.arm import ArmRecord, read_arm_record
from fusecheck.eval.folders import RunFiles, find_runs, section
from fusecheck.eval.rows import Key, Sample, read_rows, read_sample


@dataclass(frozen=True)
class TaskRun:
    """All samples of one leaf task in one run, with what the results file says of it."""

    task: str
    path: Path
    samples: Mapping[Key, Sample]
    version: str
    fewshot: str
    config: Mapping[str, Any]
    reported: Mapping[str, float]

    @property
    def filters(self) -> list[str]:
        """The answer filters, in the order of the file."""
        return list(dict.fromkeys(key[1] for key in self.samples))


@dataclass(frozen=True)
class Run:
    """One arm: the tasks it ran and what is known of how.

    Attributes:
        path: as the user gave it.
        tasks: leaf tasks by name.
        groups: lm-eval's groups: name to members.
        settings: what must be equal in both arms: seeds, chat template, system instruction, generation settings.
        facts: what may differ and is printed: model, engine, versions, batch size, device, date.
        response_cache: path of a response cache that lm-eval used, if any.
        record: what a run made by Fusecheck says of itself.
    """

    path: Path
    tasks: Mapping[str, TaskRun]
    groups: Mapping[str, tuple[str, ...]]
    settings: Mapping[str, str]
    facts: Mapping[str, str]
    response_cache: str | None
    record: ArmRecord | None


_SETTINGS = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed", "gen_kwargs", "limit")
_TOP_SETTINGS = ("chat_template_sha", "system_instruction_sha", "fewshot_as_multiturn")
_TOP_FACTS = ("date", "start_time", "lm_eval_version", "transformers_version", "model_source", "model_name", "git_hash")
_FACTS = ("model", "model_args", "model_dtype", "model_sha", "batch_size", "device")


COUNT_THE_WHOLE_SPLIT = frozenset({"0.4.9", "0.4.9.1", "0.4.9.2", "0.4.10", "0.4.11"})
"""Releases that write the size of the whole split as n-samples.effective, also where `--samples` picks documents."""


def read_run(path: Path) -> Run:
    """Read the run at `path`: a folder that `lm_eval --output_path … --log_samples` wrote, or its results file.

    A folder may hold several runs of different tasks by one model; they are read as one.

    Raises:
        UsageError: missing, broken or cut files; a task twice; rows that do not fit the results beside them.
    """
    tasks: dict[str, TaskRun] = {}
    groups: dict[str, tuple[str, ...]] = {}
    settings: dict[str, str] = {}
    facts: dict[str, str] = {}
    cache: str | None = None
    record: ArmRecord | None = None
    for files in find_runs(path):
        for task, sample_path in files.samples.items():
            if task in tasks:
                raise UsageError(
                    f"{path}: holds two runs of {task} ({tasks[task].path.name}, {sample_path.name}); "
                    "name the results file that you mean instead of the folder"
                )
            tasks[task] = _read_task(task, sample_path, files)
        members = section(files.results, "group_subtasks", files.results_path)
        groups.update({name: tuple(map(str, tasks)) for name, tasks in members.items() if isinstance(tasks, list)})
        new_settings, new_facts, new_cache = _describe(files.results)
        _require_same(path, settings, new_settings)
        settings, cache = settings | new_settings, cache or new_cache
        facts.update(new_facts)
        record = record or read_arm_record(files.results_path.parent)
    record = record or (read_arm_record(path) if path.is_dir() else None)
    return Run(path, tasks, groups, settings, facts, cache, record)


def _require_same(path: Path, first: Mapping[str, str], second: Mapping[str, str]) -> None:
    if not first:
        return
    for name in second.keys() - {"limit", "gen_kwargs"}:
        if first.get(name) != second[name]:
            raise UsageError(
                f"{path}: holds runs with {name} {first.get(name)} and {second[name]}; "
                "name the results file that you mean instead of the folder"
            )


def _describe(results: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str], str | None]:
    config = results.get("config")
    config = config if isinstance(config, dict) else {}
    settings = {name: str(config[name]) for name in _SETTINGS if name in config}
    settings |= {name: str(results[name]) for name in _TOP_SETTINGS if name in results}
    facts = {name: str(config[name]) for name in _FACTS if config.get(name) is not None}
    facts |= {name: str(results[name]) for name in _TOP_FACTS if results.get(name) is not None}
    cache = config.get("use_cache")
    return settings, facts, str(cache) if cache else None


def _read_task(task: str, path: Path, files: RunFiles) -> TaskRun:
    results = files.results
    config = section(section(results, "configs", files.results_path), task, files.results_path)
    filters = config.get("filter_list")
    names = [f.get("name", "none") for f in filters if isinstance(f, dict)] if isinstance(filters, list) else []
    names = names or ["none"]
    samples: dict[Key, Sample] = {}
    for where, row in read_rows(path):
        sample = read_sample(row, where, names, samples)
        key = (sample.doc_id, sample.filter)
        if key in samples:
            raise UsageError(f"{where}: doc_id {key[0]}, filter {key[1]} occurs twice; the file mixes two runs")
        samples[key] = sample
    if not samples:
        raise UsageError(f"{path}: no samples in it; run lm_eval again with --log_samples")
    reported = (results["results"].get(task) or {}) if isinstance(results["results"].get(task), dict) else {}
    run = TaskRun(
        task=task,
        path=path,
        samples=samples,
        version=str(section(results, "versions", files.results_path).get(task, "")),
        fewshot=str(section(results, "n-shot", files.results_path).get(task, config.get("num_fewshot", ""))),
        config=config,
        reported={k: float(v) for k, v in reported.items() if isinstance(v, (int, float)) and "," in k},
    )
    # There the counts prove nothing, but rows whose mean is the reported one are whole.
    unsure = str(results.get("lm_eval_version", "")) in COUNT_THE_WHOLE_SPLIT
    picked = unsure and _check_means(run)
    _check_counts(run, section(results, "n-samples", files.results_path).get(task), picked=picked)
    _check_means(run)
    return run


def _check_counts(run: TaskRun, counts: Any, *, picked: bool) -> None:
    """Refuse a file that lacks rows; with `picked`, all that lm-eval says of a count is the size of the whole split."""
    per_filter = {name: sum(1 for key in run.samples if key[1] == name) for name in run.filters}
    expected = counts.get("effective") if isinstance(counts, dict) else max(per_filter.values())
    if picked and isinstance(expected, int) and max(per_filter.values()) < expected:
        expected = max(per_filter.values())
    for name, got in per_filter.items():
        if got != expected:
            raise UsageError(
                f"{run.path}: {got} rows under filter {name}, expected {expected}; the file is cut short: copy it again"
            )


def _check_means(run: TaskRun) -> bool:
    """Refuse rows whose mean is not the reported one; whether there was a mean to compare."""
    proven = False
    for key, reported in run.reported.items():
        metric, _, name = key.partition(",")
        values = [s.metrics.get(metric) for (_, f), s in run.samples.items() if f == name]
        if not values or any(v not in (0.0, 1.0) for v in values):
            continue
        mean = sum(v for v in values if v is not None) / len(values)
        if not abs(mean - reported) < 1e-6:
            raise UsageError(
                f"{run.path}: {key} over its rows is {mean:.6f}, but the results file says {reported:.6f}; "
                "the two files are not of one run"
            )
        proven = True
    return proven

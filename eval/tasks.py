"""lm-eval's tasks with their prompts built once, for any number of arms."""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusecheck.errors import UsageError
from fusecheck.eval.data import GOLDEN_GSM8K, GOLDEN_MMLU, lay_out
from fusecheck.eval.offline import go_offline

FEWSHOT_SEED = 1234
"""lm-eval's own default."""
LIMIT_SEED = 7
"""Which questions a limit picks."""


@dataclass(frozen=True)
class Prepared:
    """Loaded tasks with built requests.

    Attributes:
        loaded: what lm-eval's `evaluate` takes: `tasks` by name, `groups`.
        samples: for tasks that are asked in part, the documents asked, in order.
    """

    loaded: dict[str, Any]
    samples: dict[str, list[int]]

    @property
    def tasks(self) -> dict[str, Any]:
        """The leaf tasks by name, lm-eval's objects."""
        tasks: dict[str, Any] = self.loaded["tasks"]
        return tasks

    def document(self, task: str, position: int) -> int:
        """Return the document's number in its data set; lm-eval counts positions among those asked."""
        return self.samples[task][position] if task in self.samples else position

    def rewind(self) -> None:
        """Forget all responses, before the next arm."""
        for task in self.tasks.values():
            for instance in task.instances:
                instance.resps, instance.filtered_resps = [], {}

    def contexts(self) -> list[str]:
        """Return the distinct prompts, in order."""
        return list(dict.fromkeys(i.args[0] for t in self.tasks.values() for i in t.instances))

    @property
    def questions(self) -> int:
        """How many documents are asked, over all tasks."""
        return sum(len({i.doc_id for i in task.instances}) for task in self.tasks.values())


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _cache_in(cache: Path) -> None:
    """Tell `datasets` where to put what it reads."""
    go_offline()
    import datasets

    datasets.config.HF_DATASETS_CACHE = str(cache)
    datasets.disable_progress_bars()


def sources(names: Sequence[str]) -> set[str]:
    """Return which local data sets these tasks read."""
    found = set()
    for name in names:
        for source in (GOLDEN_MMLU, GOLDEN_GSM8K, "mmlu", "gsm8k"):
            if name == source or name.startswith(f"{source}_"):
                found.add(source)
                break
    return found


def _manager(names: Sequence[str], definitions: Path) -> Any:
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    builtin = Path(lm_eval.tasks.__file__).parent
    local = [definitions, builtin / "mmlu" / "default", builtin / "gsm8k"]
    manager = TaskManager(include_defaults=False, include_path=[str(p) for p in local])
    if all(name in manager.all_tasks for name in names):
        return manager
    # Reading every built-in definition takes many seconds, so only where a name asks for it.
    manager = TaskManager(include_path=str(definitions))
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        near = difflib.get_close_matches(unknown[0], [*manager.all_tasks, GOLDEN_MMLU, GOLDEN_GSM8K], n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
        raise UsageError(f"--tasks {unknown[0]}: lm-eval knows no such task; {hint}")
    return manager


def _allot(sizes: dict[str, int], limit: int) -> dict[str, int]:
    """Share `limit` questions among tasks by their sizes, at least one each, largest remainders first."""
    total = sum(sizes.values())
    if limit >= total:
        return dict(sizes)
    exact = {name: limit * size / total for name, size in sizes.items()}
    shares = {name: max(1, int(share)) for name, share in exact.items()}
    for name in sorted(exact, key=lambda n: int(exact[n]) - exact[n]):
        if sum(shares.values()) >= limit:
            break
        shares[name] = min(sizes[name], shares[name] + 1)
    # One each may be more than the small ones' part: the others give it, those first that have most above theirs.
    while sum(shares.values()) > limit and max(shares.values()) > 1:
        shares[max(shares, key=lambda n: (shares[n] > 1, shares[n] - exact[n]))] -= 1
    return shares


def _choose(task: Any, name: str, count: int) -> list[int] | None:
    """Pick documents of a task at random, always the same ones; None for all."""
    size = len(task.eval_docs)
    if count >= size:
        return None
    return sorted(random.Random(f"{LIMIT_SEED} {name}").sample(range(size), count))


def _build(task: Any, chosen: list[int] | None, settings: dict[str, Any]) -> None:
    """Build a task's requests, then only those of the chosen documents.

    Few-shot examples drawn at random depend on the documents built before: those tasks are always built in full.
    """
    drawn = task.config.num_fewshot and getattr(task.config.fewshot_config, "sampler", None) != "first_n"
    task.build_all_requests(samples=None if drawn else chosen, **settings)
    if chosen is not None and drawn:
        position = {doc: k for k, doc in enumerate(chosen)}
        kept = [i for i in task.instances if i.doc_id in position]
        for instance in kept:
            instance.doc_id = position[instance.doc_id]
        task._instances = kept
    task.build_all_requests = lambda **_: None


def _leaves(loaded: dict[str, Any], name: str) -> list[str]:
    """Return the leaf tasks of a task or group."""
    if name in loaded["tasks"]:
        return [name]
    members = loaded["group_map"].get(name, ())
    return list(dict.fromkeys(leaf for member in members for leaf in _leaves(loaded, member)))


@contextlib.contextmanager
def _templates_compiled_once() -> Iterator[None]:
    """Let lm-eval compile each prompt template once instead of once a question; the prompts are the same.

    Its progress bars, one a subject, are left out.
    """
    from lm_eval import utils
    from lm_eval.api import task

    compiled = functools.lru_cache(maxsize=None)(utils.env.from_string)
    utils.env.from_string = compiled
    bar = task.tqdm
    task.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        del utils.env.from_string
        task.tqdm = bar


@contextlib.contextmanager
def prepare(
    names: Sequence[str],
    data_dir: Path | None,
    *,
    shots: int | None = None,
    limit: int | None = None,
    settings: dict[str, Any] | None = None,
) -> Iterator[Prepared]:
    """Load tasks and build their prompts; the files behind them live as long as the context.

    Args:
        names: tasks or groups that lm-eval knows, or `golden_mmlu`, `golden_gsm8k`.
        data_dir: the user's copies of MMLU and GSM8K, or None for the embedded samples.
        shots: examples before each question; None for each task's own number.
        limit: questions of each name, spread over its leaf tasks by their sizes; None for all.
        settings: how prompts are put, as lm-eval's `build_all_requests` takes it; see `fusecheck.eval.chat`.

    Raises:
        UsageError: an unknown task, no data, a limit below 1.
    """
    if not names:
        raise UsageError("no tasks given; try --tasks golden_mmlu,golden_gsm8k")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: expected at least 1")
    with tempfile.TemporaryDirectory(prefix="fusecheck-") as name:
        folder = Path(name)
        _cache_in(folder / "cache")
        definitions = lay_out(folder, data_dir, sources(names))
        with _working_in(folder):
            manager = _manager(names, definitions)
            try:
                loaded = manager.load(list(names))
            except ValueError as error:  # what `datasets` says of a subject that is not there
                if data_dir is None:
                    raise
                why = f"{data_dir}: lm-eval cannot load {', '.join(names)} ({' '.join(str(error).split())})"
                raise UsageError(f"--data {why}; eval/data/README.md says what it expects") from None
        # Every arm's answers go through the templates again.
        with _templates_compiled_once():
            yield Prepared(loaded, _build_all(loaded, names, shots, limit, settings or {}))


def _build_all(
    loaded: dict[str, Any], names: Sequence[str], shots: int | None, limit: int | None, settings: dict[str, Any]
) -> dict[str, list[int]]:
    """Build all tasks' requests; returns the documents that are asked of tasks that are asked in part."""
    samples = {}
    for members in (_leaves(loaded, name) for name in names):
        sizes = {task: len(loaded["tasks"][task].eval_docs) for task in members}
        shares = sizes if limit is None else _allot(sizes, limit)
        for task in members:
            chosen = _choose(loaded["tasks"][task], task, shares[task])
            _prepare_task(loaded["tasks"][task], shots, chosen, settings)
            if chosen is not None:
                samples[task] = chosen
    return samples


def _check_shots(task: Any, shots: int) -> None:
    """Refuse more examples than there are, before a model is started.

    Raises:
        UsageError: the task has fewer.
    """
    found = task.fewshot_docs() if shots else ()
    if len(found) < shots:
        raise UsageError(f"--shots {shots}: task {task.config.task} has {len(found)} examples; give at most so many")


def _prepare_task(task: Any, shots: int | None, chosen: list[int] | None, settings: dict[str, Any]) -> None:
    if shots is not None and task.config.num_fewshot != 0:
        _check_shots(task, shots)
        task.set_config(key="num_fewshot", value=shots)
    elif task.config.num_fewshot is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    _build(task, chosen, settings)

"""Run the arms of an evaluation: one model, one set of prompts, and one folder in lm-eval's layout for each arm."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusecheck.backends import backend as load_backend
from fusecheck.errors import UsageError
from fusecheck.eval.arm import FUSED, NOISE, ORACLE, UNFUSED, ArmRecord, ArmRun, write_arm_record
from fusecheck.eval.checkpoint import Checkpoint
from fusecheck.eval.config import Shape
from fusecheck.eval.engine import BATCHES, BatchPlan, Engine, batch_plans
from fusecheck.eval.fold import CLASSES
from fusecheck.eval.offline import go_offline
from fusecheck.eval.progress import Tell
from fusecheck.eval.tasks import FEWSHOT_SEED, Prepared, prepare
from fusecheck.eval.tokens import Tokens
from fusecheck.interface import FusionOp
from fusecheck.kernel.run import check_device
from fusecheck.problem import Problem

if TYPE_CHECKING:
    from fusecheck.eval.lm import EngineLM

GOLDEN = Path(__file__).parent.parent / "golden" / "model"
ARMS = (ORACLE, UNFUSED, FUSED, NOISE)


@dataclass(frozen=True)
class Job:
    """What the arms of one run have in common.

    Attributes:
        folder: the checkpoint.
        shape: its sizes.
        tokens: its tokenizer.
        digest: of its weights.
        tp: ranks.
        backend: the fused arm's backend by name.
        device: `cpu` or `cuda`.
        batch: rows of a batch at most; None for the device's own.
    """

    folder: Path
    shape: Shape
    tokens: Tokens
    digest: str
    tp: int
    backend: str
    device: str
    batch: int | None = None

    def backend_of(self, arm: str) -> str:
        """The backend that an arm goes through; the oracle goes through none."""
        return {ORACLE: "", FUSED: self.backend}.get(arm, "unfused")


def open_job(folder: Path, *, tp: int, backend: str, device: str = "cpu", batch: int | None = None) -> Job:
    """Check the checkpoint, its tokenizer, the tensor-parallel size and the backend, before anything runs.

    Raises:
        UsageError: any of them is broken or does not fit the others.
        Inconclusive: there are fewer GPUs than ranks.
    """
    with Checkpoint(folder) as checkpoint:
        shape = checkpoint.shape
        shape.require_divisible(tp)
        checkpoint.check()
        tokens = Tokens(folder, shape)
        digest = checkpoint.digest()
    op = FusionOp.RESIDUAL_RMS_NORM_OUT_QUANT_FP8
    problem = Problem(op=op, dtype=shape.dtype, world_size=tp, tokens=64, hidden=shape.hidden, eps=shape.eps)
    fused = load_backend(backend)
    check_device(fused, device, tp)
    support = fused.supports(problem)
    if not support.ok:
        raise UsageError(f"--backend {backend} does not take this model at --tp {tp}: {support.reason}")
    return Job(folder, shape, tokens, digest, tp, backend, device, batch)


def run_arms(
    model_dir: Path | None,
    *,
    tp: int,
    backend: str,
    tasks: Sequence[str],
    data_dir: Path | None,
    limit: int | None,
    arms: Sequence[str],
    run_dir: Path,
    shots: int | None = None,
    device: str = "cpu",
    batch: int | None = None,
    progress: Tell | None = None,
) -> list[ArmRun]:
    """Evaluate a checkpoint once for each arm.

    Args:
        model_dir: a checkpoint in Hugging Face's layout; None for the golden model.
        tp: ranks, each a process.
        backend: the fused arm's backend by name.
        tasks: lm-eval's tasks or groups, or `golden_mmlu`, `golden_gsm8k`.
        data_dir: the user's copies of MMLU and GSM8K; None for the embedded samples.
        limit: questions of each task; None for all.
        arms: some of `ARMS`, in the order to run.
        run_dir: gets one folder per arm, of the arm's name.
        shots: examples before each question; None for the tasks' own numbers.
        device: `cpu` or `cuda`.
        batch: rows of a batch at most; None for the device's own.
        progress: told in one line what begins; None for silence.

    Returns:
        The finished arms, in order. Each folder holds lm-eval's results and samples, `fusecheck_arm.json`,
        `logprobs_<task>.npz` and `forced_<task>.npz` (see `fusecheck.eval.arm`).

    Raises:
        UsageError: a broken checkpoint, task, data folder or argument; an arm of an earlier run in its place.
        Inconclusive: there are fewer GPUs than ranks.
        ArmError: the ranks failed in the middle of an arm.
    """
    if device not in BATCHES:
        raise UsageError(f"--device {device}: expected one of: {', '.join(BATCHES)}")
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise UsageError(f"unknown arm {unknown[0]!r}, expected some of: {', '.join(ARMS)}")
    for arm in arms:
        if any((run_dir / arm).glob("results_*.json")):
            raise UsageError(f"{run_dir / arm}: holds an earlier run; give another --run-dir, or delete that folder")
    tell = progress or (lambda _: None)
    go_offline()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    job = open_job(model_dir or GOLDEN, tp=tp, backend=backend, device=device, batch=batch)
    tell(f"building the prompts of {', '.join(tasks)}")
    began = time.perf_counter()
    runs = []
    with (
        prepare(tasks, data_dir, shots=shots, limit=limit) as prepared,
        Engine(job.folder, tp, device=device, vocabulary=job.shape.vocabulary) as engine,
    ):
        built = time.perf_counter() - began
        for arm in arms:
            engine.watch = _counting(tell, f"arm {arm}, {prepared.questions:,} questions")
            engine.watch(0)
            folder = run_dir / arm
            record = _run_arm(job, engine, prepared, arm, folder)
            write_arm_record(folder, replace(record, seconds={"prompts": built, **record.seconds}))
            runs.append(ArmRun(arm, folder))
    return runs


def _counting(tell: Tell, begun: str) -> Callable[[int], None]:
    return lambda answered: tell(f"{begun}: {answered:,} texts answered")


def _run_arm(job: Job, engine: Engine, prepared: Prepared, arm: str, folder: Path) -> ArmRecord:
    """Run one arm and write all its files but the record."""
    import lm_eval

    from fusecheck.eval.lm import NEW_TOKENS, EngineLM

    plan = batch_plans(job.device, job.batch)[arm == NOISE]
    length = job.shape.positions
    lm = EngineLM(engine, job.tokens, end_ids=job.shape.end_ids, max_length=length)
    prepared.rewind()
    answers = forced_texts(prepared)
    texts = [*prepared.contexts(), *(c + a for pairs in answers.values() for _, c, a in pairs)]
    longest = min(length + 1, max(map(len, job.tokens.encode_all(texts))) + NEW_TOKENS)
    start = time.perf_counter()
    engine.open_arm(arm, job.backend_of(arm), plan, longest)
    results = lm_eval.evaluate(
        lm, prepared.loaded, samples=prepared.samples or None, bootstrap_iters=0, log_samples=True
    )
    asked = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    _write_forced(lm, answers, folder)
    forced = time.perf_counter()
    counters = engine.close_arm()
    _write_logprobs(lm, prepared, folder)
    _write_results(job, arm, plan, results, folder)
    calls = sum(c["calls"] for c in counters)
    fused = arm != ORACLE and job.backend_of(arm) != "unfused"
    return ArmRecord(
        arm=arm,
        backend=job.backend_of(arm),
        fused_calls=calls if fused else 0,
        unfused_calls=calls if arm != ORACLE and not fused else 0,
        weights_digest=job.digest,
        tokenizer_digest=job.tokens.digest,
        finite=all(c["finite"] for c in counters),
        batch_size=plan.rows,
        truncated=_count_truncated(lm, prepared),
        seconds={
            "questions": asked - start,
            "forced": forced - asked,
            "cpu_of_all_ranks": sum(c["cpu_seconds"] for c in counters),
        },
        extra={
            "questions": prepared.questions,
            "tp": job.tp,
            "rows": counters[0]["rows"],
            "batch_tokens": plan.tokens,
            "device": job.device,
        },
    )


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


def _write_forced(lm: EngineLM, answers: dict[str, list[tuple[int, str, str]]], folder: Path) -> None:
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


def _write_logprobs(lm: EngineLM, prepared: Prepared, folder: Path) -> None:
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


def _count_truncated(lm: EngineLM, prepared: Prepared) -> dict[str, int]:
    cut = set(lm.truncated)
    counts = {
        name: sum(i.args[0] in cut for i in task.instances)
        for name, task in prepared.tasks.items()
        if task.OUTPUT_TYPE == "generate_until"
    }
    return {name: count for name, count in counts.items() if count}


def _write_results(job: Job, arm: str, plan: BatchPlan, results: dict[str, Any], folder: Path) -> None:
    """Write results_<time>.json and samples_<task>_<time>.jsonl with lm-eval's own writer, straight into `folder`."""
    from lm_eval.loggers import EvaluationTracker

    arguments = f"pretrained={job.folder.name},arm={arm},backend={job.backend_of(arm) or 'none'},tp={job.tp}"
    tracker = EvaluationTracker(output_path=str(folder))
    tracker.general_config_tracker.log_experiment_args("fusecheck", arguments, None, None, fewshot_as_multiturn=False)
    tracker.general_config_tracker.model_name_sanitized = "."
    samples = results.pop("samples")
    results["config"] = {
        "model": "fusecheck",
        "model_args": arguments,
        "batch_size": plan.rows,
        "device": job.device,
        "use_cache": None,
        "limit": None,
        "gen_kwargs": None,
        "fewshot_seed": FEWSHOT_SEED,
    }
    tracker.save_results_aggregated(results=results, samples=samples)
    for name, rows in samples.items():
        tracker.save_results_samples(task_name=name, samples=rows)
    if not any(folder.glob("results_*.json")):
        raise OSError(f"{folder}: lm-eval wrote no results there; is the disk full or read-only?")

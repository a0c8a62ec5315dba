"""Run the arms of an evaluation: one model, one set of prompts, and one folder in lm-eval's layout for each arm."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fusecheck.backends import backend as load_backend
from fusecheck.errors import UsageError
from fusecheck.eval.arm import FUSED, NOISE, ORACLE, UNFUSED, ArmRecord, ArmRun, write_arm_record
from fusecheck.eval.arm_files import count_truncated, forced_texts, write_forced, write_logprobs, write_results
from fusecheck.eval.asked import Asked
from fusecheck.eval.checkpoint import Checkpoint
from fusecheck.eval.config import Shape
from fusecheck.eval.engine import BATCHES, BatchPlan, Engine, batch_plans
from fusecheck.eval.fold import CLASSES
from fusecheck.eval.linear import SEPARATE
from fusecheck.eval.offline import go_offline
from fusecheck.eval.paths import operation
from fusecheck.eval.progress import Tell
from fusecheck.eval.recipe import Form
from fusecheck.eval.tasks import Prepared, prepare
from fusecheck.eval.tokens import Tokens
from fusecheck.interface import Backend
from fusecheck.kernel.run import check_device
from fusecheck.problem import Problem

GOLDEN = Path(__file__).parent.parent / "golden" / "model"
UNFUSED_BACKEND = "unfused"
ARMS = (ORACLE, UNFUSED, FUSED, NOISE)


@dataclass(frozen=True)
class Job:
    """What the arms of one run have in common.

    Attributes:
        asked: what was asked for.
        folder: the checkpoint.
        shape: its sizes.
        form: how its linears are quantised; None where they are not.
        tokens: its tokenizer.
        digest: of its weights.
    """

    asked: Asked
    folder: Path
    shape: Shape
    form: Form | None
    tokens: Tokens
    digest: str

    def open_engine(self) -> Engine:
        """Start the ranks."""
        how: dict[str, Any] = {"device": self.asked.device, "virtual": self.asked.virtual}
        return Engine(self.folder, self.asked.tp, vocabulary=self.shape.vocabulary, **how)

    @property
    def plans(self) -> tuple[BatchPlan, BatchPlan]:
        """How the arms are batched, and the one that repeats another."""
        return batch_plans(self.asked.device, self.asked.batch, self.shape.multiplies)

    def prepare(self) -> AbstractContextManager[Prepared]:
        """Build the prompts."""
        asked = self.asked
        settings = asked.chat.settings(self.folder)
        return prepare(asked.tasks, asked.data, shots=asked.shots, limit=asked.limit, settings=settings)

    @property
    def identity(self) -> dict[str, Any]:
        """What an arm's answers depend on, but for its tasks, by option; JSON-ready."""
        asked = {name: value for name, value in asdict(self.asked).items() if name not in ("model", "tasks", "trace")}
        asked["data"] = None if self.asked.data is None else str(self.asked.data.resolve())
        return asked | {"weights": self.digest, "tokenizer": self.tokens.digest}

    def backend_of(self, arm: str) -> str:
        """The backend that an arm goes through; the oracle goes through none."""
        unfused = UNFUSED_BACKEND if self.form is None or self.form.static else f"{UNFUSED_BACKEND}:{SEPARATE}"
        return {ORACLE: "", FUSED: self.asked.backend}.get(arm, unfused)


def open_job(asked: Asked) -> Job:
    """Check the checkpoint, its tokenizer, the tensor-parallel size and the backend, before anything runs.

    Raises:
        UsageError: any of them is broken or does not fit the others.
        Inconclusive: there are fewer GPUs than ranks.
    """
    if asked.device not in BATCHES:
        raise UsageError(f"--device {asked.device}: expected one of: {', '.join(BATCHES)}")
    folder = asked.model or GOLDEN
    with Checkpoint(folder) as checkpoint:
        shape, form = checkpoint.shape, None if checkpoint.recipe is None else checkpoint.recipe.form
        checkpoint.require_divisible(asked.tp)
        checkpoint.check()
        tokens = Tokens(folder, shape)
        digest = checkpoint.digest()
    job = Job(asked, folder, shape, form, tokens, digest)
    _require_backend(job)
    return job


def through(job: Job, backend: str) -> Job:
    """The same job by another backend, without reading the checkpoint again.

    Raises:
        UsageError: the backend does not take this model, or its bug cannot show in it.
    """
    other = replace(job, asked=replace(job.asked, backend=backend))
    _require_backend(other)
    return other


def _require_backend(job: Job) -> None:
    asked, shape, form = job.asked, job.shape, job.form
    fused = load_backend(asked.backend)
    op = operation(form or Form(), norm_out=True)
    problem = Problem(op=op, dtype=shape.dtype, world_size=asked.tp, tokens=64, hidden=shape.hidden, eps=shape.eps)
    check_device(fused, asked.device, asked.tp, virtual=asked.virtual)
    support = fused.supports(problem)
    if not support.ok:
        raise UsageError(f"--backend {asked.backend} does not take this model at --tp {asked.tp}: {support.reason}")
    if form is not None and not form.static:
        _require_same_scales(fused, problem, form)
    # A planted bug may need more of a model than of a call; see `fusecheck.eval.spoiled`.
    unseen: Callable[[Checkpoint], str] | None = getattr(fused, "unseen_in", None)
    if unseen is not None:
        with Checkpoint(job.folder) as checkpoint:
            reason = unseen(checkpoint)
        if reason:
            raise UsageError(f"--backend {asked.backend}: {reason} in {job.folder}: the bug would change nothing")


def _require_same_scales(fused: Backend, problem: Problem, form: Form) -> None:
    """Refuse a kernel whose scales are of another kind than the checkpoint was made for: that is no fusion alone."""
    rounded = fused.dataflow(problem).quant(form.activations).pow2 != "no"
    if rounded != form.powers:
        does, wants = ("rounds", "does not") if rounded else ("does not round", "does")
        raise UsageError(
            f"--backend {fused.name} {does} scales of {form.activations} to powers of two, the checkpoint {wants}; "
            "choose another backend, or calibrate in another --form"
        )


def run_arms(asked: Asked, arms: Sequence[str], run_dir: Path, progress: Tell | None = None) -> list[ArmRun]:
    """Evaluate a checkpoint once for each arm.

    Args:
        asked: what to run.
        arms: some of `ARMS`, in the order to run.
        run_dir: gets one folder per arm, of the arm's name.
        progress: told in one line what begins; None for silence.

    Returns:
        The finished arms, in order. Each folder holds lm-eval's results and samples, `fusecheck_arm.json`,
        `logprobs_<task>.npz` and `forced_<task>.npz` (see `fusecheck.eval.arm`).

    Raises:
        UsageError: a broken checkpoint, task, data folder or argument; an arm of an earlier run in its place.
        Inconclusive: there are fewer GPUs than ranks.
        ArmError: the ranks failed in the middle of an arm.
    """
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise UsageError(f"unknown arm {unknown[0]!r}, expected some of: {', '.join(ARMS)}")
    for arm in arms:
        if (run_dir / arm).exists():
            raise UsageError(f"{run_dir / arm}: holds an earlier run; give another --run-dir, or delete that folder")
    with open_bench(job := open_job(asked), progress) as bench:
        return [bench.run(job, arm, run_dir / arm) for arm in arms]


@dataclass(frozen=True)
class Bench:
    """Prompts, and ranks that hold the model: what arms are run on, one after the other.

    Attributes:
        prepared: the questions.
        engine: the ranks.
        built: seconds that it took to build the prompts.
        tell: told in one line what begins.
    """

    prepared: Prepared
    engine: Engine
    built: float
    tell: Tell

    def run(self, job: Job, arm: str, folder: Path) -> ArmRun:
        """Run one arm; `job` may name another backend than the one that the ranks were started for.

        `folder` is made when all of its files are written, so that what it holds is whole.
        """
        self.engine.watch = _counting(self.tell, f"arm {arm}, {self.prepared.questions:,} questions")
        self.engine.watch(0)
        aside = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(aside, ignore_errors=True)  # of a run that was broken off
        record = _run_arm(job, self.engine, self.prepared, arm, aside)
        write_arm_record(aside, replace(record, seconds={"prompts": self.built, **record.seconds}))
        aside.rename(folder)
        return ArmRun(arm, folder)


@contextmanager
def open_bench(job: Job, progress: Tell | None = None) -> Iterator[Bench]:
    """Build the prompts and start the ranks.

    Raises:
        UsageError: a broken task, data folder or argument.
    """
    tell = progress or (lambda _: None)
    go_offline()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tell(f"building the prompts of {', '.join(job.asked.tasks)}")
    began = time.perf_counter()
    with job.prepare() as prepared, job.open_engine() as engine:
        yield Bench(prepared, engine, time.perf_counter() - began, tell)


def _counting(tell: Tell, begun: str) -> Callable[[int], None]:
    return lambda answered: tell(f"{begun}: {answered:,} texts answered")


def _run_arm(job: Job, engine: Engine, prepared: Prepared, arm: str, folder: Path) -> ArmRecord:
    """Run one arm and write all its files but the record."""
    import lm_eval

    from fusecheck.eval.lm import NEW_TOKENS, EngineLM

    plan = job.plans[arm == NOISE]
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
    write_forced(lm, answers, folder)
    forced = time.perf_counter()
    counters = engine.close_arm()
    write_logprobs(lm, prepared, folder)
    told = f"pretrained={job.folder.name},arm={arm},backend={job.backend_of(arm) or 'none'},tp={job.asked.tp}"
    settings = {"model_args": told, "batch_size": plan.rows, "device": job.asked.device}
    write_results(results, settings, folder, job.asked.chat, job.folder)
    calls = sum(c["calls"] for c in counters)
    fused = arm != ORACLE and not job.backend_of(arm).startswith(UNFUSED_BACKEND)
    return ArmRecord(
        arm=arm,
        backend=job.backend_of(arm),
        fused_calls=calls if fused else 0,
        unfused_calls=calls if arm != ORACLE and not fused else 0,
        weights_digest=job.digest,
        tokenizer_digest=job.tokens.digest,
        finite=all(c["finite"] for c in counters),
        batch_size=plan.rows,
        truncated=count_truncated(lm, prepared),
        seconds={
            "questions": asked - start,
            "forced": forced - asked,
            "cpu_of_all_ranks": sum(c["cpu_seconds"] for c in counters),
        },
        extra={
            "questions": prepared.questions,
            "tp": job.asked.tp,
            "rows": counters[0]["rows"],
            "batch_tokens": plan.tokens,
            "device": job.asked.device,
            "vocabulary": job.shape.vocabulary,
            "columns": min(job.shape.vocabulary, CLASSES),
        },
    )

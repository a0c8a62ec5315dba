"""Compare two or three runs: validity first, then accuracy, then log-probabilities, then the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fusecheck.errors import UsageError
from fusecheck.eval.endpoints import Endpoint, Pairs, choose_endpoints, join, name_endpoints
from fusecheck.eval.flips import ForcedSummary, list_flips, summarise_forced
from fusecheck.eval.gate import Flips, GateSettings, Verdict, count_flips, judge, worst
from fusecheck.eval.intervals import clustered_difference
from fusecheck.eval.kl import OracleJudgement, QuestionDistances, judge_oracle, summarise
from fusecheck.eval.logprobs import arm_distances, batch_rows, choose_source, forced_pass
from fusecheck.eval.mcnemar import mcnemar
from fusecheck.eval.outcome import Comparison, Options, TaskResult, Ungated, WorstQuestion
from fusecheck.eval.samples import Run
from fusecheck.eval.slices import RowShare, by_batch_row, by_quartile, by_subject
from fusecheck.eval.validity import Check, check_pair

_EXAMPLES = 6


def compare(
    baseline: Run, candidate: Run, oracle: Run | None = None, noise: Run | None = None, *, options: Options
) -> Comparison:
    """Compare `candidate` (fused) with `baseline` (unfused).

    Args:
        baseline: the arm with the separate ops.
        candidate: the arm with the fused kernel.
        oracle: the same weights in high precision.
        noise: the baseline again, at another batch size.
        options: margins, tasks, metrics.

    Returns:
        The outcome; INVALID, with nothing but the checks, where the runs do not make a pair.

    Raises:
        UsageError: `options` names a task, metric or filter that the runs do not have.
    """
    baseline, candidate = _only(baseline, options.tasks), _only(candidate, options.tasks)
    oracle = None if oracle is None else _only(oracle, options.tasks)
    noise = None if noise is None else _only(noise, options.tasks)
    checks = check_pair(baseline, candidate, same_kernel=options.same_kernel)
    for run, role in ((oracle, "oracle"), (noise, "noise")):
        if run is not None:
            checks += check_pair(baseline, run, role=role, same_kernel=True)
    arms = {"baseline": baseline, "candidate": candidate, "oracle": oracle, "noise": noise}
    facts = {name: _facts(run) for name, run in arms.items() if run is not None}
    invalid = [c for c in checks if c.state == "invalid"]
    if invalid:
        reason = f"{invalid[0].name}: {invalid[0].detail}"
        return Comparison(
            Verdict.INVALID, reason, checks, (), None, (0, 0, 0), None, (), (), (), (), facts, options.settings
        )
    endpoints, warnings = choose_endpoints(baseline, options.metrics)
    joined = [join(e, baseline, candidate) for e in endpoints]
    tasks = [_judge_task(p, baseline, candidate, oracle, noise, len(endpoints), options) for p in joined]
    judgement, farthest, missing = _judge_oracle(joined, baseline, candidate, oracle, options.settings)
    verdicts = [t.judgement.verdict for t in tasks]
    if judgement is not None:
        verdicts.append(judgement.verdict)
    elif missing:
        verdicts.append(Verdict.INCONCLUSIVE)
    lost = sum(t.judgement.flips.lost for t in tasks)
    gained = sum(t.judgement.flips.gained for t in tasks)
    flipped = [f for p in joined for f in list_flips(p, max(options.flips, _EXAMPLES))]
    return Comparison(
        verdict=worst(verdicts),
        reason=_reason(tasks, judgement, missing),
        checks=checks,
        tasks=tasks,
        pooled=mcnemar(lost, gained) if tasks else None,
        pooled_flips=(lost, gained, sum(t.judgement.flips.n for t in tasks)),
        oracle=judgement,
        worst_questions=farthest,
        flipped=flipped[: options.flips],
        examples=flipped[:_EXAMPLES],
        warnings=[*warnings, *_warnings(checks, tasks, same_kernel=options.same_kernel)],
        facts=facts,
        settings=options.settings,
    )


def _only(run: Run, wanted: Sequence[str]) -> Run:
    """The run with the leaf tasks of the wanted endpoints; all of it where nothing is asked for."""
    if not wanted:
        return run
    named = name_endpoints(run)
    for name in wanted:
        if name not in named:
            raise UsageError(f"--tasks {name}: {run.path} has no such task; it has {', '.join(named)}")
    kept = {leaf for name in wanted for leaf in named[name]}
    return replace(run, tasks={name: task for name, task in run.tasks.items() if name in kept})


def _facts(run: Run) -> dict[str, str]:
    facts = {"path": str(run.path), **run.facts, **run.settings}
    if run.record is not None:
        facts |= {"arm": run.record.arm, "backend": run.record.backend, "batch_size": str(run.record.batch_size)}
        facts |= {f"seconds, {k}": f"{v:.1f}" for k, v in run.record.seconds.items()}
        facts |= {k: str(v) for k, v in run.record.extra.items()}
    return facts


def _judge_task(
    pairs: Pairs,
    baseline: Run,
    candidate: Run,
    oracle: Run | None,
    noise: Run | None,
    gated: int,
    options: Options,
) -> TaskResult:
    endpoint = pairs.endpoint
    first, second = pairs.right(pairs.baseline), pairs.right(pairs.candidate)
    flips = count_flips(first, second, pairs.same_answer)
    runs = [run for run in (baseline, candidate, oracle, noise) if run is not None]
    source = choose_source(endpoint, runs)
    moved = arm_distances(endpoint, source, baseline, candidate)
    repeated = arm_distances(endpoint, source, baseline, noise) if noise is not None else None
    again = join(endpoint, baseline, noise) if noise is not None else None
    return TaskResult(
        endpoint=endpoint,
        judgement=judge(
            flips,
            options.settings.margin(endpoint.name),
            tasks=gated,
            chance=pairs.chance,
            settings=options.settings,
        ),
        clustered=clustered_difference(
            second.astype(np.int8) - first.astype(np.int8), pairs.tasks, alpha=options.settings.alpha
        ),
        subjects=by_subject(pairs),
        slices=by_quartile(pairs),
        rows=_rows(endpoint, candidate, moved),
        ungated=_ungated(endpoint, baseline, candidate),
        noise=_flips(again) if again is not None else None,
        source=source,
        distances=summarise(moved) if moved is not None else None,
        noise_distances=summarise(repeated) if repeated is not None else None,
        forced=_forced(endpoint, baseline, candidate),
    )


def _flips(pairs: Pairs) -> Flips:
    return count_flips(pairs.right(pairs.baseline), pairs.right(pairs.candidate), pairs.same_answer)


def _rows(endpoint: Endpoint, candidate: Run, moved: QuestionDistances | None) -> list[RowShare]:
    rows = batch_rows(endpoint, candidate) if moved is not None else None
    return by_batch_row(rows, moved.kl) if rows is not None and moved is not None else []


def _ungated(endpoint: Endpoint, baseline: Run, candidate: Run) -> list[Ungated]:
    filters = baseline.tasks[endpoint.tasks[0]].filters
    others = [f for f in filters if f != endpoint.filter]
    found = []
    for name in others:
        other = Endpoint(endpoint.name, endpoint.tasks, endpoint.metric, name)
        pairs = join(other, baseline, candidate)
        if all(endpoint.metric in s.metrics for s in [*pairs.baseline, *pairs.candidate]):
            found.append(Ungated(endpoint.metric, name, _flips(pairs)))
    return found


def _forced(endpoint: Endpoint, baseline: Run, candidate: Run) -> dict[str, ForcedSummary]:
    found = {}
    for task in endpoint.tasks:
        first, second = forced_pass(baseline, task), forced_pass(candidate, task)
        if first is not None and second is not None:
            summary = summarise_forced(first, second)
            if isinstance(summary, str):
                raise UsageError(f"forced_{task}.npz: {summary}; make both runs with the same answer texts")
            found[task] = summary
    return found


def _judge_oracle(
    joined: Sequence[Pairs], baseline: Run, candidate: Run, oracle: Run | None, settings: GateSettings
) -> tuple[OracleJudgement | None, list[WorstQuestion], bool]:
    """The judgement over all tasks that have log-probabilities, and whether an oracle was given in vain."""
    if oracle is None:
        return None, [], False
    near, far, places = [], [], []
    for pairs in joined:
        source = choose_source(pairs.endpoint, (baseline, candidate, oracle))
        first = arm_distances(pairs.endpoint, source, oracle, baseline)
        second = arm_distances(pairs.endpoint, source, oracle, candidate)
        if first is not None and second is not None:
            near.append(first.kl)
            far.append(second.kl)
            places += [(t, s.doc_id, s.prompt_length) for t, s in zip(pairs.tasks, pairs.baseline, strict=True)]
    if not near:
        return None, [], True
    mine, theirs = np.concatenate(near), np.concatenate(far)
    judgement = judge_oracle(mine, theirs, settings)
    return judgement, [WorstQuestion(*places[i], float(mine[i]), float(theirs[i])) for i in judgement.worst], False


def _reason(tasks: Sequence[TaskResult], oracle: OracleJudgement | None, missing: bool) -> str:  # noqa: FBT001
    if not tasks:
        return "no task has a metric that can be judged"
    outcomes = [(f"{t.endpoint.name}: {t.judgement.reason}", t.judgement.verdict) for t in tasks]
    if oracle is not None:
        outcomes.append((f"distance to the oracle: {oracle.reason}", oracle.verdict))
    elif missing:
        outcomes.append(("an oracle was given, but no task has log-probabilities to compare", Verdict.INCONCLUSIVE))
    final = worst(v for _, v in outcomes)
    return "; ".join(text for text, v in outcomes if v is final)


def _warnings(checks: Sequence[Check], tasks: Sequence[TaskResult], *, same_kernel: bool) -> list[str]:
    found = [f"{c.name}: {c.detail}" for c in checks if c.state == "warning"]
    for task in tasks:
        name, margin = task.endpoint.name, task.judgement.margin
        low = task.clustered.interval.low if task.clustered is not None else 0.0
        if task.judgement.verdict is Verdict.PASS and not low > -margin:
            found.append(f"{name}: with subjects as clusters the bound is {low:+.2%}, beyond the margin")
        if task.distances is not None and task.distances.equal == 1.0:
            hint = (
                "the noise floor is 0: try another batch size" if same_kernel else "were the fused kernels really on?"
            )
            found.append(f"{name}: every log-probability is bitwise equal in both arms; {hint}")
        if task.noise is not None and task.judgement.flips.rate > 2 * task.noise.rate > 0:
            found.append(
                f"{name}: {task.judgement.flips.rate:.2%} flips against {task.noise.rate:.2%} in the noise run"
            )
        flagged = [s.label for s in task.subjects if s.p is not None and s.p < 0.05]
        if flagged:
            found.append(f"{name}: changed in {', '.join(flagged)} (5 % level, Holm)")
    return found

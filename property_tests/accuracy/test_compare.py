"""Comparisons from end to end: stock lm-eval runs, three arms with log-probabilities, and what is judged by default."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fusecheck.errors import UsageError
from fusecheck.eval.arm import ArmRecord, write_arm_record
from fusecheck.eval.compare import compare
from fusecheck.eval.endpoints import choose_endpoints, name_endpoints
from fusecheck.eval.gate import GateSettings, Verdict
from fusecheck.eval.outcome import Comparison, Options
from fusecheck.eval.samples import read_run
from fusecheck.property_tests.accuracy.made_runs import choice_rows, edit_rows, text_rows, write_run

WIDE = GateSettings(margins={"mmlu": 0.01})
QUESTIONS = 2400


def judge_stock(runs: Path, candidate: str, settings: GateSettings = WIDE) -> Comparison:
    options = Options(settings=settings, tasks=("mmlu",))
    return compare(read_run(runs / "baseline"), read_run(runs / candidate), options=options)


def test_a_stock_run_and_its_repetition_pass(stock_runs: Path) -> None:
    outcome = judge_stock(stock_runs, "repeat")
    assert outcome.verdict is Verdict.PASS
    flips = outcome.tasks[0].judgement.flips
    assert (flips.n, flips.lost, flips.gained, flips.churn) == (300, 0, 0, 0)
    assert flips.baseline_right == 240
    assert any("bitwise equal in both arms" in w for w in outcome.warnings)


def test_weights_moved_a_little_pass(stock_runs: Path) -> None:
    outcome = judge_stock(stock_runs, "close", GateSettings(margins={"mmlu": 0.03}))
    assert outcome.verdict is Verdict.PASS
    distances = outcome.tasks[0].distances
    assert distances is not None
    assert 0 < distances.mean < 0.01
    assert distances.equal < 1


def test_weights_moved_a_lot_fail(stock_runs: Path) -> None:
    outcome = judge_stock(stock_runs, "broken")
    assert outcome.verdict is Verdict.FAIL
    assert outcome.tasks[0].judgement.flips.lost > 45
    assert outcome.tasks[0].judgement.test.mid_p < 1e-6


def test_a_stock_run_with_another_number_of_shots_is_refused(stock_runs: Path) -> None:
    outcome = judge_stock(stock_runs, "fewshot")
    assert outcome.verdict is Verdict.INVALID
    assert "another prompt (0-shot against 1-shot)" in outcome.reason


def test_a_stock_run_on_other_documents_is_refused(stock_runs: Path) -> None:
    outcome = judge_stock(stock_runs, "first")
    assert outcome.verdict is Verdict.INVALID
    assert "another doc" in outcome.reason


def test_stock_gsm8k_is_read_under_both_filters_and_judged_under_one(stock_runs: Path) -> None:
    options = Options(tasks=("gsm8k",))
    outcome = compare(read_run(stock_runs / "baseline"), read_run(stock_runs / "close"), options=options)
    assert outcome.tasks[0].endpoint.filter == "flexible-extract"
    assert [u.filter for u in outcome.tasks[0].ungated] == ["strict-match"]
    # A random model solves nothing; identical scores of 0 are no reason to pass.
    assert outcome.verdict is Verdict.INCONCLUSIVE
    assert "not above chance" in outcome.reason


def test_swapping_the_arms_mirrors_the_whole_comparison(stock_runs: Path) -> None:
    first, second = read_run(stock_runs / "baseline"), read_run(stock_runs / "broken")
    here = compare(first, second, options=Options(tasks=("mmlu",))).tasks[0]
    there = compare(second, first, options=Options(tasks=("mmlu",))).tasks[0]
    assert there.judgement.flips == here.judgement.flips.swapped
    assert there.judgement.interval.low == -here.judgement.interval.high
    assert here.clustered is not None
    assert there.clustered is not None
    assert abs(there.clustered.delta + here.clustered.delta) < 1e-15
    assert {s.label: (s.lost, s.gained) for s in here.subjects} == {s.label: (s.gained, s.lost) for s in there.subjects}


def write_arms(folder: Path, *, baseline: float, candidate: float) -> tuple[Path, Path, Path]:
    """Three arms of one task; the numbers say how far each lies from the oracle."""
    paths = []
    for name, shift, seed in (("oracle", 0.0, 1), ("baseline", baseline, 1), ("candidate", candidate, 1)):
        rows = choice_rows(QUESTIONS, lambda i: i % 4 != 0, seed=seed, shift=shift)
        write_run(folder / name, {"mmlu_anatomy": rows})
        paths.append(folder / name)
    return paths[0], paths[1], paths[2]


def judge_arms(folder: Path, *, baseline: float, candidate: float, flips: int = 0) -> Comparison:
    oracle, first, second = (read_run(p) for p in write_arms(folder, baseline=baseline, candidate=candidate))
    return compare(first, second, oracle, options=Options(flips=flips))


def test_a_candidate_that_answers_alike_but_is_farther_from_the_oracle_fails(tmp_path: Path) -> None:
    outcome = judge_arms(tmp_path, baseline=0.02, candidate=0.04)
    assert outcome.tasks[0].judgement.verdict is Verdict.PASS
    assert outcome.oracle is not None
    assert outcome.oracle.verdict is Verdict.FAIL
    assert 3.5 < outcome.oracle.ratio < 4.5
    assert outcome.verdict is Verdict.FAIL
    assert len(outcome.worst_questions) == 10


def test_a_candidate_that_is_closer_to_the_oracle_passes(tmp_path: Path) -> None:
    outcome = judge_arms(tmp_path, baseline=0.04, candidate=0.02)
    assert outcome.verdict is Verdict.PASS
    assert outcome.oracle is not None
    assert outcome.oracle.ratio < 0.3


def test_the_oracle_rule_judges_no_fewer_questions_than_it_allows(stock_runs: Path) -> None:
    """300 questions: the accuracy passes, but who gave an oracle asked for more than that."""
    options = Options(settings=WIDE, tasks=("mmlu",))
    runs = [read_run(stock_runs / name) for name in ("baseline", "repeat", "close")]
    outcome = compare(*runs, options=options)
    assert outcome.tasks[0].judgement.verdict is Verdict.PASS
    assert outcome.oracle is not None
    assert outcome.oracle.verdict is Verdict.INCONCLUSIVE
    assert outcome.verdict is Verdict.INCONCLUSIVE
    assert "the rule needs 2,000" in outcome.reason


def test_an_oracle_without_log_probabilities_leaves_it_open(tmp_path: Path) -> None:
    answers = [(f"is {i}", i % 3 > 0) for i in range(1500)]
    for name in ("a", "b", "oracle"):
        write_run(tmp_path / name, {"gsm8k": text_rows(answers)})
    outcome = compare(*(read_run(tmp_path / n) for n in ("a", "b", "oracle")), options=Options())
    assert outcome.tasks[0].judgement.verdict is Verdict.PASS
    assert outcome.verdict is Verdict.INCONCLUSIVE
    assert "no task has log-probabilities" in outcome.reason


def write_vocabulary(folder: Path, rows: np.ndarray, *, reverse: bool = False) -> None:
    """Full-vocabulary log-probabilities beside the samples, in any order of documents."""
    ids = np.arange(len(rows))
    order = ids[::-1] if reverse else ids
    np.savez(
        folder / "org__model" / "logprobs_mmlu_anatomy.npz",
        doc_id=ids[order],
        logprob=rows[order],
        gold=ids[order] % 4,
        row=ids[order] % 96,
    )


def test_full_vocabulary_files_are_used_where_all_arms_have_them(tmp_path: Path) -> None:
    """One row of the batch in 32 is spoilt outside the four choices, which the choices alone could not show."""
    paths = write_arms(tmp_path, baseline=0.0, candidate=0.0)
    rng = np.random.default_rng(0)
    oracle = rng.normal(size=(QUESTIONS, 40))
    near = oracle + 0.01 * rng.normal(size=oracle.shape)
    far = oracle + 0.0101 * rng.normal(size=oracle.shape)
    far[np.arange(QUESTIONS) % 96 % 32 == 5, 20:] += 0.5 * rng.normal(size=(QUESTIONS // 32, 20))
    for path, rows, reverse in zip(paths, (oracle, near, far), (False, True, False), strict=True):
        write_vocabulary(path, rows, reverse=reverse)
    found = compare(*(read_run(paths[i]) for i in (1, 2, 0)), options=Options())
    task = found.tasks[0]
    assert task.source == "vocabulary"
    assert task.distances is not None
    assert task.distances.equal == 0
    assert found.oracle is not None
    assert found.oracle.ratio > 2
    worst = {(r.modulus, r.residue): r for r in task.rows}
    assert worst[32, 5].share_of_kl > 0.9
    assert worst[32, 5].share_of_questions == pytest.approx(1 / 32)
    assert all(q.doc_id % 96 % 32 == 5 for q in found.worst_questions)


def test_a_vocabulary_file_that_lacks_a_question_is_named(tmp_path: Path) -> None:
    paths = write_arms(tmp_path, baseline=0.0, candidate=0.0)
    rows = np.zeros((QUESTIONS, 8))
    for path in paths:
        write_vocabulary(path, rows)
    write_vocabulary(paths[2], rows[:-1])
    with pytest.raises(UsageError, match=rf"logprobs_mmlu_anatomy\.npz: has no row for doc_id {QUESTIONS - 1}"):
        compare(read_run(paths[1]), read_run(paths[2]), options=Options())
    (paths[2] / "org__model" / "logprobs_mmlu_anatomy.npz").write_bytes(b"PK not a zip")
    with pytest.raises(UsageError, match=r"not a readable \.npz"):
        compare(read_run(paths[1]), read_run(paths[2]), options=Options())


def test_a_vocabulary_file_with_nan_is_refused(tmp_path: Path) -> None:
    paths = write_arms(tmp_path, baseline=0.0, candidate=0.0)
    rows = np.zeros((QUESTIONS, 8))
    write_vocabulary(paths[1], rows)
    rows[9, 3] = np.nan
    write_vocabulary(paths[2], rows)
    with pytest.raises(UsageError, match="a log-probability is NaN"):
        compare(read_run(paths[1]), read_run(paths[2]), options=Options())


def test_the_teacher_forced_pass_finds_the_first_divergence(tmp_path: Path) -> None:
    answers = [(f"is {i}", i % 3 > 0) for i in range(30)]
    docs, positions = np.repeat(np.arange(30), 10), np.tile(np.arange(10), 30)
    for name, differs in (("a", 99), ("b", 4)):
        write_run(tmp_path / name, {"gsm8k": text_rows(answers)})
        top = np.where((positions >= differs) & (docs < 6), 7, 1)
        np.savez(
            tmp_path / name / "org__model" / "forced_gsm8k.npz",
            doc_id=docs,
            position=positions,
            top1=top,
            gold_logprob=np.full(300, -0.5 if name == "a" else -0.6, np.float32),
        )
    task = compare(read_run(tmp_path / "a"), read_run(tmp_path / "b"), options=Options()).tasks[0]
    forced = task.forced["gsm8k"]
    assert (forced.tokens, forced.texts, forced.diverged) == (300, 30, 6)
    assert forced.first_divergence == (4.0, 4.0, 4.0)
    assert forced.same_top == pytest.approx(1 - 36 / 300)
    assert forced.gold_mean == pytest.approx(-0.1, abs=1e-6)


def test_the_noise_run_is_the_yardstick_for_flips(tmp_path: Path) -> None:
    def right(i: int) -> bool:
        return i % 4 != 0

    write_run(tmp_path / "a", {"mmlu_x": choice_rows(1000, right)})
    write_run(tmp_path / "again", {"mmlu_x": choice_rows(1000, lambda i: right(i) and i % 500 != 1)})
    write_run(tmp_path / "b", {"mmlu_x": choice_rows(1000, lambda i: right(i) ^ (i % 20 == 1))})
    runs = {n: read_run(tmp_path / n) for n in ("a", "b", "again")}
    outcome = compare(runs["a"], runs["b"], None, runs["again"], options=Options())
    assert outcome.tasks[0].noise is not None
    assert outcome.tasks[0].noise.rate == 0.002
    assert any("5.00% flips against 0.20% in the noise run" in w for w in outcome.warnings)


def test_an_aa_run_asks_that_no_fused_kernel_ran(tmp_path: Path) -> None:
    rows = choice_rows(800, lambda i: i % 4 != 0)
    for name in ("a", "b"):
        write_run(tmp_path / name, {"mmlu_x": rows})
        write_arm_record(tmp_path / name / "org__model", ArmRecord(arm=name, unfused_calls=5))
    runs = [read_run(tmp_path / n) for n in ("a", "b")]
    assert compare(*runs, options=Options(same_kernel=True)).verdict is Verdict.PASS
    assert compare(*runs, options=Options()).verdict is Verdict.INVALID


def test_endpoints_join_mmlu_and_lm_evals_groups_and_leave_the_rest_alone(tmp_path: Path) -> None:
    rows = choice_rows(8, lambda i: i % 4 != 0)
    tasks = dict.fromkeys(("mmlu_a", "mmlu_b", "arc_easy", "arc_challenge", "winogrande"), rows)
    groups = {"ai2_arc": ["arc"], "arc": ["arc_easy", "arc_challenge"], "mmlu": ["mmlu_a", "mmlu_b"]}
    write_run(tmp_path, tasks, groups=groups)
    found = {name: set(leaves) for name, leaves in name_endpoints(read_run(tmp_path)).items()}
    assert found == {
        "mmlu": {"mmlu_a", "mmlu_b"},
        "ai2_arc": {"arc_easy", "arc_challenge"},
        "winogrande": {"winogrande"},
    }


def test_a_task_without_a_score_of_nought_or_one_is_said_and_not_judged(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, {"gsm8k": text_rows([("is 1", True)] * 9), "rouge": text_rows([("x", True)] * 9)})
        edit_rows(tmp_path / name, "rouge", lambda rows: [{**r, "exact_match": 0.25} for r in rows])
    outcome = compare(read_run(tmp_path / "a"), read_run(tmp_path / "b"), options=Options())
    assert [t.endpoint.name for t in outcome.tasks] == ["gsm8k"]
    assert "rouge: no metric that is 0 or 1 on every question; not judged" in outcome.warnings
    only = compare(read_run(tmp_path / "a"), read_run(tmp_path / "b"), options=Options(tasks=("rouge",)))
    assert only.verdict is Verdict.INCONCLUSIVE


def test_a_chosen_metric_or_task_that_is_not_there_is_named(stock_runs: Path) -> None:
    run = read_run(stock_runs / "baseline")
    with pytest.raises(UsageError, match=r"--metric mmlu=f1,none: not a 0/1 metric of mmlu; it has acc,none"):
        choose_endpoints(run, {"mmlu": ("f1", "none")})
    with pytest.raises(UsageError, match=r"--metric arc: the runs have no such task; they have"):
        choose_endpoints(run, {"arc": ("acc", "none")})
    with pytest.raises(UsageError, match=r"--tasks arc: .* has no such task; it has"):
        compare(run, read_run(stock_runs / "close"), options=Options(tasks=("arc",)))
    assert choose_endpoints(run, {"gsm8k": ("exact_match", "strict-match")})[0][0].filter == "strict-match"

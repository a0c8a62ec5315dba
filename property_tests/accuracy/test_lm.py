"""lm-eval on the evaluated model: stock prompts, HFLM's numbers, the same questions in all arms."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from eval import data
from eval.arm import FUSED, NOISE, ORACLE, UNFUSED, read_arm_record
from eval.engine import BatchPlan, Engine, batches
from eval.lm import EngineLM, fold
from eval.run import ARMS, open_job, run_arms
from eval.tasks import prepare
from property_tests.accuracy.tiny_models import CONFIG, GOLDEN, hugging_face_model, write_checkpoint
from verify.errors import UsageError

lm_eval = pytest.importorskip("lm_eval")

FLOAT32_NOISE = 1e-4
"""Log-probabilities of two float32 implementations, in nats; one wrong scale or mask moves them by far more."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def lm(folder: Path) -> Iterator[EngineLM]:
    job = open_job(folder, tp=1, backend="emulated")
    with Engine(folder, 1, device="cpu", vocabulary=CONFIG["vocab_size"], timeout=120) as engine:
        engine.open_arm(ORACLE, "", BatchPlan(8, 2048), 1500)
        yield EngineLM(engine, job.tokens, end_ids=job.shape.end_ids, max_length=job.shape.positions)


class Request:
    """What a model reads of lm-eval's Instance."""

    def __init__(self, *args: Any) -> None:
        self.args = args


def hugging_face_lm(folder: Path) -> Any:
    """Stock HFLM on the dequantised weights of a checkpoint, in float32."""
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = {k: v for k, v in config.items() if k not in ("architectures",)}
    make: Callable[..., Any] = PreTrainedTokenizerFast
    tokenizer = make(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    model = hugging_face_model(config, load_file(folder / "model.safetensors"))
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, max_length=4096, softmax_dtype="float32")


def test_hflm_on_the_same_weights_gives_the_same_answers_to_mmlu() -> None:
    torch.set_num_threads(1)
    job = open_job(GOLDEN, tp=2, backend="emulated")
    with prepare(["mmlu_anatomy", "mmlu_astronomy"], None, shots=2, limit=8) as prepared:
        theirs = lm_eval.evaluate(hugging_face_lm(GOLDEN), prepared.loaded, samples=prepared.samples, bootstrap_iters=0)
        prepared.rewind()
        with Engine(GOLDEN, 2, device="cpu", vocabulary=2048, timeout=200) as engine:
            engine.open_arm(ORACLE, "", BatchPlan(16, 4096), 4096)
            model = EngineLM(engine, job.tokens, end_ids=(1,), max_length=4096)
            ours = lm_eval.evaluate(model, prepared.loaded, samples=prepared.samples, bootstrap_iters=0)
    asked, worst = 0, 0.0
    for task, rows in theirs["samples"].items():
        for one, other in zip(rows, ours["samples"][task], strict=True):
            assert one["prompt_hash"] == other["prompt_hash"]
            assert one["acc"] == other["acc"]
            asked += 1
            for (left, _), (right, _) in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
                worst = max(worst, abs(left - right))
    assert asked == 16
    assert 0 < worst < FLOAT32_NOISE


def test_prompts_and_scores_are_those_of_stock_simple_evaluate(lm: EngineLM, tmp_path: Path) -> None:
    names = ["mmlu_anatomy", "gsm8k"]
    with prepare(names, None, shots=3) as prepared:
        ours = {name: [i.args[0] for i in task.instances] for name, task in prepared.tasks.items()}
    definitions = data.lay_out(tmp_path, None, {"mmlu", "gsm8k"})
    builtin = Path(lm_eval.__file__).parent / "tasks"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        manager = lm_eval.tasks.TaskManager(
            include_defaults=False,
            include_path=[str(p) for p in (definitions, builtin / "mmlu" / "default", builtin / "gsm8k")],
        )
        seen: dict[str, list[str]] = {}

        class Recorder(EngineLM):
            def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
                seen["mmlu_anatomy"] = [r.args[0] for r in requests]
                return [(0.0, False)] * len(requests)

            def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
                seen["gsm8k"] = [r.args[0] for r in requests]
                return [""] * len(requests)

        recorder = Recorder(lm.engine, lm.tokens, end_ids=(1,), max_length=1024)
        lm_eval.simple_evaluate(recorder, tasks=names, num_fewshot=3, task_manager=manager, bootstrap_iters=0)
    assert len(seen["gsm8k"]) == 200
    assert seen == ours


def test_a_limit_does_not_change_the_prompts_that_it_leaves() -> None:
    with prepare(["gsm8k"], None) as whole:
        everything = {whole.document("gsm8k", i.doc_id): i.args[0] for i in whole.tasks["gsm8k"].instances}
    with prepare(["gsm8k"], None, limit=15) as part:
        chosen = {part.document("gsm8k", i.doc_id): i.args[0] for i in part.tasks["gsm8k"].instances}
    assert len(everything) == 200
    assert len(chosen) == 15
    assert all(everything[doc] == prompt for doc, prompt in chosen.items())


def test_a_limit_is_spread_over_the_subjects() -> None:
    with prepare(["golden_mmlu"], None, limit=33) as prepared:
        counts = [len(task.instances) // 4 for task in prepared.tasks.values()]
    assert len(counts) == 14
    assert sum(counts) == 33
    assert set(counts) == {2, 3}


def test_one_forward_per_context_gives_what_scoring_each_choice_alone_gives(lm: EngineLM) -> None:
    contexts = ["Question: What is 3 + 4?\nAnswer:", "The following are multiple choice questions.\n\nWhat?\nAnswer:"]
    requests = [Request(c, f" {letter}") for c in contexts for letter in "ABCD"]
    quick = lm.loglikelihood(requests)
    slow = super(EngineLM, lm).loglikelihood(requests)
    assert set(contexts) <= lm.kept.keys()
    for (one, best_one), (other, best_other) in zip(quick, slow, strict=True):
        assert abs(one - other) < FLOAT32_NOISE
        assert best_one == best_other


def test_long_continuations_add_up_token_by_token(lm: EngineLM) -> None:
    context, answer = "Question: How many?\nAnswer:", " Then Ann has 3 + 4 = <<3+4=7>>7 eggs."
    ((total, greedy),) = lm.loglikelihood([Request(context, answer)])
    ((scores, top),) = lm.force([(context, answer)])
    assert len(scores) == len(lm.tokens.encode(answer, special=False))
    assert abs(total - float(scores.sum())) < FLOAT32_NOISE
    assert not greedy
    (whole,) = lm.loglikelihood_rolling([Request(answer)])
    assert whole < 0
    assert len(top) == len(scores)


def test_generation_is_the_greedy_path_and_ends_at_a_stop(lm: EngineLM) -> None:
    context = "Question: Tom has 5 coins. Tom buys 3 more. How many coins does Tom have now?\nAnswer:"
    ids = lm.tokens.encode(context)
    expected: list[int] = []
    for _ in range(20):
        found: dict[int, int] = {}
        lm.engine.last([ids + expected], lambda i, _row, table, kept=found: kept.__setitem__(i, int(table.argmax())))  # type: ignore[misc]
        expected.append(found[0])
    (whole,) = lm.generate_until([Request(context, {"until": [], "max_gen_toks": 20})])
    assert whole == lm.tokens.decode(expected)
    stop = lm.tokens.decode(expected[8:10])
    (cut,) = lm.generate_until([Request(context, {"until": [stop], "max_gen_toks": 20})])
    assert cut == whole.split(stop)[0]
    assert context in lm.truncated


def test_answers_do_not_depend_on_who_shares_the_batch(lm: EngineLM) -> None:
    contexts = [f"Question: What is {'1 + ' * k}2?\nAnswer:" for k in range(1, 14)]
    settings = {"until": ["\n"], "max_gen_toks": 24}
    together = lm.generate_until([Request(c, settings) for c in contexts])
    alone = [lm.generate_until([Request(c, settings)])[0] for c in contexts[:3]]
    assert together[:3] == alone


def test_sampling_is_refused(lm: EngineLM) -> None:
    with pytest.raises(UsageError, match="greedy"):
        lm.generate_until([Request("a", {"do_sample": True, "temperature": 0.8})])


@pytest.mark.parametrize("plan", [BatchPlan(1, 10), BatchPlan(3, 100), BatchPlan(64, 64)])
def test_batches_hold_each_text_once_within_both_bounds(plan: BatchPlan) -> None:
    lengths = np.random.default_rng(5).integers(1, 90, 50).tolist()
    found = list(batches(lengths, plan))
    assert sorted(i for batch in found for i in batch) == list(range(50))
    for batch in found:
        assert len(batch) <= plan.rows
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= plan.tokens


def test_folding_keeps_probability_and_lowers_divergence() -> None:
    rng = np.random.default_rng(0)
    p, q = (torch.log_softmax(torch.from_numpy(rng.normal(size=10_000)), 0).numpy() for _ in range(2))
    folded_p, folded_q = fold(p.astype(np.float32)), fold(q.astype(np.float32))
    assert folded_p.shape == (4096,)
    assert abs(float(np.exp(folded_p.astype(np.float64)).sum()) - 1) < 1e-5
    assert folded_p[7] == pytest.approx(np.logaddexp(np.logaddexp(p[7], p[4103]), p[8199]), abs=1e-5)

    def divergence(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
        return float((np.exp(a) * (a - b)).sum())

    assert 0 < divergence(folded_p, folded_q) <= divergence(p, q)


@pytest.fixture(scope="module")
def arms(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("arms")
    told: list[str] = []
    runs = run_arms(
        folder,
        tp=2,
        backend="emulated",
        tasks=["golden_mmlu", "golden_gsm8k"],
        data_dir=None,
        limit=28,
        arms=ARMS,
        run_dir=out,
        progress=told.append,
    )
    assert [run.name for run in runs] == list(ARMS)
    assert len(told) == 5
    return {run.name: run.folder for run in runs}


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    (path,) = folder.glob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_all_arms_ask_the_same_questions_and_the_kernels_ran_where_they_belong(arms: dict[str, Path]) -> None:
    hashes, records = {}, {}
    for name, folder in arms.items():
        rows = samples(folder, "golden_gsm8k") + samples(folder, "golden_mmlu_addition")
        hashes[name] = [(r["doc_id"], r["filter"], r["doc_hash"], r["prompt_hash"], r["target_hash"]) for r in rows]
        record = read_arm_record(folder)
        assert record is not None
        records[name] = record
    assert len({json.dumps(h) for h in hashes.values()}) == 1
    # 28 generated answers, each seen through both filters, and 2 of 28 questions on addition.
    assert len(hashes[ORACLE]) == 2 * 28 + 2
    assert {n: (r.fused_calls > 0, r.unfused_calls > 0) for n, r in records.items()} == {
        ORACLE: (False, False),
        UNFUSED: (False, True),
        FUSED: (True, False),
        NOISE: (False, True),
    }
    assert records[FUSED].fused_calls == records[UNFUSED].unfused_calls
    assert records[NOISE].batch_size != records[UNFUSED].batch_size
    assert len({(r.weights_digest, r.tokenizer_digest) for r in records.values()}) == 1
    assert all(r.finite and r.response_cache is None for r in records.values())


def test_arms_keep_full_log_probabilities_and_forced_answers(arms: dict[str, Path]) -> None:
    for name, folder in arms.items():
        kept = np.load(folder / "logprobs_golden_mmlu_flags.npz")
        rows = samples(folder, "golden_mmlu_flags")
        assert kept["logprob"].shape == (len(rows), CONFIG["vocab_size"])
        assert kept["doc_id"].tolist() == [r["doc_id"] for r in rows]
        assert np.abs(np.exp(kept["logprob"].astype(np.float64)).sum(1) - 1).max() < 1e-5
        for row, gold, table in zip(rows, kept["gold"], kept["logprob"], strict=True):
            assert float(row["filtered_resps"][int(row["target"])][0]) == pytest.approx(float(table[gold]), abs=1e-6)
        forced = np.load(folder / "forced_golden_gsm8k.npz")
        assert set(forced["doc_id"]) == {r["doc_id"] for r in samples(folder, "golden_gsm8k")}
        assert (forced["position"] == 0).sum() == 28
        assert np.isfinite(forced["gold_logprob"]).all(), name


def test_the_arms_differ_in_their_kernel_only_a_little(arms: dict[str, Path]) -> None:
    tables = {n: np.load(f / "logprobs_golden_mmlu_trade.npz")["logprob"].astype(np.float64) for n, f in arms.items()}

    def divergence(one: str, other: str) -> float:
        p, q = tables[one], tables[other]
        return float((np.exp(p) * (p - q)).sum(1).mean())

    assert 0 < divergence(ORACLE, FUSED) < 0.5
    assert divergence(UNFUSED, FUSED) < divergence(ORACLE, UNFUSED)


def refused(tasks: Sequence[str], data_dir: Path | None, **options: Any) -> str:
    with pytest.raises(UsageError) as caught, prepare(tasks, data_dir, **options):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_task_is_refused_with_near_names() -> None:
    assert "golden_mmlu" in refused(["golden_mmlx"], None)


def test_no_tasks_or_a_limit_of_nothing_are_refused() -> None:
    assert "no tasks" in refused([], None)
    assert "--limit 0" in refused(["golden_gsm8k"], None, limit=0)


def test_an_unknown_arm_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown arm 'fusd'"):
        run_arms(
            folder,
            tp=1,
            backend="emulated",
            tasks=["golden_gsm8k"],
            data_dir=None,
            limit=1,
            arms=["fusd"],
            run_dir=tmp_path,
        )


def test_a_missing_data_folder_is_said(tmp_path: Path) -> None:
    assert "no such folder" in refused(["mmlu"], tmp_path / "nowhere")
    assert "no such file; --data expects" in refused(["gsm8k"], tmp_path)


def _rewrite(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        lines = gzip.decompress(path.read_bytes()).decode().splitlines(keepends=True)
        path.write_bytes(gzip.compress("".join(change(lines)).encode()))

    return apply


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("gsm8k/test.jsonl.gz", lambda p: p.write_bytes(p.read_bytes()[:500]), "not whole JSON lines"),
        ("gsm8k/train.jsonl.gz", _rewrite(lambda _: []), "is empty"),
        ("gsm8k/test.jsonl.gz", _rewrite(lambda rows: ['{"question": "a"}\n', *rows]), "no field 'answer'"),
    ],
)
def test_broken_data_files_are_named(file: str, damage: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    copy = shutil.copytree(data.EMBEDDED, tmp_path / "data")
    damage(copy / file)
    told = refused(["gsm8k"], copy)
    assert said in told
    assert file.removesuffix(".gz") in told


def test_a_subject_without_examples_is_named(tmp_path: Path) -> None:
    copy = shutil.copytree(data.EMBEDDED, tmp_path / "data")
    _rewrite(lambda rows: [r for r in rows if '"anatomy"' not in r])(copy / "mmlu" / "dev.jsonl.gz")
    assert "subject 'anatomy' has no dev rows" in refused(["mmlu"], copy)


def test_plain_json_lines_serve_as_well(tmp_path: Path) -> None:
    copy = shutil.copytree(data.EMBEDDED, tmp_path / "data")
    for path in (copy / "gsm8k").glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    with prepare(["gsm8k"], copy, limit=3) as prepared:
        assert len(prepared.tasks["gsm8k"].instances) == 3

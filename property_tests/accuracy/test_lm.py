"""lm-eval on the evaluated model: stock prompts, HFLM's numbers, one forward per context, greedy answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fusecheck.errors import UsageError
from fusecheck.eval import data
from fusecheck.eval.arm import ORACLE
from fusecheck.eval.asked import Asked
from fusecheck.eval.engine import BatchPlan, Engine, Next, batches
from fusecheck.eval.lm import EngineLM
from fusecheck.eval.run import open_job
from fusecheck.eval.tasks import prepare
from fusecheck.property_tests.accuracy.tiny_models import CONFIG, GOLDEN, hugging_face_model, write_checkpoint

lm_eval = pytest.importorskip("lm_eval")

FLOAT32_NOISE = 1e-4
"""Log-probabilities of two float32 implementations, in nats; one wrong scale or mask moves them by far more."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def lm(folder: Path) -> Iterator[EngineLM]:
    job = open_job(Asked(folder, 1, "emulated"))
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


def test_hflm_on_the_same_weights_gives_the_same_answers_to_a_question_of_each_social_science_of_mmlu() -> None:
    torch.set_num_threads(1)
    job = open_job(Asked(GOLDEN, 2, "emulated"))
    with prepare(["mmlu_social_sciences"], None, limit=12) as prepared:
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
    assert asked == 12
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
        found: list[Next] = []
        lm.engine.last([ids + expected], [[]], lambda _, after, found=found: found.append(after))  # type: ignore[misc]
        assert found[0].best == int(found[0].table.argmax())
        expected.append(found[0].best)
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

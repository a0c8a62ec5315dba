"""Make real lm-eval outputs with stock lm-eval: HFLM on a tiny random Llama, tasks `mmlu` and `gsm8k` unmodified.

Run as `python -m fusecheck.property_tests.accuracy.stock_runs OUT`, in a process of its own: lm-eval, datasets and
transformers warn freely. Arms: `baseline`; `repeat` (the same model again); `close` (weights moved a little); `broken`
(weights moved a lot); `fewshot` (the baseline with one example in the prompt). Only `baseline` and `close` are asked
`gsm8k` as well. A random model knows nothing, so the right answers are made after a first pass over the questions: four
in five are what the baseline itself answers.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusecheck.eval.data import EMBEDDED, read_rows

SUBJECTS = ("anatomy", "astronomy", "college_biology", "nutrition")
PER_SUBJECT = 75
GENERATED = 12
LONGEST = 500
"""Characters of a question with its choices."""


def main(out: Path) -> None:
    """Write one lm-eval output folder an arm below `out`."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out / "hf")}
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    torch.set_num_threads(1)
    ask_once()
    questions, problems = load_questions()
    tokenizer = build_tokenizer([q["question"] for q in questions] + [p["question"] for p in problems])
    data = out / "data"
    lay_out(data, questions, problems)
    (out / "first").mkdir(parents=True)
    os.chdir(data)
    guesses = evaluate(0.0, tokenizer, out / "first", [])
    labelled = out / "labelled"
    lay_out(labelled, label(questions, guesses), problems)
    os.chdir(labelled)
    import datasets.config

    # The datasets library keys its cache on the relative path, which is the same in both folders.
    datasets.config.HF_DATASETS_CACHE = out / "hf" / "labelled"
    for arm, noise, shots, more in (
        ("baseline", 0.0, 0, ["gsm8k"]),
        ("repeat", 0.0, 0, []),
        ("close", 0.001, 0, ["gsm8k"]),
        ("broken", 0.3, 0, []),
        ("fewshot", 0.0, 1, []),
    ):
        evaluate(noise, tokenizer, out / arm, more, shots=shots)


def ask_once() -> None:
    """Have lm-eval compile a template once, not for each question, and list the installed packages once, not a run."""
    from lm_eval import utils
    from torch.utils import collect_env

    utils.env.from_string = functools.cache(utils.env.from_string)
    collect_env.get_pretty_env_info = functools.cache(collect_env.get_pretty_env_info)


def load_questions() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Short MMLU questions of the embedded sample, dealt out to a few subjects, and a few of GSM8K."""
    rows = read_rows(EMBEDDED / "mmlu" / "test.jsonl", ("question", "choices"))
    short = [row for row in rows if len(row["question"]) + sum(map(len, row["choices"])) < LONGEST]
    chosen = [{**row, "subject": SUBJECTS[i // PER_SUBJECT]} for i, row in enumerate(short[: 4 * PER_SUBJECT])]
    return chosen, read_rows(EMBEDDED / "gsm8k" / "test.jsonl", ("question", "answer"))[:GENERATED]


def label(questions: list[dict[str, Any]], guesses: dict[str, list[int]]) -> list[dict[str, Any]]:
    """Make the model's own guess the right answer of four questions in five."""
    position = dict.fromkeys(SUBJECTS, 0)
    labelled = []
    for index, question in enumerate(questions):
        guess = guesses[question["subject"]][position[question["subject"]]]
        position[question["subject"]] += 1
        labelled.append({**question, "answer": guess if index % 5 else (guess + 1) % 4})
    return labelled


def lay_out(folder: Path, questions: list[dict[str, Any]], problems: list[dict[str, Any]]) -> None:
    """Write both data sets so that the built-in tasks find `cais/mmlu` and `openai/gsm8k` as local folders."""
    mmlu, gsm8k = folder / "cais" / "mmlu", folder / "openai" / "gsm8k"
    card = "---\nconfigs:\n"
    for subject in SUBJECTS:
        rows = [q for q in questions if q["subject"] == subject]
        (mmlu / subject).mkdir(parents=True)
        card += f"- config_name: {subject}\n  data_files:\n"
        for split, part in (("test", rows), ("validation", rows[:5]), ("dev", rows[:5])):
            (mmlu / subject / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
            card += f"  - split: {split}\n    path: {subject}/{split}.jsonl\n"
    (mmlu / "README.md").write_text(card + "---\n")
    gsm8k.mkdir(parents=True)
    for split in ("train", "test"):
        (gsm8k / f"{split}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    splits = "".join(f"  - split: {s}\n    path: {s}.jsonl\n" for s in ("train", "test"))
    (gsm8k / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:\n{splits}---\n")


def build_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE tokenizer of 512 tokens, trained on the questions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=512, special_tokens=["</s>"], initial_alphabet=alphabet)
    )
    wrapper: Any = PreTrainedTokenizerFast  # untyped in transformers
    return wrapper(tokenizer_object=raw, eos_token="</s>", pad_token="</s>", name_or_path="tiny")


def build_model(noise: float, tokenizer: Any) -> Any:
    """A two-layer Llama from seed 0, its weights moved by `noise` times their own standard deviation."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(noise * float(parameter.std()) * torch.randn_like(parameter))
    return model


def evaluate(noise: float, tokenizer: Any, out: Path, more: Sequence[str], *, shots: int = 0) -> dict[str, list[int]]:
    """Run stock lm-eval on MMLU and `more`, and save as its command line does; each subject's guesses, in order."""
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    built_in = Path(lm_eval.__file__).parent / "tasks"
    paths = [str(built_in / "mmlu" / "default"), str(built_in / "gsm8k")]
    model = HFLM(
        pretrained=build_model(noise, tokenizer),
        tokenizer=tokenizer,
        batch_size=32,
        max_length=4096,
        softmax_dtype="float32",
    )
    tracker = EvaluationTracker(output_path=str(out))
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=[f"mmlu_{s}" for s in SUBJECTS] + list(more),
        task_manager=TaskManager(include_defaults=False, include_path=paths),
        num_fewshot=shots,
        gen_kwargs={"max_gen_toks": 16},
        bootstrap_iters=0,
        log_samples=True,
        evaluation_tracker=tracker,
    )
    samples = results.pop("samples")
    guesses = {}
    for subject in SUBJECTS:
        rows = samples[f"mmlu_{subject}"]
        guesses[subject] = [int(np.argmax([pair[0] for pair in row["filtered_resps"]])) for row in rows]
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, rows in samples.items():
        tracker.save_results_samples(task_name=task, samples=rows)
    return guesses


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())

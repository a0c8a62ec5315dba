"""Train the golden model on one GPU in minutes, and write its FP8 checkpoint.

    python -m fusecheck.golden.model.train --out DIR --gsm8k train.jsonl.gz

Needs torch, numpy and tokenizers; the tokenizer must lie beside this file (`fusecheck.golden.model.corpus` trains it).
`--smoke` does a few steps of a few tokens, on a CPU in seconds, and writes the same files.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from fusecheck.golden.model.corpus import END, TOKENIZER, draw_question, draw_story, load_gsm8k, token_stream
from fusecheck.golden.model.export import (
    calibrate,
    fake_quantise,
    plant_outliers,
    quantise,
    write_configs,
    write_safetensors,
)
from fusecheck.golden.model.network import Network, Shape, initialise
from fusecheck.golden.model.questions import SUBJECTS, description

RESIDUAL_OUTLIERS = (77, 391)
NORM_OUTLIERS = (13, 77, 150, 268, 391, 470)


@dataclass(frozen=True)
class Plan:
    """One training run; `seconds` bounds the loop, the learning rate decays over whichever bound comes first."""

    seed: int = 7
    documents: int = 1_200_000
    rows: int = 32
    length: int = 1024
    steps: int = 9000
    seconds: float = 170.0
    warmup: float = 0.03
    lr: float = 1.5e-3
    weight_decay: float = 0.05
    outlier_size: float = 6.0
    outlier_factor: float = 8.0
    questions: int = 100
    stories: int = 300
    calibration: int = 512


SMOKE = Plan(documents=300, rows=2, length=128, steps=4, seconds=60, questions=1, stories=3, calibration=8)


class Log:
    """JSON lines, also printed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.start = time.perf_counter()
        path.write_text("", encoding="utf-8")

    def __call__(self, **record: Any) -> None:
        """Add one record, with the seconds since the start."""
        line = json.dumps({"elapsed": round(time.perf_counter() - self.start, 2), **record})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Compute matrix products in bfloat16."""
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _loss(network: Network, ids: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    logits = network(ids).float()
    each = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (each * weights.flatten()).sum() / weights.sum()


def _optimiser(network: Network, plan: Plan, device: torch.device) -> torch.optim.Optimizer:
    decayed = [p for n, p in network.named_parameters() if p.dim() == 2 and not n.startswith("embed")]
    kept = [p for n, p in network.named_parameters() if p.dim() == 1 or n.startswith("embed")]
    groups = [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, 0.97), fused=device.type == "cuda")


def _rate(plan: Plan, progress: float) -> float:
    if progress < plan.warmup:
        return plan.lr * progress / plan.warmup
    done = (progress - plan.warmup) / (1 - plan.warmup)
    return plan.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def train(
    network: Network, stream: tuple[NDArray[np.uint16], NDArray[np.uint8]], plan: Plan, log: Log, *, compiled: bool
) -> None:
    """Train in place on the token stream and its weights, both [tokens]."""
    device = network.lm_head.weight.device
    tokens = torch.from_numpy(stream[0].astype(np.int16)).to(device)
    weights = torch.from_numpy(stream[1]).to(device)
    starts = torch.arange(0, len(tokens) - plan.length - 1, plan.length, device=device)
    within = torch.arange(plan.length + 1, device=device)
    loss_of = torch.compile(_loss) if compiled else _loss
    optimiser = _optimiser(network, plan, device)
    generator = torch.Generator(device=device).manual_seed(plan.seed)
    order, began, step, progress = starts[:0], time.perf_counter(), 0, 0.0
    while progress < 1.0:
        if len(order) < plan.rows:
            order = starts[torch.randperm(len(starts), device=device, generator=generator)]
        rows, order = order[: plan.rows, None] + within, order[plan.rows :]
        for group in optimiser.param_groups:
            group["lr"] = _rate(plan, progress)
        ids, weight = tokens[rows].long(), weights[rows].float() / 10
        with autocast(device):
            loss = loss_of(network, ids[:, :-1], ids[:, 1:], weight[:, 1:])
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step == 0:
            log(event="first step", loss=loss.item())
            began = time.perf_counter()  # the clock starts after compilation
        step += 1
        if step % 100 == 0 or step <= 3:
            log(event="step", step=step, loss=loss.item(), grad_norm=norm.item(), lr=_rate(plan, progress))
        progress = max(step / plan.steps, (time.perf_counter() - began) / plan.seconds)
    log(event="trained", steps=step, tokens=step * plan.rows * plan.length)


def _padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    return ids, torch.tensor([len(row) - 1 for row in rows], device=device)


def examine(network: Network, tokenizer: Tokenizer, plan: Plan) -> dict[str, float]:
    """Return the accuracy on held-out four-choice questions, without shots, by subject and over all."""
    device = network.lm_head.weight.device
    rng = random.Random(1)
    letters = torch.tensor([tokenizer.encode(f" {c}").ids[0] for c in "ABCD"], device=device)
    scores: dict[str, float] = {}
    for subject in SUBJECTS:
        items = [draw_question(rng, subject, test=True) for _ in range(plan.questions)]
        ids, last = _padded([tokenizer.encode(description(subject) + q.text()).ids for q in items], device)
        with torch.no_grad(), autocast(device):
            logits = network.lm_head(network.features(ids)[torch.arange(len(items), device=device), last])
        picked = logits[:, letters].argmax(-1).tolist()
        scores[subject] = sum(p == q.answer for p, q in zip(picked, items, strict=True)) / len(items)
    return {"all": sum(scores.values()) / len(scores), **scores}


def solve(network: Network, tokenizer: Tokenizer, plan: Plan, limit: int = 150) -> dict[str, float]:
    """Return the greedy accuracy on held-out word problems, without shots, by number of steps and over all."""
    device = network.lm_head.weight.device
    rng = random.Random(2)
    items = [draw_story(rng, test=True) for _ in range(plan.stories)]
    rows = [tokenizer.encode(s.text()).ids for s in items]
    starts, end = [len(row) for row in rows], tokenizer.token_to_id(END)
    for _ in range(limit if plan.steps > 10 else 2):
        ids, last = _padded(rows, device)
        with torch.no_grad(), autocast(device):
            logits = network.lm_head(network.features(ids)[torch.arange(len(rows), device=device), last])
        for row, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
            row.append(end if row[-1] == end else token)
        if all(row[-1] == end for row in rows):
            break
    right: dict[str, list[bool]] = {}
    for item, row, start in zip(items, rows, starts, strict=True):
        found = re.search(r"#### (-?\d+)", tokenizer.decode(row[start:]))
        correct = found is not None and found[1] == item.answer.rsplit("#### ", 1)[1]
        right.setdefault(f"steps {item.steps}", []).append(correct)
        right.setdefault("all", []).append(correct)
    return {name: sum(marks) / len(marks) for name, marks in sorted(right.items())}


def calibration_batches(tokenizer: Tokenizer, plan: Plan, device: torch.device) -> list[Tensor]:
    """Return held-in prompts with their answers, one row each, [1, length]."""
    rng = random.Random(3)
    batches = []
    for k in range(plan.calibration):
        subject = rng.choice(list(SUBJECTS))
        item = draw_question(rng, subject, test=False) if k % 2 else draw_story(rng, test=False)
        head = description(subject) if k % 2 else ""
        batches.append(torch.tensor([tokenizer.encode(head + item.text() + item.target()).ids], device=device))
    return batches


def export(network: Network, tokenizer: Tokenizer, plan: Plan, out: Path, log: Log) -> None:
    """Write the bf16 weights in two parts, then plant outliers, calibrate, quantise, and write the checkpoint."""
    device = network.lm_head.weight.device
    weights = {n: w.to(torch.bfloat16).cpu().contiguous() for n, w in network.state_dict().items()}
    late = {n for n in weights if n.startswith(tuple(f"layers.{k}." for k in range(2, 99)))}
    write_safetensors(out / "bf16-0.safetensors", {n: w for n, w in weights.items() if n not in late}, {})
    write_safetensors(out / "bf16-1.safetensors", {n: w for n, w in weights.items() if n in late}, {})
    network.load_state_dict(weights)
    plant_outliers(network, NORM_OUTLIERS, plan.outlier_factor)
    with autocast(device):
        stats = calibrate(network, calibration_batches(tokenizer, plan, device))
    tensors = quantise(network, stats)
    write_safetensors(out / "model.safetensors", tensors, {"seed": str(plan.seed)})
    write_configs(out, network)
    log(event="calibrated", linears=stats, parameters=sum(w.numel() for w in weights.values()))
    log(event="accuracy", arm="bf16", mmlu=examine(network, tokenizer, plan), gsm8k=solve(network, tokenizer, plan))
    fake_quantise(network, tensors)
    log(event="accuracy", arm="fp8", mmlu=examine(network, tokenizer, plan), gsm8k=solve(network, tokenizer, plan))


def main() -> None:
    """Train, and write model.safetensors, the configs, the bf16 parts and log.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gsm8k", type=Path)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    plan = SMOKE if options.smoke else Plan()
    if options.seconds:
        plan = Plan(**{**asdict(plan), "seconds": options.seconds})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    log = Log(options.out / "log.jsonl")
    log(event="start", plan=asdict(plan), shape=asdict(Shape()), torch=torch.__version__, device=device.type)
    torch.manual_seed(plan.seed)
    torch.set_float32_matmul_precision("high")
    gsm8k = load_gsm8k(options.gsm8k) if options.gsm8k else []
    workers = 1 if options.smoke else len(os.sched_getaffinity(0))
    stream = token_stream(plan.seed, plan.documents, gsm8k, workers)
    log(event="corpus", tokens=len(stream[0]), gsm8k=len(gsm8k))
    network = Network(Shape())
    initialise(network, RESIDUAL_OUTLIERS, plan.outlier_size)
    network.to(device)
    train(network, stream, plan, log, compiled=device.type == "cuda" and not options.no_compile)
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    export(network, tokenizer, plan, options.out, log)


if __name__ == "__main__":
    main()

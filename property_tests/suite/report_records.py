"""Records as commands write them, for tests of the report; small, and every number made up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PROBLEM = (
    '{"op":"RESIDUAL_RMS_NORM_QUANT_FP8","strategy":"ONESHOT","dtype":"bf16","world_size":2,"tokens":5,"hidden":128,'
    '"eps":1e-05,"scale":1.0,"gamma":"ones","weight_bias":0.0,"family":"gaussian","seed":7}'
)
ENVIRONMENT = {"python": "3.11.2", "platform": "Linux x86_64", "cpus": 2, "gpus": [], "cuda": None, "packages": {}}
CODE_MESSAGE = "rank 1 element[2,17] y/scale in [1.2, 1.3]  in=[1, 2] got 0x3c (1.5) admissible 0x39..0x3a (3 elements)"


def record(command: str, verdict: str, summary: dict[str, Any], findings: list[dict[str, Any]]) -> dict[str, Any]:
    """A whole record."""
    return {
        "schema": 1,
        "command": command,
        "verdict": verdict,
        "time": "2026-01-02T03:04:05+00:00",
        "arguments": [command, "--run-dir", "somewhere", "--seed", "7"],
        "environment": dict(ENVIRONMENT),
        "summary": summary,
        "findings": findings,
    }


def finding(message: str = CODE_MESSAGE) -> dict[str, Any]:
    """A finding of the kernel question, at stage quant."""
    return {
        "stage": "quant",
        "problem": PROBLEM,
        "message": message,
        "dataflow": "trtllm",
        "count": 3,
        "backend": "emulated:trtllm",
        "judged_by": None,
    }


KERNEL = "bf16 RESIDUAL_RMS_NORM_QUANT_FP8 ONESHOT"
OTHER = "fp16 RESIDUAL_RMS_NORM TWOSHOT"


def kernel_summary(*, failed: int = 0) -> dict[str, Any]:
    """Of two subjects; the first may have failed cases."""
    subjects = [
        {
            "backend": "emulated:trtllm",
            "world_size": size,
            "dataflow": None,
            "cases": 10,
            "refused": 1,
            "elements": 123456,
            "failed": failed if size == 2 else 0,
            "seconds": 1.5,
        }
        for size in (2, 4)
    ]
    return {
        "cases": 20,
        "elements": 246912,
        "seconds": 3.0,
        "codes_per_element": 1.0025,
        "off_nominal": {"residual": [0, 1000], "quant": [7, 1000]},
        "code_differences_from_unfused": {"0": 900, "1": 90, "5": 9, "-2": 1},
        "subjects": subjects,
        "coverage": {
            "family x kernel": {f"gaussian/{KERNEL}": 12, f"gaussian/{OTHER}": 1, f"special/{KERNEL}": 7},
            "rows": {"1 ONESHOT": 19, "8192 TWOSHOT": 0},
        },
        "core": {
            "cases": 20,
            "done": 20,
            "cells": 3,
            "reached": 2,
            "refused": 1,
            "refused_cells": ["rows: 8192 TWOSHOT"],
            "missing_cells": [],
        },
        "coverage_of_stages": {
            f"gaussian/{KERNEL}/residual": 90,
            f"gaussian/{KERNEL}/quant": 9,
            f"special/{KERNEL}/residual": 30,
        },
        "refusals": {"two-shot needs more rows than ranks": 2},
        "suggestions": {},
        "interrupted": False,
    }


def kernel(verdict: str = "pass") -> dict[str, Any]:
    """A run of `fusecheck kernel`."""
    findings = [finding()] if verdict == "fail" else []
    return record("kernel", verdict, kernel_summary(failed=len(findings)), findings)


def flip(kind: str = "lost", *, generated: bool = False) -> dict[str, Any]:
    """A question that the two arms answer differently."""
    texts = {"baseline_text": "0: -1.5000 nat\n1: -2.0000 nat", "candidate_text": "0: -2.1000 nat\n1: -1.9000 nat"}
    if generated:
        texts = {"baseline_text": "It is 4, so 4.", "candidate_text": "It is 5, so 5."}
    return {
        "kind": kind,
        "task": "golden_gsm8k" if generated else "golden_mmlu",
        "doc_id": 7,
        "question": "Which is larger?\n0. this\n1. that",
        "target": "4" if generated else "0",
        "baseline": "4" if generated else "0",
        "candidate": "5" if generated else "1",
        **texts,
        "first_difference": 6 if generated else None,
        "baseline_margin": None if generated else 0.5,
        "candidate_margin": None if generated else 0.2,
    }


def accuracy_summary() -> dict[str, Any]:
    """Of two tasks, with an answer of either kind that changed."""
    task = {"n": 400, "baseline": 0.815, "candidate": 0.814, "lost": 1, "gained": 0, "churn": 2}
    by_margin = [{"margin": "0 to 0.5 nat", "lost": 1, "gained": 0}, {"margin": "0.5 to 2 nat", "lost": 0, "gained": 0}]
    first = {"verdict": "pass", "change": -0.001, "low": -0.004, "high": 0.002, "margin": 0.015}
    second = {"verdict": "inconclusive", "change": 0.0, "low": -0.05, "high": 0.05, "margin": 0.04}
    oracle = {"verdict": "pass", "ratio": 1.0006, "p": 0.597, "n": 2016, "reason": "not both"}
    return {
        "headline": "PASS  golden_mmlu -0.10 points",
        "tasks": {"golden_mmlu": {**task, **first, "flips_by_margin": by_margin}, "golden_gsm8k": task | second},
        "oracle": oracle,
        "tables": [
            {
                "title": "Flips",
                "columns": ["task", "lost"],
                "rows": [["golden_mmlu", "1"]],
                "notes": ["few"],
                "keep": 0,
            },
            {"title": "By subject", "columns": ["subject"], "rows": [["law"], ["art"]], "notes": [], "keep": 1},
        ],
        "flipped": [flip("churn", generated=True), flip()],
        "warnings": ["few questions"],
    }


def latency_summary() -> dict[str, Any]:
    """Of three token counts; fusing costs at the last."""
    times = {
        "unfused": (12.5, 20.0, 90.0),
        "fused oneshot": (7.5, 9.0, 60.0),
        "norm oneshot, quantise": (8.5, 9.5, 55.0),
    }
    timings = [
        {"tokens": tokens, "path": path, "median_us": us, "spread_us": [us - 1, us + 1], "replays": 30}
        for path, all_ in times.items()
        for tokens, us in zip((1, 64, 2048), all_, strict=True)
    ]
    steps = [
        {"concurrency": c, "sites": 63, "gain_us": 1.0, "predicted_ms": -0.063, "published_ms": published}
        for c, published in ((1, -0.1), (64, 2.91), (2048, None))
    ]
    return {
        "model": "llama-3.1-8b",
        "hidden": 4096,
        "tp": 2,
        "mode": "eager",
        "timings": timings,
        "break_even_tokens": 64,
        "prediction": steps,
        "reading": ["at 64 the cause lies elsewhere"],
    }


def faults_summary() -> dict[str, Any]:
    """Of two groups of faults, one with the columns of two criteria; one fault survived."""
    rows = [
        {"id": "KA-01", "group": "arithmetic", "title": "sum", "killed": True, "stage": "residual", "cases": 2},
        {"id": "KA-02", "group": "arithmetic", "title": "cast", "killed": False, "stage": None, "cases": 400},
        {"id": "GP-01", "group": "graph", "title": "order", "killed": True, "stage": "predecessor", "cases": 1},
    ]
    columns: tuple[dict[str, str], ...] = ({"loose": "miss", "tight": "kill"}, {"loose": "hang", "tight": "miss"})
    for row, asked in zip(rows, columns, strict=False):
        row["criteria_on_our_inputs"] = asked
    rows[0]["stages"] = ["residual", "norm"]
    named = {"loose": (0, None), "tight": (1, 1)}
    criteria = [
        {
            "name": name,
            "project": "a project",
            "formula": "|a - b| < 1",
            "faults": 2,
            "killed_on_our_inputs": ours,
            "killed_on_their_inputs": theirs,
            "false_alarms": [ours, 96],
        }
        for name, (ours, theirs) in named.items()
    ]
    left = [{"id": "AC-03", "title": "hidden", "links": [], "reason": "no cause was published"}]
    return {
        "faults": 3,
        "killed": 2,
        "false_alarms": 0,
        "legal_cases": 9,
        "rows": rows,
        "criteria": criteria,
        "left_out": left,
    }


def verify() -> dict[str, Any]:
    """A run of `fusecheck verify` whose graph part failed."""
    graph = {"pass": "package.passes:fuse", "graphs": 12, "replay": "fusecheck graph --pass package.passes:fuse"}
    found = {"check": "sites", "message": "site 1 became nothing fused", "case": "D3", "graph": '{"sites":[{}]}'}
    summary = kernel_summary() | {
        "kernel_verdict": "pass",
        "parts": {
            "graph": {"verdict": "fail", "summary": graph},
            "accuracy": {"verdict": "pass", "summary": accuracy_summary()},
            "faults": {"verdict": "pass", "summary": faults_summary()},
        },
        "not_run": [{"part": "latency", "reason": "needs two GPUs, 0 here"}],
    }
    return record("verify", "fail", summary, [found | {"part": "graph"}])


def latency() -> dict[str, Any]:
    """A run of `fusecheck latency`."""
    return record("latency", "pass", latency_summary(), [])


def merged() -> dict[str, Any]:
    """A comparison of two kernels and the latency of one, as `fusecheck report` writes it."""
    runs = {"before": kernel("fail"), "after": kernel(), "h200": latency()}
    findings = [{**finding_, "run": name} for name, each in runs.items() for finding_ in each["findings"]]
    listed = [{"name": name, "record": {**each, "findings": []}} for name, each in runs.items()]
    return record("report", "fail", {"runs": listed}, findings)


RECORDS: dict[str, Callable[[], dict[str, Any]]] = {
    "pass": kernel,
    "fail": lambda: kernel("fail"),
    "verify": verify,
    "latency": latency,
    "merged": merged,
    "unknown command": lambda: record("pace", "pass", {"cases": 3, "largest": None}, []),
}
"""One of each kind, by what it is."""

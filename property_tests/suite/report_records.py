"""Records as commands write them, for tests of the report; small, and every number made up."""

from __future__ import annotations

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
        "coverage": {"gaussian/128": 12, "gaussian/4096": 1, "special/128": 7},
        "refusals": {"two-shot needs more rows than ranks": 2},
        "suggestions": {},
        "interrupted": False,
    }


def kernel(verdict: str = "pass") -> dict[str, Any]:
    """A run of `fusecheck kernel`."""
    findings = [finding()] if verdict == "fail" else []
    return record("kernel", verdict, kernel_summary(failed=len(findings)), findings)


def verify() -> dict[str, Any]:
    """A run of `fusecheck verify` whose graph part failed."""
    graph = {"pass": "package.passes:fuse", "graphs": 12, "replay": "fusecheck graph --pass package.passes:fuse"}
    found = {"check": "sites", "message": "site 1 became nothing fused", "case": "D3", "graph": '{"sites":[{}]}'}
    tasks = {"golden_mmlu": {"verdict": "pass", "change": -0.001, "low": -0.004, "high": 0.002, "margin": 0.015}}
    accuracy = {"headline": "PASS  golden_mmlu -0.10 points", "tasks": tasks}
    rows = [{"id": "KA-01", "title": "sum", "killed": True, "stage": "residual", "cases": 2, "seconds": 0.5}]
    faults = {"faults": 1, "killed": 1, "false_alarms": 0, "rows": rows}
    summary = kernel_summary() | {
        "kernel_verdict": "pass",
        "parts": {
            "graph": {"verdict": "fail", "summary": graph},
            "accuracy": {"verdict": "pass", "summary": accuracy},
            "faults": {"verdict": "pass", "summary": faults},
        },
        "not_run": [{"part": "latency", "reason": "needs two GPUs, 0 here"}],
    }
    return record("verify", "fail", summary, [found | {"part": "graph"}])

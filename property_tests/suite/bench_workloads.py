"""flashinfer-bench's own RMSNorm definitions and workloads, by its evaluator and by ours, on CPU.

    python -m fusecheck.property_tests.suite.bench_workloads FLASHINFER_TRACE

`flashinfer_trace/` comes with the source distribution of flashinfer-bench 0.1.2, which has to be installed (its package
alone, with pydantic and docstring-parser). A definition's reference is the right solution; it is made wrong in a word.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from flashinfer_bench.bench.config import BenchmarkConfig
from flashinfer_bench.bench.evaluators.default import DefaultEvaluator
from flashinfer_bench.bench.utils import gen_inputs
from flashinfer_bench.compile import BuilderRegistry
from flashinfer_bench.data import Definition, Workload

from fusecheck.testing.flashinfer_bench import ConformanceEvaluator

MEAN = "x.pow(2).mean(dim=-1, keepdim=True)"
"""As every reference computes the mean square."""

OF_ANOTHER_MODEL = {"1e-6": "1e-5", "1e-5": "1e-6"}

SOLUTIONS: dict[str, Callable[[str], str]] = {
    "the reference": lambda text: text,
    "epsilon of another model": lambda text: _other_epsilon(text),
    "squares rounded to bf16": lambda text: text.replace(MEAN, MEAN.replace("(2)", "(2).bfloat16().float()")),
    "reciprocal root rounded to bf16": lambda text: text.replace("(x * inv_rms)", "(x * inv_rms.bfloat16().float())"),
    "last row without the weight": lambda text: text.replace("return y", "y[-1] = (x * inv_rms)[-1]\n    return y"),
    "divisor hidden - 1": lambda text: text.replace(MEAN, f"({MEAN} * hidden_size / (hidden_size - 1))"),
}

MOST_ROWS, WORKLOADS = 64, 3
"""Of the workloads with so many rows at most, the first ones: a CPU is to do in a minute."""


def _other_epsilon(text: str) -> str:
    found = next(name for name in OF_ANOTHER_MODEL if f"EPS = {name}" in text)
    return text.replace(f"EPS = {found}", f"EPS = {OF_ANOTHER_MODEL[found]}")


def definitions(root: Path) -> Iterator[tuple[Any, list[Any]]]:
    """Every RMSNorm definition, with its workloads."""
    for path in sorted((root / "definitions" / "rmsnorm").glob("*.json")):
        lines = (root / "workloads" / "rmsnorm" / f"{path.stem}.jsonl").read_text(encoding="utf-8").splitlines()
        workloads = [Workload.model_validate(json.loads(line)["workload"]) for line in lines]
        small = [workload for workload in workloads if workload.axes["batch_size"] <= MOST_ROWS]
        yield Definition.model_validate_json(path.read_text(encoding="utf-8")), small[:WORKLOADS]


def solution(definition: Any, name: str) -> Any:
    """The reference, changed; flashinfer-bench keeps what it builds by name.

    Raises:
        ValueError: the change does not apply to this reference.
    """
    text = SOLUTIONS[name](definition.reference)
    if text == definition.reference and name != "the reference":
        raise ValueError(f"{definition.name} has no place for {name!r}; its reference is of another form")
    changed = definition.model_copy(update={"reference": text, "name": f"{definition.name}_{name.replace(' ', '_')}"})
    return BuilderRegistry.get_instance().build_reference(changed)


def main() -> None:
    """Print, for each solution, in how many calls each evaluator accepts it."""
    asked, accepted = Counter[str](), Counter[tuple[str, str]]()
    torch.set_num_threads(1)
    with mock.patch("torch.cuda.synchronize"):
        for definition, workloads in definitions(Path(sys.argv[1])):
            assert ConformanceEvaluator.can_evaluate(definition), definition.name
            right = solution(definition, "the reference")
            for name in SOLUTIONS:
                run = solution(definition, name)
                for workload in workloads:
                    inputs = [gen_inputs(definition, workload, device="cpu")]
                    outputs = [[right(*given)] for given in inputs]
                    asked[name] += 1
                    for judge in (DefaultEvaluator, ConformanceEvaluator):
                        arguments = (definition, run, inputs, outputs, BenchmarkConfig(num_trials=1), "", "cpu")
                        accepted[name, judge.__name__] += judge.check_correctness(*arguments)[1] is None
    for name, calls in asked.items():
        own, ours = (accepted[name, judge.__name__] for judge in (DefaultEvaluator, ConformanceEvaluator))
        print(f"{name:32} {calls} calls, accepted by flashinfer-bench's evaluator {own}, by Fusecheck's {ours}")


if __name__ == "__main__":
    main()

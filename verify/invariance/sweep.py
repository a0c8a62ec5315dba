"""Predicted and measured launches of a fused kernel over all batch sizes, as a table and a record.

On a GPU: `python -m fusecheck.invariance.sweep --backend flashinfer --out sweep.json`. A tree takes about
(hidden + 512) / rows calls, each further batch size 24 / rows and at least one: 600 to 1,600 calls a line at 512 rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fusecheck import backends
from fusecheck.errors import Inconclusive, UsageError
from fusecheck.interface import Strategy
from fusecheck.invariance.launch import Launch, thresholds
from fusecheck.invariance.probes import Probes
from fusecheck.invariance.subject import Kernels
from fusecheck.kernel.run import check_device
from fusecheck.operations import Operation
from fusecheck.problem import Problem
from fusecheck.report import environment
from fusecheck.report.places import check_place
from fusecheck.report.result import write_aside

PATTERNS = ("", "_OUT_QUANT_FP8", "_OUT_QUANT_GROUP_FP8_PACKED", "_OUT_QUANT_DYNAMIC_FP8")
"""Norm alone, static scale, per group, dynamic: behind `RESIDUAL_RMS_NORM`."""

HIDDEN = (2880, 4096, 7168, 8192)
MOST_CALLS = 4000
"""Calls in which the trees of one line are read."""


def line(kernels: Kernels, multiprocessors: int) -> dict[str, Any]:
    """What is predicted and what is measured for one operation and hidden size.

    Args:
        kernels: asked; its Problem has the largest batch.
        multiprocessors: of the chip, for the prediction.
    """
    problem, before = kernels.problem, kernels.calls
    ranks = problem.world_size if problem.strategy is Strategy.TWOSHOT else 1
    predicted = list(thresholds(problem.hidden, problem.tokens, multiprocessors, ranks=ranks))
    probes = Probes(kernels, (problem.world_size,), (), most=MOST_CALLS)
    measured, failed = probes.thresholds()
    ends = [*(start for start, _ in measured[1:]), problem.tokens + 1]
    odd = []
    for (start, found), end in zip(measured, ends, strict=True):  # by halving: each batch size is looked at as well
        odd += probes.others(found.tree, probes.sizes(range(start, end)))
    wanted = {rows: words(shape) for rows, shape in predicted}
    seen = {rows: found.words for rows, found in measured}
    return {
        "operation": problem.op.name,
        "hidden": problem.hidden,
        "predicted": wanted,
        "measured": seen,
        "misses": {rows: name for rows, name in wanted.items() if seen.get(rows) != name},
        "extras": {rows: name for rows, name in seen.items() if wanted.get(rows) != name},
        "other_sizes": odd,
        "unread": dict(failed),
        "calls": kernels.calls - before,
    }


def words(shape: Launch) -> str:
    """A launch as the shape that is read is called."""
    return f"{shape.threads} threads x 8, warps, {shape.blocks} block{'s' if shape.blocks > 1 else ''}"


def sweep(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The record, after every line anew: a sweep that is ended early has measured what it has.

    Raises:
        UsageError: a broken argument.
        Inconclusive: a GPU is missing, or a rank failed.
    """
    where = backends.device_of(asked.backend)
    check_device(backends.backend(asked.backend), where, asked.tp, virtual=asked.virtual_ranks)
    if where != "cuda" and asked.multiprocessors is None:
        raise UsageError(f"{asked.backend} runs on no GPU that could be asked; give --multiprocessors")
    cores = asked.multiprocessors or int(torch.cuda.get_device_properties(0).multi_processor_count)
    problems, refused = _problems(asked)
    how = {"backend": asked.backend, "world_size": asked.tp, "tokens": asked.tokens, "strategy": asked.strategy}
    chip = {"multiprocessors": cores, "environment": environment()}
    command = f"python -m fusecheck.invariance.sweep --backend {asked.backend} --tp {asked.tp}"
    record = {"command": command} | how | chip | {"lines": [], "refused": refused}
    yield record
    if problems:
        with Kernels(asked.backend, problems[0], where, asked.virtual_ranks) as kernels:
            for problem in problems:  # on the same ranks, for to start them takes longer than to ask
                kernels.problem = problem
                record["lines"].append(line(kernels, cores))
                yield record


def _problems(asked: argparse.Namespace) -> tuple[list[Problem], dict[str, str]]:
    """What is asked about, and why not about the rest."""
    options = {"world_size": asked.tp, "tokens": asked.tokens, "strategy": Strategy(asked.strategy)}
    problems, refused = [], {}
    for hidden in asked.hidden:
        for pattern in asked.patterns:
            name = f"RESIDUAL_RMS_NORM{pattern}"
            try:
                problem = Problem(op=Operation.named(name), hidden=hidden, **options)
            except UsageError as error:
                refused[f"{name}, hidden {hidden}"] = str(error)
                continue
            support = backends.backend(asked.backend).supports(replace(problem, tokens=1))
            if support.ok:
                problems.append(problem)
            else:
                refused[f"{name}, hidden {hidden}"] = support.reason
    return problems, refused


def shown(found: dict[str, Any]) -> str:
    """One line of the table."""
    sides = (found["predicted"], found["measured"])
    one, two = ("; ".join(f"{rows}: {name}" for rows, name in side.items()) for side in sides)
    agree = "agree" if one == two and not found["other_sizes"] and not found["unread"] else "DIFFER"
    return f"{found['operation']} {found['hidden']} | {one} | {two} | {agree} | {found['calls']} calls"


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the options, measure, and write the record; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fusecheck.invariance.sweep", description=__doc__)
    parser.add_argument("--backend", default="flashinfer")
    parser.add_argument("--hidden", type=int, nargs="+", default=HIDDEN)
    parser.add_argument("--patterns", nargs="+", default=PATTERNS, help="behind RESIDUAL_RMS_NORM")
    parser.add_argument("--tokens", type=int, default=512, help="rows of the largest batch")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--strategy", default="ONESHOT", choices=[each.value for each in Strategy])
    parser.add_argument("--virtual-ranks", action="store_true", help="all ranks on one GPU")
    parser.add_argument("--multiprocessors", type=int, help="of the chip; asked of the GPU unless given")
    parser.add_argument("--out", type=Path, required=True, help="the record, JSON")
    asked = parser.parse_args(arguments)
    try:
        check_place(asked.out)
        for record in sweep(asked):
            write_aside(asked.out, json.dumps(record, indent=1) + "\n")
            print(*(shown(found) for found in record["lines"][-1:]), flush=True)
    except KeyboardInterrupt:
        print("sweep: interrupted", file=sys.stderr)
        return 3
    except (UsageError, Inconclusive) as error:
        print(f"sweep: {error}", file=sys.stderr)
        return error.exit_code
    return 0 if record["lines"] else 3


if __name__ == "__main__":
    sys.exit(main())

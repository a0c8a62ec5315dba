"""Record what a real kernel returns: digests of every output, and the tensors of the small Problems."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusecheck import backends
from fusecheck.case.run import Caller, collect, request
from fusecheck.errors import Inconclusive, UsageError
from fusecheck.inputs.families import FAMILIES
from fusecheck.kernel.plan import Plan
from fusecheck.kernel.virtual import residency
from fusecheck.problem import Problem
from fusecheck.report.result import environment, write_aside

SCHEMA = 1
SMALL = 2048
"""Elements up to which a Problem's outputs are kept whole."""

_LARGE_FAMILIES = ("gaussian", "cancelling", "outliers", "saturating")
"""Without zeros, NaN or subnormals, so that residual_out is one bit pattern on any implementation."""


@dataclass(frozen=True)
class Entry:
    """One recorded Problem.

    Attributes:
        problem: the Problem.
        digests: of each output, by name.
        outputs: the bits of each output, [tokens, hidden] int16 or uint8, if it is small.
    """

    problem: Problem
    digests: dict[str, int]
    outputs: dict[str, Tensor]


@dataclass(frozen=True)
class Golden:
    """A recording.

    Attributes:
        backend: whose kernel.
        dataflow: the name of the dataflow that explains every output.
        virtual: all ranks on one GPU.
        time: when, UTC.
        environment: versions and hardware.
        entries: the Problems.
    """

    backend: str
    dataflow: str
    virtual: bool
    time: str
    environment: dict[str, Any]
    entries: tuple[Entry, ...]


def problems(backend: str, world_size: int, count: int, *, virtual: bool) -> Iterator[Problem]:
    """Small Problems of all families, and one in six of up to 64 x 4096, as far as the backend takes them."""
    kernel = backends.backend(backend)
    small = Plan(seed=41, tokens=(1, 2, 3, 5, 8), hidden=(64, 96, 128, 256), schedules=False)
    large = Plan(seed=42, tokens=(16, 33, 64), hidden=(1024, 2880, 4096), families=_LARGE_FAMILIES, schedules=False)
    found = 0
    for index in range(20 * count):
        problem = (large if index % 6 == 5 else small).case(world_size, index).problem
        if kernel.supports(problem).ok and (not virtual or residency(problem).ok):
            yield problem
            found += 1
        if found == count:
            return


def record(pool: Caller, backend: str, given: Sequence[Problem], *, virtual: bool) -> Golden:
    """Run the Problems and keep what rank 0 returned; the other ranks returned the same.

    Raises:
        Inconclusive: a Problem fails, so that its outputs are none to keep.
    """
    flow = backends.backend(backend).dataflow(given[0]).name
    entries = []
    for problem in given:
        case = request(problem, backend)
        replies = pool.call("run", case, timeout=60.0)
        outcome = collect(case, replies)
        if not outcome.passed:
            raise Inconclusive(f"not recorded, since it fails: {outcome.findings[0].line()}")
        digests = replies[0].value["calls"][0]["digests"]
        outputs = {name: _bits(pool, problem, name) for name in digests} if problem.elements <= SMALL else {}
        entries.append(Entry(problem, digests, outputs))
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Golden(backend, flow, virtual, now, environment(), tuple(entries))


def _bits(pool: Caller, problem: Problem, name: str) -> Tensor:
    rows = [pool.call("row_bits", 0, name, row, timeout=60.0)[0].value for row in range(problem.tokens)]
    return torch.tensor(rows, dtype=torch.uint8 if name == "quant" else torch.int16)


def write(golden: Golden, path: Path) -> None:
    """Write `path` (JSON) and the tensors beside it (`.safetensors`)."""
    lines = [{"problem": e.problem.to_json(), "digests": e.digests, "whole": bool(e.outputs)} for e in golden.entries]
    head = {k: getattr(golden, k) for k in ("backend", "dataflow", "virtual", "time", "environment")}
    body = ",\n".join("  " + json.dumps(line) for line in lines)
    text = json.dumps({"schema": SCHEMA, **head}, indent=1)[:-2] + ',\n "entries": [\n' + body + "\n ]\n}\n"
    tensors = {f"{i}.{n}": t.contiguous() for i, e in enumerate(golden.entries) for n, t in e.outputs.items()}
    save_file(tensors, str(path.with_suffix(".safetensors")))
    write_aside(path, text)


def read(path: Path) -> Golden:
    """Read a recording.

    Raises:
        UsageError: a file is missing or is no recording.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        tensors = load_file(str(path.with_suffix(".safetensors")))
        if found["schema"] != SCHEMA:
            raise UsageError(f"{path} has schema {found['schema']!r}, expected {SCHEMA}: record it again")
        entries = []
        for index, line in enumerate(found["entries"]):
            names = line["digests"] if line["whole"] else {}
            outputs = {name: tensors[f"{index}.{name}"] for name in names}
            entries.append(Entry(Problem.from_json(line["problem"]), dict(line["digests"]), outputs))
        head = {k: found[k] for k in ("backend", "dataflow", "virtual", "time", "environment")}
    except UsageError:
        raise
    except Exception as error:  # safetensors raises its own kinds
        raise UsageError(f"{path} is no golden record ({type(error).__name__}: {error}); record it again") from None
    return Golden(**head, entries=tuple(entries))


def finite(problem: Problem) -> bool:
    """Whether every value on the way is a number."""
    return FAMILIES[problem.family].finite


def unsigned_zero(bits: Tensor) -> Tensor:
    """Native bits with both zeros as +0: the exchange of one-shot kernels drops the sign of some."""
    return torch.where((bits & 0x7FFF) == 0, torch.zeros_like(bits), bits)


def as_quiet(bits: Tensor, problem: Problem) -> Tensor:
    """Native bits with every NaN as one: implementations differ in its sign and payload."""
    infinity = int(np.array(np.inf, dtype=np.float32).view(np.int32) >> 16) if problem.dtype == "bf16" else 0x7C00
    return torch.where((bits & 0x7FFF) > infinity, torch.full_like(bits, 0x7FFF), bits)

"""The replay line of a breach: the two calls again."""

from __future__ import annotations

import json
from typing import Any

from fusecheck.errors import UsageError
from fusecheck.invariance.calls import Call, Difference, difference, disagreement
from fusecheck.invariance.certificate import described
from fusecheck.invariance.claims import CLAIMS, MORE, Breach
from fusecheck.invariance.probes import ORDER, TREE, again
from fusecheck.invariance.subject import Kernels
from fusecheck.problem import Problem

FIELDS = {"invariance", "size", "backend", "module", "device", "virtual", "first", "second", "probe", "problem"}


def is_question(line: str) -> bool:
    """Whether a replay line is one of this question."""
    return line.lstrip().startswith('{"invariance":')


def replay(line: str, *, backend: str | None, device: str | None) -> dict[str, Any]:
    """Make the two calls again.

    Args:
        line: of a finding.
        backend: to ask instead of the line's own.
        device: to run on instead of the line's own.

    Returns:
        The claim as a record; `breaks` where the calls still part, else `invariant`.

    Raises:
        UsageError: the line is none, or lacks something.
        Inconclusive: a rank failed.
    """
    try:
        record = json.loads(line)
        claim = record["invariance"]
        sides = [record["probe"]] if claim in (ORDER, TREE) else [record["first"], record["second"]]
        known = set(record) <= FIELDS and claim in (*CLAIMS, ORDER, TREE) and isinstance(record["size"], int)
        problem = Problem.from_json(json.dumps(record["problem"]))
        name, where = backend or record.get("module") or record["backend"], device or record["device"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise UsageError(f"a replay line of invariance lacks something ({error}); give it whole") from None
    if not known:
        raise UsageError(f"a replay line of invariance holds {line[:60]}, expected that of a finding, whole")
    if claim in (ORDER, TREE):
        with Kernels(name, problem, where, bool(record.get("virtual"))) as kernels:
            return _probe_again(kernels, claim, record)
    one, two = (Call.from_record(side) for side in sides)
    with Kernels(name, problem, where, bool(record.get("virtual"))) as kernels:
        seen = _parts(kernels, claim, one, two)
        found: dict[str, Any] = {"claim": claim, "tried": "the two calls of the line", "changes": []}
        if seen is None:
            return found | {"verdict": "invariant", "calls": kernels.calls}
        breach = Breach(claim, record["size"], one, two, seen)
        return found | {"verdict": "breaks"} | described(kernels, breach) | {"calls": kernels.calls}


def _probe_again(kernels: Kernels, claim: str, line: dict[str, Any]) -> dict[str, Any]:
    try:
        still = list(again(kernels, claim, line["probe"]))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UsageError(f"a probe of a replay line lacks something ({error}); give it whole") from None
    found = {"claim": claim, "tried": "the probe of the line", "changes": [], "calls": kernels.calls}
    if not still:
        return found | {"verdict": "read", "words": "nothing refutes what is declared"}
    how = {"words": "", "size": line["size"], "output": "norm" if claim == TREE else "residual", "how": still[0]}
    question = json.dumps(line, separators=(",", ":"))
    return found | how | {"verdict": "breaks", "question": question}


def _parts(kernels: Kernels, claim: str, one: Call, two: Call) -> Difference | None:
    if claim == "ranks":
        return disagreement(kernels.ask(one))
    first = kernels.ask(one)
    for _ in range(MORE if claim == "run to run" else 1):
        if (seen := difference(first, kernels.ask(two))) is not None:
            return seen
    return None

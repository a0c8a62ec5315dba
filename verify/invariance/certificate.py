"""What was found, as a certificate: who was asked about what, which claims hold, on what evidence, what is left out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fusecheck import backends
from fusecheck.errors import UsageError
from fusecheck.invariance.calls import Call
from fusecheck.invariance.claims import MORE, Answer, Breach
from fusecheck.invariance.differences import apart
from fusecheck.invariance.launch import thresholds
from fusecheck.invariance.probes import ORDER, TREE
from fusecheck.invariance.shares import Chosen
from fusecheck.invariance.subject import Kernels
from fusecheck.report import environment

ALWAYS = {"run to run": "reproducible", "workspace history": "reproducible", "ranks": "that ranks agree"}
"""Claims that every kernel makes unless it declares otherwise, and by what."""

NOT_TRIED = (
    "CUDA graphs, streams and launches by PDL beside eager ones",
    "a change between two sizes that were tried which is taken back in between",
    "batches larger than the largest, and other hidden sizes, dtypes and operations",
    "other chips, drivers and builds of the kernel",
    "the order in which the experts of one rank are summed",
    "operands that are not aligned, or lie in memory with gaps",
)


def described(kernels: Kernels, breach: Breach) -> dict[str, Any]:
    """A breach as a record: where, by how much, in words, and the replay line."""
    seen = breach.seen
    first, second = (_row(kernels.show(x)[r][seen.output], x, seen.row) for x, r in _sides(breach))
    by = apart(first, second)
    for _ in range(MORE if breach.claim == "run to run" else 0):
        if by["elements"]:
            break
        again = kernels.show(breach.second)[seen.ranks[1]][seen.output]
        by = apart(first, _row(again, breach.second, seen.row))
    if by["elements"]:
        most = f", by at most {by['most']} {by['unit']}" if by["most"] is not None else ", NaN among them"
        how = f"{by['elements']} of {by['of']} elements of a row differ{most}"
    else:
        how = "seen in one call, and not again"
    return {
        "size": breach.size,
        "output": seen.output,
        "ranks": list(seen.ranks),
        "by": by,
        "how": how,
        "question": question(kernels, breach),
    }


def _sides(breach: Breach) -> tuple[tuple[Call, int], tuple[Call, int]]:
    return (breach.first, breach.seen.ranks[0]), (breach.second, breach.seen.ranks[1])


def _row(output: Any, call: Call, row: int) -> Any:
    place = call.watched.index(row)
    return output[place : place + 1]


def question(kernels: Kernels, breach: Breach) -> str:
    """The replay line of a breach, whole: kernel, device, Problem, and the two calls."""
    calls = {"first": breach.first.to_record(), "second": breach.second.to_record()}
    return _line(kernels, breach.claim, breach.size, calls)


def _line(kernels: Kernels, claim: str, size: int, more: dict[str, Any]) -> str:
    record: dict[str, Any] = {"invariance": claim, "size": size, "backend": kernels.backend}
    if module := backends.target(kernels.backend):
        record["module"] = module
    record |= {"device": kernels.device} | ({"virtual": True} if kernels.virtual else {}) | more
    return json.dumps(record | {"problem": json.loads(kernels.problem.to_json())}, separators=(",", ":"))


def probed(kernels: Kernels, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What probes read, with a replay line where it refutes a declaration."""
    return [
        record | {"question": _line(kernels, record["claim"], record["size"], {"probe": record["probe"]})}
        if "probe" in record
        else record
        for record in records
    ]


def unasked(claim: str, why: str) -> dict[str, Any]:
    """The record of a claim that could not be asked."""
    return {"claim": claim, "verdict": "untold", "tried": "", "untold": why, "calls": 0, "changes": []}


def claims(kernels: Kernels, answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Each claim as a record, with its evidence."""
    return [
        {"claim": each.claim, "verdict": each.verdict, "tried": each.tried, "untold": each.untold, "calls": each.calls}
        | {"changes": list(each.changes)}
        | (described(kernels, each.breach) if each.breach else {})
        for each in answers
    ]


def findings(kernels: Kernels, records: Sequence[dict[str, Any]], *, require: bool) -> Iterator[dict[str, Any]]:
    """The breaches of what the kernel declares; of every claim where invariance is required."""
    backend = backends.backend(kernels.backend)
    flow = backend.dataflow(kernels.problem)
    for record in records:
        if record["verdict"] != "breaks":
            continue
        claim, below = record["claim"], flow.invariant_below
        declared = ALWAYS.get(claim, "") if claim == "ranks" or flow.reproducible else ""
        declared = {ORDER: f"order {flow.order!r}", TREE: f"a depth of {flow.depth}"}.get(claim, declared)
        if claim in ("batch", "position", "neighbours") and below is not None and (not below or record["size"] < below):
            declared = f"invariance {f'below {below} rows' if below else 'in every batch'}"
        if declared or require:
            why = f"the kernel declares {declared}" if declared else "--require-invariant"
            message = f"{sentence(record)}; {why}"
            yield {"stage": claim, "message": message, "question": record["question"], "backend": kernels.backend}


def sentence(record: dict[str, Any]) -> str:
    """One claim in words."""
    if record["verdict"] == "invariant":
        return f"{record['claim']}: invariant over {record['tried']}"
    if record["verdict"] == "read":
        return f"{record['claim']}: {record['words']}"
    if record["verdict"] == "untold":
        return f"{record['claim']}: not told, {record['untold']}"
    what = {"world size": "ranks", "workspace history": "rows before"}.get(record["claim"], "rows")
    size, seen = f"{record['size']} {what}", f"{record['output']} first: {record['how']}"
    if record["claim"] in (ORDER, TREE):
        return f"{record['claim']}: not as declared in a batch of {size}, {seen}"
    if record["claim"] == "run to run":  # smaller ones may have had luck
        return f"{record['claim']}: breaks, seen in a batch of {size}, {seen}"
    more = record["changes"][1:]
    others = f"; again from {', '.join(map(str, more))}" if more else ""
    return f"{record['claim']}: breaks from {size} on, {seen}{others}"


def certificate(
    kernels: Kernels, records: Sequence[dict[str, Any]], chosen: Chosen, multiprocessors: int | None
) -> dict[str, Any]:
    """The certificate, JSON-ready."""
    problem = kernels.problem
    where = environment()
    made: dict[str, Any] = {
        "kernel": kernels.backend,
        "packages": where["packages"],
        "binaries": kernels.binaries(),
        "device": (where["gpus"] or ["cuda"])[0] if kernels.device == "cuda" else "cpu",
        "multiprocessors": multiprocessors,
        "operation": problem.op.name,
        "dtype": problem.dtype,
        "hidden": problem.hidden,
        "world_size": problem.world_size,
        "virtual": kernels.virtual,
        "largest_batch": problem.tokens,
        "claims": list(records),
        "evidence": {"calls": kernels.calls, "rows": len(chosen.rows), "shares": chosen.shares, "drawn": chosen.drawn},
        "not_tried": list(NOT_TRIED),
    }
    if multiprocessors:
        predicted = thresholds(problem.hidden, problem.tokens, multiprocessors)
        made["predicted"] = [{"rows": rows, "launch": str(shape)} for rows, shape in predicted]
    return made


def read_certificate(path: Path) -> dict[str, Any]:
    """A certificate of a file, or of a run's directory.

    Raises:
        UsageError: there is none.
    """
    place = path / "certificate.json" if path.is_dir() else path
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
        found = found.get("summary", {}).get("certificate", found)
        said = [(each["claim"], each["verdict"], each.get("size"), each.get("words")) for each in found["claims"]]
        if found["kernel"] and all(isinstance(name, str) for name, *_ in said):
            return dict(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UsageError(f"{path} holds no certificate, expected what `fusecheck invariance` wrote: certificate.json")


COMPARED = (
    "kernel", "packages", "binaries", "device", "multiprocessors", "operation", "dtype", "hidden", "world_size",
    "virtual", "largest_batch",
)  # fmt: skip


def compared(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """What two certificates say differently, in words; empty where nothing."""
    lines = [
        f"{name}: {first.get(name)} | {second.get(name)}" for name in COMPARED if first.get(name) != second.get(name)
    ]
    names: tuple[str, ...] = ("verdict", "size", "changes", "words")
    if not lines:  # of one kernel and one question, what was tried is news, too
        names = (*names, "tried")
        rows = [(each.get("evidence") or {}).get("rows") for each in (first, second)]
        lines = [f"watched rows: {rows[0]} | {rows[1]}"] if rows[0] != rows[1] else []
    mine, theirs = ({record["claim"]: record for record in each["claims"]} for each in (first, second))
    for claim in {**mine, **theirs}:
        sides = [each.get(claim, {"verdict": "not asked"}) for each in (mine, theirs)]
        if any(sides[0].get(name) != sides[1].get(name) for name in names):
            lines.append(f"{claim}: {' | '.join(map(_side, sides))}")
    return lines


def _side(record: dict[str, Any]) -> str:
    """What one of two certificates says of a claim."""
    since = f" from {record['size']}" if record.get("size") else ""
    more = record.get("words") or record.get("changes") or record.get("tried") or ""
    return f"{record['verdict']}{since} {more}".strip()

"""One record of a samples file, in the shapes that several versions of lm-eval write it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusecheck.errors import UsageError

Key = tuple[int, str]


@dataclass(frozen=True)
class Sample:
    """One question as one arm answered it, under one answer filter.

    Attributes:
        doc_id: its index in the task's split.
        filter: lm-eval's answer filter.
        digests: SHA-256 of the document, of every context and continuation that was sent, and of the right answer as
            text; each empty where the file does not hold the thing.
        stored_hashes: lm-eval's own doc, prompt and target hash; empty where the version does not write them.
        metrics: the numeric metrics of this question.
        likelihoods: log-likelihood of each choice, nats; None where the task generates text.
        answer: what was extracted: the generated answer, or the index of the likeliest choice.
        response: the whole generated text; empty for multiple choice.
        target: the right answer as text.
        question: what to show for this document, one string.
        prompt_length: characters of the first context.
    """

    doc_id: int
    filter: str
    digests: tuple[str, str, str]
    stored_hashes: tuple[str, str, str]
    metrics: Mapping[str, float]
    likelihoods: tuple[float, ...] | None
    answer: str
    response: str
    target: str
    question: str
    prompt_length: int


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place for error messages, record) for every record of a samples file: JSON lines or one JSON array.

    Raises:
        UsageError: not UTF-8, cut or broken JSON, or a record that is not an object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); copy the file again"
        ) from error
    if text.lstrip().startswith("["):  # up to 0.4.2: one array
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}:{error.lineno}: broken JSON ({error.msg}); is the file cut short?") from error
        lines: Iterator[tuple[str, Any]] = ((f"{path}, item {i}", row) for i, row in enumerate(rows))
    else:
        lines = _json_lines(path, text)
    for where, row in lines:
        if not isinstance(row, dict):
            raise UsageError(f"{where}: got {type(row).__name__}, expected an object a line")
        yield where, row


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    # Only "\n" ends a record: model answers may hold other line separators, which json leaves unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(
                f"{path}:{number}: broken JSON ({error.msg}); the file is cut short: copy it again"
            ) from error


def read_sample(row: dict[str, Any], where: str, filters: list[str], seen: Mapping[Key, Sample]) -> Sample:
    """Read one record.

    Args:
        row: the record.
        where: its place, for messages.
        filters: the task's filters in order; old versions do not name the filter, but write them in this order.
        seen: the samples before it.

    Raises:
        UsageError: no integer doc_id, or a prompt that does not fit its own hash.
    """
    doc_id = row.get("doc_id")
    if not isinstance(doc_id, int) or isinstance(doc_id, bool):
        raise UsageError(f"{where}: doc_id is {doc_id!r}, expected an integer; not a samples file of lm-eval")
    name = row.get("filter") or next((f for f in filters if (doc_id, f) not in seen), filters[-1])
    arguments, context = _arguments(row.get("arguments")), context_of(row)
    hashes = (str(row.get("doc_hash", "")), str(row.get("prompt_hash", "")), str(row.get("target_hash", "")))
    if context is not None and hashes[1] and _sha256(context) != hashes[1]:
        raise UsageError(f"{where}: prompt_hash does not fit the prompt beside it; the file was edited")
    likelihoods = _likelihoods(row.get("filtered_resps"))
    filtered = row.get("filtered_resps")
    first = filtered[0] if isinstance(filtered, list) and filtered else ""
    doc = row.get("doc")
    return Sample(
        doc_id=doc_id,
        filter=str(name),
        digests=(
            _sha256(json.dumps(doc, sort_keys=True, ensure_ascii=False)) if doc is not None else "",
            _prompt_digest(arguments),
            _sha256(str(row["target"])) if "target" in row else "",
        ),
        stored_hashes=hashes,
        metrics=_metrics(row),
        likelihoods=likelihoods,
        answer=str(_likeliest(likelihoods)) if likelihoods else str(first),
        response="" if likelihoods else _first_text(row.get("resps")),
        target=str(row.get("target", "")),
        question=_question(doc, context),
        prompt_length=len(context or ""),
    )


def context_of(row: dict[str, Any]) -> str | None:
    """The first prompt of a record; None where the file does not hold it."""
    arguments = _arguments(row.get("arguments"))
    context = arguments[0][0] if arguments and arguments[0] else None
    return context if isinstance(context, str) else None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _arguments(value: Any) -> list[list[Any]]:
    """Requests as lists: old files have [[context, continuation], …], newer ones {gen_args_0: {arg_0: …}, …}."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return []
    return [list(r.values()) if isinstance(r, dict) else list(r) if isinstance(r, list) else [r] for r in value]


def _prompt_digest(arguments: list[list[Any]]) -> str:
    # Generation settings (a dict) are left out: some engines take entries out of it before it is logged.
    texts = [[a for a in request if not isinstance(a, dict)] for request in arguments]
    return _sha256(json.dumps(texts, ensure_ascii=False)) if texts else ""


def _likelihoods(filtered: Any) -> tuple[float, ...] | None:
    """Choice log-likelihoods from [[logprob, is_greedy], …], numbers or text; None for generated answers."""
    if not isinstance(filtered, list) or len(filtered) < 2:
        return None
    values = []
    for pair in filtered:
        if not (isinstance(pair, list) and len(pair) == 2 and str(pair[1]) in {"True", "False"}):
            return None
        try:
            values.append(float(pair[0]))
        except (TypeError, ValueError):
            return None
    return tuple(values)


def _likeliest(values: tuple[float, ...]) -> int:
    return max(range(len(values)), key=lambda i: -math.inf if math.isnan(values[i]) else values[i])


def _first_text(resps: Any) -> str:
    while isinstance(resps, list) and resps:
        resps = resps[0]
    return "" if isinstance(resps, list) else str(resps)


_OWN_FIELDS = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"}


def _metrics(row: Mapping[str, Any]) -> dict[str, float]:
    names = row["metrics"] if isinstance(row.get("metrics"), list) else [k for k in row if k not in _OWN_FIELDS]
    found = {}
    for name in map(str, names):
        value = row.get(name)
        if isinstance(value, (bool, int, float)):
            found[name] = float(value)
    return found


def _question(doc: Any, context: Any) -> str:
    if isinstance(doc, dict):
        for name in ("question", "query", "input", "text", "prompt"):
            if isinstance(doc.get(name), str):
                choices = doc.get("choices")
                listed = "\n".join(f"{i}. {c}" for i, c in enumerate(choices)) if isinstance(choices, list) else ""
                return f"{doc[name]}\n{listed}".rstrip()
    return context[-1000:] if isinstance(context, str) else ""

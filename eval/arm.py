"""What one arm of an evaluation leaves on disk, beside lm-eval's own files.

An arm folder is an lm-eval output folder (`results_<time>.json` and `samples_<task>_<time>.jsonl`), so that any
engine's run can be an arm. Three further files are optional; runs made by Fusecheck have them, and the gate uses
what it finds:

- `fusecheck_arm.json`: an `ArmRecord`: which kernels ran how often, digests of weights and tokenizer, and so on.
- `logprobs_<task>.npz`: full-vocabulary log-probabilities at the answer position; arrays `doc_id` int64 [n],
  `logprob` float16 or float32 [n, vocabulary] in nats, and optionally `gold` int64 [n] (token id of the right answer)
  and `row` int64 [n] (row of that position in the batch's token matrix).
- `forced_<task>.npz`: a teacher-forced pass over an answer text equal in all arms; arrays `doc_id` int64 [t],
  `position` int64 [t] (0 is the first scored token), `top1` int64 [t] and `gold_logprob` float32 [t] in nats.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fusecheck.errors import UsageError
from fusecheck.report.result import write_aside

RECORD_NAME = "fusecheck_arm.json"
ORACLE, UNFUSED, FUSED, NOISE = "oracle", "unfused", "fused", "unfused-again"


@dataclass(frozen=True)
class ArmRun:
    """One finished arm: its name (`oracle`, `unfused`, `fused`, `unfused-again`) and its lm-eval output folder."""

    name: str
    folder: Path


@dataclass(frozen=True)
class ArmRecord:
    """What a run knows of itself that lm-eval does not write.

    Attributes:
        arm: the role, as in `ArmRun.name`.
        backend: the backend that computed AllReduce + residual + RMSNorm + quantise.
        fused_calls: calls of the fused kernel, all ranks.
        unfused_calls: calls of the separate ops, all ranks.
        weights_digest: SHA-256 over the checkpoint's tensors; empty when unknown.
        tokenizer_digest: SHA-256 of the tokenizer; empty when unknown.
        finite: whether every logit that was scored was finite.
        batch_size: rows a forward; 0 when unknown.
        response_cache: path of a response cache, if the run used one.
        truncated: generations cut at the token limit, by task.
        seconds: wall time by stage.
        extra: anything else worth printing; strings, numbers.
    """

    arm: str
    backend: str = ""
    fused_calls: int = 0
    unfused_calls: int = 0
    weights_digest: str = ""
    tokenizer_digest: str = ""
    finite: bool = True
    batch_size: int = 0
    response_cache: str | None = None
    truncated: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    extra: dict[str, str | int | float] = field(default_factory=dict)


def write_arm_record(folder: Path, record: ArmRecord) -> Path:
    """Write `record` into `folder`, aside and renamed; returns the file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RECORD_NAME
    write_aside(path, json.dumps({"schema": 1, **asdict(record)}, indent=1, sort_keys=True) + "\n")
    return path


def read_arm_record(folder: Path) -> ArmRecord | None:
    """The record in `folder`, or None where an engine other than ours made the run.

    Raises:
        UsageError: the file is not JSON, is of a newer schema, or holds fields of another type.
    """
    path = folder / RECORD_NAME
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a JSON file ({error}); make the run again") from error
    if not isinstance(data, dict) or data.get("schema") != 1:
        schema = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise UsageError(f"{path}: got schema {schema!r}, expected 1; update fusecheck or make the run again")
    return _record_of(data, path)


def _record_of(data: dict[str, Any], path: Path) -> ArmRecord:
    default = asdict(ArmRecord(arm=""))
    known = {f.name for f in fields(ArmRecord)}
    for name in known & data.keys():
        expected = (str, type(None)) if name == "response_cache" else (type(default[name]),)
        if not isinstance(data[name], expected) or (isinstance(data[name], bool) and bool not in expected):
            got, wanted = data[name], expected[0].__name__
            raise UsageError(f"{path}: {name} is {got!r}, expected {wanted}; make the run again with this version")
    if "arm" not in data:
        raise UsageError(f"{path}: has no field 'arm'; make the run again with this version")
    return ArmRecord(**{name: data[name] for name in known & data.keys()})

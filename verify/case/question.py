"""A replay line: the whole question of one case, as one line of JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fusecheck import backends
from fusecheck.case.run import CHECKS, ON_GPU
from fusecheck.errors import UsageError
from fusecheck.problem import Problem

FIELDS = ("backend", "module", "dataflow", "device", "virtual", "checks", "before", "problem")
NEEDED = ("backend", "dataflow", "device", "checks", "problem")


@dataclass(frozen=True)
class Question:
    """Who is asked what, by what it is judged, where, and after what.

    Attributes:
        problem: the case.
        backend: name of the kernel, or `package.module:attribute`.
        module: where a plug-in's name is found, as `module:attribute`; another package may take the name later.
        dataflow: what it is judged by, instead of what it declares.
        device: `cpu` or `cuda`.
        virtual: all ranks are in one process on one GPU.
        checks: beyond the case's own call.
        before: earlier cases on the same open workspace, each with its checks.
    """

    problem: Problem
    backend: str
    module: str = ""
    dataflow: str | None = None
    device: str = "cpu"
    virtual: bool = False
    checks: tuple[str, ...] = ()
    before: tuple[tuple[Problem, tuple[str, ...]], ...] = ()

    @classmethod
    def of(cls, case: dict[str, Any], device: str, *, virtual: bool = False) -> Question:
        """The question that a request to a pool asks; see `fusecheck.case.run.request`."""
        earlier = tuple((Problem.from_json(x["problem"]), tuple(x["checks"])) for x in case.get("before", ()))
        return cls(
            Problem.from_json(case["problem"]),
            case["backend"],
            backends.target(case["backend"]),
            case.get("dataflow"),
            device,
            virtual,
            tuple(case.get("checks", ())),
            earlier,
        )

    @property
    def kernel(self) -> str:
        """What to load: the backend by its name while that means the same, else where it was found."""
        return _found(self.backend, self.module)

    def to_json(self) -> str:
        """One line that `from_json` reads."""
        record: dict[str, Any] = {"backend": self.backend} | ({"module": self.module} if self.module else {})
        record |= {"dataflow": self.dataflow, "device": self.device} | ({"virtual": True} if self.virtual else {})
        record["checks"] = list(self.checks)
        if self.before:
            record["before"] = [{"problem": json.loads(p.to_json()), "checks": list(c)} for p, c in self.before]
        # Last, so that of a line that is cut short nothing is left that could be read.
        return json.dumps(record | {"problem": json.loads(self.problem.to_json())}, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str, *, backend: str | None = None) -> Question:
        """Read a replay line; a Problem alone, as earlier versions printed it, needs a backend.

        Args:
            line: of a finding.
            backend: to ask instead of the line's own.

        Raises:
            UsageError: it is no replay line, or lacks something; the message says what.
        """
        record = _object(line)
        if "problem" not in record and "backend" not in record:
            problem = Problem.from_json(line)
            if backend is None:
                raise UsageError("the replay line lacks backend; give --backend, and --dataflow if need be")
            return cls(problem, backend, checks=() if problem.schedule else CHECKS, device="")
        unknown = sorted(set(record) - set(FIELDS))
        if unknown:
            raise UsageError(f"unknown field {unknown[0]!r} in a replay line, expected: {', '.join(FIELDS)}")
        lacks = [name for name in NEEDED if name not in record]
        if lacks:
            raise UsageError(f"the replay line lacks {', '.join(lacks)}; expected the line of a finding, whole")
        asked = backend or _text("backend", record["backend"])
        own = "" if backend else _text("module", record.get("module", ""))
        flow = None if record["dataflow"] is None else _text("dataflow", record["dataflow"])
        backends.backend(_found(asked, own))  # first: it may bring a quantiser of its own
        before = tuple(_earlier(x) for x in _list("before", record.get("before", [])))
        virtual, device = record.get("virtual", False), _text("device", record["device"])
        if not isinstance(virtual, bool):
            raise UsageError(f"virtual={virtual!r}, expected true or false")
        problem = Problem.from_json(json.dumps(record["problem"]))
        return cls(problem, asked, own, flow, device, virtual, _checks(record["checks"]), before)


def _found(backend: str, module: str) -> str:
    """What to load: the backend by its name while that means the module, else the module."""
    return module if module and module != backends.target(backend) else backend


def _object(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"replay line is not JSON ({error}), expected the line of a finding, whole") from None
    if not isinstance(record, dict):
        raise UsageError(f"replay line is a JSON {type(record).__name__}, expected an object")
    return record


def _earlier(value: Any) -> tuple[Problem, tuple[str, ...]]:
    if not isinstance(value, dict) or set(value) != {"problem", "checks"}:
        raise UsageError(f"before holds {str(value)[:60]}, expected objects with problem and checks")
    return Problem.from_json(json.dumps(value["problem"])), _checks(value["checks"])


def _checks(value: Any) -> tuple[str, ...]:
    for name in _list("checks", value):
        if name not in CHECKS + ON_GPU:
            raise UsageError(f"checks holds {name!r}, expected some of: {', '.join(CHECKS + ON_GPU)}")
    return tuple(value)


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise UsageError(f"{name}={value!r}, expected a list")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{name}={value!r}, expected a text")
    return value

"""A finding: what is wrong in one case, at one stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fusecheck.verdict import Stage


@dataclass(frozen=True)
class Finding:
    """What is wrong in one case, at one stage.

    Attributes:
        stage: where it was noticed first.
        problem: the Problem of the case, whole, as JSON: the replay line.
        message: one line: element, rank, inputs, got, admissible.
        dataflow: the name of the dataflow that was declared.
        count: elements outside, on all ranks that noticed.
        question: the replay line: Problem, backend, dataflow, device, and what came before if that matters.
        like: the known dataflows that explain every element of the case.
        varies: how the same call came out when it was repeated; empty where it was not.
        error: the type of the exception that was raised, if one was; `BreachError` where the interface was not kept.
        traceback: of that exception.
        output: the end of what the rank had printed.
    """

    stage: Stage
    problem: str
    message: str
    dataflow: str
    count: int = 1
    like: tuple[str, ...] = ()
    varies: str = ""
    question: str = ""
    error: str = ""
    traceback: str = ""
    output: str = ""

    @property
    def head(self) -> str:
        """The stage, and what the kernel computes like."""
        return f"{self.stage.value} (computes like {', '.join(self.like)})" if self.like else self.stage.value

    def line(self) -> str:
        """The report line, with what replays it."""
        varies = f"; {self.varies}" if self.varies.startswith("varies") else ""
        asked = self.question or self.problem
        return f"{self.head}: {self.message}{varies}  dataflow={self.dataflow}  replay='{asked}'"

    def to_record(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return {
            "stage": self.stage.value,
            "problem": self.problem,
            "message": self.message,
            "dataflow": self.dataflow,
            "count": self.count,
            "question": self.question,
            "computes_like": list(self.like),
            "varies": self.varies,
            "error": self.error,
            "traceback": self.traceback,
            "output": self.output,
        }

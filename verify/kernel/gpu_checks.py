"""What cases are checked for on GPUs beyond what they name: what only a device that works by itself can get wrong."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from fusecheck.kernel.table import Case


@dataclass
class GpuChecks:
    """Adds the checks of one kernel's cases; threads may share it.

    Attributes:
        pdl: whether the kernel is launched by programmatic dependent launch, and so has neighbours.
    """

    pdl: bool
    _hurried: set[tuple[str, str]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, case: Case) -> list[str]:
        """The checks to add: those of its own shape to a repeated case, `hurried` once an operation and exchange."""
        kind = case.problem.op.name, case.problem.strategy.value
        with self._lock:
            first = kind not in self._hurried
            self._hurried.add(kind)
        found = ["graphs", "streams", *(["neighbours"] * self.pdl)] if "repeat" in case.checks else []
        return [*found, *(["hurried"] * first)]

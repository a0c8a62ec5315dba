"""The whole of what was asked, so that one line asks it again; and what a finding needs besides its graph."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fusecheck.graph.cases import GraphCase, Subject
from fusecheck.graph.findings import Check
from fusecheck.graph.results import GraphResult


@dataclass(frozen=True)
class Question:
    """Everything but the graphs.

    Attributes:
        subject: the pass, and where it stands.
        world_size: ranks.
        backend: the kernel that fused operators call.
        dialect: of the graphs.
        config: a file with transforms and policies.
        device: where the graphs run.
        export: whether rewritten graphs are exported again.
    """

    subject: Subject
    world_size: int = 2
    backend: str = "emulated"
    dialect: str = "fusecheck"
    config: Path | None = None
    device: str = "cpu"
    export: bool = True

    def line(self, *graphs: str) -> str:
        """The command that asks it, of these graphs in their order."""
        after = "norm" if self.subject.after_norm else "none"
        words = [
            "fusecheck",
            "graph",
            "--pass",
            self.subject.name,
            "--after",
            after,
            "--produces",
            self.subject.produces,
        ]
        words += ["--tp", str(self.world_size), "--backend", self.backend, "--dialect", self.dialect]
        words += ["--device", self.device] + ([] if self.config is None else ["--config", str(self.config)])
        words += [] if self.export else ["--no-export"]
        return shlex.join([*words, *(word for graph in graphs for word in ("--graph", graph))])


def history_needed(
    result: GraphResult, again: Callable[[Sequence[GraphCase]], GraphResult], limit: int = 12
) -> tuple[GraphCase, ...] | None:
    """Which earlier graphs a finding needs to show again.

    A pass may keep something from graph to graph. Alone, in ranks that have seen nothing, its finding then stays away.

    Args:
        result: with the finding.
        again: checks graphs in their order in fresh ranks, and returns the last result.
        limit: how often it may be asked.

    Returns:
        None where it did not show again at all; empty where the graph alone is enough.
    """
    wanted = {finding.check for finding in result.open_findings}

    def shows(earlier: Sequence[GraphCase]) -> bool:
        nonlocal limit
        limit -= 1
        return bool(wanted & {finding.check for finding in again([*earlier, result.case]).findings})

    if shows(()):
        return ()
    needed = result.earlier
    if not needed or not shows(needed):
        return None
    size = len(needed) // 2
    while size and limit > 0:
        part = next((rest for rest in _without(needed, size) if limit > 0 and shows(rest)), None)
        if part is None:
            size //= 2
        else:
            needed, size = part, min(size, len(part) // 2 or len(part) - 1)
    return needed


def _without(cases: tuple[GraphCase, ...], size: int) -> list[tuple[GraphCase, ...]]:
    """The cases without one run of so many of them, for each such run."""
    return [cases[:start] + cases[start + size :] for start in range(0, len(cases), size)]


def needs_ranks(result: GraphResult) -> bool:
    """Whether a finding is about what the ranks did, rather than one that a hang would show again at great cost."""
    return not any(finding.check is Check.RUNS and "hang" in finding.message for finding in result.findings)

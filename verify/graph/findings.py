"""What the checks of a rewritten graph say: findings by named check, and what became of each site."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any


class Check(str, Enum):
    """What a rewritten graph is held to."""

    RUNS = "runs"
    """The pass returns a graph, on every rank, within its time."""
    LINT = "lint"
    """Every node is defined before it is read."""
    RANKS = "ranks"
    """All ranks rewrite alike."""
    SITES = "sites"
    """Each site became what it must."""
    COUNTS = "counts"
    """The numbers of collectives, norms and fused operators are those of the model."""
    ARGUMENTS = "arguments"
    """eps, strategy, weight and scale are the site's own."""
    ORPHANS = "orphans"
    """No fused operator, collective, norm or getitem is left without a reader."""
    IDEMPOTENT = "idempotent"
    """A second run changes nothing."""
    EXPORT = "re-export"
    """`torch.export` takes the rewritten graph, with its open token count."""
    META = "meta"
    """Every new node says the dtype and shape that it has."""
    ACTIVE = "active"
    """The backend was called by each fused operator, each time."""
    KERNEL = "kernel"
    """On the operands of the unfused graph, each fused operator returns what its dataflow admits."""
    PREDECESSOR = "predecessor"
    """Outputs are bit for bit those of the graph that the pass was given."""
    UNFUSED = "unfused"
    """With the unfused graph's values at each site, outputs are bit for bit the unfused graph's."""
    REPLICATED = "replicated"
    """Outputs that all ranks share are equal on all of them."""
    MEMORY = "memory"
    """Running the graph changes no input and no weight that the unfused graph leaves alone."""


@dataclass(frozen=True)
class GraphFinding:
    """One thing wrong with a rewritten graph.

    Attributes:
        check: which check says so.
        message: what was got, what was expected.
        site: the site's number, where there is one.
        rank: the rank that saw it.
    """

    check: Check
    message: str
    site: int | None = None
    rank: int = 0

    def to_record(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self) | {"check": self.check.value}


@dataclass
class GraphReport:
    """What one rank found out about one graph.

    Attributes:
        findings: in the order of the checks.
        outcomes: per site the fused operation's name, or None.
        elements: output elements compared bit by bit.
        differing: of these, how many differ from the unfused graph when every kernel's own result is used.
        kernel_elements: elements judged by the oracle.
        off_nominal: of these, how many were not the nominal value.
        counts: operators of the final graph by role.
        skipped: checks that could not be made, with the reason.
    """

    findings: list[GraphFinding] = field(default_factory=list)
    outcomes: dict[int, str | None] = field(default_factory=dict)
    elements: int = 0
    differing: int = 0
    kernel_elements: int = 0
    off_nominal: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def to_record(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self) | {"findings": [finding.to_record() for finding in self.findings]}

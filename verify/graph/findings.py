"""What the checks of a rewritten graph say: findings by named check, and what became of each site."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any, Literal


class Check(str, Enum):
    """What a rewritten graph is held to."""

    RUNS = "runs"
    """The pass returns a graph, on every rank, within its time."""
    LINT = "lint"
    """Every node is defined before it is read."""
    RANKS = "ranks"
    """All ranks rewrite alike, though their interpreters hash differently."""
    REPEATS = "repeats"
    """The same graph, given again, is rewritten alike."""
    SITES = "sites"
    """Each site became what it must."""
    COUNTS = "counts"
    """The numbers of collectives, norms and fused operators are those of the model."""
    ARGUMENTS = "arguments"
    """eps, strategy, weight and scale are the site's own."""
    ORPHANS = "orphans"
    """Nothing is computed that no output and no effect needs."""
    EFFECTS = "effects"
    """Every write and assertion of the graph is still there, and no other."""
    IDEMPOTENT = "idempotent"
    """A second run changes nothing."""
    EXPORT = "re-export"
    """`torch.export` takes the rewritten graph, with its open token count."""
    META = "meta"
    """Every new node says the dtype, shape, strides and device that it has, at every token count."""
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
    """Pass and graph change no tensor that the unfused graph leaves alone, and the pass no setting of torch."""


Kind = Literal["missed", "against a rule", "broken"]
"""What a finding says of a graph: less was fused than must be; something was fused that must not be; it is wrong."""


@dataclass(frozen=True)
class GraphFinding:
    """One thing wrong with a rewritten graph.

    Attributes:
        check: which check says so.
        message: what was got, what was expected.
        site: the site's number, where there is one.
        rank: the rank that saw it.
        kind: whether it says that too little was fused, too much, or that the graph is wrong.
        node: the node that it is about, by name.
        where: file, line and function of a pass that raised.
        traceback: of a pass that raised.
        waived: why it is accepted; empty where it is not.
    """

    check: Check
    message: str
    site: int | None = None
    rank: int = 0
    kind: Kind = "broken"
    node: str = ""
    where: str = ""
    traceback: str = ""
    waived: str = ""

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> GraphFinding:
        """What `to_record` wrote."""
        return cls(**record | {"check": Check(record["check"])})

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
        separate_elements: sums of fused operators that run as separate steps, compared with the unfused graph's.
        off_nominal: of the judged, how many were not the nominal value.
        counts: operators of the final graph by role.
        skipped: checks that could not be made, with the reason.
    """

    findings: list[GraphFinding] = field(default_factory=list)
    outcomes: dict[int, str | None] = field(default_factory=dict)
    elements: int = 0
    differing: int = 0
    kernel_elements: int = 0
    separate_elements: int = 0
    off_nominal: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def found(self, check: Check) -> bool:
        """Whether a check has something to say already."""
        return any(finding.check is check for finding in self.findings)

    def to_record(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self) | {"findings": [finding.to_record() for finding in self.findings]}

"""What runs on each rank: make the graph, let the pass rewrite it, compare with the other ranks, run and judge."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule

from fusecheck import backends
from fusecheck.graph.build import MAX_TOKENS, BuiltGraph, build, site_of
from fusecheck.graph.comparison import Comparison, Graphs
from fusecheck.graph.config import BOTH_ENABLED, SharedConfig, TransformConfig
from fusecheck.graph.context import RankContext, tensor_parallel
from fusecheck.graph.dialect import Dialect
from fusecheck.graph.dialects import dialect_named
from fusecheck.graph.files import FilePlan, is_file, load_file
from fusecheck.graph.findings import Check, GraphFinding, GraphReport
from fusecheck.graph.inspection import check_structure, copy_graph, count_roles, fused_nodes, signature
from fusecheck.graph.model_plan import ModelPlan, is_model
from fusecheck.graph.models import build_model
from fusecheck.graph.plan import GraphPlan
from fusecheck.graph.subject import PassError, apply_pass, load_pass
from fusecheck.interface import FusionOp, Rank
from fusecheck.problem import Problem


@dataclass(frozen=True)
class GraphJob:
    """One graph to check.

    Attributes:
        source: the JSON of a graph plan, a model plan or a model file.
        passes: run in this order; the last one is the subject.
        backend: the kernel that the fused operators call.
        dialect: of the graph.
        tokens: token counts to run at, besides the graph's own.
        export: whether to export the rewritten graph again.
        transforms: configuration by transform name.
    """

    source: str
    passes: tuple[str, ...]
    backend: str = "emulated"
    dialect: str = "fusecheck"
    tokens: tuple[int, ...] = (1, 5)
    export: bool = True
    transforms: tuple[tuple[str, TransformConfig], ...] = tuple(BOTH_ENABLED.items())


class GraphWorker:
    """Checks graphs on one rank.

    Args:
        rank: this process's place in the group.
    """

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self._contexts: dict[str, RankContext] = {}
        torch.set_num_threads(1)

    def check(self, job: GraphJob) -> dict[str, Any]:
        """Check one graph; a collective call."""
        context = self._context(job.backend)
        with tensor_parallel(context):
            return _Case(self.rank, context, job).run().to_record()

    def _context(self, name: str) -> RankContext:
        if name not in self._contexts:
            backend = backends.backend(name)
            flow = backend.dataflow(Problem(op=FusionOp.RESIDUAL_RMS_NORM, world_size=max(2, self.rank.world_size)))
            self._contexts[name] = RankContext(self.rank, backend, flow)
        return self._contexts[name]


class _Case:
    """One job on one rank."""

    def __init__(self, rank: Rank, context: RankContext, job: GraphJob) -> None:
        self.rank, self.context, self.job = rank, context, job
        # Importing a pass may register the operators of its dialect.
        self.passes = [load_pass(name) for name in job.passes]
        self.dialect: Dialect = dialect_named(job.dialect)
        self.report = GraphReport()
        self.shared = SharedConfig(
            local_rank=rank.index,
            world_size=rank.world_size,
            gather=context.gather_text,
            max_tokens=MAX_TOKENS,
            transforms=dict(job.transforms),
        )

    def run(self) -> GraphReport:
        """All checks; those that need a sound graph are left out where it is not."""
        built = self._build()
        graphs = self._rewrite(built)
        if graphs is None:
            return self.report
        self.report.outcomes = self._outcomes(graphs.after)
        self.report.counts = count_roles(graphs.after, self.dialect)
        for finding in check_structure(graphs.before, graphs.after, self.dialect, graphs.predecessor):
            self._add(finding)
        self._idempotent(graphs.after)
        comparison = Comparison(self.context, self.dialect, built, graphs, self.report, self._own_tokens)
        for tokens in dict.fromkeys((self._own_tokens, *self.job.tokens)):
            if built.token_dimension is not None or tokens == self._own_tokens:
                comparison.execute(tokens, moves_quantise_only=len(self.job.passes) > 1)
        if self.job.export and self._turn():
            comparison.export()
        return self.report

    def _turn(self) -> bool:
        """Exporting is slow and the ranks' graphs are alike: one rank does it, in turn."""
        return zlib.crc32(self.job.source.encode()) % self.rank.world_size == self.rank.index

    # Building and rewriting ---------------------------------------------------------------------------------------

    def _build(self) -> BuiltGraph:
        if is_model(self.job.source):
            plan = ModelPlan.from_json(self.job.source)
            self._own_tokens = plan.tokens
            return build_model(plan, self.rank.index, self.rank.world_size, self.dialect, self.rank.device)
        if is_file(self.job.source):
            self._own_tokens = 0
            return load_file(FilePlan.from_json(self.job.source), self.rank.index)
        graph = GraphPlan.from_json(self.job.source)
        self._own_tokens = graph.tokens
        return build(graph, self.rank.index, self.rank.world_size, self.dialect, self.rank.device)

    def _rewrite(self, built: BuiltGraph) -> Graphs | None:
        """Run the passes; None where a rank has no sound graph, or the ranks' graphs differ."""
        predecessor = after = copy_graph(built.module)
        said = ""
        try:
            for function in self.passes:
                predecessor = copy_graph(after)
                after = apply_pass(function, after, self.shared, self.dialect)
        except PassError as error:
            self._add(GraphFinding(Check.RUNS, str(error)))
            said = "raised"
        else:
            said = "\n".join(signature(after)) if self._lints(after) else "does not lint"
        everyone = self.context.gather_text(said)
        if any(text != said for text in everyone):
            self._add(GraphFinding(Check.RANKS, _difference(everyone)))
            return None
        return None if said in ("raised", "does not lint") else Graphs(copy_graph(built.module), predecessor, after)

    def _lints(self, gm: GraphModule) -> bool:
        try:
            gm.graph.lint()
            gm.recompile()
        except Exception as error:
            told = " ".join(f"{type(error).__name__}: {error}".split())
            self._add(GraphFinding(Check.LINT, f"the rewritten graph is not sound: {told[:400]}"))
            return False
        return True

    def _outcomes(self, gm: GraphModule) -> dict[int, str | None]:
        found: dict[int, str | None] = {}
        for fused in fused_nodes(gm, self.dialect):
            site = site_of(fused.gamma) if fused.gamma else None
            if site is not None:
                found[site] = fused.op.value
        return found

    def _idempotent(self, after: GraphModule) -> None:
        again = copy_graph(after)
        try:
            again = apply_pass(self.passes[-1], again, self.shared, self.dialect)
        except PassError as error:
            self._add(GraphFinding(Check.IDEMPOTENT, f"on the second run {error}"))
            return
        was, now = signature(after), signature(again)
        if was != now:
            changed = sum(line not in was for line in now)
            self._add(GraphFinding(Check.IDEMPOTENT, f"the second run changed {changed} nodes"))

    def _add(self, finding: GraphFinding) -> None:
        self.report.findings.append(replace(finding, rank=self.rank.index))


def _difference(everyone: list[str]) -> str:
    """Where the ranks' graphs part, in one line."""
    first = everyone[0].splitlines()
    for rank, text in enumerate(everyone[1:], 1):
        lines = text.splitlines()
        if lines != first:
            at = next((at for at, (a, b) in enumerate(zip(first, lines, strict=False)) if a != b), -1)
            return f"rank 0 has '{first[at][:160] if first else ''}', rank {rank} '{lines[at][:160] if lines else ''}'"
    return "this rank's graph differs from rank 0's"

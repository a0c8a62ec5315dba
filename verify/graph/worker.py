"""What runs on each rank: make the graph, let the pass rewrite it, compare with the other ranks, run and judge."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule

from fusecheck import backends
from fusecheck.graph.build import MAX_TOKENS, BuiltGraph, build, site_of
from fusecheck.graph.cases import Plan
from fusecheck.graph.collinear import PairPlan, build_pairs
from fusecheck.graph.comparison import Comparison, Graphs
from fusecheck.graph.config import ALL_ENABLED, SharedConfig, TransformConfig
from fusecheck.graph.context import RankContext, tensor_parallel
from fusecheck.graph.dialects import library_named
from fusecheck.graph.execution import bits
from fusecheck.graph.exporting import Exports
from fusecheck.graph.files import FilePlan, load_file
from fusecheck.graph.findings import Check, GraphFinding, GraphReport
from fusecheck.graph.inspection import Sites, check_structure, count_roles, fused_nodes, tensors_of
from fusecheck.graph.model_plan import ModelPlan
from fusecheck.graph.models import build_model
from fusecheck.graph.state import settings_kept
from fusecheck.graph.structure import copy_graph, expressions, signature
from fusecheck.graph.subject import PassError, apply_pass, load_pass
from fusecheck.interface import FusionOp, Rank
from fusecheck.problem import Problem
from fusecheck.ranks.rank import LocalRank


@dataclass(frozen=True)
class GraphJob:
    """One graph to check.

    Attributes:
        plan: what to build or load.
        passes: run in this order; the last one is the subject.
        backend: the kernel that the fused operators call.
        dialect: of the graph.
        tokens: token counts to run at, besides the graph's own.
        export: whether to export the rewritten graph again.
        alone: the graph is one rank's: the first checks it in a group of its own, and the others do nothing.
        transforms: configuration by transform name.
    """

    plan: Plan
    passes: tuple[str, ...]
    backend: str = "emulated"
    dialect: str = "fusecheck"
    tokens: tuple[int, ...] = (1, 5)
    export: bool = True
    alone: bool = False
    transforms: tuple[tuple[str, TransformConfig], ...] = tuple(ALL_ENABLED.items())


class GraphWorker:
    """Checks graphs on one rank.

    Args:
        rank: this process's place in the group.
    """

    def __init__(self, rank: LocalRank) -> None:
        self.rank = rank
        self._alone = rank.alone() if rank.world_size > 1 else rank
        self._contexts: dict[tuple[str, bool], RankContext] = {}
        self._exports = {alone: Exports(*_place(each)) for alone, each in ((False, rank), (True, self._alone))}
        torch.set_num_threads(1)
        # Memory that nobody has written to is filled with NaN, so that what reads it shows.
        torch.use_deterministic_algorithms(mode=True, warn_only=True)

    def check(self, jobs: Sequence[GraphJob]) -> list[dict[str, Any]]:
        """Check graphs; a collective call. The exports come last, so that ranks export at the same time."""
        cases = [_Case(self._context(job), job) for job in jobs]
        mine = [case for case in cases if not case.job.alone or self.rank.index == 0]
        for case in mine:
            with tensor_parallel(case.context):
                case.run()
        for case in mine:
            with tensor_parallel(case.context):
                case.export(self._exports[case.job.alone])
        return [case.report.to_record() for case in cases]

    def _context(self, job: GraphJob) -> RankContext:
        known = (job.backend, job.alone)
        if known not in self._contexts:
            backend, rank = backends.backend(job.backend), self._alone if job.alone else self.rank
            flow = backend.dataflow(Problem(op=FusionOp.RESIDUAL_RMS_NORM, world_size=max(2, rank.world_size)))
            self._contexts[known] = RankContext(rank, backend, flow)
        return self._contexts[known]


def _place(rank: Rank) -> tuple[int, int]:
    return rank.index, rank.world_size


@dataclass(frozen=True)
class _Rewritten:
    """What came of the passes.

    Attributes:
        given: what the last pass was given, in its library's operators.
        made: what it made of it.
        graphs: all graphs in Fusecheck's operators.
        text: what was made, equal on all ranks.
    """

    given: GraphModule
    made: GraphModule
    graphs: Graphs
    text: str


class _Case:
    """One job on one rank."""

    def __init__(self, context: RankContext, job: GraphJob) -> None:
        self.rank, self.context, self.job = context.rank, context, job
        # Importing a pass may register the operators of its dialect.
        *self.earlier, self.subject = [load_pass(name) for name in job.passes]
        self.library = library_named(job.dialect)
        self.library.ready()
        self.report = GraphReport()
        self._to_export: tuple[BuiltGraph, _Rewritten] | None = None
        self.shared = SharedConfig(
            local_rank=self.rank.index,
            world_size=self.rank.world_size,
            gather=context.gather_text,
            max_tokens=MAX_TOKENS,
            transforms=dict(job.transforms),
        )

    def run(self) -> None:
        """All checks but the export; those that need a sound graph are left out where it is not."""
        built, native = self._build()
        done = self._rewrite(built, native)
        if done is None:
            return
        graphs = done.graphs
        sites = Sites(graphs.before)
        self.report.outcomes = self._outcomes(graphs.after, sites)
        self.report.counts = count_roles(graphs.after)
        for finding in check_structure(graphs.before, graphs.after, sites, graphs.predecessor):
            self._add(finding)
        self._run_again(done)
        comparison = Comparison(self.context, sites, built, graphs, self.report, self.job.plan.tokens)
        for tokens in dict.fromkeys((self.job.plan.tokens, *self.job.tokens)):
            if built.token_dimension is not None or tokens == self.job.plan.tokens:
                comparison.execute(tokens, moves_quantise_only=len(self.job.passes) > 1)
        if self.job.export:
            self._to_export = built, done

    def export(self, exports: Exports) -> None:
        """Export the rewritten graph, if this is the rank to do it."""
        if self._to_export is None or not exports.has_turn(self._to_export[1].text):
            return
        built, done = self._to_export
        finding, skipped = exports.check(done.graphs, built, self.job.plan.tokens)
        if finding is not None:
            self._add(finding)
        if skipped:
            self.report.skipped[Check.EXPORT.value] = skipped

    # Building and rewriting ---------------------------------------------------------------------------------------

    def _build(self) -> tuple[BuiltGraph, GraphModule | None]:
        """The graph in Fusecheck's operators, and a user's own as it is."""
        plan, ranks = self.job.plan, (self.rank.index, self.rank.world_size, self.rank.device)
        if isinstance(plan, FilePlan):
            return load_file(plan, self.rank.index, self.library)
        if isinstance(plan, ModelPlan):
            return build_model(plan, *ranks), None
        return (build_pairs(plan, *ranks) if isinstance(plan, PairPlan) else build(plan, *ranks)), None

    def _rewrite(self, built: BuiltGraph, native: GraphModule | None) -> _Rewritten | None:
        """Run the passes; None where a rank has no sound graph, or the ranks' graphs differ."""
        predecessor = copy_graph(built.module) if self.earlier else built.module
        for function in self.earlier:
            predecessor = apply_pass(function, predecessor, self.shared)
        given = self.library.enter(predecessor) if native is None or self.earlier else native
        loaded = _digests(given)
        made, said = copy_graph(given), ""
        try:
            with settings_kept() as left:
                made = apply_pass(self.subject, made, self.shared)
        except PassError as error:
            self._raised(Check.RUNS, error)
            said = "raised"
        else:
            said = "\n".join(signature(made)) if self._lints(made) else "does not lint"
            self._unchanged(loaded, given, made)
            for setting in left:
                self._add(GraphFinding(Check.MEMORY, f"the pass left torch's {setting}"))
        everyone = self.context.gather_text(said)
        if any(text != said for text in everyone):
            self._add(GraphFinding(Check.RANKS, _difference(everyone)))
            return None
        if said in ("raised", "does not lint"):
            return None
        try:
            after = self.library.leave(made)
        except PassError as error:
            self._raised(Check.RUNS, error)
            return None
        return _Rewritten(given, made, Graphs(built.module, predecessor, after), said)

    def _unchanged(self, loaded: dict[str, int], before: GraphModule, after: GraphModule) -> None:
        """The pass leaves every loaded tensor as it is, in memory and by name."""
        now, named = _digests(before), _digests(after)
        for name, digest in loaded.items():
            if now[name] != digest:
                self._add(GraphFinding(Check.MEMORY, f"the pass wrote to {name} while it ran"))
            elif named.get(name, digest) != digest:
                self._add(GraphFinding(Check.MEMORY, f"the pass put other values in the place of {name}"))

    def _lints(self, gm: GraphModule) -> bool:
        try:
            gm.graph.lint()
            gm.recompile()
        except Exception as error:
            told = " ".join(f"{type(error).__name__}: {error}".split())
            self._add(GraphFinding(Check.LINT, f"the rewritten graph is not sound: {told[:400]}"))
            return False
        return True

    def _outcomes(self, gm: GraphModule, sites: Sites) -> dict[int, str | None]:
        found: dict[int, str | None] = {}
        for fused in fused_nodes(gm, sites):
            site = site_of(fused.site) if fused.site else None
            if site is not None:
                found[site] = fused.op.value
        return found

    def _run_again(self, done: _Rewritten) -> None:
        """The pass once more: on what it was given it does the same, on what it made it does nothing."""
        for check, given in ((Check.REPEATS, done.given), (Check.IDEMPOTENT, done.made)):
            try:
                with settings_kept():
                    again = apply_pass(self.subject, copy_graph(given), self.shared)
            except PassError as error:
                self._raised(check, error, "on the second run ")
                continue
            if signature(again) != signature(done.made):
                mine, wanted = expressions(again), expressions(done.made)
                new, gone = sum((mine - wanted).values()), sum((wanted - mine).values())
                if new or gone:
                    self._add(GraphFinding(check, f"the second run made {new} other nodes and dropped {gone}"))

    def _raised(self, check: Check, error: PassError, when: str = "") -> None:
        place = (error.node, error.where, error.trace)
        self._add(GraphFinding(check, f"{when}{error}", None, self.rank.index, "broken", *place))

    def _add(self, finding: GraphFinding) -> None:
        self.report.findings.append(replace(finding, rank=self.rank.index))


def _digests(gm: GraphModule) -> dict[str, int]:
    """A checksum of each loaded tensor's bytes, by name."""
    return {name: zlib.crc32(bits(tensor).cpu().numpy().data) for name, tensor in tensors_of(gm)}


def _difference(everyone: list[str]) -> str:
    """Where the ranks' graphs part, in one line."""
    first = everyone[0].splitlines()
    for rank, text in enumerate(everyone[1:], 1):
        lines = text.splitlines()
        if lines != first:
            at = next((at for at, (a, b) in enumerate(zip(first, lines, strict=False)) if a != b), -1)
            return f"rank 0 has '{first[at][:160] if first else ''}', rank {rank} '{lines[at][:160] if lines else ''}'"
    return "this rank's graph differs from rank 0's"

"""The checks that run: the rewritten graph beside the one it was made from and the unfused one, on the same inputs."""

from __future__ import annotations

import contextlib
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule

from fusecheck.graph.build import BuiltGraph
from fusecheck.graph.context import RankContext
from fusecheck.graph.execution import ForcedRun, Loaded, RecordingRun, Values, bits, count_differing, value_bits
from fusecheck.graph.findings import Check, GraphFinding, GraphReport
from fusecheck.graph.fused_ops import resolve
from fusecheck.graph.inspection import Sites, fused_nodes
from fusecheck.graph.interpreter import Run
from fusecheck.graph.meta import MetaCheckedRun
from fusecheck.graph.quantised import Form, exact
from fusecheck.interface import FusionOp


@dataclass
class Graphs:
    """The graph before any pass, before the last one, and after it."""

    before: GraphModule
    predecessor: GraphModule
    after: GraphModule


class Comparison:
    """Runs the three graphs of one job on one rank, and writes what differs into the report.

    Args:
        context: the rank, and the kernel that fused operators call.
        sites: the names of the graphs' norms.
        built: where inputs come from.
        graphs: the graphs.
        report: receives findings and counts.
        own_tokens: the token count of the example.
    """

    def __init__(
        self,
        context: RankContext,
        sites: Sites,
        built: BuiltGraph,
        graphs: Graphs,
        report: GraphReport,
        own_tokens: int,
    ) -> None:
        self.context, self.sites, self.built, self.graphs = context, sites, built, graphs
        self.report, self.own_tokens = report, own_tokens
        self._known = {node.name for node in graphs.before.graph.nodes}
        self._before, self._predecessor = Loaded(graphs.before), Loaded(graphs.predecessor)
        self._after = Loaded(graphs.after)
        self._fused = fused_nodes(graphs.after, sites)

    def execute(self, tokens: int, *, moves_quantise_only: bool) -> None:
        """Run all three graphs on the same inputs; a run that raises is a finding, and its comparisons are left out."""
        inputs = self.built.inputs(tokens)
        label = "" if tokens == self.own_tokens else f"at {tokens} tokens, not the exported {self.own_tokens}: "
        recording = RecordingRun(self.graphs.before, self.sites)
        given = _copies(inputs)
        with self._before.kept() as written:
            unfused = recording.run(*given)
        written |= _written(given, inputs)
        with self._judged(Check.PREDECESSOR, label):
            exact = moves_quantise_only and self._exact
            fused = self._run_fused(inputs, label, written)
            predecessor = fused
            if exact:
                with self._predecessor.kept():
                    predecessor = Run(self.graphs.predecessor).run(*_copies(inputs))
            self._compare(Check.PREDECESSOR, label, fused, predecessor, exact=exact)
            self._replicated(fused, label)
            _, differing = count_differing(fused, unfused)
            self.report.differing += differing
        with self._judged(Check.UNFUSED, label):
            forced = ForcedRun(self.graphs.after, self.sites, self.context, recording)
            with self._after.kept():
                outputs = forced.run(*_copies(inputs))
            self.report.kernel_elements += forced.elements
            self.report.separate_elements += forced.separate
            self.report.off_nominal += forced.off_nominal
            for finding in forced.findings:
                self._add(replace(finding, message=label + finding.message))
            self._compare(Check.UNFUSED, label, outputs, unfused, exact=True)

    @property
    def _exact(self) -> bool:
        """Whether the kernel's quantise is bit for bit a separate one: of the returned norm, by declared steps."""
        flow = self.context.dataflow
        declared = flow.scaling == "divide" or (flow.scaling == "multiply" and flow.exact_reciprocal)
        makers = {fused.op.quantiser for fused in self._fused if fused.op.returns_scale}
        return flow.round_norm and declared and all(exact(Form(name), flow) for name in makers)

    def _run_fused(self, inputs: Values, label: str, written: dict[str, Tensor]) -> Values:
        """The rewritten graph, with meta values, calls of the backend and memory checked on the way."""
        given = _copies(inputs)
        calls = Counter(self.context.calls)
        run = MetaCheckedRun(self.graphs.after, self._known)
        with self._after.kept() as changed:
            outputs: Values = run.run(*given)
        changed |= _written(given, inputs)
        for finding in run.findings if not self.report.found(Check.META) else ():
            self._add(replace(finding, message=label + finding.message))
        self._active(self.context.calls - calls, given[0], label)
        for name in sorted(changed.keys() | written.keys()):
            mine, wanted = changed.get(name), written.get(name)
            if mine is None or wanted is None or not _equal(mine, wanted):
                told = (
                    "does not write" if mine is None else "writes other values to" if wanted is not None else "changed"
                )
                self._add(GraphFinding(Check.MEMORY, f"{label}running the graph {told} {name}"))
        return outputs

    def _active(self, calls: Counter[FusionOp], example: Tensor, label: str) -> None:
        tokens = example.numel() // max(1, example.shape[-1]) if example.is_floating_point() else example.numel()
        wanted: Counter[FusionOp] = Counter()
        for fused in self._fused:
            if resolve(str(fused.argument("strategy")), tokens) is not None:
                wanted[fused.op] += 1
        if wanted != calls:
            told = [{op.value: count for op, count in each.items()} for each in (calls, wanted)]
            self._add(GraphFinding(Check.ACTIVE, f"{label}the backend was called {told[0]}, the graph has {told[1]}"))

    def _compare(
        self, check: Check, label: str, got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], *, exact: bool
    ) -> None:
        if not exact:
            self.report.skipped[check.value] = "the kernel may round otherwise than the separate steps; see `unfused`"
            return
        if len(got) != len(wanted):
            self._add(GraphFinding(check, f"{label}{len(got)} outputs, expected {len(wanted)}"))
            return
        for index, (mine, other) in enumerate(zip(got, wanted, strict=True)):
            elements, differing = count_differing((mine,), (other,))
            self.report.elements += elements
            if differing:
                what = f"{label}output {index}: {differing} of {elements} elements differ in bits"
                if mine.dtype != other.dtype:
                    what = f"{label}output {index} is {mine.dtype}, expected {other.dtype}"
                self._add(GraphFinding(check, what))

    def _replicated(self, outputs: tuple[Tensor, ...], label: str) -> None:
        digests = {
            index: zlib.crc32(value_bits(outputs[index]).cpu().numpy().tobytes()) for index in self.built.replicated
        }
        everyone = [json.loads(text) for text in self.context.gather_text(json.dumps(digests))]
        for index in digests:
            if len({each[str(index)] for each in everyone}) > 1:
                self._add(GraphFinding(Check.REPLICATED, f"{label}output {index} is not the same on all ranks"))

    @contextlib.contextmanager
    def _judged(self, check: Check, label: str) -> Iterator[None]:
        """Turn what a run raises into a finding; ranks run alike, so they raise alike."""
        try:
            yield
        except Exception as error:
            told = " ".join(f"{type(error).__name__}: {error}".split())
            self._add(GraphFinding(check, f"{label}running the rewritten graph raised {told[:400]}"))

    def _add(self, finding: GraphFinding) -> None:
        self.report.findings.append(replace(finding, rank=self.context.rank.index))


def _copies(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.clone() for tensor in inputs)


def _written(given: Values, inputs: Values) -> dict[str, Tensor]:
    """The inputs that a run has written to, by number."""
    pairs = enumerate(zip(given, inputs, strict=True))
    return {f"input {at}": mine for at, (mine, own) in pairs if not _equal(mine, own)}


def _equal(left: Tensor, right: Tensor) -> bool:
    return torch.equal(bits(left), bits(right))

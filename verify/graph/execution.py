"""Running graphs on a rank: recording the unfused values, putting them in place of a kernel's, checking meta values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fusecheck.graph import nodes
from fusecheck.graph.arithmetic import quantize
from fusecheck.graph.context import RankContext
from fusecheck.graph.dialect import Dialect
from fusecheck.graph.findings import Check, GraphFinding
from fusecheck.graph.fused_ops import resolve
from fusecheck.graph.inspection import NORM_ARGUMENTS, QUANT_ARGUMENTS
from fusecheck.interface import FusionOp, RankOutputs
from fusecheck.oracle import Operands, Oracle
from fusecheck.verdict import judge_rows

Values = tuple[Any, ...]


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes, so that NaN equals itself and zeros differ by sign."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def value_bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes with every NaN made the same one: sign and payload of a NaN differ between processors."""
    if not tensor.is_floating_point():
        return bits(tensor)
    nan = tensor.detach().to(torch.float64).isnan().reshape(-1, 1)
    return bits(tensor).reshape(-1, tensor.element_size()).masked_fill(nan, 0xFF).reshape(-1)


def count_differing(left: Values, right: Values) -> tuple[int, int]:
    """Elements in both tuples of outputs, and how many of them differ in value, sign of zero, dtype or shape."""
    elements = differing = abs(len(left) - len(right))
    for mine, other in zip(left, right, strict=False):
        elements += mine.numel()
        if mine.dtype != other.dtype or mine.shape != other.shape:
            differing += max(mine.numel(), 1)
        elif not torch.equal(ours := value_bits(mine), theirs := value_bits(other)):
            unequal = (ours != theirs).reshape(-1, mine.element_size())
            differing += int(unequal.any(-1).sum())
    return elements, differing


class MetaCheckedRun(Interpreter):
    """Runs a graph and compares each node's meta value with what the node returned."""

    def __init__(self, gm: GraphModule, known: set[str]) -> None:
        """Nodes named in `known` may lack a meta value, as they did before the pass."""
        super().__init__(gm)
        self.known = known
        self.missing: list[str] = []
        self.wrong: list[str] = []

    @property
    def findings(self) -> list[GraphFinding]:
        """One finding for all missing values, and one for all wrong ones."""
        missing = f"{len(self.missing)} new nodes have no meta value, the first is {self.missing[:1]}"
        wrong = f"{len(self.wrong)} nodes are not what their meta says, the first: {self.wrong[:1]}"
        pairs = ((self.missing, missing), (self.wrong, wrong))
        return [GraphFinding(Check.META, message) for nodes_found, message in pairs if nodes_found]

    def run_node(self, n: Node) -> Any:
        """Run, then compare."""
        result = super().run_node(n)
        if n.op == "call_function":
            self._compare(n, n.meta.get("val"), result)
        return result

    def _compare(self, node: Node, said: Any, got: Any) -> None:
        if said is None and node.name not in self.known:
            self.missing.append(node.name)
        if isinstance(said, tuple | list) and isinstance(got, tuple | list):
            for mine, other in zip(said, got, strict=False):
                self._compare(node, mine, other)
        if isinstance(said, Tensor) and isinstance(got, Tensor) and not _agrees(said, got):
            self.wrong.append(f"{node.name}: meta {_form(said)}, returned {_form(got)}")


def _agrees(said: Tensor, got: Tensor) -> bool:
    sizes = zip(said.shape, got.shape, strict=False)
    same = all(not isinstance(mine, int) or mine == other for mine, other in sizes)
    return said.dtype == got.dtype and said.dim() == got.dim() and same


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{[str(size) for size in tensor.shape]}"


@dataclass(frozen=True)
class SiteValues:
    """What one norm of the unfused graph had and made, on this rank.

    Attributes:
        stream: what the norm read.
        norm: what it returned.
        weight: of the norm.
        eps: of the norm.
        partial: this rank's addend of the sum over ranks before it; None where there is none.
        residual: the other summand.
    """

    stream: Tensor
    norm: Tensor
    weight: Tensor
    eps: float
    partial: Tensor | None = None
    residual: Tensor | None = None


class RecordingRun(Interpreter):
    """Runs the unfused graph and keeps each norm's values by the name of its weight; copies, for in-place writers."""

    def __init__(self, gm: GraphModule, dialect: Dialect) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.dialect = dialect
        self.values: dict[str, SiteValues] = {}
        self._partials: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        """Run, then keep what belongs to a site."""
        if self.dialect.is_all_reduce(n):
            self._partials[n] = self.env[nodes.argument(n, 0)].clone()
        result = super().run_node(n)
        weight = nodes.argument(n, 1) if self.dialect.is_norm(n) else None
        if isinstance(weight, Node) and weight.op == "get_attr":
            add = nodes.argument(n, 0)
            own = (self.env[add].clone(), result.clone(), self.env[weight], nodes.argument(n, 2))
            self.values[str(weight.target)] = SiteValues(*own, *self._summands(add))
        return result

    def _summands(self, add: Node) -> tuple[Tensor, ...]:
        """The partial sum and the residual of a plain residual add."""
        operands = [each for each in add.args if isinstance(each, Node)]
        for operand in operands if len(operands) == 2 else ():
            source, _ = nodes.through_views(operand)
            if isinstance(source, Node) and source in self._partials:
                other = operands[1 - operands.index(operand)]
                return self._partials[source], self.env[other].clone()
        return ()


class ForcedRun(Interpreter):
    """Runs a fused graph with the unfused graph's values in place of each kernel's results.

    Every site then sees the unfused graph's values. Its kernel is run on the operands that the rewrite gave it, and the
    oracle judges the results by the operands that the unfused graph had. Whatever differs at the outputs is the
    wiring's fault, not rounding's.
    """

    def __init__(
        self, gm: GraphModule, dialect: Dialect, context: RankContext, recorded: dict[str, SiteValues]
    ) -> None:
        super().__init__(gm)
        self.dialect, self.context, self.recorded = dialect, context, recorded
        self.findings: list[GraphFinding] = []
        self.elements = self.off_nominal = 0

    def run_node(self, n: Node) -> Any:
        """Run; at a fused node judge the kernel, and return the recorded values."""
        op = self.dialect.fused_op(n)
        if op is None:
            return super().run_node(n)
        own = super().run_node(n)
        where = QUANT_ARGUMENTS if op.returns_quant else NORM_ARGUMENTS
        weight = nodes.argument(n, where["weight"])
        known = self.recorded.get(str(weight.target)) if isinstance(weight, Node) else None
        if known is None:
            return own
        self._judge(n, op, own, known, where)
        shape = own[-1].shape
        forced = [known.stream.reshape(shape)]
        if op.returns_quant:
            scale = self._operand(n, where["scale"])
            divide = self.context.dataflow.scaling == "divide"
            forced.insert(0, quantize(known.norm.reshape(shape), scale, divide=divide))
        if op.returns_norm:
            forced.insert(0, known.norm.reshape(shape))
        return tuple(forced)

    def _operand(self, node: Node, position: int) -> Any:
        given = nodes.argument(node, position)
        return self.env[given] if isinstance(given, Node) else given

    def _judge(self, node: Node, op: FusionOp, own: Values, known: SiteValues, where: dict[str, int]) -> None:
        """The oracle on this site; where the steps run separately there is no kernel to judge."""
        flat = (-1, known.stream.shape[-1])
        tokens = known.stream.numel() // max(1, flat[1])
        separate = resolve(self._operand(node, where["strategy"]), max(1, tokens)) is None
        if tokens == 0 or separate or known.partial is None or known.residual is None:
            return
        operands = Operands(
            partials=[part.reshape(flat) for part in self.context.gather(known.partial)],
            residual=known.residual.reshape(flat),
            gamma=known.weight,
            scale=float(self._operand(node, where["scale"])) if op.returns_quant else 1.0,
            eps=known.eps,
        )
        results = [each.reshape(flat) for each in own]
        outputs = RankOutputs(
            residual=results[-1],
            norm=results[0] if op.returns_norm else None,
            quant=results[-2] if op.returns_quant else None,
        )
        for tally in judge_rows(Oracle(self.context.dataflow, operands), outputs, 0):
            self.elements += tally.elements
            self.off_nominal += tally.off_nominal
            if tally.outside:
                first = tally.shown[0]
                message = (
                    f"{node.name}: {tally.outside} of {tally.elements} elements of {tally.stage.value} not admissible, "
                    f"[{first.row},{first.column}] got {first.got}, admissible {first.admissible}"
                )
                self.findings.append(GraphFinding(Check.KERNEL, message))

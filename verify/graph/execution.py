"""Running graphs on a rank: recording the unfused values, and putting them in place of a kernel's."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fusecheck.graph import nodes, roles
from fusecheck.graph.arithmetic import quantize
from fusecheck.graph.collinear import is_merged, is_plain_add, summands
from fusecheck.graph.context import RankContext
from fusecheck.graph.family_ops import all_gather
from fusecheck.graph.findings import Check, GraphFinding
from fusecheck.graph.fused_ops import RESULTS, resolve
from fusecheck.graph.inspection import Sites, tensors_of
from fusecheck.graph.interpreter import Run
from fusecheck.graph.quantised import Form, given_value, quantise
from fusecheck.interface import FusionOp, RankOutputs
from fusecheck.operations import GIVEN_SCALE
from fusecheck.oracle import Operands, Oracle
from fusecheck.stages.judgement import Tally
from fusecheck.stages.layout import judge_layout
from fusecheck.verdict import judge_rows

Values = tuple[Any, ...]
COEFFICIENTS: dict[Any, float] = {torch.ops.aten.add.Tensor: 1.0, torch.ops.aten.sub.Tensor: -1.0}
"""What the second operand of each residual add is multiplied by, besides `alpha`."""


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


class Loaded:
    """The loaded tensors of a graph, and a copy of each."""

    def __init__(self, gm: GraphModule) -> None:
        self._held = [(name, tensor.detach(), bits(tensor).clone()) for name, tensor in tensors_of(gm)]

    @contextlib.contextmanager
    def kept(self) -> Iterator[dict[str, Tensor]]:
        """Put the tensors back after a run; the mapping then holds what the run made of those it changed."""
        changed: dict[str, Tensor] = {}
        yield changed
        for name, tensor, before in self._held:
            if not torch.equal(bits(tensor), before):
                changed[name] = tensor.clone()
                tensor.copy_(before.view(tensor.dtype).reshape(tensor.shape))


@dataclass(frozen=True)
class SiteValues:
    """What one norm of the unfused graph had and made, on this rank.

    Attributes:
        stream: what the norm read.
        norm: what it returned.
        weight: of the norm.
        eps: of the norm.
        weight_bias: what it adds to its weight.
        summands: this rank's addend of the sum over ranks before it, and the residual; of a sum of two all-reduces
            both ways to see it. Empty where the norm reads something else.
    """

    stream: Tensor
    norm: Tensor
    weight: Tensor
    eps: float
    weight_bias: float
    summands: tuple[tuple[Tensor, Tensor], ...] = ()


@dataclass(frozen=True)
class AddedSums:
    """Sums over ranks that the unfused graph adds.

    Attributes:
        total: of them.
        strategies: that they name.
    """

    total: Tensor
    strategies: frozenset[str]


Key = tuple[bytes, ...]


def _key(addends: Iterable[Tensor]) -> Key:
    """What tells addends of sums over ranks from others: their bits, whatever their order."""
    forms = ((f"{each.dtype} {tuple(each.shape)}", bits(each).numpy(force=True).tobytes()) for each in addends)
    return tuple(sorted(form.encode() + held for form, held in forms))


class RecordingRun(Run):
    """Runs the unfused graph and keeps each norm's values by the name of the norm; copies, for in-place writers."""

    def __init__(self, gm: GraphModule, sites: Sites) -> None:
        super().__init__(gm, keep=True)
        self.names = sites.of(gm)
        self.values: dict[str, SiteValues] = {}
        self.sums: dict[Key, AddedSums] = {}
        self._partials: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        """Run, then keep what belongs to a site."""
        if roles.is_sum(n):
            self._partials[n] = self.env[nodes.argument(n, 0)].clone()
        result = super().run_node(n)
        if n in self.names:
            add, weight = nodes.argument(n, 0), nodes.argument(n, 1)
            bias = roles.weight_bias(n) or 0.0
            whole = self._whole(add)
            own = (whole(self.env[add]), whole(result), self.env[weight], nodes.argument(n, 2), bias)
            self.values[self.names[n]] = SiteValues(*own, tuple(self._summands(add)))
        if is_plain_add(n) and (reduced := summands(n)) is not None:
            strategies = frozenset(str(nodes.argument(each, 1)) for each in reduced)
            self.sums[_key(self._partials[each] for each in reduced)] = AddedSums(result.clone(), strategies)
        return result

    def _whole(self, add: Node) -> Callable[[Tensor], Tensor]:
        """What makes a copy of all rows of a tensor of the site: of rows that are spread over the ranks, a gather."""
        sources = [nodes.through_views(each)[0] for each in add.all_input_nodes]
        spread = any(each in self._partials and not roles.is_all_reduce(each) for each in sources)
        return (lambda x: all_gather(x, 0, "")) if spread else torch.clone

    def _summands(self, add: Node) -> Iterator[tuple[Tensor, Tensor]]:
        """The addend and the residual of a residual add, scaled as the add scales them; a bare sum adds zeros."""
        bare, _ = nodes.through_views(add)
        if isinstance(bare, Node) and bare in self._partials and roles.is_all_reduce(bare):
            partial = self._partials[bare].reshape(self.env[add].shape)
            yield partial, torch.zeros_like(partial)
            return
        if add.target not in COEFFICIENTS:
            return
        operands = [nodes.argument(add, at) for at in (0, 1)]
        alpha: Any = add.kwargs.get("alpha", 1)
        scales = (1.0, COEFFICIENTS[add.target] * float(alpha))
        # Other factors would round, where the kernel would not.
        if any(math.frexp(abs(scale))[0] != 0.5 for scale in scales):
            return
        for at, operand in enumerate(operands):
            source, _ = nodes.through_views(operand)
            other = operands[1 - at]
            if isinstance(source, Node) and source in self._partials and isinstance(other, Node):
                shape, whole = self.env[add].shape, self._whole(add)
                rest = whole(self.env[other].expand(shape) * scales[1 - at])
                yield self._partials[source].reshape(rest.shape) * scales[at], rest


class ForcedRun(Run):
    """Runs a fused graph with the unfused graph's values in place of each kernel's results.

    Every site then sees the unfused graph's values. Its kernel is run on the operands that the rewrite gave it, and the
    oracle judges the results by the operands that the unfused graph had. Whatever differs at the outputs is the
    wiring's fault, not rounding's.
    """

    def __init__(self, gm: GraphModule, sites: Sites, context: RankContext, recording: RecordingRun) -> None:
        super().__init__(gm, keep=bool(recording.sums))
        self.names = sites.of(gm)
        self.context, self.recorded, self.sums = context, recording.values, recording.sums
        self.addends = {part for key in self.sums for part in key}
        self.findings: list[GraphFinding] = []
        self.elements = self.off_nominal = self.separate = 0

    def run_node(self, n: Node) -> Any:
        """Run; at a fused node judge the kernel, and return the recorded values."""
        op = roles.fused_op(n)
        if op is None:
            own = super().run_node(n)
            return self._merged(n, own) if self.sums and is_merged(n) else own
        own = super().run_node(n)
        known = self.recorded.get(self.names.get(n, ""))
        if known is None:
            return own
        self._judge(n, op, own, known)
        shape = own[-1].shape
        forced = {"residual": known.stream.reshape(shape), "norm": known.norm.reshape(shape)}
        if op.quantiser == GIVEN_SCALE:
            divide = self.context.dataflow.scaling == "divide"
            forced["quant"] = quantize(forced["norm"], self._operand(n, "scale"), divide=divide)
        elif op.returns_quant:
            form = Form(op.quantiser, self._operand(n, "layout"))
            scale = self._operand(n, "scale")
            forced["quant"], forced["scale"] = quantise(forced["norm"], scale, form, self.context.dataflow)
        return tuple(forced[name] for name in RESULTS if name in op.returns)

    def _merged(self, node: Node, own: Tensor) -> Tensor:
        """The sum of sums over ranks that the unfused graph has in the place of this sum over ranks of sums."""
        found = summands(nodes.argument(node, 0), lambda each: _key([self.env[each]])[0] in self.addends)
        known = None if found is None else self.sums.get(_key(self.env[each] for each in found))
        if known is None or known.total.dtype != own.dtype or known.total.numel() != own.numel():
            return own
        self.separate += own.numel()
        if {str(nodes.argument(node, 1))} != known.strategies:
            told = f"strategy={nodes.argument(node, 1)}, the sums that it is made of have {sorted(known.strategies)}"
            self.findings.append(GraphFinding(Check.ARGUMENTS, f"{node.name}: {told}", node=node.name))
        return known.total.reshape(own.shape)

    def _operand(self, node: Node, name: str) -> Any:
        given = nodes.named(node, name)
        return self.env[given] if isinstance(given, Node) else given

    def _judge(self, node: Node, op: FusionOp, own: Values, known: SiteValues) -> None:
        """The oracle on this site; where it knows no operands, the sum is compared with the unfused graph's."""
        flat = (-1, known.stream.shape[-1])
        tokens = known.stream.numel() // max(1, flat[1])
        separate = resolve(self._operand(node, "strategy"), max(1, tokens)) is None
        if tokens == 0:
            return
        if separate or not known.summands:
            self._compare_sum(node, own[-1], known)
            self.separate += known.stream.numel()
            return
        outputs, tallies = self._outputs(node, op, own, (tokens, flat[1]))
        given = self._operand(node, "scale") if op.returns_quant else None
        scale = given_value(given)
        judged = []
        for partial, residual in known.summands:
            operands = Operands(
                partials=[part.reshape(flat) for part in self.context.gather(partial)],
                residual=residual.reshape(flat),
                gamma=known.weight,
                scale=scale,
                eps=known.eps,
                weight_bias=known.weight_bias,
                op=op,
            )
            judged.append(judge_rows(Oracle(self.context.dataflow, operands), outputs, 0))
        self._report(node, [*tallies, *min(judged, key=lambda each: sum(tally.outside for tally in each))])

    def _outputs(self, node: Node, op: FusionOp, own: Values, size: tuple[int, int]) -> tuple[RankOutputs, list[Tally]]:
        """The kernel's results as rows, one code a byte and scales [rows, groups], and what lies around its scales."""
        found = dict(zip([name for name in RESULTS if name in op.returns], own, strict=True))
        tallies = []
        if "scale" in found:
            form = Form(op.quantiser, self._operand(node, "layout"))
            layout = form.scales(*size, self.context.dataflow.quant(op.quantiser))
            tallies = [judge_layout(layout, found["scale"], None)]
            found |= {"scale": layout.read(found["scale"]), "quant": form.quantiser.element.unpack(found["quant"])}
        rows = {name: each if name == "scale" else each.reshape(size) for name, each in found.items()}
        return RankOutputs(**({"residual": None} | rows)), tallies

    def _report(self, node: Node, tallies: list[Tally]) -> None:
        for tally in tallies:
            self.elements += tally.elements
            self.off_nominal += tally.off_nominal
            if tally.outside:
                first = tally.shown[0]
                message = (
                    f"{node.name}: {tally.outside} of {tally.elements} elements of {tally.stage.value} not admissible, "
                    f"[{first.row},{first.column}] got {first.got}, admissible {first.admissible}"
                )
                self.findings.append(GraphFinding(Check.KERNEL, message, node=node.name))

    def _compare_sum(self, node: Node, got: Tensor, known: SiteValues) -> None:
        """The kernel's sum with the unfused graph's, where no declared arithmetic stands between them."""
        elements, differing = count_differing((got.reshape(-1),), (known.stream.reshape(-1),))
        if differing:
            message = f"{node.name}: {differing} of {elements} sums differ from the unfused graph's"
            self.findings.append(GraphFinding(Check.KERNEL, message, node=node.name))

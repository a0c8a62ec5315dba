"""Sums over ranks that are added: which may become one, what the graph of a pair looks like, and its named cases.

AutoDeploy's transform `fuse_collinear_allreduce` (NVIDIA/TensorRT-LLM,
`auto_deploy/transform/library/collectives.py`, read 2026-11-29) makes AR(a + b) of AR(a) + AR(b) where both name one
strategy, nobody else reads either, the addends have one shape, and nothing but copies and casts to the same dtype stand
between. The addends are then rounded once before the exchange instead of the sums after it, so bits may differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.fx import Node

from fusecheck.graph import nodes, roles
from fusecheck.graph.build import CPU, BuiltGraph
from fusecheck.graph.canvas import Canvas
from fusecheck.graph.plan import GraphPlan

aten, own = torch.ops.aten, torch.ops.fusecheck
COPIES = (aten.clone.default, aten.contiguous.default)
CASTS = (aten._to_copy.default, aten.to.dtype)

Between = Literal["nothing", "clone", "contiguous", "cast", "widened", "halved"]
Second = Literal["all_reduce", "strategy", "grouped", "max", "plain"]
Add = Literal["plain", "alpha", "sub", "broadcast"]
Reader = Literal["none", "first", "second", "copy"]


@dataclass(frozen=True)
class PairPlan:
    """A graph in which two sums over ranks, or more, are added; a residual add, a norm and a layer follow.

    Attributes:
        between: what stands between the second sum over ranks and the add: a copy, a cast to the dtype that it has, to
            float32 (the first is cast as well), or a product with one half.
        second: the other summand: a sum over ranks of the same strategy or of another, over part of the ranks, a
            maximum over them, or no sum over ranks.
        add: how they are added; `broadcast` has a second addend of one row.
        reader: who else reads something: the first sum, the second, or the copy between.
        late: the second addend is computed from the residual, after the first sum.
        summands: of which sums over ranks are added, two or three.
        pairs: such sums in a row.
        dtype: of the activations.
        batched: activations are [1, tokens, hidden].
        dynamic: the token count is open.
        seed: of weights and inputs.
    """

    between: Between = "nothing"
    second: Second = "all_reduce"
    add: Add = "plain"
    reader: Reader = "none"
    late: bool = False
    summands: int = 2
    pairs: int = 1
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    batched: bool = False
    dynamic: bool = True
    seed: int = 0
    tokens: ClassVar[int] = GraphPlan.tokens

    def to_json(self) -> str:
        """One line of JSON that `from_json` reads."""
        return json.dumps({"pair": asdict(self)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> PairPlan:
        """Read a plan, as `to_json` wrote it; `cases.read_plan` says what is wrong with one."""
        return cls(**json.loads(text)["pair"])

    @property
    def merges(self) -> bool:
        """Whether the pairs must become one sum over ranks each."""
        plain = self.second == "all_reduce" and self.add == "plain" and self.reader == "none"
        return plain and self.between not in ("widened", "halved")


def build_pairs(plan: PairPlan, rank: int, world_size: int, device: torch.device = CPU) -> BuiltGraph:
    """A rank's graph of pairs; deterministic, so that every rank makes its own."""
    shape = GraphPlan(dtype=plan.dtype, batched=plan.batched, dynamic=plan.dynamic, seed=plan.seed)
    canvas = Canvas(shape, rank, world_size, device)
    stream = canvas.input("residual")
    for number in range(plan.pairs):
        stream = _Pair(canvas, plan, f"pair{number}").compose(stream)
    canvas.output(stream, replicated=plan.second not in ("grouped", "plain"))
    module = canvas.builder.finish(canvas.outputs)
    module.__dict__["is_draft"] = False
    return BuiltGraph(module, canvas.example, tuple(canvas.replicated), canvas.builder.token_dimension)


class _Pair:
    """Writes one pair and what follows it."""

    def __init__(self, canvas: Canvas, plan: PairPlan, name: str) -> None:
        self.canvas, self.plan, self.name = canvas, plan, name
        self.call = canvas.builder.call

    def compose(self, stream: Node) -> Node:
        """Write the pair; returns the next residual."""
        plan, call = self.plan, self.call
        first = call(own.all_reduce.default, self.canvas.input(f"{self.name}_a", per_rank=True), "AUTO")
        second = self.second(stream)
        if plan.reader in ("first", "second"):
            self.canvas.output(call(aten.mul.Tensor, first if plan.reader == "first" else second, 0.5))
        total = self.added(first, self.copied(second))
        for number in range(plan.summands - 2):
            addend = self.canvas.input(f"{self.name}_more{number}", per_rank=True)
            total = self.added(total, call(own.all_reduce.default, addend, "AUTO"))
        if plan.between == "widened":
            total = call(aten._to_copy.default, total, dtype=self.canvas.dtype)
        stream = call(aten.add.Tensor, stream, total)
        values = 1 + 0.25 * self.canvas.builder.normal(f"{self.name}.gamma", self.canvas.plan.hidden)
        gamma = self.canvas.builder.attribute(f"{self.name}.gamma", values.to(self.canvas.dtype))
        self.canvas.output(call(own.triton_rms_norm.default, stream, gamma, 1e-5))
        return stream

    def second(self, stream: Node) -> Node:
        """The other summand."""
        call, kind = self.call, self.plan.second
        addend = self.canvas.input(f"{self.name}_b", per_rank=True)
        if self.plan.late:
            addend = call(aten.mul.Tensor, addend, call(aten.sigmoid.default, stream))
        if self.plan.add == "broadcast":
            axis = int(self.plan.batched)
            addend = call(aten.mean.dim, addend, [axis], keepdim=True)
        if kind == "grouped":
            return call(own.all_reduce_grouped.default, addend, max(1, self.canvas.world_size // 2), "AUTO")
        if kind == "max":
            return call(own.all_reduce_max.default, addend, "AUTO")
        if kind == "plain":
            return addend
        return call(own.all_reduce.default, addend, "ONESHOT" if kind == "strategy" else "AUTO")

    def copied(self, second: Node) -> Node:
        """The second sum as the add reads it."""
        call, kind = self.call, self.plan.between
        if kind == "clone" or self.plan.reader == "copy":
            second = call(aten.clone.default, second)
        elif kind == "contiguous":
            second = call(aten.contiguous.default, second)
        elif kind in ("cast", "widened"):
            dtype = torch.float32 if kind == "widened" else self.canvas.dtype
            second = call(aten._to_copy.default, second, dtype=dtype)
        elif kind == "halved":
            second = call(aten.mul.Tensor, second, 0.5)
        if self.plan.reader == "copy":
            self.canvas.output(call(aten.mul.Tensor, second, 0.5))
        return second

    def added(self, first: Node, second: Node) -> Node:
        """The sum of both."""
        call, kind = self.call, self.plan.add
        if self.plan.between == "widened":
            first = call(aten._to_copy.default, first, dtype=torch.float32)
        if kind == "alpha":
            return call(aten.add.Tensor, first, second, alpha=2)
        if kind == "sub":
            return call(aten.sub.Tensor, first, second)
        return call(aten.add.Tensor, first, second)


def summands(node: object, leaf: Callable[[Node], bool] = roles.is_all_reduce) -> list[Node] | None:
    """The nodes of which a node is the plain sum, each through copies; None for a sum of anything else.

    Args:
        node: the sum, or one of the nodes.
        leaf: which nodes it must be made of; left out, sums over ranks.
    """
    source = through_copies(node)
    if not isinstance(source, Node):
        return None
    if leaf(source):
        return [source]
    if not is_plain_add(source):
        return None
    left, right = (summands(nodes.argument(source, at), leaf) for at in (0, 1))
    return None if left is None or right is None else left + right


def is_merged(node: Node) -> bool:
    """Whether a node is a sum over ranks of a sum that a rank made before."""
    return roles.is_all_reduce(node) and is_plain_add(through_copies(nodes.argument(node, 0)))


def is_plain_add(node: object) -> bool:
    """Whether a node adds two tensors as they are."""
    if not isinstance(node, Node) or node.target != aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
        return False
    return all(isinstance(nodes.argument(node, at), Node) for at in (0, 1))


def through_copies(node: object) -> Any:
    """What lies under copies and casts that keep the dtype."""
    while isinstance(node, Node) and (node.target in COPIES or (node.target in CASTS and _keeps_dtype(node))):
        node = node.args[0]
    return node


def _keeps_dtype(node: Node) -> bool:
    given, made = nodes.value(node.args[0]), nodes.value(node)
    return given is not None and made is not None and given.dtype == made.dtype


# The named cases ----------------------------------------------------------------------------------------------------

PAIRS: dict[str, tuple[str, PairPlan]] = {
    "C1": ("two sums over ranks are added", PairPlan()),
    "C1-fp16": ("fp16 activations", PairPlan(dtype="float16")),
    "C1-batched": ("3-D activations", PairPlan(batched=True)),
    "C1-fixed": ("a fixed token count", PairPlan(dynamic=False)),
    "C2": ("a copy between", PairPlan(between="clone")),
    "C2-contiguous": ("a contiguous between", PairPlan(between="contiguous")),
    "C2-cast": ("a cast to the same dtype between", PairPlan(between="cast")),
    "C3": ("the second addend is computed after the first sum", PairPlan(late=True)),
    "C4": ("three sums over ranks are added", PairPlan(summands=3)),
    "C5": ("three pairs in a row", PairPlan(pairs=3)),
    "CN1": ("the first sum has another reader", PairPlan(reader="first")),
    "CN1-second": ("the second sum has another reader", PairPlan(reader="second")),
    "CN1-copy": ("the copy between has another reader", PairPlan(reader="copy")),
    "CN2": ("another strategy", PairPlan(second="strategy")),
    "CN3": ("the second sum is over part of the ranks", PairPlan(second="grouped")),
    "CN3-max": ("a maximum over the ranks", PairPlan(second="max")),
    "CN3-plain": ("the second summand is no sum over ranks", PairPlan(second="plain")),
    "CN4": ("the second sum counts twice", PairPlan(add="alpha")),
    "CN4-sub": ("a difference", PairPlan(add="sub")),
    "CN5": ("a real cast between", PairPlan(between="widened")),
    "CN5-halved": ("a product between", PairPlan(between="halved")),
    "CN6": ("the second addend is one row for all", PairPlan(add="broadcast")),
}
"""C pairs must become one sum over ranks, CN pairs must not, by name: what the graph has, and the graph."""

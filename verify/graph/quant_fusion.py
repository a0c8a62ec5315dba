"""The static E4M3 quantise of the layers that read a fused norm moves into the fused operator."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from fusecheck.graph import nodes
from fusecheck.graph.config import QUANT_PASS
from fusecheck.graph.ops import FP8
from fusecheck.graph.transform import RefusedError, Transform, check_activations

LINEAR_SCALE, QUANTIZE_SCALE = 3, 1
"""Where a linear layer and a quantise have their input scale."""
OUT_DTYPE = 5


@dataclass(frozen=True)
class Reader:
    """A node that reads the norm and quantises what it reads.

    Attributes:
        node: a linear layer that quantises its input, or a quantise.
        views: between the norm and it, nearest the norm first.
        scale: the node of its input scale.
    """

    node: Node
    views: tuple[Node, ...]
    scale: Node


@dataclass(frozen=True)
class QuantSite:
    """A fused norm whose readers quantise.

    Attributes:
        fused: the all-reduce + residual + norm node.
        readers: those that quantise, all with one scale.
        mixed: whether anybody else reads the norm, so that it must stay an output.
        value: the scale's value.
    """

    fused: Node
    readers: tuple[Reader, ...]
    mixed: bool
    value: float


class FuseQuant(Transform[QuantSite]):
    """`fuse_allreduce_residual_rmsnorm_quant_fp8`."""

    name = QUANT_PASS

    def candidates(self) -> list[Node]:
        """The nodes that the first pass made."""
        return [node for node in self.graph.nodes if node.op == "call_function" and self._is_fused_norm(node)]

    def _is_fused_norm(self, node: Node) -> bool:
        fused = self.dialect.fused_op(node)
        return fused is not None and not fused.returns_quant

    def match(self, node: Node) -> QuantSite:
        """See `Transform.match`."""
        if not nodes.only_getitems(node):
            raise RefusedError("the fused node is read as a tuple")
        readers, mixed = self.readers(node)
        if not readers:
            raise RefusedError("no FP8 layer reads the norm")
        self.check_strategy(nodes.argument(node, 4))
        norm = self.meta_of(nodes.getitems(node, 0)[0], "norm")
        check_activations(norm)
        self.check_policy(norm)
        value = self.common_scale(readers, norm)
        if mixed and self.dialect.out_quant is None:
            raise RefusedError("somebody else reads the norm, and the dialect has no operator that returns both")
        self.check_unwritten("norm or residual", *node.users)
        return QuantSite(node, readers, mixed, value)

    def readers(self, fused: Node) -> tuple[tuple[Reader, ...], bool]:
        """The readers that quantise, and whether there are others."""
        found: list[Reader] = []
        others = False
        for norm in nodes.getitems(fused, 0):
            for user, views in nodes.terminal_users(norm):
                scale = self.scale_of(user, views[-1] if views else norm)
                if scale is None:
                    others = True
                else:
                    found.append(Reader(user, views, scale))
        return tuple(found), others

    def scale_of(self, user: Node, read: Node) -> Node | None:
        """The input scale of a user that quantises `read`, and reads it as nothing else; None for other users."""
        if self.dialect.is_linear(user):
            position, operands = LINEAR_SCALE, [nodes.argument(user, index) for index in range(OUT_DTYPE)]
            weight = nodes.value(operands[1])
            if weight is not None and weight.dtype != FP8:
                return None
        elif user.target == self.dialect.quantize:
            position, operands = QUANTIZE_SCALE, [nodes.argument(user, 0), nodes.argument(user, 1)]
        else:
            return None
        scale = operands[position]
        reads = [operand is read for operand in operands]
        return scale if reads == [True] + [False] * (len(reads) - 1) and isinstance(scale, Node) else None

    def common_scale(self, readers: tuple[Reader, ...], norm: Tensor) -> float:
        """The one value of all readers' input scales.

        Raises:
            RefusedError: a scale is not a loaded float32 number, or they differ.
        """
        values = [self.check_scale(reader, norm) for reader in readers]
        if any(value != values[0] for value in values):
            raise RefusedError(f"the readers' input scales differ: {', '.join(sorted({f'{v:.9g}' for v in values}))}")
        return values[0]

    def check_scale(self, reader: Reader, norm: Tensor) -> float:
        """The value of a scale that the kernel can read as one `float`.

        Raises:
            RefusedError: it is computed in the graph, or is of a wrong dtype, size, device or value.
        """
        scale = nodes.attribute(self.gm, reader.scale)
        if scale is None:
            raise RefusedError(f"the input scale of {reader.node.name} is not an attribute: it is dynamic")
        if scale.dtype is not torch.float32 or scale.numel() != 1:
            shape = list(scale.shape)
            raise RefusedError(f"the input scale of {reader.node.name} is {scale.dtype} {shape}, not one float32")
        if scale.device.type != norm.device.type:
            raise RefusedError(f"the input scale of {reader.node.name} is on {scale.device}, the norm on {norm.device}")
        value = float(scale)
        if not (math.isfinite(value) and value > 0):
            raise RefusedError(f"the input scale of {reader.node.name} is {value}")
        return value

    def decision(self, site: QuantSite) -> str:
        """See `Transform.decision`."""
        readers = [reader.node.name for reader in site.readers]
        return f"{'OUT_QUANT' if site.mixed else 'QUANT'} {site.value.hex()} {readers}"

    def rewrite(self, site: QuantSite) -> None:
        """See `Transform.rewrite`."""
        old = site.fused
        outputs = 3 if site.mixed else 2
        with self.graph.inserting_before(old):
            fused = self.emit(site)
            results = [self.result(site, fused, index, outputs) for index in range(outputs)]
        quant = results[-2]
        for getitem in nodes.getitems(old, 1):
            getitem.replace_all_uses_with(results[-1])
        copies: dict[Node, Node] = {}
        for reader in site.readers:
            self.feed(reader, self.reapply(reader.views, quant, copies))
        if site.mixed:
            for getitem in nodes.getitems(old, 0):
                getitem.replace_all_uses_with(results[0])
        self.remove_dead(site, results)

    def emit(self, site: QuantSite) -> Node:
        """Insert the fused operator, with the first reader's own scale attribute."""
        x, residual, weight, eps, strategy = (nodes.argument(site.fused, index) for index in range(5))
        scale = nodes.clone_attribute(self.graph, self.chosen_scale(site))
        target = self.dialect.out_quant if site.mixed else self.dialect.quant
        assert target is not None
        strategy = self.config.policy.strategy(strategy) if "<=" not in strategy else strategy
        return nodes.call(self.graph, target, (x, residual, weight, scale, eps, strategy), site.fused)

    def chosen_scale(self, site: QuantSite) -> Node:
        """The reader's scale that the fused operator takes; all are equal in value."""
        return site.readers[0].scale

    def result(self, site: QuantSite, fused: Node, index: int, outputs: int) -> Node:
        """Take one result: codes before the residual, the norm before both if it is returned."""
        like = nodes.getitems(site.fused, 1 if index == outputs - 1 else 0)
        return nodes.call(self.graph, operator.getitem, (fused, index), (like or [site.fused])[0])

    def reapply(self, views: tuple[Node, ...], quant: Node, copies: dict[Node, Node]) -> Node:
        """Apply the views to the codes, each once, where it stands for the norm."""
        current = quant
        for view in views:
            if view not in copies:
                with self.graph.inserting_before(view):
                    copies[view] = nodes.call(self.graph, view.target, (current, *view.args[1:]), view)  # type: ignore[arg-type]
            current = copies[view]
        return current

    def feed(self, reader: Reader, codes: Node) -> None:
        """Give a reader the codes: a linear layer becomes its variant for codes, a quantise disappears."""
        if not self.dialect.is_linear(reader.node):
            for index, replacement in ((0, codes), (1, reader.scale)):
                for getitem in nodes.getitems(reader.node, index):
                    getitem.replace_all_uses_with(replacement)
            return
        old = reader.node
        _, weight, bias, scale, weight_scale, out_dtype = (nodes.argument(old, index) for index in range(6))
        out_dtype = out_dtype or self.out_dtype(reader)
        with self.graph.inserting_before(old):
            args = (codes, weight, bias, scale, weight_scale, out_dtype)
            new = nodes.call(self.graph, self.dialect.prequant_linear, args, old)
        old.replace_all_uses_with(new)

    def out_dtype(self, reader: Reader) -> str:
        """The dtype that the layer had from its input, by name."""
        read = self.meta_of(nodes.argument(reader.node, 0), "input")
        return str(read.dtype).removeprefix("torch.")

    def remove_dead(self, site: QuantSite, results: list[Node]) -> None:
        """Erase what nobody reads any more, last in the graph first."""
        touched = {site.fused, *site.fused.users, *results}
        for reader in site.readers:
            touched |= {reader.node, *reader.node.users, *reader.views}
        for node in reversed(self.graph.nodes):
            if node in touched and not node.users:
                self.graph.erase_node(node)

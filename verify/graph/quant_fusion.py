"""The quantise of the layers that read a fused norm moves into the fused operator, whatever the format.

A transform takes some kinds of quantisers, in their order. At each site the readers of one kind are fused; everybody
else goes on reading the norm, which is then returned.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fusecheck.graph import nodes, roles
from fusecheck.graph.config import FAMILY_PASS, QUANT_PASS, QUANT_PASSES, SharedConfig
from fusecheck.graph.family import KINDS, fused_operation, kind_of
from fusecheck.graph.fused_ops import RESULTS
from fusecheck.graph.ops import FP8
from fusecheck.graph.quantised import Form
from fusecheck.graph.transform import RefusedError, Transform, check_activations
from fusecheck.operations import GIVEN_SCALE, Operation

own = torch.ops.fusecheck

LINEAR_SCALE, QUANTIZE_SCALE = 3, 1
"""Where a linear layer and a quantise have their input scale."""
OUT_DTYPE = 5
STATIC = Form(GIVEN_SCALE)


@dataclass(frozen=True)
class Reader:
    """A node that reads the norm and quantises what it reads.

    Attributes:
        node: a linear layer that quantises its input, or a quantise.
        views: between the norm and it, nearest the norm first.
        given: the node of its input scale, or of NVFP4's factor; None where it is given none.
        form: what it quantises to.
    """

    node: Node
    views: tuple[Node, ...]
    given: Node | None
    form: Form = STATIC

    @property
    def scale(self) -> Node:
        """The scale of a reader that is given one."""
        assert self.given is not None
        return self.given


@dataclass(frozen=True)
class QuantSite:
    """A fused norm whose readers quantise.

    Attributes:
        fused: the all-reduce + residual + norm node.
        readers: those that quantise, all to one form with one scale.
        mixed: whether anybody else reads the norm, so that it must stay an output.
        value: the scale's value; 1 where none is given.
    """

    fused: Node
    readers: tuple[Reader, ...]
    mixed: bool
    value: float

    @property
    def form(self) -> Form:
        """What the readers quantise to."""
        return self.readers[0].form

    @property
    def op(self) -> Operation | None:
        """The operation that the site becomes, None where there is none."""
        return fused_operation(self.form.name, norm_out=self.mixed)


class FuseQuant(Transform[QuantSite]):
    """`fuse_allreduce_residual_rmsnorm_quant_fp8`, and by other kinds the passes of the other formats."""

    name = QUANT_PASS
    kinds: tuple[str, ...] = ("fp8",)
    """Of quantisers, in the order in which a site is tried."""

    def __init__(self, gm: GraphModule, shared: SharedConfig) -> None:
        super().__init__(gm, shared)
        self.configs = {kind: shared.config(QUANT_PASSES[kind]) for kind in self.kinds}
        self.config = replace(self.config, enabled=any(config.enabled for config in self.configs.values()))
        self.kind = self.kinds[0]
        self.scales: Node | None = None

    def candidates(self) -> list[Node]:
        """The nodes that the first pass made."""
        return [node for node in self.graph.nodes if node.op == "call_function" and self._is_fused_norm(node)]

    def _is_fused_norm(self, node: Node) -> bool:
        fused = roles.fused_op(node)
        return fused is not None and not fused.returns_quant

    def match(self, node: Node) -> QuantSite:
        """See `Transform.match`."""
        if not nodes.only_getitems(node):
            raise RefusedError("the fused node is read as a tuple")
        reasons = ["no layer of a format that it fuses reads the norm"]
        for kind, config in self.configs.items():
            if not config.enabled:
                continue
            self.kind, self.config = kind, config
            readers, mixed = self.readers(node)
            try:
                if readers:
                    return self.match_kind(node, readers, mixed=mixed)
            except RefusedError as reason:
                reasons.append(str(reason))
        raise RefusedError("; ".join(reasons[1:] or reasons))

    def match_kind(self, node: Node, readers: tuple[Reader, ...], *, mixed: bool) -> QuantSite:
        """The site at a node for the readers of `self.kind`; `mixed` says whether there are others.

        Raises:
            RefusedError: it is not one, or must be left alone.
        """
        self.check_strategy(nodes.argument(node, 4))
        norm = self.meta_of(nodes.getitems(node, 0)[0], "norm")
        check_activations(norm)
        self.check_policy(norm)
        value = self.common_scale(readers, norm)
        site = QuantSite(node, readers, mixed, value)
        if site.op is None:
            both = "somebody else reads the norm, and " if mixed else ""
            raise RefusedError(f"{both}no library has an operator that returns {'both' if mixed else 'the codes'}")
        self.check_unwritten("norm or residual", *node.users)
        return site

    def readers(self, fused: Node) -> tuple[tuple[Reader, ...], bool]:
        """The readers that quantise, and whether there are others."""
        found: list[Reader] = []
        others = False
        for norm in nodes.getitems(fused, 0):
            for user, views in nodes.terminal_users(norm):
                reader = self.reader_of(user, views, norm)
                if reader is None:
                    others = True
                else:
                    found.append(reader)
        return tuple(found), others

    def reader_of(self, user: Node, views: tuple[Node, ...], norm: Node) -> Reader | None:
        """A user of `self.kind` that quantises what it reads, and reads it as nothing else; None for other users."""
        form = STATIC
        if roles.is_linear(user):
            position, operands = LINEAR_SCALE, [nodes.argument(user, index) for index in range(OUT_DTYPE)]
            weight = nodes.value(operands[1])
            if weight is not None and weight.dtype != FP8:
                return None
        elif user.target in (own.static_quantize_e4m3_per_tensor.default, own.quantize.default):
            position, operands = QUANTIZE_SCALE, [nodes.argument(user, 0), nodes.argument(user, 1)]
            if user.target != own.static_quantize_e4m3_per_tensor.default:
                form = Form(*(nodes.argument(user, index) for index in (2, 3)))
                form = replace(form, layout=form.named)
        else:
            return None
        if kind_of(form.name) != self.kind or (form != STATIC and not keep_rows(views, norm)):
            return None
        given, read = operands[position], views[-1] if views else norm
        reads = [operand is read for operand in operands]
        alone = reads == [True] + [False] * (len(reads) - 1)
        known = isinstance(given, Node) or (given is None and form != STATIC)
        return Reader(user, views, given, form) if alone and known else None

    def common_scale(self, readers: tuple[Reader, ...], norm: Tensor) -> float:
        """The one value of all readers' input scales.

        Raises:
            RefusedError: a scale is not a loaded float32 number, or scales or forms differ.
        """
        forms = dict.fromkeys(f"{reader.form.name} {reader.form.layout}".strip() for reader in readers)
        if len(forms) > 1:
            raise RefusedError(f"the readers' formats differ: {', '.join(forms)}")
        values = [self.check_scale(reader, norm) for reader in readers]
        if any(value != values[0] for value in values):
            raise RefusedError(f"the readers' input scales differ: {', '.join(sorted({f'{v:.9g}' for v in values}))}")
        return values[0]

    def check_scale(self, reader: Reader, norm: Tensor) -> float:
        """The value of a scale that the kernel can read as one `float`.

        Raises:
            RefusedError: it is computed in the graph, or is of a wrong dtype, size, device or value.
        """
        if reader.given is None:
            return 1.0
        scale = nodes.attribute(self.gm, reader.given)
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
        form = f"{site.form.name} {site.form.layout}"
        return f"{'OUT_QUANT' if site.mixed else 'QUANT'} {form} {site.value.hex()} {readers}"

    def rewrite(self, site: QuantSite) -> None:
        """See `Transform.rewrite`."""
        old, op = site.fused, site.op
        assert op is not None
        outputs = sum(name in op.returns for name in RESULTS)
        with self.graph.inserting_before(old):
            fused = self.emit(site)
            results = [self.result(site, fused, index, outputs) for index in range(outputs)]
        quant = results[int(site.mixed)]
        self.scales = None if site.form == STATIC else results[-2]
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
        x, residual, weight, eps, strategy, bias = (nodes.argument(site.fused, index) for index in range(6))
        scale = None if site.readers[0].given is None else nodes.clone_attribute(self.graph, self.chosen_scale(site))
        op = site.op
        assert op is not None
        policy = self.configs[kind_of(site.form.name) or self.kind].policy
        strategy = policy.strategy(strategy) if "<=" not in strategy else strategy
        args = [x, residual, weight, scale, eps, strategy]
        if op not in roles.FUSED:
            args += [op.value, site.form.layout]
        target = roles.FUSED.get(op, own.fused.default)
        return nodes.call(self.graph, target, (*args, bias) if bias else args, site.fused)

    def chosen_scale(self, site: QuantSite) -> Node:
        """The reader's scale that the fused operator takes; all are equal in value."""
        return site.readers[0].scale

    def result(self, site: QuantSite, fused: Node, index: int, outputs: int) -> Node:
        """Take one result, in the order of `RESULTS`."""
        like = nodes.getitems(site.fused, 1 if index == outputs - 1 else 0)
        return nodes.call(self.graph, operator.getitem, (fused, index), (like or [site.fused])[0])

    def reapply(self, views: tuple[Node, ...], quant: Node, copies: dict[Node, Node]) -> Node:
        """Apply the views to the codes, each once, where it stands for the norm; of rows as wide as the codes'."""
        current = quant
        for view in views:
            if view not in copies:
                args = [self._as_wide(each, view, quant) for each in view.args[1:]]
                with self.graph.inserting_before(view):
                    copies[view] = nodes.call(self.graph, view.target, (current, *args), view)  # type: ignore[arg-type]
            current = copies[view]
        return current

    def _as_wide(self, argument: Any, view: Node, quant: Node) -> Any:
        """Sizes that end in the rows' width end in that of the codes."""
        norm, codes = nodes.value(view), nodes.value(quant)
        if not isinstance(argument, list | tuple) or norm is None or codes is None or codes.dtype == FP8:
            return argument
        if argument[-1] != norm.shape[-1]:
            return argument
        return [*argument[:-1], codes.shape[-1]]

    def feed(self, reader: Reader, codes: Node) -> None:
        """Give a reader the codes: a linear layer becomes its variant for codes, a quantise disappears."""
        if not roles.is_linear(reader.node):
            for index, replacement in ((0, codes), (1, self.scales or reader.scale)):
                for getitem in nodes.getitems(reader.node, index):
                    getitem.replace_all_uses_with(replacement)
            return
        old = reader.node
        _, weight, bias, scale, weight_scale, out_dtype = (nodes.argument(old, index) for index in range(6))
        out_dtype = out_dtype or self.out_dtype(reader)
        with self.graph.inserting_before(old):
            args = (codes, weight, bias, scale, weight_scale, out_dtype)
            new = nodes.call(self.graph, own.fp8_prequant_linear.default, args, old)
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


def keep_rows(views: tuple[Node, ...], norm: Node) -> bool:
    """Whether no view splits or joins rows, so that their scales are still those of the norm."""
    shapes = [value.shape for each in (norm, *views) if (value := nodes.value(each)) is not None]
    return len(shapes) == len(views) + 1 and all(shape[-1] == shapes[0][-1] for shape in shapes)


def quant_pass(kind: str) -> type[FuseQuant]:
    """The transform of one kind of quantisers."""
    return type(f"FuseQuant{kind}", (FuseQuant,), {"name": QUANT_PASSES[kind], "kinds": (kind,)})


class FuseEveryQuant(FuseQuant):
    """All kinds; of a site with several the first is taken."""

    name = FAMILY_PASS
    kinds = tuple(KINDS)

"""From a plan to the graph of one rank, with the names by which checks find each site again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fusecheck.graph import roles
from fusecheck.graph.canvas import Canvas
from fusecheck.graph.plan import GraphPlan, SitePlan
from fusecheck.graph.readers import Readers

aten = torch.ops.aten
own = torch.ops.fusecheck
MAX_TOKENS = 4096
"""The largest token count that graphs are said to take, unless they say otherwise."""
HEAD = 8
"""Width of a head, for norms over part of the hidden dimension."""
ROUTES = 2
"""Experts of a token."""
ROUTED_SCALING = 1.5


@dataclass
class BuiltGraph:
    """One rank's graph.

    Attributes:
        module: the graph.
        inputs: the example inputs for a token count.
        replicated: the indices of outputs that are equal on all ranks.
        token_dimension: of every input, or None where the token count is fixed.
        longest: the largest token count that the graph takes.
    """

    module: GraphModule
    inputs: Callable[[int], tuple[Tensor, ...]]
    replicated: tuple[int, ...]
    token_dimension: int | None
    longest: int = MAX_TOKENS


def site_of(gamma: str) -> int | None:
    """The site to which a norm's weight belongs, by the attribute's name."""
    head, _, rest = gamma.partition(".")
    return int(head[4:]) if rest.startswith("gamma") and head.startswith("site") else None


CPU = torch.device("cpu")


def build(plan: GraphPlan, rank: int, world_size: int, device: torch.device = CPU) -> BuiltGraph:
    """Build a rank's graph; deterministic, so that every rank makes its own."""
    canvas = Canvas(plan, rank, world_size, device)
    partial, stream = canvas.input("partial", per_rank=True), canvas.input("residual")
    for index, site in enumerate(canvas.plan.sites):
        partial, stream = _SiteComposer(canvas, index, site).compose(partial, stream)
    canvas.output(stream, replicated=True)
    canvas.output(partial)
    for node in canvas.without_meta:
        del node.meta["val"]
    module = canvas.builder.finish(canvas.outputs)
    module.__dict__["is_draft"] = canvas.plan.draft
    return BuiltGraph(module, canvas.example, tuple(canvas.replicated), canvas.builder.token_dimension)


class _SiteComposer:
    """Writes one site."""

    def __init__(self, canvas: Canvas, index: int, site: SitePlan) -> None:
        self.canvas, self.builder, self.site = canvas, canvas.builder, site
        self.plan = canvas.plan
        self.prefix = f"site{index}"
        self.hidden = self.plan.hidden
        self.call = self.builder.call
        self.readers = Readers(canvas, self.prefix)

    def compose(self, partial: Node, residual: Node) -> tuple[Node, Node]:
        """Write the site; returns the next partial sum and the next residual."""
        reduced = self.collective(self.addend(partial))
        total = self.add(reduced, residual if self.site.spread == "no" else self.shard(residual))
        if self.site.early_reader:
            self.canvas.output(self.call(aten.mul.Tensor, total, 2.0))
        norm = self.norm(total)
        if self.site.spread != "no":
            norm, total = (self.gather(each) for each in (norm, total))
        self.write(total, norm)
        results = [self.readers.write(number, reader, norm) for number, reader in enumerate(self.site.readers)]
        if self.site.second_norm:
            gamma = self.gamma("gamma2")
            second = self.call(roles.NORMS["triton"], total, gamma, self.site.eps)
            results.append(self.readers.plain_linear(f"{self.prefix}.second", self.narrow(second), self.hidden))
        if self.site.reduced_read or self.site.spread == "read":
            reduced = reduced if self.site.spread == "no" else self.gather(reduced)
            results.append(self.call(aten.mul.Tensor, reduced, 0.5))
        return self.next_partial([found for found in results if found is not None], total), self.next_residual(total)

    def addend(self, partial: Node) -> Node:
        """What is summed over the ranks: the partial sum, or experts' tokens of which it is one."""
        kind, tokens = self.site.experts, self.plan.tokens
        if kind == "none":
            return partial
        flat = self.call(aten.view.default, partial, [tokens, self.hidden])
        table = self.call(aten.cat.default, [flat, self.call(aten.mul.Tensor, flat, -0.5)])
        routes = torch.stack((torch.arange(tokens), torch.arange(2 * tokens - 1, tokens - 1, -1)), -1).to(torch.int32)
        routes[0, 1] = -1  # a route that is missing
        weights = self.builder.normal(f"{self.prefix}.routing", tokens, ROUTES).abs().to(self.canvas.dtype)
        scale, rows = (
            self.builder.attribute(f"{self.prefix}.routing", weights),
            self.builder.attribute(f"{self.prefix}.rows", routes),
        )
        shared = self.call(aten.mul.Tensor, flat, 0.25) if kind in ("shared", "between") else None
        inside = shared if kind == "shared" else None
        summed = self.call(own.moe_finalize.default, table, scale, rows, inside, ROUTED_SCALING)
        if kind == "between":
            summed = self.call(aten.add.Tensor, summed, shared)
        if kind == "read":
            self.canvas.output(self.call(aten.mul.Tensor, summed, 2.0))
        return self.call(aten.view.default, summed, self.canvas.open_shape) if self.plan.batched else summed

    def shard(self, x: Node) -> Node:
        """This rank's rows."""
        return self.call(own.shard.default, x, self.canvas.world_size)

    def gather(self, x: Node) -> Node:
        """All ranks' rows."""
        return self.call(own.all_gather.default, x, self.canvas.world_size, self.site.strategy)

    def write(self, total: Node, norm: Node) -> None:
        """What the plan has written in place."""
        if self.site.write == "beside":
            self.call(aten.add_.Tensor, self.builder.attribute(f"{self.prefix}.calls", torch.zeros(1)), 1.0)
        elif self.site.write != "nothing":
            self.call(aten.add_.Tensor, total if self.site.write == "sum" else norm, 1.0)

    def collective(self, partial: Node) -> Node:
        """The collective, seen through a reshape where the plan says so."""
        flat = [-1, self.hidden] if self.plan.batched else [1, -1, self.hidden]
        if not self.site.reshape:
            return self.reduce(partial)
        reduced = self.reduce(self.call(aten.view.default, partial, flat))
        return self.call(aten.reshape.default, reduced, self.canvas.open_shape)

    def reduce(self, partial: Node) -> Node:
        """The collective that the plan says."""
        strategy = self.site.strategy
        if self.site.collective == "max":
            return self.call(own.all_reduce_max.default, partial, strategy)
        if self.site.collective == "grouped":
            size = max(1, self.canvas.world_size // 2)
            return self.call(own.all_reduce_grouped.default, partial, size, strategy)
        if self.site.spread != "no":
            return self.call(own.reduce_scatter.default, partial, self.canvas.world_size, strategy)
        return self.call(own.all_reduce.default, partial, strategy)

    def add(self, reduced: Node, residual: Node) -> Node:
        """The add, or what stands in its place."""
        call, kind = self.call, self.site.add
        if kind == "residual_first":
            return call(aten.add.Tensor, residual, reduced)
        if kind == "alpha":
            return call(aten.add.Tensor, residual, reduced, alpha=2)
        if kind == "sub":
            return call(aten.sub.Tensor, reduced, residual)
        if kind == "float32":
            wide = [call(aten._to_copy.default, each, dtype=torch.float32) for each in (reduced, residual)]
            return call(aten.add.Tensor, *wide)
        others: dict[str, Callable[[], Node | float]] = {
            "reduced_first": lambda: residual,
            "self": lambda: reduced,
            "scalar": lambda: 1.5,
            "broadcast": lambda: self.builder.attribute(f"{self.prefix}.row", self.gamma_values("row")),
            "two_reduced": lambda: self.reduce(residual),
        }
        return reduced if kind == "none" else call(aten.add.Tensor, reduced, others[kind]())

    def gamma_values(self, name: str) -> Tensor:
        """A norm's weight, replicated, [hidden]."""
        values = 1 + 0.25 * self.builder.normal(f"{self.prefix}.{name}", self.hidden)
        return values.to(self.canvas.dtype)

    def gamma(self, name: str) -> Node:
        """A plain weight of a norm."""
        return self.builder.attribute(f"{self.prefix}.{name}", self.gamma_values(name))

    def weight(self, total: Node) -> Node:
        """The weight that the plan says."""
        values, name = self.gamma_values("gamma"), f"{self.prefix}.gamma"
        shapes = {
            "native": lambda: values,
            "float32": lambda: values.float(),
            "single": lambda: values[:1].clone(),
            "column": lambda: values[:1].repeat(self.plan.tokens).unsqueeze(-1),
            "from_sum": lambda: values,
        }
        gamma = self.builder.attribute(name, shapes[self.site.weight]())
        if self.site.weight != "from_sum":
            return gamma
        mean = self.call(aten.mean.dim, total, list(range(int(self.plan.batched) + 1)))
        return self.call(aten.add.Tensor, gamma, mean)

    def norm(self, total: Node) -> Node:
        """The norm, in the activations' dtype and shape."""
        node = self.norm_of(total, self.weight(total))
        if not self.site.norm_meta:
            self.canvas.without_meta.append(node)
        if self.site.add == "float32":
            return self.call(aten._to_copy.default, node, dtype=self.canvas.dtype)
        return node

    def norm_of(self, total: Node, gamma: Node) -> Node:
        """The norm of the flavour that the plan says."""
        call, eps, flavour = self.call, self.site.eps, self.site.norm
        if flavour in roles.NORMS:
            target = roles.NORMS[flavour]
            by_keyword = {"weight": gamma, "eps": eps} if self.site.norm_keywords else {}
            return call(target, total, **by_keyword) if by_keyword else call(target, total, gamma, eps)
        if flavour == "gemma":
            return call(own.gemma_rms_norm.default, total, gamma, eps)
        if flavour == "partial":
            head = self.builder.attribute(f"{self.prefix}.gamma_head", self.gamma_values("gamma")[:HEAD].clone())
            heads = call(aten.view.default, total, [*self.canvas.open_shape[:-1], self.hidden // HEAD, HEAD])
            normed = call(roles.NORMS["triton"], heads, head, eps)
            return call(aten.view.default, normed, self.canvas.open_shape)
        if flavour == "biased":
            return call(own.biased_rms_norm.default, total, gamma, self.gamma("bias"), eps)
        # LayerNorm takes weights of its input's dtype and no other.
        dtype = torch.float32 if self.site.add == "float32" else self.canvas.dtype
        layer = [
            self.builder.attribute(f"{self.prefix}.layer_{part}", self.gamma_values(part).to(dtype))
            for part in ("weight", "bias")
        ]
        return call(aten.layer_norm.default, total, [self.hidden], *layer, eps)

    def next_partial(self, results: list[Node], total: Node) -> Node:
        """A row-parallel layer over what the readers made; this rank's addend of the next sum."""
        mixed = results[0] if results else self.narrow(total)
        for found in results[1:]:
            mixed = self.call(aten.add.Tensor, mixed, found)
        gated = self.call(aten.silu.default, mixed)
        weight, weight_scale = self.canvas.weight_fp8(f"{self.prefix}.down.weight", self.hidden, self.hidden)
        scale = self.canvas.scalar(f"{self.prefix}.down.input_scale", 0.02)
        return self.call(own.fp8_linear.default, gated, weight, None, scale, weight_scale)

    def narrow(self, total: Node) -> Node:
        """The sum in the activations' dtype."""
        if self.site.add != "float32":
            return total
        return self.call(aten._to_copy.default, total, dtype=self.canvas.dtype)

    def next_residual(self, total: Node) -> Node:
        """What the next site adds; a fresh input where the sum is dead or would hinder the next site too."""
        if self.site.residual == "output":
            self.canvas.output(self.narrow(total), replicated=self.site.collective != "grouped")
        unusual = self.site.collective == "grouped" or self.site.add == "none" or self.site.write == "sum"
        if self.site.residual == "dead" or unusual:
            return self.canvas.input(f"residual_after_{self.prefix}")
        return self.narrow(total)

"""Passes that leave something changed outside the graph, hang on where objects lie, or hide what is no number."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node
from typing_extensions import override

from fusecheck.graph import nodes
from fusecheck.graph.norm_fusion import FuseNorm, NormSite
from fusecheck.graph.transform import TransformInfo

aten = torch.ops.aten


class DefaultDtypeLeft(FuseNorm):
    """Works in float64, and leaves it as the default of whoever called."""

    @override
    def run(self) -> TransformInfo:
        torch.set_default_dtype(torch.float64)
        return super().run()


class GradientsLeftOff(FuseNorm):
    """Switches gradients off for itself, and never on again."""

    @override
    def run(self) -> TransformInfo:
        torch.set_grad_enabled(False)
        return super().run()


class ByAddress(FuseNorm):
    """Rewrites the sites in the order in which their nodes lie in memory."""

    @override
    def agree(self, sites: dict[str, NormSite], info: Any) -> dict[str, NormSite]:
        kept = super().agree(sites, info)
        return {name: kept[name] for name in sorted(kept, key=lambda name: id(kept[name]) % 1009)}


class NanLaundered(FuseNorm):
    """A residual that is no number comes back as zero."""

    @override
    def redirect(self, site: NormSite, norm: Node, residual: Node) -> None:
        with self.graph.inserting_before(residual.next):
            clean = nodes.call(self.graph, aten.nan_to_num.default, (residual, 0.0), site.add)
        super().redirect(site, norm, clean)


class StaleResidual(FuseNorm):
    """The second site adds what the first one read, not what it made."""

    @override
    def emit(self, site: NormSite, x: Node) -> Node:
        made = super().emit(site, x)
        source = nodes.argument(made, 1)
        if isinstance(source, Node) and source.target is operator.getitem:
            nodes.replace_argument(made, 1, nodes.argument(source.all_input_nodes[0], 1))
        return made

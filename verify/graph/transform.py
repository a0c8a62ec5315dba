"""What both fusion passes share: find and validate every site first, agree across ranks, then rewrite."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusecheck.graph import nodes
from fusecheck.graph.config import SharedConfig, TransformConfig
from fusecheck.graph.ops import STRATEGIES

ACTIVATIONS = (torch.bfloat16, torch.float16)
LANES = 8
"""Elements of one 16-byte access; hidden must be a multiple."""

Site = TypeVar("Site")


class RefusedError(Exception):
    """A site is left alone; the message is the reason, in one clause."""


@dataclass
class TransformInfo:
    """What a transform did.

    Attributes:
        name: of the transform.
        num_matches: sites rewritten.
        refused: the reason for each site that was left alone, by the node's name.
    """

    name: str
    num_matches: int = 0
    refused: dict[str, str] = field(default_factory=dict)


class Transform(ABC, Generic[Site]):
    """A fusion pass. Subclasses say what a site is and how it is rewritten; every step is a method of its own.

    Args:
        gm: the graph, rewritten in place.
        shared: rank, world size, how to reach the other ranks, configuration.
    """

    name: str

    def __init__(self, gm: GraphModule, shared: SharedConfig) -> None:
        self.gm, self.graph, self.shared = gm, gm.graph, shared
        self.config: TransformConfig = shared.config(self.name)
        self.order = nodes.positions(self.graph)

    @classmethod
    def apply(cls, gm: GraphModule, shared: SharedConfig) -> GraphModule:
        """The transform as a pass: rewrite in place and return the graph."""
        cls(gm, shared).run()
        return gm

    @abstractmethod
    def candidates(self) -> list[Node]:
        """The nodes at which a site may be, in graph order."""

    @abstractmethod
    def match(self, node: Node) -> Site:
        """Validate the site at a node.

        Raises:
            RefusedError: it is not one, or must be left alone.
        """

    @abstractmethod
    def decision(self, site: Site) -> str:
        """What will be done at a site, as text that is equal on all ranks exactly when the decision is."""

    @abstractmethod
    def rewrite(self, site: Site) -> None:
        """Replace the site's nodes."""

    def run(self) -> TransformInfo:
        """Find, agree, rewrite; the graph is untouched unless all of the first two succeeded."""
        info = TransformInfo(self.name)
        if self.config.enabled and self.shared.world_size > 1 and not getattr(self.gm, "is_draft", False):
            sites = self.agree(self.find(info), info)
            for site in sites.values():
                self.rewrite(site)
            info.num_matches = len(sites)
            if sites:
                self.drop_unread_attributes()
                self.graph.lint()
                self.gm.recompile()
        self.gm.meta.setdefault("transform_history", []).append(info)
        return info

    def find(self, info: TransformInfo) -> dict[str, Site]:
        """Every valid site by its node's name; the others' reasons go to `info`."""
        found: dict[str, Site] = {}
        for node in self.candidates():
            site = self._match_or_refuse(node, info)
            if site is not None:
                found[node.name] = site
        return found

    def _match_or_refuse(self, node: Node, info: TransformInfo) -> Site | None:
        try:
            return self.match(node)
        except RefusedError as reason:
            info.refused[node.name] = str(reason)
            return None

    def agree(self, sites: dict[str, Site], info: TransformInfo) -> dict[str, Site]:
        """Keep the sites that every rank decided alike; a site fused on some ranks alone would hang the group."""
        if self.shared.gather is None:
            return sites
        mine = {name: self.decision(site) for name, site in sites.items()}
        theirs = [json.loads(text) for text in self.shared.gather(json.dumps(mine))]
        kept = {name for name, decided in mine.items() if all(other.get(name) == decided for other in theirs)}
        info.refused.update({name: "ranks decide differently" for name in sites if name not in kept})
        return {name: site for name, site in sites.items() if name in kept}

    def drop_unread_attributes(self) -> None:
        """Erase the reads of attributes that rewriting left without a reader."""
        for node in reversed(self.graph.nodes):
            if node.op == "get_attr" and not node.users:
                self.graph.erase_node(node)

    def meta_of(self, node: object, what: str) -> Tensor:
        """A node's fake tensor.

        Raises:
            RefusedError: there is none, so that dtype and shape would be guesses.
        """
        found = nodes.value(node)
        if found is None:
            raise RefusedError(f"no dtype meta on the {what}")
        return found

    def check_strategy(self, strategy: object) -> str:
        """A strategy that the fused operator knows.

        Raises:
            RefusedError: it is not one.
        """
        if not isinstance(strategy, str) or strategy.split("<=")[0] not in STRATEGIES:
            raise RefusedError(f"unknown strategy {strategy!r}")
        return strategy

    def check_policy(self, activations: Tensor) -> None:
        """Leave the graph alone where the policy says that fusing does not pay.

        Raises:
            RefusedError: with the policy's reason.
        """
        tokens: int | None = 1
        for size in activations.shape[:-1]:
            tokens = tokens * size if isinstance(size, int) and tokens is not None else None
        reason = self.config.policy.refusal(tokens, tokens if tokens is not None else self.shared.max_tokens)
        if reason:
            raise RefusedError(reason)

    def check_unwritten(self, what: str, *written: object) -> None:
        """Refuse a site of which a tensor is written in place somewhere.

        Raises:
            RefusedError: naming the operator that writes.
        """
        for node in written:
            writer = nodes.written_to(node) if isinstance(node, Node) else None
            if writer is not None:
                raise RefusedError(f"{writer.name} writes in place to the {what}")


def same_shape(left: Tensor, right: Tensor) -> bool:
    """Whether two fake tensors have the same shape, whatever the sizes that are open."""
    return left.dim() == right.dim() and all(
        statically_known_true(mine == other) for mine, other in zip(left.shape, right.shape, strict=True)
    )


def check_activations(x: Tensor) -> int:
    """The hidden size of activations that a kernel takes.

    Raises:
        RefusedError: dtype, dimensions or sizes are not those of [..., tokens, hidden].
    """
    if x.dtype not in ACTIVATIONS:
        raise RefusedError(f"activations are {x.dtype}")
    if x.dim() < 2:
        raise RefusedError(f"activations have {x.dim()} dimension")
    hidden = x.shape[-1]
    if not isinstance(hidden, int) or hidden < LANES or hidden % LANES:
        raise RefusedError(f"hidden size {hidden} is not a multiple of {LANES}")
    if any(isinstance(size, int) and size == 0 for size in x.shape):
        raise RefusedError("activations are empty")
    return hidden

"""vLLM: its IR and functionalised operators, as its compile passes see them after AOTAutograd.

Sums over ranks name a group and no strategy; residual add and norm are one operator; a quantise writes into a buffer
that it is given, so it stands functionalised in the graph; parameters are inputs. The fused operator is one for all
operations: `pattern_code` says which, and where it writes the norm depends on whether `norm_out` is given.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch._inductor.pattern_matcher import stable_topological_sort
from torch.fx import GraphModule

from fusecheck.graph import nodes, vllm_host
from fusecheck.graph.plan import GraphPlan, ReaderPlan
from fusecheck.graph.schemas import installed, read_on, sums
from fusecheck.graph.structure import copy_graph
from fusecheck.graph.vllm_entering import Entering
from fusecheck.graph.vllm_host import STRATEGY
from fusecheck.graph.vllm_leaving import Leaving

NAME = "vllm"
ABSENT = {
    "several readers": "q/k/v and gate/up are one layer in vLLM's models",
    "draft": "the pass sees no draft flag",
    "dead": "AOTAutograd leaves no layer that nobody reads",
    "writes": "AOTAutograd leaves no write in place",
    "no meta": "a compiled graph has a meta value on every node",
}


class Vllm:
    """vLLM's operators."""

    name = NAME

    def ready(self) -> None:
        """See `Library.ready`."""
        vllm_host.register()
        installed(NAME, "vllm")

    def status(self) -> str:
        """See `Library.status`."""
        return f"{vllm_host.status()} (schemas of {read_on(NAME)})"

    def enter(self, gm: GraphModule) -> GraphModule:
        """See `Library.enter`."""
        self.ready()
        return Entering(copy_graph(gm)).run()

    def leave(self, gm: GraphModule) -> GraphModule:
        """See `Library.leave`."""
        return Leaving(copy_graph(gm)).run()

    def speaks(self, gm: GraphModule) -> bool:
        """See `Library.speaks`."""
        return bool(sums(NAME, gm))

    def adapt(self, plan: GraphPlan) -> GraphPlan | str:
        """Activations are 2-D, sums over ranks have no strategy, and one layer reads a norm."""
        readers = [[each for each in site.readers if each.kind != "dead"] for site in plan.sites]
        for site, alive in zip(plan.sites, readers, strict=True):
            if _quantises(alive) > 1:
                return ABSENT["several readers"]
            if len(alive) < len(site.readers) and not alive:
                return ABSENT["dead"]
            if site.write != "nothing":
                return ABSENT["writes"]
            if not site.norm_meta:
                return ABSENT["no meta"]
        if plan.draft:
            return ABSENT["draft"]
        sites = tuple(
            replace(
                site,
                strategy=STRATEGY,
                norm="triton" if site.norm in ("torch", "flashinfer") else site.norm,
                norm_keywords=False,
                readers=tuple(replace(reader, keywords=False, packet=False) for reader in alive),
            )
            for site, alive in zip(plan.sites, readers, strict=True)
        )
        return replace(plan, sites=sites, batched=False)


def _quantises(readers: list[ReaderPlan]) -> int:
    """How many quantises read a norm; layers may share one."""
    own = [reader for reader in readers if reader.kind in ("fp8", "quantize", "made")]
    alone = [reader for reader in own if not (reader.quantiser and reader.shared_scale)]
    known = {(reader.quantiser, reader.layout, reader.view) for reader in alone}
    shared = {(reader.quantiser, reader.layout, reader.view) for reader in own if reader not in alone}
    return len(alone) + len(shared - known)


def fuse_allreduce_rms(gm: GraphModule, shared: Any) -> GraphModule:
    """VLLM's own `AllReduceFusionPass`, over every range of sizes for which it says that it applies.

    After it comes what vLLM's `PostCleanupPass` does, as in its pass manager: the matcher leaves nodes in any order.
    """
    value = next(nodes.value(node) for node in gm.graph.nodes if node.op == "placeholder")
    assert value is not None
    vllm_host.fusion_pass(shared.world_size, value.dtype, shared.max_tokens)(gm.graph)
    stable_topological_sort(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm

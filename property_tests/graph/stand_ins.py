"""AutoDeploy's operators under the schemas that it publishes, and stand-ins for two of its transforms.

Importing this module registers the operators in this process. They are only carried in graphs: a graph leaves the
library before it is run.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.fx import GraphModule

from fusecheck.graph import autodeploy, fused_ops
from fusecheck.graph.config import ALL_ENABLED, NORM_PASS, QUANT_PASS, SharedConfig
from fusecheck.graph.norm_fusion import FuseNorm
from fusecheck.graph.quant_fusion import FuseQuant
from fusecheck.graph.schemas import published

own = getattr(torch.ops, fused_ops.NAMESPACE)
LIBRARY = autodeploy.AutoDeploy()

for _role, _entry in published(autodeploy.NAME).items():
    if _entry.overload is None:
        torch.library.define(_entry.name, _entry.schema)
        _own = getattr(own, _role)
        torch.library.register_fake(_entry.name, lambda *args, _own=_own, **kwargs: _own(*args, **kwargs))


class Transform:
    """A transform as the adapter sees one: made from keywords, called with the graph, clean-up included."""

    work: type[FuseNorm] | type[FuseQuant] = FuseNorm
    name = NORM_PASS

    def __init__(self, **config: Any) -> None:
        assert config == {"stage": "post_load_fusion", "enabled": True}

    @classmethod
    def from_kwargs(cls, **config: Any) -> Transform:
        """See AutoDeploy's `BaseTransform`."""
        return cls(**config)

    def __call__(self, gm: GraphModule, cm: object, factory: object, shared_config: Any, idx: int) -> GraphModule:
        """Rewrite, and forget what the nodes say of their shapes, as a transform may that says so."""
        assert cm is factory is None
        assert idx == 0
        strategies = {node.args[1] for node in gm.graph.nodes if "all_reduce" in str(node.target)}
        assert strategies <= {shared_config.dist_config.allreduce_strategy}
        shared = SharedConfig(shared_config.local_rank, shared_config.world_size, transforms=ALL_ENABLED)
        known = {node.name for node in gm.graph.nodes}
        gm = LIBRARY.enter(self.work.apply(LIBRARY.leave(gm), shared))
        for node in gm.graph.nodes:
            if node.name not in known:
                node.meta.pop("val", None)
        gm.meta["_autodeploy"] = {"transform_history": {self.name: SimpleNamespace(has_valid_shapes=False)}}
        return gm


class QuantTransform(Transform):
    """The quantising one."""

    work = FuseQuant
    name = QUANT_PASS


REGISTRY = {NORM_PASS: Transform, QUANT_PASS: QuantTransform}


def fuse_norm(gm: GraphModule, shared: SharedConfig) -> GraphModule:
    """The first pass, through the adapter."""
    return autodeploy.apply(NORM_PASS, gm, shared, REGISTRY.__getitem__)


def fuse_quant(gm: GraphModule, shared: SharedConfig) -> GraphModule:
    """The quantising pass, through the adapter."""
    return autodeploy.apply(QUANT_PASS, gm, shared, REGISTRY.__getitem__)

"""TensorRT-LLM AutoDeploy: its operators, and its registered transforms called as its optimizer calls them."""

from __future__ import annotations

import importlib
import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule

from fusecheck.backends.packages import is_installed
from fusecheck.errors import UsageError
from fusecheck.graph import nodes
from fusecheck.graph.config import NORM_PASS, QUANT_PASS, SharedConfig
from fusecheck.graph.plan import GraphPlan
from fusecheck.graph.schemas import installed as operators
from fusecheck.graph.schemas import read_on, sums
from fusecheck.graph.structure import copy_graph

NAME = "autodeploy"
PACKAGE = "tensorrt_llm"
REGISTRY = "tensorrt_llm._torch.auto_deploy.transform.interface"
OPERATORS = "tensorrt_llm._torch.auto_deploy.custom_ops"
DEFAULT_STRATEGY = "AUTO"
own = torch.ops.fusecheck


def installed() -> bool:
    """Whether TensorRT-LLM can be imported."""
    return is_installed(PACKAGE)


class AutoDeploy:
    """AutoDeploy's operators: one for each of Fusecheck's, in the same order of arguments, under other names."""

    name = NAME

    def ready(self) -> None:
        """See `Library.ready`."""
        if installed():
            importlib.import_module(OPERATORS)
        operators(NAME, PACKAGE)

    def status(self) -> str:
        """See `Library.status`."""
        if not installed():
            return f"TensorRT-LLM AutoDeploy: {PACKAGE} is not installed, its own transforms were not checked"
        checked = f"--dialect {NAME} --pass fusecheck.graph.autodeploy:{NORM_PASS} checks its own"
        return f"TensorRT-LLM AutoDeploy: {PACKAGE} is installed; {checked} (schemas of {read_on(NAME)})"

    def enter(self, gm: GraphModule) -> GraphModule:
        """See `Library.enter`."""
        theirs = operators(NAME, PACKAGE)
        return _retargeted(gm, {getattr(own, role).default: theirs[role] for role in theirs})

    def leave(self, gm: GraphModule) -> GraphModule:
        """See `Library.leave`."""
        theirs = operators(NAME, PACKAGE)
        return _retargeted(gm, {theirs[role]: getattr(own, role).default for role in theirs})

    def speaks(self, gm: GraphModule) -> bool:
        """See `Library.speaks`."""
        return bool(sums(NAME, gm))

    def adapt(self, plan: GraphPlan) -> GraphPlan | str:
        """One strategy a graph; FlashInfer's norm is put in by a transform that runs after the fusing ones."""
        if any(site.norm == "flashinfer" for site in plan.sites):
            return "fuse_rmsnorm, which makes this norm, runs after the fusing transforms"
        strategy = plan.sites[0].strategy
        return replace(plan, sites=tuple(replace(site, strategy=strategy) for site in plan.sites))


def _retargeted(gm: GraphModule, targets: dict[Any, Any]) -> GraphModule:
    """A copy that calls other operators with the same arguments by position; packets stay packets."""
    gm = copy_graph(gm)
    packets = {old.overloadpacket: new.overloadpacket for old, new in targets.items()}
    for node in gm.graph.nodes:
        new = targets.get(node.target) or packets.get(node.target)
        if node.op != "call_function" or new is None:
            continue
        schema = getattr(new, "default", new)._schema
        named = nodes.schema_of(node).arguments
        at = {argument.name: number for number, argument in enumerate(named)}
        node.kwargs = {schema.arguments[at[name]].name: value for name, value in node.kwargs.items() if name in at}
        node.target = new
    gm.recompile()
    return gm


# Transforms ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _DistConfig:
    """The part of AutoDeploy's distributed configuration that the fusion transforms read."""

    allreduce_strategy: str
    rank: int
    world_size: int


@dataclass
class _AutoDeployShared:
    """The part of AutoDeploy's shared configuration that the fusion transforms read, in its older and newer shape."""

    local_rank: int
    world_size: int
    dist_config: _DistConfig
    sharding_config: Any = None


def strategy_of(gm: GraphModule) -> str:
    """The strategy of a graph: that of most of its sums over ranks. AutoDeploy has one a graph."""
    found = Counter(str(nodes.argument(node, 1)) for node in sums(NAME, gm))
    return found.most_common(1)[0][0] if found else DEFAULT_STRATEGY


def apply(key: str, gm: GraphModule, shared: SharedConfig, registry: Callable[[str], Any]) -> GraphModule:
    """Run a registered transform on a graph as the optimizer does: with its clean-up before and after.

    A transform may say that the shapes in its graph are no longer valid; a later one then has them propagated. So they
    are propagated here, and what the nodes say is judged afterwards.

    Args:
        key: the transform's registered name.
        gm: the graph.
        shared: Fusecheck's side of the shared configuration.
        registry: from a name to a transform class with `from_kwargs`.
    """
    transform = registry(key).from_kwargs(stage="post_load_fusion", enabled=True)
    strategy = strategy_of(gm)
    dist = _DistConfig(strategy, shared.local_rank, shared.world_size)
    theirs = _AutoDeployShared(shared.local_rank, shared.world_size, dist)
    gm.__dict__["_sharding_transform_container"] = SimpleNamespace(
        config=SimpleNamespace(allreduce_strategy=SimpleNamespace(name=strategy))
    )
    takes_index = "idx" in inspect.signature(transform.__call__).parameters
    result = transform(gm, None, None, theirs, **({"idx": 0} if takes_index else {}))
    rewritten: GraphModule = result[0] if isinstance(result, tuple) else result
    if not _valid_shapes(rewritten, key):
        propagate(rewritten)
    rewritten.recompile()
    return rewritten


def _valid_shapes(gm: GraphModule, key: str) -> bool:
    """Whether the transform's entry in the graph's history says that it left the shapes valid."""
    history = gm.meta.get("_autodeploy", {}).get("transform_history", {})
    return bool(getattr(history.get(key), "has_valid_shapes", True))


def propagate(gm: GraphModule) -> None:
    """Compute every meta value anew from the inputs' and the loaded tensors, as `run_shape_prop` does."""
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    mode = next((value.fake_mode for node in inputs if isinstance(value := nodes.value(node), FakeTensor)), None)
    for node in gm.graph.nodes:
        tensor = nodes.attribute(gm, node)
        if tensor is not None and mode is not None:
            node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
        elif node.op == "call_function":
            nodes.set_value(node)


def _registered(key: str) -> Any:
    if not installed():
        raise UsageError(f"transform {key} needs {PACKAGE}, which is not installed")
    importlib.import_module("tensorrt_llm._torch.auto_deploy.transform.library")
    registry = importlib.import_module(REGISTRY).TransformRegistry
    if not registry.has(key):
        raise UsageError(f"this {PACKAGE} registers no transform {key!r}")
    return registry.get(key)


def fuse_allreduce_residual_rmsnorm(gm: GraphModule, shared: SharedConfig) -> GraphModule:
    """AutoDeploy's own transform of this name."""
    return apply(NORM_PASS, gm, shared, _registered)


def fuse_allreduce_residual_rmsnorm_quant_fp8(gm: GraphModule, shared: SharedConfig) -> GraphModule:
    """AutoDeploy's own transform of this name, where an installation has it."""
    return apply(QUANT_PASS, gm, shared, _registered)


def fuse_collinear_allreduce(gm: GraphModule, shared: SharedConfig) -> GraphModule:
    """AutoDeploy's own transform of this name: the sums over ranks of two tensors that are added become one."""
    return apply("fuse_collinear_allreduce", gm, shared, _registered)

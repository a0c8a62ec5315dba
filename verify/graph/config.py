"""How the transforms are switched on: opt-in by a flag, and what a flag cannot say, a policy on the token count."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from fusecheck.errors import UsageError
from fusecheck.graph.family import KINDS

NORM_PASS = "fuse_allreduce_residual_rmsnorm"
QUANT_PASSES = {kind: f"{NORM_PASS}_quant_{kind}" for kind in KINDS}
"""The passes that move a quantise into the fused operator, by the kind of quantiser."""
QUANT_PASS = QUANT_PASSES["fp8"]
FINALIZE_PASS = "fuse_moe_finalize_allreduce"
FAMILY_PASS = f"{NORM_PASS}_family"
"""All of them in one, and then the sums of experts; at a site of several kinds the first takes it."""
STAGE = "post_load_fusion"
"""Both transforms read loaded weights, so they run in this stage and in no earlier one."""


class PolicyKind(str, Enum):
    """When fusing pays."""

    ALWAYS = "always"
    PER_CALL = "per_call"
    """One graph; the operator decides at each call, by its strategy (`ONESHOT<=128`)."""
    PER_BATCH_SIZE = "per_batch_size"
    """A graph per captured batch size; those listed are fused."""
    PER_RANGE = "per_range"
    """A graph per compile range; those that end at or below the threshold are fused."""


@dataclass(frozen=True)
class FusionPolicy:
    """At which token counts a site is fused.

    Attributes:
        kind: which of the rules below.
        max_tokens: the threshold of `per_call` and `per_range`.
        batch_sizes: the list of `per_batch_size`.
    """

    kind: PolicyKind = PolicyKind.ALWAYS
    max_tokens: int | None = None
    batch_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        thresholds = (PolicyKind.PER_CALL, PolicyKind.PER_RANGE)
        if self.kind in thresholds and (self.max_tokens is None or self.max_tokens < 1):
            raise UsageError(f"policy {self.kind.value} has max_tokens={self.max_tokens}, expected a number above 0")
        if self.kind is PolicyKind.PER_BATCH_SIZE and not self.batch_sizes:
            raise UsageError("policy per_batch_size has no batch_sizes, expected a list such as [1, 2, 4, 8, 16]")

    def refusal(self, tokens: int | None, largest: float) -> str | None:
        """Why a graph is left alone, or None.

        Args:
            tokens: the graph's token count where it is fixed, else None.
            largest: the largest token count that the graph is compiled for; infinite where unbounded.
        """
        if self.kind is PolicyKind.PER_BATCH_SIZE and tokens not in self.batch_sizes:
            return f"policy: {'a dynamic token count' if tokens is None else tokens} is not a listed batch size"
        if self.kind is PolicyKind.PER_RANGE and largest > (self.max_tokens or 0):
            bound = "unbounded" if math.isinf(largest) else int(largest)
            return f"policy: the graph's tokens go up to {bound}, the threshold is {self.max_tokens}"
        return None

    def strategy(self, strategy: str) -> str:
        """The strategy that the fused operator gets."""
        return f"{strategy}<={self.max_tokens}" if self.kind is PolicyKind.PER_CALL else strategy


@dataclass(frozen=True)
class TransformConfig:
    """One transform's entry in a model's configuration.

    Attributes:
        enabled: opt-in per model.
        stage: where the transform runs.
        policy: at which token counts.
    """

    enabled: bool = False
    stage: str = STAGE
    policy: FusionPolicy = field(default_factory=FusionPolicy)


@dataclass(frozen=True)
class SharedConfig:
    """What every transform of a run shares.

    Attributes:
        local_rank: this rank.
        world_size: of the tensor-parallel group; 1 switches fusion off.
        gather: hands a text to all ranks and returns theirs, in rank order; a collective call.
        max_tokens: the largest token count that the graph is compiled for.
        transforms: configuration by transform name.
    """

    local_rank: int = 0
    world_size: int = 1
    gather: Callable[[str], list[str]] | None = None
    max_tokens: float = math.inf
    transforms: Mapping[str, TransformConfig] = field(default_factory=dict)

    def config(self, name: str) -> TransformConfig:
        """The configuration of a transform; the norm pass is on by default, the quantising ones are opt-in."""
        return self.transforms.get(name, TransformConfig(enabled=name == NORM_PASS))


ALL_ENABLED: Mapping[str, TransformConfig] = {
    name: TransformConfig(enabled=True) for name in (NORM_PASS, *QUANT_PASSES.values(), FINALIZE_PASS)
}
"""All transforms on, at every token count."""


def load_transforms(path: Path) -> dict[str, TransformConfig]:
    """Read a YAML or JSON file with a `transforms:` mapping, for example the latency command's proposal.

    Raises:
        UsageError: the file cannot be read, or an entry is not what `TransformConfig` holds.
    """
    import yaml  # type: ignore[import-untyped]  # only here: the default run needs no configuration file

    try:
        loaded = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(
            f"cannot read {path}: {str(error).splitlines()[0]}; expected YAML with 'transforms:'"
        ) from None
    transforms = loaded.get("transforms") if isinstance(loaded, dict) else None
    if not isinstance(transforms, dict):
        raise UsageError(f"{path} has no mapping 'transforms:', expected entries by transform name")
    return {name: _transform(f"{path}: {name}", entry) for name, entry in transforms.items()}


def _transform(where: str, entry: object) -> TransformConfig:
    known = _checked(where, entry, {each.name for each in fields(TransformConfig)})
    if not isinstance(known.get("enabled", False), bool):
        raise UsageError(f"{where}: enabled is {known['enabled']!r}, expected true or false")
    if known.get("stage", STAGE) != STAGE:
        raise UsageError(f"{where}: stage is {known['stage']!r}, expected {STAGE}: the transform reads loaded weights")
    if "policy" in known:
        known["policy"] = _policy(f"{where}: policy", known["policy"])
    return TransformConfig(**known)


def _policy(where: str, entry: object) -> FusionPolicy:
    known = _checked(where, entry, {each.name for each in fields(FusionPolicy)})
    kinds = [kind.value for kind in PolicyKind]
    if known.get("kind") not in kinds:
        raise UsageError(f"{where}: kind is {known.get('kind')!r}, expected one of {', '.join(kinds)}")
    sizes = known.get("batch_sizes", ())
    limit = known.get("max_tokens")
    if not isinstance(sizes, list | tuple) or not all(type(size) is int and size > 0 for size in sizes):
        raise UsageError(f"{where}: batch_sizes is {sizes!r}, expected a list of positive integers")
    if limit is not None and type(limit) is not int:
        raise UsageError(f"{where}: max_tokens is {limit!r}, expected an integer")
    return FusionPolicy(PolicyKind(known["kind"]), limit, tuple(sizes))


def _checked(where: str, entry: object, allowed: set[str]) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise UsageError(f"{where} is {entry!r}, expected a mapping with {', '.join(sorted(allowed))}")
    unknown = sorted(str(key) for key in entry if key not in allowed)
    if unknown:
        raise UsageError(f"{where}: unknown key {unknown[0]!r}, expected {', '.join(sorted(allowed))}")
    return dict(entry)

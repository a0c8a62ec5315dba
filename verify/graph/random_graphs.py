"""Random graph plans from a seed: every feature on any site, so that features meet.

Most sites fuse, so that a pass which matches nothing is noticed; the rest carry one or two obstacles.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from fusecheck.graph.family import takes_scale
from fusecheck.graph.plan import SCALES, ExpertsKind, GraphPlan, ReaderKind, ReaderPlan, ScaleKind, SitePlan, made

OBSTACLES: tuple[dict[str, Any], ...] = (
    {"collective": "grouped"},
    {"collective": "max"},
    {"reduced_read": True},
    {"add": "alpha"},
    {"add": "self"},
    {"add": "scalar"},
    {"add": "sub"},
    {"add": "two_reduced"},
    {"add": "broadcast"},
    {"add": "float32"},
    {"add": "none"},
    {"norm": "gemma"},
    {"norm": "biased"},
    {"norm": "layer"},
    {"norm": "partial"},
    {"weight": "float32"},
    {"weight": "single"},
    {"weight": "from_sum"},
    {"write": "sum"},
    {"write": "norm"},
    {"norm_meta": False},
)
"""What forbids the first fusion, as features of a site."""
BAD_SCALES: tuple[ScaleKind, ...] = ("vector", "bf16", "dynamic", "zero", "negative", "nan", "infinite", "per_rank")
OTHERS: tuple[ReaderKind, ...] = ("bf16", "router", "made", "capture", "weight", "e5m2")
"""Readers that are no FP8 layers; the `made` one is of NVFP4."""
STRATEGIES = ("AUTO", "ONESHOT", "TWOSHOT", "NCCL")
MAX_SITES, MAX_READERS = 3, 3
FORMATS = (
    *("dynamic-fp8", "group-fp8-16", "group-fp8-32", "group-fp8-packed-16", "group-fp8-packed-32"),
    *("nvfp4", "mxfp8", "mxfp4"),
)
"""Quantisers that make their scales; groups of 32 do not divide every width that is drawn."""
BAD_FACTORS: tuple[ScaleKind, ...] = ("dynamic", "zero", "per_rank")
"""What NVFP4's factor may be that forbids fusion."""
EXPERTS: tuple[ExpertsKind, ...] = ("finalize", "shared", "between", "read")


def random_plan(seed: int) -> GraphPlan:
    """The graph plan of a seed: one of static FP8, of which some sites are then given other formats."""
    draw = random.Random(seed)
    batched = draw.random() < 0.3
    plan = GraphPlan(
        sites=tuple(_site(draw) for _ in range(draw.randint(1, MAX_SITES))),
        dtype=draw.choice(("bfloat16", "bfloat16", "float16")),
        hidden=draw.choice((32, 64, 64, 80)),
        tokens=draw.randint(2, 9),
        dynamic=draw.random() < 0.7,
        batched=batched,
        magnitude=draw.choice((1.0, 1.0, 1e-3)),
        seed=seed,
    )
    others = random.Random(f"family/{seed}")
    return replace(plan, sites=tuple(_of_family(others, plan, site) for site in plan.sites))


def _of_family(draw: random.Random, plan: GraphPlan, site: SitePlan) -> SitePlan:
    """A site as it is, or with another format, with experts before its sum, or with rows spread over the ranks."""
    if draw.random() < 0.3:
        name = draw.choice(FORMATS)
        site = replace(site, readers=tuple(_made(draw, name, reader) for reader in site.readers))
    if not plan.dynamic and draw.random() < 0.3:
        site = replace(site, experts=draw.choice(EXPERTS))
    plain = site.collective == "all_reduce" and site.add in ("residual_first", "reduced_first")
    if plain and site.write == "nothing" and not plan.dynamic and plan.tokens % 4 == 0 and draw.random() < 0.4:
        site = replace(site, spread=draw.choice(("yes", "yes", "read")))
    return site


def _made(draw: random.Random, name: str, reader: ReaderPlan) -> ReaderPlan:
    """A reader of static FP8 with a format that makes its scales; the others as they are."""
    if reader.kind not in ("fp8", "quantize", "dead"):
        return reader
    name = draw.choice(FORMATS) if draw.random() < 0.12 else name
    bad = reader.scale_kind if reader.scale_kind in BAD_FACTORS and takes_scale(name) else "static"
    shared = draw.random() < 0.4
    return made(name, scale=reader.scale, scale_kind=bad, bias=reader.bias, view=reader.view, shared_scale=shared)


def _site(draw: random.Random) -> SitePlan:
    features: dict[str, Any] = {
        "strategy": draw.choice(STRATEGIES),
        "reshape": draw.random() < 0.2,
        "add": draw.choice(("residual_first", "reduced_first")),
        "norm": draw.choice(("torch", "triton", "flashinfer")),
        "eps": draw.choice((1e-5, 1e-6)),
        "norm_keywords": draw.random() < 0.3,
        "second_norm": draw.random() < 0.2,
        "early_reader": draw.random() < 0.3,
        "residual": draw.choice(("next", "next", "next", "dead", "output")),
    }
    for obstacle in draw.choices(OBSTACLES, k=draw.choice((0, 0, 0, 1, 1, 2))):
        features |= obstacle
    return SitePlan(**features, readers=_readers(draw))


def _readers(draw: random.Random) -> tuple[ReaderPlan, ...]:
    common = draw.randrange(len(SCALES))
    bad = draw.choice(BAD_SCALES) if draw.random() < 0.12 else "static"
    found = []
    for number in range(draw.randint(1, MAX_READERS)):
        if draw.random() < 0.3:
            reads = draw.choice(OTHERS)
            found.append(ReaderPlan(reads, "nvfp4" if reads == "made" else "", view=_view(draw)))
            continue
        kind = draw.choice(("fp8", "fp8", "fp8", "quantize", "dead"))
        other = draw.random() < 0.12
        found.append(
            ReaderPlan(
                kind=kind,  # type: ignore[arg-type]
                scale=draw.randrange(len(SCALES)) if other else common,
                scale_kind=bad if number == 0 else "static",
                bias=draw.random() < 0.3,
                keywords=kind == "fp8" and draw.random() < 0.4,
                packet=kind == "fp8" and draw.random() < 0.2,
                view=_view(draw),
            )
        )
    return tuple(found)


def _view(draw: random.Random) -> Any:
    return draw.choice(("none", "none", "flat", "unsqueeze", "chain", "halves"))

"""Hypothesis strategies for the graph question: plans of decoder graphs, shrinking toward one plain site that fuses."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from fusecheck.graph.family import takes_scale
from fusecheck.graph.plan import SCALES, GraphPlan, ReaderKind, ReaderPlan, SitePlan, View, made
from fusecheck.graph.random_graphs import (
    BAD_FACTORS,
    BAD_SCALES,
    FORMATS,
    MAX_READERS,
    MAX_SITES,
    OBSTACLES,
    OTHERS,
    STRATEGIES,
)

VIEWS: tuple[View, ...] = ("none", "flat", "unsqueeze", "chain", "halves")
FP8_KINDS: tuple[ReaderKind, ...] = ("fp8", "quantize", "dead")
SMALL_HIDDEN = (16, 32, 64, 80)


def rare(value: SearchStrategy[Any], usual: object) -> SearchStrategy[Any]:
    """Mostly the usual, so that many sites still fuse; shrinks to it."""
    return st.integers(0, 7).flatmap(lambda roll: value if roll == 7 else st.just(usual))


@st.composite
def readers(draw: DrawFn) -> tuple[ReaderPlan, ...]:
    """The readers of a norm: FP8 layers with a common scale more often than not, and others."""
    common = draw(st.integers(0, len(SCALES) - 1), label="scale")
    bad = draw(rare(st.sampled_from(BAD_SCALES), "static"), label="first scale kind")
    format_of = draw(rare(st.sampled_from(FORMATS), ""), label="format")
    found = []
    for number in range(draw(st.integers(1, MAX_READERS), label="readers")):
        kind: ReaderKind = draw(rare(st.sampled_from(OTHERS), "fp8") | st.sampled_from(FP8_KINDS), label="kind")
        view = draw(st.sampled_from(VIEWS), label="view")
        if kind in OTHERS:
            found.append(ReaderPlan(kind, "nvfp4" if kind == "made" else "", view=view))
            continue
        if name := draw(st.just(format_of) | rare(st.sampled_from(FORMATS), format_of), label="own format"):
            factor = bad if number == 0 and bad in BAD_FACTORS and takes_scale(name) else "static"
            shared = draw(st.booleans(), label="shared")
            found.append(made(name, scale=common, scale_kind=factor, view=view, shared_scale=shared))
            continue
        found.append(
            ReaderPlan(
                kind=kind,
                scale=draw(rare(st.integers(0, len(SCALES) - 1), common), label="own scale"),
                scale_kind=bad if number == 0 else "static",
                bias=draw(st.booleans(), label="bias"),
                keywords=kind == "fp8" and draw(st.booleans(), label="keywords"),
                packet=kind == "fp8" and draw(rare(st.just(True), False), label="packet"),
                view=view,
            )
        )
    return tuple(found)


@st.composite
def sites(draw: DrawFn) -> SitePlan:
    """One site: features that must not matter, and sometimes one or two obstacles."""
    features: dict[str, Any] = {
        "strategy": draw(st.sampled_from(STRATEGIES), label="strategy"),
        "reshape": draw(rare(st.just(True), False), label="reshape"),
        "add": draw(st.sampled_from(("residual_first", "reduced_first")), label="add"),
        "norm": draw(st.sampled_from(("triton", "flashinfer", "torch")), label="norm"),
        "eps": draw(st.sampled_from((1e-5, 1e-6)), label="eps"),
        "norm_keywords": draw(st.booleans(), label="norm keywords"),
        "second_norm": draw(rare(st.just(True), False), label="second norm"),
        "early_reader": draw(st.booleans(), label="early reader"),
        "residual": draw(st.sampled_from(("next", "dead", "output")), label="residual"),
    }
    for obstacle in draw(st.lists(rare(st.sampled_from(OBSTACLES), {}), max_size=2), label="obstacles"):
        features |= obstacle
    return SitePlan(**features, readers=draw(readers()))


@st.composite
def plans(draw: DrawFn) -> GraphPlan:
    """A graph of up to three sites."""
    return GraphPlan(
        sites=tuple(draw(st.lists(sites(), min_size=1, max_size=MAX_SITES), label="sites")),
        dtype=draw(st.sampled_from(("bfloat16", "float16")), label="dtype"),
        hidden=draw(st.sampled_from(SMALL_HIDDEN), label="hidden"),
        tokens=draw(st.integers(2, 9), label="tokens"),
        dynamic=draw(st.booleans(), label="dynamic"),
        batched=draw(st.booleans(), label="batched"),
        magnitude=draw(st.sampled_from((1.0, 1e-3)), label="magnitude"),
        seed=draw(st.integers(0, 2**16), label="seed"),
    )

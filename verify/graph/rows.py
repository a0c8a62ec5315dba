"""The edge cases by name: one small graph for each way in which such passes are known to go wrong.

F rows must fuse, D rows must fuse differently, N rows must not fuse. What becomes of each site follows from the plan.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusecheck.graph.plan import UNKNOWN_STRATEGY, GraphPlan, ReaderPlan, SitePlan, made

FP8, ROUTER, CAPTURE = ReaderPlan(), ReaderPlan(kind="router"), ReaderPlan(kind="capture")
OTHER_SCALE = ReaderPlan(scale=4)


@dataclass(frozen=True)
class Row:
    """A named edge case.

    Attributes:
        name: the rule, and the variant after a dash.
        title: what the graph has, in a few words.
        plan: the graph.
        world_size: ranks that it is meant for, None for any above 1.
    """

    name: str
    title: str
    plan: GraphPlan
    world_size: int | None = None


def _one(name: str, title: str, site: SitePlan, **graph: object) -> Row:
    """A row of one site, followed by a plain one so that its results are read."""
    return Row(name, title, GraphPlan(sites=(site, SitePlan()), seed=_seed(name), **graph))  # type: ignore[arg-type]


def _seed(name: str) -> int:
    return sum(ord(letter) * (at + 1) for at, letter in enumerate(name))


def _must_fuse() -> list[Row]:
    saturating = ReaderPlan(scale=2)
    return [
        _one("F1", "one FP8 layer, residual used later", SitePlan()),
        _one("F1-one", "scale 1", SitePlan(readers=(ReaderPlan(scale=1),))),
        _one("F1-saturating", "a scale that saturates", SitePlan(readers=(saturating,))),
        _one("F1-small", "activations near eps", SitePlan(eps=1e-6), magnitude=1e-3),
        _one("F1-nan", "a NaN in the stream stays one", SitePlan(), nan=True),
        _one("F2", "all-reduce + residual instead of residual + all-reduce", SitePlan(add="reduced_first")),
        _one("F3", "q/k/v unfused, one scale attribute", SitePlan(readers=(FP8, *[ReaderPlan(shared_scale=True)] * 2))),
        _one("F4", "q/k/v unfused, scales equal by value", SitePlan(readers=(FP8,) * 3)),
        _one("F5", "one merged layer with a bias of scale", SitePlan(readers=(ReaderPlan(scale=5),))),
        _one("F6", "a view between norm and layer", SitePlan(readers=(ReaderPlan(view="flat"),)), batched=True),
        _one("F6-chain", "reshape, contiguous, view", SitePlan(readers=(ReaderPlan(view="chain"),))),
        _one("F6-halves", "a view that halves the rows", SitePlan(readers=(ReaderPlan(view="halves"), FP8))),
        _one("F6-both", "one layer behind a view, one not", SitePlan(readers=(FP8, ReaderPlan(view="unsqueeze")))),
        _one("F6-reshape", "a reshape between all-reduce and add", SitePlan(reshape=True)),
        _one("F6-flat", "a reshape between all-reduce and add, 3-D", SitePlan(reshape=True), batched=True),
        _one("F7", "nobody reads the residual", SitePlan(residual="dead")),
        _one("F8", "the residual is read before the layer", SitePlan(early_reader=True)),
        _one("F9", "scales by keyword", SitePlan(readers=(ReaderPlan(keywords=True),))),
        _one("F9-norm", "the norm's arguments by keyword", SitePlan(norm_keywords=True)),
        _one(
            "F9-packet", "the operator's packet instead of its overload", SitePlan(readers=(ReaderPlan(packet=True),))
        ),
        _one("F10-torch", "the norm that rounds twice", SitePlan(norm="torch")),
        _one("F10-triton", "the norm that rounds once, triton", SitePlan(norm="triton")),
        _one("F10-flashinfer", "the norm that rounds once, flashinfer", SitePlan(norm="flashinfer")),
        _one("F11", "an open token count", SitePlan(), tokens=7),
        _one("F11-fixed", "a fixed token count", SitePlan(), dynamic=False),
        _one("F12", "a layer with a bias", SitePlan(readers=(ReaderPlan(bias=True),))),
        _one("F13", "a separate quantise and a layer", SitePlan(readers=(ReaderPlan(kind="quantize"), FP8))),
        _one("F14", "fp16 activations", SitePlan(), dtype="float16"),
        _one("F14-mixed", "fp16 activations, norm also read", SitePlan(readers=(FP8, ROUTER)), dtype="float16"),
        _one("F16", "a counter is written in place beside the site", SitePlan(write="beside")),
        Row("F15", "three layers' sites", GraphPlan(sites=(SitePlan(),) * 6, seed=15)),
    ]


def _must_fuse_differently() -> list[Row]:
    nvfp4 = made("nvfp4")
    return [
        _one("D1", "a router reads the norm", SitePlan(readers=(FP8, ROUTER))),
        _one("D1-linear", "a bf16 layer reads the norm", SitePlan(readers=(ReaderPlan(kind="bf16"), FP8))),
        _one("D1-view", "a router, and the layer behind a view", SitePlan(readers=(ROUTER, ReaderPlan(view="chain")))),
        _one("D2", "the norm is a graph output", SitePlan(readers=(FP8, CAPTURE))),
        _one("D2-residual", "norm and residual are graph outputs", SitePlan(readers=(FP8, CAPTURE), residual="output")),
        _one("D3", "only a bf16 layer reads the norm", SitePlan(readers=(ReaderPlan(kind="bf16"),))),
        _one("D4", "v has another scale", SitePlan(readers=(FP8, FP8, OTHER_SCALE))),
        _one("D5", "two norms of one sum", SitePlan(second_norm=True)),
        _one(
            "D5-gemma", "two norms of one sum, the first of another formula", SitePlan(second_norm=True, norm="gemma")
        ),
        _one("D6", "an NVFP4 layer reads the norm", SitePlan(readers=(FP8, nvfp4))),
        _one("D7", "strategy NCCL: fused in the graph, not on the device", SitePlan(strategy="NCCL")),
        _one("D7-symm", "strategy SYMM_MEM", SitePlan(strategy="SYMM_MEM")),
        _one("D8", "the graph of a prefill step", SitePlan(strategy="TWOSHOT"), tokens=160, dynamic=False),
        _one("D8-decode", "the graph of a decode step", SitePlan(strategy="ONESHOT"), tokens=1, dynamic=False),
    ]


def _must_not_fuse() -> list[Row]:
    fixed = {"dynamic": False}

    def scale(kind: str) -> SitePlan:
        return SitePlan(readers=(ReaderPlan(scale_kind=kind),))  # type: ignore[arg-type]

    return [
        _one("N1", "the all-reduce has another reader", SitePlan(reduced_read=True)),
        *[
            _one(f"N2-{add}", f"the add is '{add}'", SitePlan(add=add))
            for add in ("alpha", "self", "scalar", "sub", "two_reduced", "none")
        ],
        _one("N3", "the residual is broadcast", SitePlan(add="broadcast")),
        _one("N3-dtype", "added and normalised in float32", SitePlan(add="float32")),
        _one("N4", "the norm's weight comes from the sum", SitePlan(weight="from_sum")),
        _one("N5", "a Gemma norm", SitePlan(norm="gemma")),
        _one("N5-layer", "a LayerNorm", SitePlan(norm="layer")),
        _one("N5-bias", "a norm with a bias", SitePlan(norm="biased")),
        _one("N5-partial", "a norm of each head", SitePlan(norm="partial")),
        _one("N5-float32", "a float32 weight", SitePlan(weight="float32")),
        _one("N5-single", "a weight of one element", SitePlan(weight="single")),
        _one("N5-column", "a weight per token", SitePlan(weight="column"), **fixed),
        _one("N6", "an all-reduce over part of the ranks", SitePlan(collective="grouped")),
        _one("N6-max", "a maximum over the ranks", SitePlan(collective="max")),
        _one("N7", "a scale computed in the graph", scale("dynamic")),
        _one("N7-vector", "a scale per channel", scale("vector")),
        _one("N7-bf16", "a bf16 scale", scale("bf16")),
        *[
            _one(f"N8-{kind}", f"a scale that is {kind}", scale(kind))
            for kind in ("zero", "negative", "nan", "infinite")
        ],
        _one("N9", "a layer reads the norm as its weight", SitePlan(readers=(ReaderPlan(kind="weight"), FP8))),
        _one("N9-only", "the norm is only a weight", SitePlan(readers=(ReaderPlan(kind="weight"),))),
        _one("N10", "a cast to E5M2", SitePlan(readers=(ReaderPlan(kind="e5m2"),))),
        _one("N10-mixed", "a cast to E5M2 beside a layer", SitePlan(readers=(ReaderPlan(kind="e5m2"), FP8))),
        _one("N11", "hidden is not a multiple of 8", SitePlan(), hidden=20),
        _one("N11-batched", "[1, tokens, hidden]: all tokens count", SitePlan(), batched=True),
        _one("N12-draft", "a draft model", SitePlan(), draft=True),
        _one("N12-strategy", "a strategy that the fused operator does not have", SitePlan(strategy=UNKNOWN_STRATEGY)),
        Row("N12-tp1", "one rank", GraphPlan(sites=(SitePlan(), SitePlan()), seed=121), 1),
        _one("N13", "the norm has no dtype meta", SitePlan(norm_meta=False)),
        _one("N14", "the scale differs between ranks", scale("per_rank")),
        _one("N15", "written in place to the sum", SitePlan(write="sum")),
        _one("N15-norm", "written in place to the norm", SitePlan(write="norm")),
        _one("N16", "a second run", SitePlan(readers=(FP8, ROUTER))),
    ]


def _family() -> list[Row]:
    """Formats whose scales are made in the graph, sums of experts, rows that are spread over the ranks."""
    fixed = {"dynamic": False}
    wide = {"hidden": 128}
    formats = ("dynamic-fp8", "group-fp8", "group-fp8-packed", "nvfp4", "mxfp8", "mxfp4")

    def of(*readers: ReaderPlan, **features: object) -> SitePlan:
        return SitePlan(readers=readers, **features)  # type: ignore[arg-type]

    def factor(kind: str) -> SitePlan:
        return of(made("nvfp4", scale_kind=kind))

    nvfp4, dynamic, group = made("nvfp4"), made("dynamic-fp8"), made("group-fp8-32")
    return [
        *[_one(f"F17-{name}", f"codes and scales of {name}", of(made(name)), **wide) for name in formats],
        *[
            _one(
                f"F18-{name}",
                "one quantise, three layers",
                of(made(name), *[made(name, shared_scale=True)] * 2),
                **wide,
            )
            for name in ("group-fp8", "nvfp4")
        ],
        _one("F19", "three layers, each with a quantise of its own", of(group, group, group)),
        _one("F19-nvfp4", "the same, of equal factors", of(nvfp4, nvfp4)),
        _one("F20", "a view that keeps the rows", of(made("dynamic-fp8", view="flat")), batched=True),
        _one("F20-nvfp4", "two codes a byte behind views", of(made("nvfp4", view="chain"), nvfp4)),
        _one("F20-nan", "a NaN stays in its row", of(dynamic), nan=True),
        _one("D9", "a router reads the norm, too", of(group, ROUTER)),
        _one("D9-dynamic", "the norm is a graph output", of(dynamic, CAPTURE)),
        _one("D9-nvfp4", "a bf16 layer reads the norm", of(ReaderPlan(kind="bf16"), nvfp4)),
        _one("D10", "groups differ between readers", of(group, made("group-fp8-64"))),
        _one("D10-layout", "layouts of scales differ", of(group, made("group-fp8-32", layout="column-major"))),
        _one("D10-scales", "scales in float32 and as packed powers of two", of(group, made("group-fp8-packed-32"))),
        _one("D10-factor", "one has the factor of another site", of(nvfp4, made("nvfp4", scale=4))),
        _one("D11", "static and dynamic readers of one norm", of(FP8, dynamic)),
        _one("D11-others", "dynamic and grouped readers of one norm", of(group, dynamic)),
        _one("D12", "a view that halves the rows, and their scales", of(made("dynamic-fp8", view="halves"))),
        _one("D13", "strategy NCCL: separate kernels", of(nvfp4, strategy="NCCL")),
        _one("F21", "a sum of experts before the all-reduce", of(ReaderPlan(kind="bf16"), experts="finalize"), **fixed),
        _one("F21-nvfp4", "the same with NVFP4 codes", of(nvfp4, experts="finalize"), **fixed),
        _one("F21-shared", "with the shared expert inside", of(FP8, experts="shared"), **fixed),
        _one("D14", "rows spread over the ranks up to the norm", of(dynamic, spread="yes"), **fixed),
        _one("N17", "the group does not divide hidden", of(made("group-fp8-48"))),
        _one("N18", "the factor is computed in the graph", factor("dynamic")),
        _one("N18-zero", "the factor is zero", factor("zero")),
        _one("N18-rank", "the factor differs between ranks", factor("per_rank")),
        _one("N19", "norm and codes after experts: no such operator", of(FP8, ROUTER, experts="finalize"), **fixed),
        _one("N20", "a shared expert is added to the sum of experts", of(nvfp4, experts="between"), **fixed),
        _one("N20-read", "somebody else reads the sum of experts", of(nvfp4, experts="read"), **fixed),
        _one("N21", "this rank's rows are read before they are gathered", of(dynamic, spread="read"), **fixed),
    ]


ROWS: tuple[Row, ...] = (*_must_fuse(), *_must_fuse_differently(), *_must_not_fuse(), *_family())
"""Every edge case, in order."""

"""What a test graph looks like, as small JSON, and what the passes must make of it.

A plan is a chain of sites: collective, residual add, norm, readers. Each site names its features; `expectation`
derives from the features alone, without looking at a graph, whether the site must fuse, how, and why not.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from fusecheck.errors import UsageError
from fusecheck.interface import FusionOp

Collective = Literal["all_reduce", "grouped", "max"]
Add = Literal[
    "residual_first", "reduced_first", "alpha", "self", "scalar", "sub", "broadcast", "two_reduced", "float32", "none"
]
Norm = Literal["torch", "triton", "flashinfer", "gemma", "biased", "layer", "partial"]
Weight = Literal["native", "float32", "single", "column", "from_sum"]
ReaderKind = Literal["fp8", "quantize", "bf16", "router", "nvfp4", "capture", "weight", "e5m2", "dead"]
ScaleKind = Literal["static", "vector", "bf16", "dynamic", "zero", "negative", "nan", "infinite", "per_rank"]
View = Literal["none", "flat", "unsqueeze", "chain", "halves"]

FP8_READERS = ("fp8", "quantize")
FUSIBLE_NORMS = ("torch", "triton", "flashinfer")
OTHER_READERS = {"bf16": "D1", "router": "D1", "capture": "D2", "nvfp4": "D6", "weight": "N9", "e5m2": "N10"}
"""Readers that need the norm itself, and the rules that they stand for."""
UNKNOWN_STRATEGY = "LOWPRECISION"
"""A strategy that all-reduces have and fused operators do not."""
SCALES = (4 / 448, 1.0, 0.448 / 448, 0.03125, 0.0123, 7 / 448)
"""The scale values that readers choose from: ordinary, one, saturating, a power of two, and two more."""


@dataclass(frozen=True)
class ReaderPlan:
    """One reader of a norm.

    Attributes:
        kind: `fp8` a linear layer that quantises, `quantize` a quantise before a linear layer for codes, `bf16` a
            plain linear layer, `router` a softmax over a small one, `nvfp4` a layer of another format, `capture` a
            graph output, `weight` a layer that reads the norm as its weight, `e5m2` a cast, `dead` a layer whose
            result nobody reads.
        scale: index into SCALES.
        scale_kind: what the scale is; all but `static` must not be fused.
        shared_scale: read the scale from the attribute of the site's first reader.
        bias: the layer has a bias.
        keywords: its scales are keyword arguments.
        packet: the graph holds the operator's packet instead of its overload, as symbolic tracing leaves it.
        view: what stands between the norm and the layer; `halves` makes two rows of each.
    """

    kind: ReaderKind = "fp8"
    scale: int = 0
    scale_kind: ScaleKind = "static"
    shared_scale: bool = False
    bias: bool = False
    keywords: bool = False
    packet: bool = False
    view: View = "none"


@dataclass(frozen=True)
class SitePlan:
    """One collective with what follows it.

    Attributes:
        collective: over the whole group, over part of it, or the maximum instead of the sum.
        strategy: of the collective.
        reduced_read: somebody else reads the collective's result.
        reshape: a reshape stands between the collective and the add.
        add: how the residual is added, if it is.
        norm: its flavour or formula.
        weight: what the norm's weight is.
        eps: of the norm.
        norm_keywords: the norm's arguments are given by keyword.
        second_norm: another norm reads the same sum.
        early_reader: the sum is read before the norm's readers.
        residual: `next` the next site adds it, `dead` nobody reads it, `output` it is also a graph output.
        write: what is written in place: the sum, the norm, or a counter beside the site, which hinders nothing.
        norm_meta: whether the norm has its dtype meta.
        readers: of the norm.
    """

    collective: Collective = "all_reduce"
    strategy: str = "AUTO"
    reduced_read: bool = False
    reshape: bool = False
    add: Add = "residual_first"
    norm: Norm = "triton"
    weight: Weight = "native"
    eps: float = 1e-5
    norm_keywords: bool = False
    second_norm: bool = False
    early_reader: bool = False
    residual: Literal["next", "dead", "output"] = "next"
    write: Literal["nothing", "sum", "norm", "beside"] = "nothing"
    norm_meta: bool = True
    readers: tuple[ReaderPlan, ...] = (ReaderPlan(),)


@dataclass(frozen=True)
class GraphPlan:
    """A graph to rewrite.

    Attributes:
        sites: in order.
        dtype: of the activations.
        hidden: columns.
        tokens: rows of the example.
        dynamic: the token count is open in the graph.
        batched: activations are [1, tokens, hidden] instead of [tokens, hidden].
        magnitude: of the inputs; small ones make eps matter.
        nan: one value of the residual stream's last row but one is no number.
        draft: the graph is a draft model's.
        seed: of weights and inputs.
    """

    sites: tuple[SitePlan, ...] = (SitePlan(),)
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    hidden: int = 64
    tokens: int = 4
    dynamic: bool = True
    batched: bool = False
    magnitude: float = 1.0
    nan: bool = False
    draft: bool = False
    seed: int = 0

    def to_json(self) -> str:
        """One line of JSON that `from_json` reads; defaults are left out."""
        return json.dumps(_differences(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> GraphPlan:
        """Read a plan.

        Raises:
            UsageError: the text is not one.
        """
        try:
            loaded = json.loads(text)
            sites = tuple(_site(entry) for entry in loaded.pop("sites", [{}]))
            return cls(sites=sites, **loaded)
        except (ValueError, TypeError, AttributeError) as error:
            raise UsageError(f"not a graph plan: {error}; expected the line that a finding prints") from None


def _differences(entry: Any) -> Any:
    if not dataclasses.is_dataclass(entry):
        return [_differences(each) for each in entry] if isinstance(entry, tuple) else entry
    found = {each.name: getattr(entry, each.name) for each in dataclasses.fields(entry)}
    defaults = {each.name: each.default for each in dataclasses.fields(entry)}
    return {name: _differences(value) for name, value in found.items() if value != defaults[name]}


def _site(entry: dict[str, Any]) -> SitePlan:
    given = dict(entry)
    if "readers" in given:
        given["readers"] = tuple(ReaderPlan(**each) for each in given["readers"])
    return SitePlan(**given)


@dataclass(frozen=True)
class Expectation:
    """What must become of a site.

    Attributes:
        fused: the operation that it must become; None for none.
        also: other outcomes that are right, though they gain less; None for unfused.
        rows: the rules of the edge-case table that decide it (`N1`, `D3`, ...).
        why: in words.
    """

    fused: FusionOp | None
    also: tuple[FusionOp | None, ...] = ()
    rows: tuple[str, ...] = ()
    why: str = ""

    @property
    def allowed(self) -> tuple[FusionOp | None, ...]:
        """Every right outcome."""
        return (self.fused, *self.also)


def norm_blockers(plan: GraphPlan, site: SitePlan, world_size: int) -> dict[str, str]:
    """Why a site must not become all-reduce + residual + norm: the rules that forbid it, with the reason."""
    found = {
        "N1": "the plain sum over ranks has another reader" if site.reduced_read else "",
        "N2": f"the add is '{site.add}', not a residual add"
        if site.add in ("alpha", "self", "scalar", "sub", "two_reduced", "none")
        else "",
        "N3": f"residual: '{site.add}'" if site.add in ("broadcast", "float32") else "",
        "N4": "the norm's weight is computed from the sum" if site.weight == "from_sum" else "",
        "N5": "another formula or weight" if _other_formula(site) else "",
        "N6": f"the collective is '{site.collective}'" if site.collective != "all_reduce" else "",
        "N11": f"hidden {plan.hidden} is not a multiple of 8" if plan.hidden % 8 else "",
        "N12": "one rank, a draft model or an unknown strategy" if _disabled(plan, site, world_size) else "",
        "N13": "the norm has no dtype meta" if not site.norm_meta else "",
        "N15": f"written in place to the {site.write}" if site.write in ("sum", "norm") else "",
    }
    return {row: why for row, why in found.items() if why}


def _of_first_norm(site: SitePlan, forbidden: dict[str, str]) -> bool:
    """Whether everything that forbids fusion lies with the first norm of the sum, and the second is free of it."""
    return set(forbidden) <= {"N4", "N5", "N13"} | ({"N15"} if site.write == "norm" else set())


def _other_formula(site: SitePlan) -> bool:
    return site.norm not in FUSIBLE_NORMS or site.weight in ("float32", "single", "column")


def _disabled(plan: GraphPlan, site: SitePlan, world_size: int) -> bool:
    return world_size == 1 or plan.draft or site.strategy == UNKNOWN_STRATEGY


def quant_blockers(site: SitePlan) -> dict[str, str]:
    """Why a fused norm's quantise must stay where it is."""
    fp8 = [reader for reader in _live(site) if reader.kind in FP8_READERS]
    kinds = {reader.scale_kind for reader in fp8}
    values = {reader.scale for reader in fp8}
    found = {
        "D3": "" if fp8 else "no FP8 layer reads the norm",
        "N7": f"the scale is {sorted(kinds)}" if kinds & {"vector", "bf16", "dynamic"} else "",
        "N8": f"the scale is {sorted(kinds)}" if kinds & {"zero", "negative", "nan", "infinite"} else "",
        "N14": "the scale differs between ranks" if "per_rank" in kinds else "",
        "D4": "the scales differ" if len(values) > 1 else "",
    }
    return {row: why for row, why in found.items() if why}


def _live(site: SitePlan) -> list[ReaderPlan]:
    """The readers in the graph; a dead FP8 layer is one as long as it stands there."""
    return [dataclasses.replace(reader, kind="fp8") if reader.kind == "dead" else reader for reader in site.readers]


def _harmless(plan: GraphPlan, index: int, world_size: int) -> tuple[FusionOp | None, ...]:
    """What may become of a sum of two all-reduces, of a bare one, and of a Gemma norm: its values then decide.

    One all-reduce may be the other's residual, zeros may be a bare one's, and the operator takes a weight bias.
    """
    site = plan.sites[index]
    plain = dataclasses.replace(
        site,
        add="residual_first" if site.add in ("two_reduced", "none") else site.add,
        norm="triton" if site.norm == "gemma" else site.norm,
    )
    if plain == site or norm_blockers(plan, plain, world_size):
        return ()
    sites = (*plan.sites[:index], plain, *plan.sites[index + 1 :])
    relaxed = expectation(dataclasses.replace(plan, sites=sites), index, world_size)
    return (*relaxed.allowed, FusionOp.RESIDUAL_RMS_NORM)


def expectation(plan: GraphPlan, index: int, world_size: int) -> Expectation:
    """What must become of a site under both passes, by the features of the plan alone."""
    site = plan.sites[index]
    forbidden = norm_blockers(plan, site, world_size)
    if forbidden and site.second_norm and _of_first_norm(site, forbidden):
        also = (None, *_harmless(plan, index, world_size))
        return Expectation(FusionOp.RESIDUAL_RMS_NORM, also, ("D5", *forbidden), "the second norm of the sum fits")
    if forbidden:
        also = _harmless(plan, index, world_size) if set(forbidden) <= {"N2", "N5"} else ()
        return Expectation(None, also, tuple(forbidden), "; ".join(forbidden.values()))
    blocked = quant_blockers(site)
    norm = FusionOp.RESIDUAL_RMS_NORM
    if blocked:
        # The equal part of a group with different scales may be fused if the rest keeps the norm.
        some = (FusionOp.RESIDUAL_RMS_NORM_OUT_QUANT_FP8,) if set(blocked) == {"D4"} else ()
        return Expectation(norm, some, tuple(blocked), "; ".join(blocked.values()))
    if any(reader.kind not in FP8_READERS for reader in _live(site)):
        why = "somebody besides the FP8 layers reads the norm"
        rows = tuple(
            dict.fromkeys(OTHER_READERS[reader.kind] for reader in site.readers if reader.kind in OTHER_READERS)
        )
        return Expectation(FusionOp.RESIDUAL_RMS_NORM_OUT_QUANT_FP8, (norm,), rows, why)
    return Expectation(FusionOp.RESIDUAL_RMS_NORM_QUANT_FP8, (), ("F1",), "every reader quantises with one scale")

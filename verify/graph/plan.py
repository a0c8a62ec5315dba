"""What a test graph looks like, as small JSON.

A plan is a chain of sites: collective, residual add, norm, readers. Each site names its features.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from fusecheck.errors import UsageError
from fusecheck.graph.family import check_quantiser
from fusecheck.graph.quantised import Form

Collective = Literal["all_reduce", "grouped", "max"]
Add = Literal[
    "residual_first", "reduced_first", "alpha", "self", "scalar", "sub", "broadcast", "two_reduced", "float32", "none"
]
Norm = Literal["torch", "triton", "flashinfer", "gemma", "biased", "layer", "partial"]
Weight = Literal["native", "float32", "single", "column", "from_sum"]
ReaderKind = Literal["fp8", "quantize", "made", "bf16", "router", "capture", "weight", "e5m2", "dead"]
ScaleKind = Literal["static", "vector", "bf16", "dynamic", "zero", "negative", "nan", "infinite", "per_rank"]
ExpertsKind = Literal["none", "finalize", "shared", "between", "read"]
View = Literal["none", "flat", "unsqueeze", "chain", "halves"]

UNKNOWN_STRATEGY = "LOWPRECISION"
"""A strategy that all-reduces have and fused operators do not."""
SCALES = (4 / 448, 1.0, 0.448 / 448, 0.03125, 0.0123, 7 / 448)
"""The scale values that readers choose from: ordinary, one, saturating, a power of two, and two more."""


@dataclass(frozen=True)
class ReaderPlan:
    """One reader of a norm.

    Attributes:
        kind: `fp8` a linear layer that quantises, `quantize` a quantise before a linear layer for codes, `made` the
            same by a quantiser that makes its scales, `bf16` a plain linear layer, `router` a softmax over a small
            one, `capture` a graph output, `weight` a layer that reads the norm as its weight, `e5m2` a cast, `dead` a
            layer whose result nobody reads.
        quantiser: of a `made` one; rows that its groups do not divide are filled up with zeros before it.
        layout: of its scales; empty: the quantiser's first.
        scale: index into SCALES.
        scale_kind: what the scale is, of NVFP4 the factor; all but `static` must not be fused.
        shared_scale: read the scale from the attribute of the site's first reader; of a `made` one, codes and scales
            from an earlier reader's quantise.
        bias: the layer has a bias.
        keywords: its scales are keyword arguments.
        packet: the graph holds the operator's packet instead of its overload, as symbolic tracing leaves it.
        view: what stands between the norm and the layer; `halves` makes two rows of each.
    """

    kind: ReaderKind = "fp8"
    quantiser: str = ""
    layout: str = ""
    scale: int = 0
    scale_kind: ScaleKind = "static"
    shared_scale: bool = False
    bias: bool = False
    keywords: bool = False
    packet: bool = False
    view: View = "none"

    def __post_init__(self) -> None:
        if (self.kind == "made") != bool(self.quantiser):
            raise UsageError(
                f"reader kind={self.kind!r}, quantiser={self.quantiser!r}: expected both of 'made', or none"
            )
        if self.quantiser:
            check_quantiser(self.quantiser)
            if self.layout and self.layout not in (known := self.form.quantiser.layouts):
                raise UsageError(f"layout={self.layout!r}, expected one that {self.quantiser} has: {', '.join(known)}")

    @property
    def form(self) -> Form:
        """What a `made` one quantises to, its layout named."""
        form = Form(self.quantiser, self.layout)
        return Form(self.quantiser, form.named)


def made(quantiser: str, **features: Any) -> ReaderPlan:
    """A reader that quantises by a quantiser which makes its scales."""
    return ReaderPlan("made", quantiser, **features)


@dataclass(frozen=True)
class SitePlan:
    """One collective with what follows it.

    Attributes:
        collective: over the whole group, over part of it, or the maximum instead of the sum.
        strategy: of the collective.
        experts: what the addend is: nothing in particular; a sum of experts, without or with the shared expert; such a
            sum to which the shared expert's output is added; a sum of experts that somebody else reads, too.
        spread: rows are spread over the ranks between collective and readers: reduce-scatter, residual and norm on this
            rank's rows, all-gather; `read`: this rank's rows of the sum are read before.
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
    experts: ExpertsKind = "none"
    spread: Literal["no", "yes", "read"] = "no"
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

    def __post_init__(self) -> None:
        if self.dynamic and any(site.experts != "none" or site.spread != "no" for site in self.sites):
            raise UsageError('a site with experts or spread rows has a fixed token count, expected "dynamic":false')

    def to_json(self) -> str:
        """One line of JSON that `from_json` reads; defaults are left out."""
        return json.dumps(_differences(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> GraphPlan:
        """Read a plan, as `to_json` wrote it; `cases.read_plan` says what is wrong with one."""
        loaded = json.loads(text)
        sites = tuple(_site(entry) for entry in loaded.pop("sites", [{}]))
        return cls(sites=sites, **loaded)


def _differences(entry: Any) -> Any:
    if not dataclasses.is_dataclass(entry):
        return [_differences(each) for each in entry] if isinstance(entry, tuple) else entry
    found = {each.name: getattr(entry, each.name) for each in dataclasses.fields(entry)}
    defaults = {each.name: each.default for each in dataclasses.fields(entry)}
    return {name: _differences(value) for name, value in found.items() if value != defaults[name]}


def _site(entry: dict[str, Any]) -> SitePlan:
    given = dict(entry)
    if "readers" in given:
        given["readers"] = tuple(_reader(each) for each in given["readers"])
    return SitePlan(**given)


def _reader(entry: dict[str, Any]) -> ReaderPlan:
    """A reader; lines of before the family call one of NVFP4 a kind of its own."""
    return ReaderPlan(**(entry | {"kind": "made", "quantiser": "nvfp4"} if entry.get("kind") == "nvfp4" else entry))

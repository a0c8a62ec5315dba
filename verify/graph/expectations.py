"""What the passes must make of a plan: derived from its features alone, without looking at a graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from fusecheck.graph.family import FINALIZE, KINDS, fused_operation, kind_of, takes_scale
from fusecheck.graph.plan import UNKNOWN_STRATEGY, GraphPlan, ReaderPlan, SitePlan
from fusecheck.interface import FusionOp
from fusecheck.operations import GIVEN_SCALE, Operation

FP8_READERS = ("fp8", "quantize", "dead")
"""Layers by a given scale; a dead one stands in the graph, too."""
FUSIBLE_NORMS = ("torch", "triton", "flashinfer")
OTHER_READERS = {"bf16": "D1", "router": "D1", "capture": "D2", "made": "D6", "weight": "N9", "e5m2": "N10"}
"""Readers that need the norm itself, and the rules that they stand for."""
EVERY = (*KINDS, FINALIZE)
"""What passes may move into the fused operator besides the norm."""


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
        "N1": "the plain sum over ranks has another reader" if site.reduced_read or site.spread == "read" else "",
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


def quant_blockers(plan: GraphPlan, site: SitePlan, kind: str) -> dict[str, str]:
    """Why a fused norm's quantise of one kind must stay where it is."""
    of_kind = [reader for reader in site.readers if _kind(reader) == kind]
    mine = [reader for reader in of_kind if _whole_groups(plan, reader) and _whole_rows(reader)]
    given = bool(mine) and takes_scale(_quantiser(mine[0]))
    kinds = {reader.scale_kind for reader in mine} if given else {"static"}
    values = {reader.scale for reader in mine} if given else {0}
    forms = {reader.form for reader in mine if reader.quantiser}
    found = {
        "D3": "" if of_kind else f"no {kind.upper().replace('_', ' ')} layer reads the norm",
        "N17": "" if mine or all(_whole_groups(plan, each) for each in of_kind) else "the group does not divide hidden",
        "D12": "" if mine or all(_whole_rows(each) for each in of_kind) else "a view splits the rows",
        "N7": f"the scale is {sorted(kinds)}" if kinds & {"vector", "bf16", "dynamic"} else "",
        "N8": f"the scale is {sorted(kinds)}" if kinds & {"zero", "negative", "nan", "infinite"} else "",
        "N14": "the scale differs between ranks" if "per_rank" in kinds else "",
        "D4": "the scales differ" if len(values) > 1 else "",
        "D10": "groups, layouts or scales' formats differ" if len(forms) > 1 else "",
    }
    return {row: why for row, why in found.items() if why}


def _quantiser(reader: ReaderPlan) -> str:
    return reader.quantiser or GIVEN_SCALE


def _kind(reader: ReaderPlan) -> str | None:
    """The kind of a reader's quantiser, None where it has none."""
    return kind_of(_quantiser(reader)) if reader.quantiser or reader.kind in FP8_READERS else None


def _whole_groups(plan: GraphPlan, reader: ReaderPlan) -> bool:
    group = reader.form.quantiser.group if reader.quantiser else None
    return group is None or plan.hidden % group == 0


def _whole_rows(reader: ReaderPlan) -> bool:
    """Whether a view leaves the rows whole, as scales of rows and groups need it."""
    return not reader.quantiser or reader.view != "halves"


def _quantised(plan: GraphPlan, site: SitePlan, kind: str) -> Operation | None:
    """What a site with readers of this kind becomes, without its experts."""
    mine = [each for each in site.readers if _kind(each) == kind and _whole_groups(plan, each) and _whole_rows(each)]
    return fused_operation(_quantiser(mine[0]), norm_out=len(mine) < len(site.readers))


def _harmless(plan: GraphPlan, index: int, world_size: int, moves: Sequence[str]) -> tuple[FusionOp | None, ...]:
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
    relaxed = expectation(dataclasses.replace(plan, sites=sites), index, world_size, moves)
    return (*relaxed.allowed, FusionOp.RESIDUAL_RMS_NORM)


def expectation(plan: GraphPlan, index: int, world_size: int, moves: Sequence[str] = EVERY) -> Expectation:
    """What must become of a site under the norm pass and those that move what `moves` names, by its features alone."""
    site = plan.sites[index]
    forbidden = norm_blockers(plan, site, world_size)
    if forbidden and site.second_norm and _of_first_norm(site, forbidden):
        also = (None, *_harmless(plan, index, world_size, moves))
        found = Expectation(FusionOp.RESIDUAL_RMS_NORM, also, ("D5", *forbidden), "the second norm of the sum fits")
    elif forbidden:
        also = _harmless(plan, index, world_size, moves) if set(forbidden) <= {"N2", "N5"} else ()
        return Expectation(None, also, tuple(forbidden), "; ".join(forbidden.values()))
    else:
        found = _of_readers(plan, site, moves)
    if site.spread == "yes":
        found = dataclasses.replace(found, also=(*found.also, None), rows=(*found.rows, "D14"))
    return _with_experts(found, site, moves)


def _of_readers(plan: GraphPlan, site: SitePlan, moves: Sequence[str]) -> Expectation:
    """What the quantising passes make of a fused norm."""
    norm = FusionOp.RESIDUAL_RMS_NORM
    kinds = [kind for kind in KINDS if kind in moves]
    blocked = {kind: quant_blockers(plan, site, kind) for kind in kinds}
    fitting = [_quantised(plan, site, kind) for kind in kinds if not blocked[kind]]
    # The equal part of a group with different scales may be fused if the rest keeps the norm.
    differing = [kind for kind in kinds if blocked[kind] and blocked[kind].keys() <= {"D4", "D10"}]
    parts = [each for kind in differing for each in _parts(site, kind)]
    if not fitting:
        whys = {row: why for kind in kinds for row, why in blocked[kind].items()}
        if len(whys) > 1:
            whys.pop("D3", None)
        return Expectation(norm, tuple(parts), tuple(whys), "; ".join(whys.values()) or "no quantising pass runs")
    if fitting[0] is None or not fitting[0].returns_norm:
        return Expectation(fitting[0], (), ("F1",), "every reader quantises alike")
    rows = [OTHER_READERS[each.kind] for each in site.readers if each.kind in OTHER_READERS]
    why = "somebody besides the layers of one format reads the norm"
    return Expectation(fitting[0], (norm, *fitting[1:], *parts), tuple(dict.fromkeys(rows)), why)


def _parts(site: SitePlan, kind: str) -> list[Operation | None]:
    """What a site may become if some readers of a kind are quantised for, and the others get the norm."""
    names = dict.fromkeys(_quantiser(reader) for reader in site.readers if _kind(reader) == kind)
    return [fused_operation(name, norm_out=True) for name in names]


def _with_experts(found: Expectation, site: SitePlan, moves: Sequence[str]) -> Expectation:
    """The same of a site whose addend is a sum of experts: it may move in, and must where a pass does that."""
    if site.experts not in ("finalize", "shared"):
        return found
    with_experts = {
        op: fused_operation(op.quantiser, norm_out=op.returns_norm, experts=True)
        for op in (*found.allowed, FusionOp.RESIDUAL_RMS_NORM)
        if op is not None
    }
    also = (*found.also, *(op for op in with_experts.values() if op is not None))
    moved = with_experts.get(found.fused) if found.fused is not None and FINALIZE in moves else None
    if moved is None:
        return dataclasses.replace(found, also=also)
    return dataclasses.replace(found, fused=moved, also=(found.fused, *also), rows=(*found.rows, "F21"))

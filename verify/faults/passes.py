"""Faulty fusion passes as subjects of a graph check: those of the catalogue, and mistakes that nobody has reported."""

from __future__ import annotations

from dataclasses import dataclass

from fusecheck.faults.catalogue import Fault, catalogue
from fusecheck.graph.cases import Subject


@dataclass(frozen=True)
class FaultyPass:
    """A faulty pass.

    Attributes:
        id: of the fault; `GM-` where there is no report.
        title: what goes wrong, in one clause.
        subject: the pass, and where it stands.
    """

    id: str
    title: str
    subject: Subject


def subject(fault: Fault) -> Subject:
    """Where the faulty pass of a catalogue entry stands, by the pass that it changes."""
    return _subject(fault.patch, of_norm=fault.hook.startswith("FuseNorm."))


def faulty_passes() -> tuple[FaultyPass, ...]:
    """All of them, the catalogue's first."""
    published = [fault for fault in catalogue().faults if fault.subject == "pass"]
    return *(FaultyPass(fault.id, fault.title, subject(fault)) for fault in published), *UNREPORTED


def _subject(patch: str, *, of_norm: bool) -> Subject:
    return Subject(f"{patch}.apply", after_norm=not of_norm, quantises=not of_norm)


def _norm(identifier: str, name: str, title: str) -> FaultyPass:
    return FaultyPass(identifier, title, _subject(f"fusecheck.graph.faulty_norm:{name}", of_norm=True))


def _quant(identifier: str, name: str, title: str) -> FaultyPass:
    return FaultyPass(identifier, title, _subject(f"fusecheck.graph.faulty_quant:{name}", of_norm=False))


UNREPORTED: tuple[FaultyPass, ...] = (
    _norm("GM-01", "AlphaIgnored", "alpha of the add is ignored"),
    _norm("GM-02", "OtherReaderIgnored", "the sum's other reader is ignored"),
    _norm("GM-03", "BroadcastResidual", "a broadcast residual"),
    _norm("GM-04", "FixedEps", "eps is a constant"),
    _norm("GM-05", "FixedStrategy", "the strategy is a constant"),
    _norm("GM-06", "NoMeta", "no meta values after the norm pass"),
    _norm("GM-07", "FirstRankOnly", "one rank fuses alone"),
    _quant("GM-08", "WeightScale", "the weight scale for the input scale"),
    _quant("GM-09", "BadScaleValue", "zero, negative, infinite and NaN scales"),
    _quant("GM-10", "FixedOutDtype", "the result is always bf16"),
    _quant("GM-11", "ViewDropped", "a view between norm and layer is lost"),
    _quant("GM-12", "AlwaysOutQuant", "the norm is always returned"),
    _quant("GM-13", "DirectReaderOnly", "one direct reader only"),
    _quant("GM-14", "NoMeta", "no meta values after the quantising pass"),
)
"""Mistakes that a count of nodes or a comparison with a tolerance does not show; without a source, so not published."""

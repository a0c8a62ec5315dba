"""Stage `layout`: what lies around the scales: padding that must be zero, and slots that the kernel must not touch."""

from __future__ import annotations

import torch
from torch import Tensor

from fusecheck.quantisers.layouts import DATA, PROMISED, UNTOUCHED, Layout
from fusecheck.stages.judgement import SHOWN, Element, Stage, Tally, raw


def judge_layout(layout: Layout, stored: Tensor, poison: int | None) -> Tally:
    """Tally the slots of a tensor of scales that hold no scale.

    Args:
        layout: of the tensor.
        stored: as the kernel returned it.
        poison: the byte that filled the memory before the call; None where that is not known.
    """
    slots, classes = raw(layout.slots(stored)), layout.classes(stored.device)
    tally = Tally(Stage.LAYOUT, elements=layout.size - layout.count(DATA))
    wrong = []
    if layout.count(PROMISED):
        wrong.append(((classes == PROMISED) & (slots != 0), "0 (padding)"))
    if poison is not None and layout.count(UNTOUCHED):
        before = int.from_bytes(bytes([poison]) * slots.element_size(), "little", signed=slots.dtype.is_signed)
        wrong.append(((classes == UNTOUCHED) & (slots != before), "not written"))
    if wrong and bool(torch.stack([where.any() for where, _ in wrong]).any()):
        for where, expected in wrong:
            _add(tally, layout, slots, where, expected)
    return tally


def _add(tally: Tally, layout: Layout, slots: Tensor, wrong: Tensor, expected: str) -> None:
    places = torch.nonzero(wrong)[:, 0]
    tally.off_nominal += len(places)
    tally.outside += len(places)
    for place in places[: SHOWN - len(tally.shown)].tolist():
        where = f"slot {place} of {layout.size} in the {layout.name} scales of {layout.tokens} x {layout.columns}"
        tally.shown.append(Element(0, place, f"{int(slots[place]):#x}", expected, where))

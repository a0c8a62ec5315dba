"""Try to refute the bounds of scales and codes: random groups, random legal quantisers, everything inside every time.

Per format, every known flow in turn. What is compared is the scale as stored, the value before the cast (a code hides
nearly every violation), and the code. The same outputs are judged again by bounds that are broken on purpose, each of
which must be caught: slack taken away where a flow has it, another rule declared where it has none.

    python -m fusecheck.property_tests.suite.refutation --format mxfp8 --checks 1e8
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from fusecheck.numerics.enclosure import Interval, U, corners, widen
from fusecheck.property_tests.suite import legal_quantisers, refuting
from fusecheck.property_tests.suite.legal_quantisers import Doubles, Quantised
from fusecheck.property_tests.suite.quantiser_cases import SPECS, draw_given, draw_groups
from fusecheck.property_tests.suite.rational_quantisers import Spec
from fusecheck.property_tests.suite.refuting import Tallies
from fusecheck.quantflow import QUANT_FLOWS, CodeRule, PowerOfTwo, QuantFlow, ScaleRule
from fusecheck.quantisers import nvfp4, scaled, scales
from fusecheck.quantisers.known import QUANTISERS
from fusecheck.quantisers.quantiser import Quantiser
from fusecheck.quantisers.scaled import Scaled

SIZES = {"static-fp8": (64, 128), "dynamic-fp8": (64, 128, 576), "group-fp8": (64, 128), "group-fp8-packed": (64, 128)}
"""Elements of a group that are drawn; those of the others are fixed."""


@dataclass
class Tally(refuting.Tally):
    """What one bound was tried on; an element is judged by its value and its code, and scales on top.

    Attributes:
        groups: scales judged.
        codes: elements with more than one admissible code.
        scales: groups with more than one admissible scale.
    """

    groups: int = 0
    codes: int = 0
    scales: int = 0

    def rest(self) -> dict[str, str]:
        return {
            ">1 scale": f"{self.scales / max(self.groups, 1):.1e}",
            ">1 code": f"{self.codes / self.elements:.1e}",
        }


@dataclass(frozen=True)
class Groups:
    """Groups and what a kernel was given: `norm` [groups, size], native."""

    quantiser: Quantiser
    spec: Spec
    norm: Tensor
    given: float


def draw(rng: np.random.Generator, name: str, flow: QuantFlow, elements: int) -> Groups:
    """Random groups for a quantiser; float32 where it reads the unrounded norm."""
    quantiser = QUANTISERS[name]
    assert isinstance(quantiser, Scaled)
    size = int(rng.choice(SIZES[name])) if name in SIZES else quantiser.group or 1
    native = torch.bfloat16 if rng.random() < 0.7 else torch.float16
    norm = draw_groups(rng, max(1, elements // size), size, native, SPECS[name])
    if flow.reads == "unrounded":
        norm = norm.float() * torch.from_numpy(rng.uniform(1, 1 + 2.0**-8, norm.shape)).float()
    given = draw_given(rng, float(norm.abs().amax(1).median()), flow)
    return Groups(replace(quantiser, group=size), SPECS[name], norm, given)


def beside(rng: np.random.Generator, norm: Tensor) -> Interval:
    """Ends of a norm that was not returned: the value itself, or its neighbours in its own format (G7)."""
    native = norm.numpy() if norm.dtype is torch.float32 else norm.view(torch.int16).numpy()
    bits = native.view(np.int32) if norm.dtype is torch.float32 else native
    ends = []
    for side in (-1, 1):
        step = rng.integers(0, 2, bits.shape, dtype=np.int8) * np.where(bits < 0, -side, side) * (bits << 1 != 0)
        moved = torch.from_numpy((bits + step).astype(bits.dtype)).view(norm.dtype).double()
        ends.append(torch.where(moved.isfinite(), moved, norm.double()))
    return ends[0], ends[1]


def judge(groups: Groups, out: Quantised, flow: QuantFlow, tally: Tally, ends: Interval | None = None) -> None:
    """Judge one kernel's scales and codes by one bound, given the scales that it stored.

    Args:
        groups: what it was given.
        out: what it made of them.
        flow: the bound's declaration.
        tally: to add to.
        ends: of the norm, where it was not returned.
    """
    wide = (groups.norm.double(),) * 2 if ends is None else ends
    quantiser, given = groups.quantiser, groups.given
    dtype = torch.float32 if groups.spec.stored == "fp32" else torch.uint8
    stored = torch.from_numpy(out.scales).to(dtype)
    nominal = quantiser.scales(groups.norm, flow, given).expand(stored.shape)
    low, high = (end.expand(stored.shape) for end in quantiser.scale_ends(wide, flow, given))
    tally.violations["scale"] += int((~quantiser.admits(stored, nominal, (low, high), flow)).sum())
    tally.groups += stored.numel()
    tally.scales += int((low != high).sum())
    judge_codes(groups, out, flow, tally, wide)


def judge_codes(groups: Groups, out: Quantised, flow: QuantFlow, tally: Tally, norm: Interval) -> None:
    """The half that concerns values and codes, by ends of the norm."""
    dtype = torch.float32 if groups.spec.stored == "fp32" else torch.uint8
    stored = torch.from_numpy(out.scales).to(dtype)
    ends = groups.quantiser.quotient_ends(norm, stored, flow, groups.given)
    first, last = groups.quantiser.code_ends(norm, stored, flow, groups.given)
    value, code = torch.from_numpy(out.values).double(), torch.from_numpy(out.ordinals)
    # Where zero may meet an infinite factor, at one end of the norm alone, any value is possible, and none.
    undefined = ends[0].isnan() | (ends[0].isneginf() & ends[1].isposinf())
    inside = ((ends[0] <= value) & (value <= ends[1])) | (value.isnan() & undefined)
    tally.violations["value"] += int((~inside).sum())
    tally.violations["code"] += int((~((first <= code) & (code <= last))).sum())
    tally.elements += value.numel()
    tally.codes += int((last > first).sum())


def cancelled(rng: np.random.Generator, name: str, flow: QuantFlow, elements: int, tally: Tally) -> None:
    """Rows whose norm was neither rounded nor returned: their root lies anywhere in an enclosure, and cancels (G6)."""
    size = 4096
    t, gamma = (torch.from_numpy(x).bfloat16().double() for x in rows(rng, max(1, elements // size), size))
    middle = t.square().mean(1, keepdim=True).add(1e-6).rsqrt()
    wide = 1e-4  # as after a sum of squares in any order
    actual = (middle * torch.from_numpy(1 + rng.uniform(-wide, wide, middle.shape))).float()
    norm = (t.float() * actual) * gamma.float() if rng.integers(2) else (t.float() * gamma.float()) * actual
    quantiser = QUANTISERS[name]
    groups = Groups(quantiser, SPECS[name], norm, 1.0)
    out = legal_quantisers.run(norm.numpy(), groups.spec, flow, 1.0, rng)
    possible = quantiser.amax_ends(torch.from_numpy(out.scales).float(), flow)
    weighted = t * gamma
    peak = weighted.abs().amax(1, keepdim=True)
    low, high = scales.narrowed_root((middle * (1 - wide), middle * (1 + wide)), (peak, peak), possible)
    judge_codes(groups, out, flow, tally, widen(*corners(weighted, weighted, low, high), 2.01 * U))


def rows(rng: np.random.Generator, count: int, size: int) -> tuple[Doubles, Doubles]:
    """A stream and its weight."""
    t = rng.standard_normal((count, size)) * np.exp2(rng.integers(-4, 5, (count, 1)).astype(np.float64))
    return t, 1 + 0.3 * rng.standard_normal(size)


@contextmanager
def without(slack: str) -> Iterator[None]:
    """Grant one kind of approximate operation no error at all."""
    with ExitStack() as stack:
        for module in (scales, scaled, nvfp4):
            if hasattr(module, slack):
                stack.enter_context(mock.patch.object(module, slack, 0.0))
        yield


def sabotages(name: str, flow: QuantFlow) -> dict[str, tuple[str | None, QuantFlow]]:
    """Broken bounds: the slack that is taken away, or None, and the flow that the judge is told."""
    found: dict[str, tuple[str | None, QuantFlow]] = {}
    rules = {flow.scale_rule, flow.code_rule}
    for slack, rule in (("QUOTIENT", {"approx", "either"}), ("RECIPROCAL", {"rcp"}), ("LOGARITHM", {"log2"})):
        if rules & rule:
            found[f"no error of {min(rules & rule)}"] = slack, flow
    found.update({f"{rule} declared": (None, told) for rule, told in _other_rules(name, flow).items()})
    return found


def _other_rules(name: str, flow: QuantFlow) -> dict[str, QuantFlow]:
    """Declarations that differ from a flow where it leaves nothing open."""
    told: dict[str, QuantFlow] = {}
    if flow.pow2 != "no":
        other: PowerOfTwo = "floor" if flow.pow2 != "floor" else "rceil"
        told[other] = replace(flow, pow2=other)
    elif flow.scale_rule in ("divide", "multiply") and name != "nvfp4":
        rule: ScaleRule = "multiply" if flow.scale_rule == "divide" else "divide"
        told[rule] = replace(flow, scale_rule=rule)
    exact = flow.code_rule != "approx" or flow.exact_pow2
    if flow.pow2 != "no" and exact and flow.reads == "rounded":  # ties need the activations' grid
        told["ties away"] = replace(flow, ties="away")
    if flow.code_rule in ("divide", "reciprocal") and flow.pow2 == "no" and flow.codes_from == "scale":
        code_rule: CodeRule = "reciprocal" if flow.code_rule == "divide" else "divide"
        told[f"codes by {code_rule}"] = replace(flow, code_rule=code_rule)
    if flow.least:
        told["half the least"] = replace(flow, least=flow.least / 2)
    if flow.codes_from == "amax":
        told["codes from the scale"] = replace(flow, codes_from="scale")
    return told


def refute(name: str, checks: int, elements: int, seed: int) -> Iterator[Tallies[Tally]]:
    """Judge random kernels of every flow of a format; yield the tallies so far, by flow and bound."""
    rng, tallies = np.random.default_rng(seed), Tallies[Tally]()
    while tallies.elements < checks:
        for flow in QUANT_FLOWS[name].values():
            groups = draw(rng, name, flow, elements)
            out = legal_quantisers.run(groups.norm.float().numpy(), groups.spec, flow, groups.given, rng)
            judge(groups, out, flow, tallies.sound.setdefault(flow.name, Tally()))
            enclosed = tallies.sound.setdefault(f"{flow.name}: norm enclosed", Tally())
            judge(groups, out, flow, enclosed, beside(rng, groups.norm))
            if name == "dynamic-fp8" and flow.reads == "unrounded":
                cancelled(rng, name, flow, elements, tallies.sound.setdefault(f"{flow.name}: root cancels", Tally()))
            for broken, (slack, told) in sabotages(name, flow).items():
                spoilt = tallies.broken.setdefault(f"{flow.name}: {broken}", Tally())
                if spoilt.elements < checks / 16:
                    with without(slack) if slack else ExitStack():
                        judge(groups, out, told, spoilt)
        yield tallies

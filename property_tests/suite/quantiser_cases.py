"""Groups for quantisers, on and beside every boundary, and which quantisers and flows there are to try them on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fusecheck.property_tests.suite.rational_quantisers import Spec
from fusecheck.quantflow import QUANT_FLOWS, QuantFlow

SPECS = {
    "static-fp8": Spec("e4m3", "fp32"),
    "dynamic-fp8": Spec("e4m3", "fp32"),
    "group-fp8": Spec("e4m3", "fp32"),
    "group-fp8-packed": Spec("e4m3", "ue8m0"),
    "mxfp8": Spec("e4m3", "ue8m0"),
    "nvfp4": Spec("e2m1", "e4m3"),
    "mxfp4": Spec("e2m1", "ue8m0"),
}
"""Each quantiser, as the second oracle knows it."""

KNOWN: list[tuple[str, QuantFlow]] = [(name, flow) for name, flows in QUANT_FLOWS.items() for flow in flows.values()]
"""Every known flow of every quantiser."""
MAKE_SCALES = [(name, flow) for name, flow in KNOWN if flow.scale_rule != "given"]
"""Those of them that make scales."""
IDS = [f"{name}-{flow.name}" for name, flow in KNOWN]

KINDS = (
    *("gaussian", "log-uniform", "constant", "ties", "outlier"),
    *("tiny", "zeros", "boundary", "near boundary", "least", "largest"),
)


def draw_groups(rng: np.random.Generator, count: int, size: int, native: torch.dtype, spec: Spec) -> Tensor:
    """Groups of every kind in turn, [count, size], native; maxima at 7 * 2^j or 3 * 2^j, beside it, and at the top."""
    narrow = native is torch.float16
    kind = np.arange(count) % len(KINDS)
    at = {name: np.flatnonzero(kind == i) for i, name in enumerate(KINDS)}
    each = {name: (len(rows), 1) for name, rows in at.items()}
    x = rng.standard_normal((count, size))
    x[at["log-uniform"]] *= np.exp2(rng.uniform(-12, 2, (each["log-uniform"][0], size)))
    x[at["constant"]] = rng.uniform(0.5, 2, each["constant"])
    x[at["ties"]] = rng.integers(-64, 65, (each["ties"][0], size)) / 8
    x[at["outlier"], rng.integers(0, size)] *= 1000
    x *= np.exp2(rng.integers(-5, 3, (count, 1)) if narrow else rng.integers(-18, 19, (count, 1))).astype(np.float64)
    x[at["tiny"]] *= 2.0**-18 if narrow else 2.0 ** rng.integers(-118, -30)
    x[at["zeros"]] *= rng.integers(0, 2, each["zeros"]) * rng.integers(0, 2, (each["zeros"][0], size))
    for name in ("boundary", "near boundary"):
        peak = np.abs(x[at[name]]).max(1) + 1e-30
        top = np.ldexp(1.75 if spec.element == "e4m3" else 1.5, np.ceil(np.log2(peak)).astype(int))
        beside = rng.choice([1 - 2.0**-8, 1 + 2.0**-7], len(peak)) if name == "near boundary" else 1.0
        x[at[name], rng.integers(0, size, len(peak))] = top * beside * rng.choice([-1.0, 1.0], len(peak))
    least = rng.choice([2.0**-9, 448e-10, 1e-4, 1e-10], each["least"]) * rng.choice([0.99, 1.0, 1.01], each["least"])
    x[at["least"]] = np.clip(x[at["least"]], -1, 1) * least
    top = torch.finfo(native).max
    largest = np.abs(x[at["largest"]]).max(1, keepdims=True) + 1e-300
    x[at["largest"]] *= top / largest * np.exp2(rng.uniform(-3, 0, each["largest"]))
    return torch.from_numpy(x).to(native)


def draw_given(rng: np.random.Generator, amax: float, flow: QuantFlow) -> float:
    """A scale of the caller: for NVFP4 as calibrated, half of them powers of two; float32 values."""
    if flow.given == "none":
        return 1.0
    if flow.given == "scale":
        value = max(amax, 1e-3) / 448 * 2.0 ** rng.uniform(-4, 2)
    else:
        value = 448 * 6 / max(amax, 1e-3) * 2.0 ** rng.uniform(-8, 0.5)
        value = 1 / value if flow.given == "divides" else value
    value = 2.0 ** np.floor(np.log2(value)) if rng.integers(2) else value
    return float(np.float32(value))

"""Random dataflows: every combination of flags that some kernel could have."""

from __future__ import annotations

import numpy as np
import torch

from fusecheck.dataflow import Dataflow


def draw_dataflow(rng: np.random.Generator, *, depth: int | None = None) -> Dataflow:
    """Draw every flag at random.

    Squares are rounded only where the norm reads native values: no kernel multiplies float32 operands natively.
    """

    def coin() -> bool:
        return bool(rng.random() < 0.5)

    reads_rounded = coin()
    round_squares = reads_rounded and bool(rng.random() < 0.25)
    return Dataflow(
        "drawn",
        accumulate=(("fp32", "native", "exact") * 2)[int(rng.integers(6))],
        sum_rounding=(("nearest", "truncate", "either") * 2)[int(rng.integers(6))],
        order="rank" if coin() else "any",
        round_sum=coin(),
        norm_reads_rounded=reads_rounded,
        round_squares=round_squares,
        scaled_squares=not round_squares and bool(rng.random() < 0.2),
        depth=depth,
        mean_rule="approx" if coin() else "exact",
        round_normed=bool(rng.random() < 0.25),
        round_norm=coin(),
        scaling=(("multiply", "divide", "either") * 2)[int(rng.integers(6))],
        exact_reciprocal=coin(),
        exact_pow2=coin(),
        flush_subnormals=coin(),
        sum_flushes=coin(),
    )


def draw_native(rng: np.random.Generator, flow: Dataflow) -> torch.dtype:
    """Draw the activations' dtype; bf16 where squares are rounded, for those of fp16 overflow from 256 on."""
    return torch.bfloat16 if flow.round_squares or rng.random() < 0.6 else torch.float16


def describe(flow: Dataflow) -> str:
    """The flags that are set, for a table or a failure message."""
    flags: tuple[str, ...] = ("round_sum", "norm_reads_rounded", "round_squares", "scaled_squares", "round_normed")
    flags += ("round_norm", "exact_reciprocal", "exact_pow2")
    words = [
        flow.accumulate,
        flow.sum_rounding,
        flow.order,
        flow.scaling,
        f"mean={flow.mean_rule}",
        f"depth={flow.depth}",
    ]
    return " ".join([*words, *(f for f in flags if getattr(flow, f))])

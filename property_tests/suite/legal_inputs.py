"""Random operands for the swarm of legal kernels: twelve distributions that stress different bounds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from fusecheck.property_tests.suite.legal_kernels import Floats, Generator, Inputs, to_native

Doubles = npt.NDArray[np.float64]

DISTRIBUTIONS = (
    "gaussian",
    "uniform",
    "heavy tails",
    "outlier channels",
    "ranks of unequal size",
    "cancelling",
    "constant rows",
    "sparse",
    "tiny",
    "large",
    "integers",
    "log-uniform",
)
TOO_LARGE_FOR_FP16 = ("heavy tails", "outlier channels", "large", "log-uniform")


def _outliers(rng: Generator, shape: tuple[int, int, int]) -> Doubles:
    x = rng.standard_normal(shape)
    x[..., rng.choice(shape[2], max(1, shape[2] // 128), replace=False)] *= 64
    return x


def _cancelling(rng: Generator, shape: tuple[int, int, int]) -> Doubles:
    x = rng.standard_normal(shape) * 2.0 ** rng.integers(0, 13)
    if shape[0] > 1:
        x[-1] = 2.0**-7 * rng.standard_normal(shape[1:]) - x[0]
    return x


def draw_partials(rng: Generator, distribution: str, shape: tuple[int, int, int]) -> Doubles:
    """Draw [world_size, tokens, hidden] float64 addends of one distribution."""
    normal = rng.standard_normal
    makers: dict[str, Callable[[], Doubles]] = {
        "gaussian": lambda: normal(shape),
        "uniform": lambda: rng.uniform(-1, 1, shape),
        "heavy tails": lambda: np.clip(rng.standard_t(2, shape), -1e3, 1e3),
        "outlier channels": lambda: _outliers(rng, shape),
        "ranks of unequal size": lambda: normal(shape) * 10.0 ** rng.uniform(-3, 2, (shape[0], 1, 1)),
        "cancelling": lambda: _cancelling(rng, shape),
        "constant rows": lambda: np.broadcast_to(normal((*shape[:2], 1)), shape).copy(),
        "sparse": lambda: normal(shape) * (rng.random(shape) < 0.1),
        "tiny": lambda: normal(shape) * 1e-4,
        "large": lambda: normal(shape) * 300,
        "integers": lambda: rng.integers(-16, 17, shape).astype(np.float64),
        "log-uniform": lambda: rng.choice([-1.0, 1.0], shape) * 10.0 ** rng.uniform(-3, 2, shape),
    }
    return makers[distribution]()


def _draw_gamma(rng: Generator, hidden: int) -> Doubles:
    kind = rng.integers(3)
    if kind == 0:
        return np.ones(hidden)
    if kind == 1:
        return 1 + 0.1 * rng.standard_normal(hidden)
    return np.where(rng.random(hidden) < 0.01, 0.0, rng.standard_normal(hidden))


def _draw_scale(rng: Generator, largest: float) -> float:
    kind = rng.integers(5)
    if kind == 0:
        return 1.0
    if kind == 1:
        return float(2.0 ** rng.integers(-8, 3))
    if kind == 2:
        return float(np.float32(10.0 ** rng.uniform(-3.5, 0.5)))
    return float(np.float32(largest / (448 if kind == 3 else 448 * 8)))  # amax / 448, and an eighth: saturating


def draw(rng: Generator, distribution: str, world_size: int, tokens: int, hidden: int, native: torch.dtype) -> Inputs:
    """Draw the operands of one call; gamma, eps, the scale and the weight bias vary with them."""
    if native is torch.float16 and distribution in TOO_LARGE_FOR_FP16:
        distribution = "gaussian"
    partials = draw_partials(rng, distribution, (world_size, tokens, hidden))
    flat = distribution == "constant rows"
    residual = 0 * partials[0] if flat else rng.standard_normal((tokens, hidden)) * np.abs(partials[0]).mean()
    gamma = _draw_gamma(rng, hidden)
    bias = float(rng.choice([0.0, 0.0, 0.0, 1.0]))

    def as_native(x: Doubles) -> Floats:
        return to_native(x.astype(np.float32), native)

    return Inputs(
        as_native(partials),
        as_native(residual),
        as_native(gamma - bias),
        bias,
        float(rng.choice([1e-5, 1e-6, 1e-3])),
        _draw_scale(rng, float(np.abs(gamma).max()) * 4),
        native,
    )

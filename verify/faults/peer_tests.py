"""The data on which the peers' own tests run their criteria: shapes, scale, gamma, and what the ranks hold.

Facts from the tests that `criteria` names. Where a test's largest shapes would take long on a CPU, the tokens are
capped; hidden sizes are kept, since they decide about partial warps and launch limits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusecheck.interface import RankInputs
from fusecheck.oracle import Operands

MOST_ELEMENTS = 2**15
"""tokens * hidden of the largest shape that is run."""


@dataclass(frozen=True)
class Profile:
    """The data of one project's test.

    Attributes:
        name: a key of `PROFILES`.
        tokens: rows.
        hidden: columns.
        dtype: bf16 or fp16.
        world_sizes: ranks that the test runs with, as far as they are run here.
        deviation: of the partial sums.
        residual: `normal`, or `partial` where the residual is the partial sum itself.
        same_on_ranks: all ranks hold the same partial sums.
        integers: the values are small integers.
        gamma: `normal`, `ones`, or `near` one.
        scale: the dequantisation scale, or None for one drawn from (0, 1).
        eps: of the norm.
        returns_quant: whether the op under test returns codes.
        warmups: calls with the same data before the one that is looked at.
    """

    name: str
    tokens: tuple[int, ...]
    hidden: tuple[int, ...]
    dtype: str = "bf16"
    world_sizes: tuple[int, ...] = (2, 4)
    deviation: float = 1.0
    residual: str = "normal"
    same_on_ranks: bool = False
    integers: bool = False
    gamma: str = "normal"
    scale: float | None = 1.0
    eps: float = 1e-5
    returns_quant: bool = True
    warmups: int = 0

    def shapes(self) -> list[tuple[int, int, int]]:
        """(world_size, tokens, hidden) of every call that is run: each value of each, but not every combination."""
        count = max(len(self.tokens), len(self.hidden), len(self.world_sizes))
        made = []
        for index in range(count):
            hidden = self.hidden[index % len(self.hidden)]
            tokens = min(self.tokens[index % len(self.tokens)], max(1, MOST_ELEMENTS // hidden))
            made.append((self.world_sizes[index % len(self.world_sizes)], tokens, hidden))
        return made


_ALL = (
    Profile("flashinfer", (1, 128), (1024, 8192), scale=None, eps=1e-3, warmups=5),
    Profile("flashinfer-gemma", (8,), (2048,), world_sizes=(2,), returns_quant=False),
    Profile("flashinfer-mnnvl", (1, 32), (2880, 5120, 7168)),
    Profile("flashinfer-norm", (1, 19, 99), (111, 1024, 4096), world_sizes=(2,), scale=0.01),
    Profile("flashinfer-group", (1, 64), (1024, 2048), deviation=8.0, same_on_ranks=True, scale=0.05),
    Profile("flashinfer-contract", (1, 16), (8192,), returns_quant=False),
    Profile("tensorrt-llm", (16, 256), (128, 7168), world_sizes=(2,), deviation=60.0, gamma="near"),
    Profile("tensorrt-llm-cpp", (3, 17, 100), (64, 512, 896, 4096), deviation=57.0),
    Profile("vllm", (1, 4, 64), (512, 2048), world_sizes=(2,), returns_quant=False),
    Profile("vllm-layernorm", (7, 83), (768, 5120, 8192), world_sizes=(2,), deviation=1e-3, scale=0.01, gamma="near"),
    Profile("sglang", (1, 64), (2048, 4096), world_sizes=(2,), scale=0.02),
    Profile("sglang-amd", (1, 16, 128), (2880, 4096, 8192), gamma="ones", returns_quant=False),
    Profile("aiter", (1, 16), (4096, 8192), residual="partial", same_on_ranks=True, gamma="ones", scale=0.01),
    Profile("modular", (1, 17, 20), (512, 2880, 4096), scale=0.0125),
    Profile("torch", (4,), (1024, 2048), world_sizes=(4,), returns_quant=False),
    Profile("nccl-tests", (4,), (1024,), integers=True, returns_quant=False),
)

PROFILES: dict[str, Profile] = {profile.name: profile for profile in _ALL}
"""The peers' own data by name."""


def _normal(shape: tuple[int, ...], seed: int, profile: Profile, deviation: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if profile.integers:
        made = torch.randint(-8, 9, shape, generator=generator).float()
    else:
        made = torch.randn(shape, generator=generator) * deviation
    return made.to(torch.bfloat16 if profile.dtype == "bf16" else torch.float16)


def operands(profile: Profile, world_size: int, tokens: int, hidden: int, seed: int) -> Operands:
    """All ranks' operands of one call; hidden is rounded up to a multiple of 8."""
    shape = (tokens, -(-hidden // 8) * 8)
    seeds = [seed * 1000 + (0 if profile.same_on_ranks else rank) for rank in range(world_size)]
    partials = [_normal(shape, one, profile, profile.deviation) for one in seeds]
    residual = partials[0] if profile.residual == "partial" else _normal(shape, seed * 1000 + 77, profile)
    wave = _normal(shape[1:], seed * 1000 + 88, profile)
    gamma = {"normal": wave, "ones": torch.ones_like(wave), "near": (1 + 0.1 * wave.float()).to(wave.dtype)}
    drawn = float(torch.rand(1, generator=torch.Generator().manual_seed(seed)).clamp(min=1e-3))
    scale = drawn if profile.scale is None else float(torch.tensor(profile.scale, dtype=torch.float32))
    return Operands(partials, residual, gamma[profile.gamma], scale, profile.eps)


def inputs_of(made: Operands, rank: int) -> RankInputs:
    """What the kernel receives on one rank."""
    scale = torch.tensor([made.scale], dtype=torch.float32)
    return RankInputs(
        made.partials[rank].clone(), made.residual.clone(), made.gamma.clone(), scale, made.eps, made.weight_bias
    )

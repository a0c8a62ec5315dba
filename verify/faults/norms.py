"""Faults of the norm: mean square (A4), inverse root (A5), gamma and product (A6). One hook of `Arithmetic` each."""

from __future__ import annotations

import torch
from torch import Tensor

from fusecheck.backends.emulated_arithmetic import LANES, Arithmetic, Row
from fusecheck.interface import RankInputs

WARP = 32
"""Threads of a warp; each holds LANES elements."""

PIPELINED_ROWS = 32
"""Rows from which the miscompiled pipeline of KA-22 is taken; 512 in the original, scaled down."""


def partial_warp(hidden: int) -> int:
    """The first element that lies in a warp with inactive threads; `hidden` where there is none."""
    return hidden // LANES // WARP * WARP * LANES


class DropsGammaCast(Arithmetic):
    """KA-10: the rounding of t * r before gamma is dropped because a residual is given."""

    def normalise(self, read: Tensor, inverse: Tensor, weight: Tensor, native: torch.dtype) -> Tensor:
        """Multiply without the declared rounding."""
        del native
        return read.mul_(inverse).mul_(weight)


class RoundsBiasedGamma(Arithmetic):
    """KA-11: 1 + gamma is formed in the activations' dtype."""

    def weight(self, gamma: Tensor, weight_bias: float) -> Tensor:
        """Round the sum."""
        return (gamma.float() + weight_bias).to(gamma.dtype).float()


class DropsBias(Arithmetic):
    """KA-12: the fused kernel ignores the bias of the weight."""

    def weight(self, gamma: Tensor, weight_bias: float) -> Tensor:
        """Gamma alone."""
        return super().weight(gamma, 0.0 * weight_bias)


class DoublesBias(Arithmetic):
    """KA-12, folded into the weights and added by the kernel as well."""

    def weight(self, gamma: Tensor, weight_bias: float) -> Tensor:
        """Add it twice."""
        return super().weight(gamma, 2 * weight_bias)


class WeighsBeforeVariance(Arithmetic):
    """KA-13: gamma multiplies before the mean of squares is taken, which normalises it away."""

    def prepare(self, inputs: RankInputs) -> Row:
        """Keep gamma for `mean_square`."""
        row = super().prepare(inputs)
        self.gamma = row.weight
        return row

    def mean_square(self, read: Tensor, native: torch.dtype) -> Tensor:
        """Of t * gamma."""
        return super().mean_square(read * self.gamma, native)


class TenfoldEps(Arithmetic):
    """KA-14: eps comes from the wrong operand."""

    def epsilon(self, inputs: RankInputs) -> float:
        """Ten times too large."""
        return 10 * super().epsilon(inputs)


class EpsOutsideRoot(Arithmetic):
    """KA-14: eps is added to the root, not to the mean square."""

    def inverse_root(self, mean_square: Tensor, eps: float) -> Tensor:
        """1 / (sqrt(ms) + eps)."""
        return (mean_square.sqrt() + eps).reciprocal()


class ReadsPadding(Arithmetic):
    """KA-20: lanes masked off beyond hidden, padded to a power of two, enter the sum with what lies there."""

    def mean_square(self, read: Tensor, native: torch.dtype) -> Tensor:
        """Add the next row's first elements, as far as the padded block reaches."""
        hidden = read.shape[1]
        padding = min((1 << (hidden - 1).bit_length()) - hidden, hidden)
        beyond = read.roll(-1, 0)[:, :padding].square().sum(1, keepdim=True)
        return super().mean_square(read, native) + beyond / hidden


class LosesLastLanes(Arithmetic):
    """KA-21: the last lanes of a partial warp do not enter the sum of squares."""

    def mean_square(self, read: Tensor, native: torch.dtype) -> Tensor:
        """Leave out the last 8 elements where hidden / 8 is no multiple of the warp."""
        counted = read
        if partial_warp(read.shape[1]) != read.shape[1]:
            counted = read.clone()
            counted[:, -LANES:] = 0
        return super().mean_square(counted, native)


class CountsLanesTwice(Arithmetic):
    """KA-21: a shuffle with a full mask reads lanes of a partial warp twice."""

    def mean_square(self, read: Tensor, native: torch.dtype) -> Tensor:
        """Count the partial warp's elements twice."""
        hidden = read.shape[1]
        again = read[:, partial_warp(hidden) :].square().sum(1, keepdim=True)
        return super().mean_square(read, native) + again / hidden


class LosesPartialWarp(Arithmetic):
    """FI-3883: the number of warps is rounded down, so that a partial warp is not summed."""

    def mean_square(self, read: Tensor, native: torch.dtype) -> Tensor:
        """Sum the full warps only, if there are any."""
        first = partial_warp(read.shape[1])
        counted = read.clone()
        counted[:, first if first else read.shape[1] :] = 0
        return super().mean_square(counted, native)


class CountsInactiveThreads(Arithmetic):
    """FI-3879: the first mend sums over all threads of the last warp, active or not."""

    def mean_square(self, read: Tensor, native: torch.dtype) -> Tensor:
        """Too large by the ratio of started to active threads."""
        threads = read.shape[1] // LANES
        return super().mean_square(read, native) * (-(-threads // WARP) * WARP / threads)


class LosesPipelineStage(Arithmetic):
    """KA-22: a pipelined reduction was validated at hidden 4096 only; elsewhere many rows lose its last stage."""

    def mean_square(self, read: Tensor, native: torch.dtype) -> Tensor:
        """Leave out the last sixteenth of the row."""
        rows, hidden = read.shape
        counted = read
        if hidden != 4096 and rows >= PIPELINED_ROWS:
            counted = read.clone()
            counted[:, hidden - hidden // 16 :] = 0
        return super().mean_square(counted, native)


class NormsInNative(Arithmetic):
    """KA-27: mean square, root and product in the activations' dtype."""

    def mean_square(self, read: Tensor, native: torch.dtype) -> Tensor:
        """Round the squares and the mean."""
        squares = read.to(native).square().float()
        return squares.mean(1, keepdim=True).to(native).float()

    def normalise(self, read: Tensor, inverse: Tensor, weight: Tensor, native: torch.dtype) -> Tensor:
        """Round every factor and every product."""
        product = read.to(native) * inverse.to(native) * weight.to(native)
        return read.copy_(product)

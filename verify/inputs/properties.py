"""What each input family promises, as predicates over a sample of rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fusecheck.formats.binary import Format, round_to, trailing_unit, ulp
from fusecheck.formats.element import E4M3
from fusecheck.inputs.captured import recording, to_width
from fusecheck.inputs.special_groups import top_binade

ENOUGH = 4096
"""Cells from which shares are asserted; below, only that the property can occur at all."""

FEW = 64
"""Cells below which one kind of value that is drawn for a share of them may be missing."""


@dataclass(frozen=True)
class Sample:
    """Rows of a case as it ran: partials [world, rows, hidden], residual [rows, hidden], gamma [hidden], float64.

    `gamma_kind` is the Problem's.
    """

    partials: Tensor
    residual: Tensor
    gamma: Tensor
    eps: float
    scale: float
    format: Format
    gamma_kind: str

    @cached_property
    def total(self) -> Tensor:
        """The exact sum over ranks (to float64)."""
        return self.partials.sum(0)

    @cached_property
    def stream(self) -> Tensor:
        """The residual stream, rounded to the format."""
        return round_to(self.total + self.residual, self.format)

    @cached_property
    def normed(self) -> Tensor:
        """The normalised activations, rounded to the format."""
        mean_square = self.stream.square().mean(-1, keepdim=True)
        return round_to(self.stream * (mean_square + self.eps).rsqrt() * self.gamma, self.format)

    @property
    def enough(self) -> bool:
        """Whether shares mean something."""
        return self.residual.numel() >= ENOUGH


def _share(mask: Tensor) -> float:
    return float(mask.to(torch.float64).mean())


def _expect(holds: bool, found: str) -> str | None:  # noqa: FBT001
    return None if holds else found


def unit_rms(sample: Sample) -> str | None:
    """The mean square of the stream is near one."""
    if not sample.enough:
        return None
    mean = float(sample.stream.square().mean())
    return _expect(0.85 < mean < 1.15, f"mean square {mean:.3g}, expected about 1")


def small_rows(sample: Sample) -> str | None:
    """Rows are small enough for eps to matter."""
    rows = sample.stream.square().mean(-1)
    most = 2e-3 if sample.stream.shape[-1] >= 512 else 1e-2  # the mean of few squares strays further from 1e-3
    return _expect(bool((rows < most).all()), f"a row of mean square {float(rows.max()):.3g}, expected below {most:g}")


def cancels(sample: Sample) -> str | None:
    """The addends are far larger than their sum."""
    if len(sample.partials) == 1:
        return None
    ratio = float(sample.partials.abs().amax(0).min())
    return _expect(ratio >= 2.0**11, f"largest addend {ratio:.3g} in a column, expected at least 2^11")


def order_free(sample: Sample) -> str | None:
    """Every partial sum is exact in the native format (lemma L3)."""
    addends = torch.cat((sample.partials, sample.residual[None]))
    grid = trailing_unit(addends).amin(0)
    exact = sample.partials.abs().sum(0) <= 2.0**sample.format.precision * grid
    return _expect(bool(exact.all()), f"{_share(~exact):.2%} of the sums depend on the order, expected none")


def code_ties(sample: Sample) -> str | None:
    """Some quotients lie exactly between two codes."""
    quotient = (sample.normed / sample.scale).abs()
    share = _share((quotient < E4M3.largest) & (torch.remainder(quotient / ulp(quotient, E4M3), 1) == 0.5))
    least = 2.0 ** (1 - sample.format.precision)  # an eighth of one in 2^(p - 4), the share on the native grid
    return _expect(not sample.enough or share > least, f"{share:.2%} ties, expected more than {least:.2%}")


def native_ties(sample: Sample) -> str | None:
    """Every sum lies exactly between two values of the format."""
    exact = sample.total + sample.residual
    step = ulp(exact, sample.format)
    share = _share(torch.remainder(exact.abs() / step, 1) == 0.5)
    return _expect(share > 0.4, f"{share:.2%} ties, expected more than 40 %")


def saturates(sample: Sample) -> str | None:
    """One to five per cent of the codes lie beyond 448."""
    share = _share((sample.normed / sample.scale).abs() > 448)
    return _expect(not sample.enough or 0.01 <= share <= 0.05, f"{share:.2%} saturate, expected 1 to 5 %")


def subnormal_codes(sample: Sample) -> str | None:
    """Three codes in ten or more are subnormal."""
    share = _share((sample.normed / sample.scale).abs() < 2.0**-6)
    return _expect(not sample.enough or share >= 0.3, f"{share:.2%} subnormal codes, expected at least 30 %")


def has_outliers(sample: Sample) -> str | None:
    """The largest magnitude is far above the median."""
    ratio = float(sample.stream.abs().max() / sample.stream.abs().median().clamp(min=2.0**-40))
    # One channel in 128 is an outlier: in a narrow row there may be none.
    enough = sample.enough and sample.stream.shape[-1] >= 2048
    return _expect(not enough or ratio > 20, f"largest over median {ratio:.3g}, expected more than 20")


def one_lane(sample: Sample) -> str | None:
    """Exactly one lane of each row is not zero."""
    lanes = (sample.stream != 0).sum(-1)
    return _expect(bool((lanes == 1).all()), f"{int(lanes.max())} lanes in a row, expected 1")


def constant_rows(sample: Sample) -> str | None:
    """All lanes of a row are equal."""
    same = (sample.stream == sample.stream[:, :1]).all()
    return _expect(bool(same), "lanes of a row differ, expected one value")


def negative_zeros(sample: Sample) -> str | None:
    """There are negative zeros on every rank."""
    minus = (sample.partials == 0) & torch.signbit(sample.partials)
    found = sample.residual.numel() < FEW or bool(minus.flatten(1).any(1).all())
    return _expect(found, "a rank without a negative zero, expected some on all")


def on_scale_edges(sample: Sample) -> str | None:
    """Groups of sixteen have their largest magnitude at 1.75 and 1.5 times a power of two, beside these, and at 0."""
    groups = sample.normed.shape[-1] // 16
    if groups < FEW or sample.gamma_kind != "edges" or sample.eps > 1e-5:
        return None
    largest = sample.normed[:, : 16 * groups].abs().unflatten(-1, (groups, 16)).amax(-1)  # type: ignore[no-untyped-call]
    mantissa = 2 * torch.frexp(largest)[0]
    step = 2.0 ** (1 - sample.format.precision)
    wanted = {f"{at + side * step:g}": at + side * step for at in (1.75, 1.5) for side in (-1, 0, 1)}
    missing = [name for name, value in wanted.items() if not bool((mantissa == value).any())]
    missing += [] if bool((largest == 0).any()) else ["0"]
    return _expect(not missing, f"no group's largest magnitude at {', '.join(missing)} times a power of two")


def special(sample: Sample) -> str | None:
    """There are infinities or NaNs, unless the rows are too few to reach them."""
    found = bool((~sample.partials.isfinite()).any())
    return _expect(found or len(sample.residual) < 5, "no NaN or infinity, expected one in four rows of five")


def special_in_every_row(sample: Sample) -> str | None:
    """Every row has a value that is not finite or far from the others, in one of its operands."""
    every = torch.cat((sample.partials, sample.residual[None]))
    found = (~every.isfinite() | (every.abs() >= 2.0**14)).flatten(2).any(-1).any(0)
    return _expect(bool(found.all()), f"{_share(found):.0%} of the rows hold something special, expected all")


def special_weights(sample: Sample) -> str | None:
    """Among the weights are a NaN, both infinities and the largest finite value."""
    gamma = sample.gamma
    wanted = {"NaN": gamma.isnan(), "+Inf": gamma == torch.inf, "-Inf": gamma == -torch.inf}
    wanted["the largest value"] = gamma == sample.format.largest
    missing = [name for name, where in wanted.items() if not where.any()]
    return _expect(not missing, f"no {', '.join(missing)} among the weights, expected one")


def special_groups(sample: Sample) -> str | None:
    """Rows of +-1, and a weight that is not finite or in the upper two binades."""
    gamma, unit = sample.gamma, bool((sample.stream.abs() == 1).all())
    found = unit and bool((~gamma.isfinite() | (gamma.abs() > top_binade(sample.format) / 2)).any())
    return _expect(found, "no such row and weight, expected +-1 times a weight that is near the top or not finite")


def subnormal_inputs(sample: Sample) -> str | None:
    """There are subnormals on every rank."""
    least = 2.0**sample.format.emin
    small = (sample.partials != 0) & (sample.partials.abs() < least)
    found = sample.residual.numel() < FEW or bool(small.flatten(1).any(1).all())
    return _expect(found, "a rank without a subnormal, expected some on all")


def overflows(sample: Sample) -> str | None:
    """A sum overflows the format or a square overflows float32, unless the rows are too few to reach one."""
    high = sample.stream.isinf() | (sample.stream.abs() > 2.0**15)
    return _expect(bool(high.any()) or len(sample.residual) < 3, "no overflow, expected one in two rows of three")


def like_a_model(sample: Sample) -> str | None:
    """The rows are recorded ones of one site with outlier channels, and so are gamma and scale where gamma is."""
    recorded, dtype = recording(), sample.format.dtype
    hidden, device = sample.residual.shape[-1], sample.residual.device
    named = sample.gamma_kind == "captured"
    for site, rows in enumerate(recorded["residual"]):
        table = to_width(rows.to(device, dtype), hidden).double()
        if not (sample.residual[:, None] == table).all(-1).any(-1).all():
            continue
        gamma = to_width(recorded["gamma"][site][None].to(device, dtype), hidden)[0]
        if not named or (torch.equal(sample.gamma, gamma.double()) and sample.scale == recorded["scale"][site]):
            return _outlying(sample)
    return f"rows{', gamma and scale' if named else ''} of no recorded site, expected those of one"


def _outlying(sample: Sample) -> str | None:
    """Eight rows hold outlier channels, and the ranks' addends partly cancel."""
    if len(sample.residual) < 8 or sample.stream.shape[-1] < 512:
        return None
    ratio = float(sample.stream.abs().max() / sample.stream.abs().median())
    addends = float(sample.partials.abs().sum(0).mean() / sample.total.abs().mean())
    found = f"largest over median {ratio:.3g}, addends over their sums {addends:.3g}"
    cancels_partly = len(sample.partials) == 1 or addends > 1.05
    return _expect(
        ratio > 15 and cancels_partly, f"{found}, expected more than 15, and more than 1.05 on several ranks"
    )

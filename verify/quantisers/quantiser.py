"""What the stages, the emulator and the faults know of a quantiser, and nothing else.

The pair contract: scales are judged from the norm, codes from the norm and the scales *as stored*. Codes that fit a
wrong scale are not blamed; codes that do not fit the scale beside them are (G2 of the criterion).

Shapes: `norm` is [..., groups * k], `stored` is [..., groups], one scale for k successive elements; k is the quotient
of their last sizes. So whole rows are [rows, hidden] and [rows, groups], and single elements [n, 1] and [n, 1].
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fusecheck.formats.element import Element
from fusecheck.numerics.enclosure import Interval
from fusecheck.quantflow import QuantFlow
from fusecheck.quantisers.layouts import Layout


class Quantiser(Protocol):
    """A format of codes with the rule of its scales and their layout.

    Attributes:
        name: as operations name it.
        element: what is stored for each activation.
        group: how many elements share a scale; None: the row, or the whole tensor where the scale is given.
        scale_dtype: of each scale before packing: float32, or uint8 for UE8M0 and E4M3 bytes.
        layouts: the names of the layouts that its scales may have; the first is the default.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def element(self) -> Element: ...  # noqa: D102
    @property
    def group(self) -> int | None: ...  # noqa: D102
    @property
    def scale_dtype(self) -> torch.dtype: ...  # noqa: D102
    @property
    def layouts(self) -> tuple[str, ...]: ...  # noqa: D102

    def groups(self, hidden: int) -> int:
        """How many scales a row of `hidden` elements has.

        Raises:
            UsageError: the group does not divide the row.
        """
        ...

    def scales(self, norm: Tensor, flow: QuantFlow, given: float = 1.0, peaks: Tensor | None = None) -> Tensor:
        """The nominal scales of whole groups.

        Args:
            norm: what the quantiser reads, [..., hidden], native, or float32 where it reads the unrounded norm.
            flow: the declared arithmetic.
            given: the caller's scale, a float32 value.
            peaks: the largest magnitude of each group, [..., groups], where it is known; NaN where there is one.

        Returns:
            [..., groups], as they are stored before packing: float32, or bytes (uint8).
        """
        ...

    def scale_ends(self, norm: Interval, flow: QuantFlow, given: float = 1.0) -> Interval:
        """The least and greatest admissible scale of whole groups whose elements lie in an interval.

        Args:
            norm: ends of what the quantiser reads, float64, [..., hidden] each; equal where it was observed.
            flow: the declared arithmetic.
            given: the caller's scale.

        Returns:
            [..., groups] each, of the dtype of `scales`.
        """
        ...

    def scale_ends_of(self, amax: Interval, flow: QuantFlow, given: float = 1.0) -> Interval:
        """`scale_ends` from ends of the groups' amax, float64, [..., groups] each."""
        ...

    def admits(self, stored: Tensor, nominal: Tensor, ends: Interval, flow: QuantFlow) -> Tensor:
        """Which stored scales are admissible, bool: inside, of the declared kind, and NaN only where the nominal is."""
        ...

    def amax_ends(self, stored: Tensor, flow: QuantFlow, given: float = 1.0) -> Interval:
        """The inverse of the scale's rule: the amax that each stored scale leaves possible, float64, [..., groups]."""
        ...

    def values(self, stored: Tensor, flow: QuantFlow) -> Tensor:
        """The numbers that stored scales stand for in the kernel, float64, [..., groups]; without the given factor."""
        ...

    def quotients(self, norm: Tensor, stored: Tensor, flow: QuantFlow, given: float = 1.0) -> Tensor:
        """What the nominal cast reads, float32, [..., hidden]: the norm over the scales as stored, rounded once."""
        ...

    def quotient_ends(
        self, norm: Interval, stored: Tensor, flow: QuantFlow, given: float = 1.0, amax: Interval | None = None
    ) -> Interval:
        """Ends of what the cast reads, float32 values in float64.

        Args:
            norm: float64, [..., groups * k] each.
            stored: the scales as stored, [..., groups].
            flow: the declared arithmetic.
            given: the caller's scale.
            amax: float64, [..., groups] each; needed where codes come from the amax, and `norm` is not whole groups.
        """
        ...

    def codes(self, norm: Tensor, stored: Tensor, flow: QuantFlow, given: float = 1.0) -> Tensor:
        """The nominal codes given the scales as stored, uint8, one a byte, [..., hidden]."""
        ...

    def code_ends(
        self, norm: Interval, stored: Tensor, flow: QuantFlow, given: float = 1.0, amax: Interval | None = None
    ) -> Interval:
        """Ordinals of the least and greatest admissible code, int16; arguments as those of `quotient_ends`."""
        ...

    def layout(self, tokens: int, hidden: int, flow: QuantFlow, name: str | None = None) -> Layout:
        """Where each scale of a call lies, and what every other byte of the tensor of scales must hold.

        Raises:
            UsageError: the quantiser has no layout of this name, or its group does not divide the row.
        """
        ...

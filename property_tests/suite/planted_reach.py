"""Faulty kernels that show in one corner only: each is reached through one dimension of the coverage table.

Right in all other cases, so a plan that leaves the corner out passes them. `planted_reach_run` puts the core to them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fusecheck.backends.emulated import EmulatedBackend, EmulatedKernel
from fusecheck.faults.defects import MeanOverOneLess
from fusecheck.interface import FusionOp, Kernel, Limits, Rank, RankInputs, RankOutputs, Strategy
from fusecheck.property_tests.suite.planted_parts import (
    FlagOf7Bits,
    FlagOf8Bits,
    FlagOfBits,
    HalfARow,
    SharedSums,
    ThirdOf8Bits,
)

MODEL_SIZES = (3072, 3584, 5376, 6144, 12288)
PRIMES = (13, 31, 61, 127, 257, 509, 1021)
CHUNK = 2**18
"""Elements that an exchange in pieces moves at a time."""


class PlantedKernel(EmulatedKernel):
    """An emulated kernel whose inputs or outputs a fault changes.

    Attributes:
        calls: made on this workspace, this one included.
        idle: seconds since the call before.
    """

    fault: ClassVar[Fault]

    def __init__(self, backend: EmulatedBackend, rank: Rank, limits: Limits) -> None:
        super().__init__(backend, rank, limits)
        self.calls, self.idle, self._last = 0, 0.0, time.monotonic()
        self.first: RankInputs | None = None
        self.kept: list[RankOutputs] = []

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        self.calls, self.idle = self.calls + 1, time.monotonic() - self._last
        changed = self.fault.read(self, inputs) if self.fault.read else inputs
        outputs = super().run(changed, op=op, strategy=strategy)
        self.first = self.first or inputs
        if self.fault.spoil:
            self.fault.spoil(self, inputs, outputs, strategy)
        self._last = time.monotonic()
        return outputs


Read = Callable[[PlantedKernel, RankInputs], RankInputs]
Spoil = Callable[[PlantedKernel, RankInputs, RankOutputs, Strategy], None]


@dataclass(frozen=True)
class Fault:
    """A kernel that is wrong in one corner.

    Attributes:
        dimension: of the coverage table, through which it is reached.
        does: what is wrong, in one sentence.
        read: changes what the kernel reads.
        spoil: changes what it returned.
        parts: of the emulator, replaced.
    """

    dimension: str
    does: str
    read: Read | None = None
    spoil: Spoil | None = None
    parts: tuple[tuple[str, type], ...] = ()

    def backend(self, name: str) -> EmulatedBackend:
        """The kernel as a backend of this name."""
        kernel = type("Planted", (PlantedKernel,), {"fault": self})
        options: dict[str, Any] = dict(self.parts)
        return PlantedBackend(name, kernel, **options)


class PlantedBackend(EmulatedBackend):
    """Opens planted kernels."""

    def __init__(self, name: str, kernel: type[PlantedKernel], **parts: Any) -> None:
        super().__init__(**parts)
        self.name, self._kernel = name, kernel

    def open(self, rank: Rank, limits: Limits) -> Kernel:
        super().open(rank, limits).close()
        return self._kernel(self, rank, limits)


def _zero(rows: slice) -> Spoil:
    """Some rows of the codes (of the stream, where there are none) are zero."""

    def spoil(_kernel: PlantedKernel, _inputs: RankInputs, outputs: RankOutputs, _strategy: Strategy) -> None:
        _bytes(_last(outputs))[rows] = 0

    return spoil


def _last(outputs: RankOutputs) -> Tensor:
    """The output that is made last."""
    return next(x for x in (outputs.quant, outputs.norm, outputs.residual) if x is not None)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


def _where(holds: Callable[[PlantedKernel, RankInputs, Strategy], bool], then: Spoil) -> Spoil:
    def spoil(kernel: PlantedKernel, inputs: RankInputs, outputs: RankOutputs, strategy: Strategy) -> None:
        if holds(kernel, inputs, strategy):
            then(kernel, inputs, outputs, strategy)

    return spoil


def _hidden(holds: Callable[[int], bool]) -> Spoil:
    """The last lanes of some hidden sizes are zero."""

    def lanes(_kernel: PlantedKernel, _inputs: RankInputs, outputs: RankOutputs, _strategy: Strategy) -> None:
        _bytes(_last(outputs))[:, -8:] = 0

    return _where(lambda _kernel, inputs, _strategy: holds(inputs.partial.shape[1]), lanes)


def _last_chunk(_kernel: PlantedKernel, _inputs: RankInputs, outputs: RankOutputs, _strategy: Strategy) -> None:
    """What lies behind the second chunk is zero."""
    flat = _last(outputs).view(-1)
    _bytes(flat[2 * CHUNK :])[:] = 0


def _one_code_up(_kernel: PlantedKernel, _inputs: RankInputs, outputs: RankOutputs, _strategy: Strategy) -> None:
    """One code is its neighbour."""
    if outputs.quant is not None:
        _bytes(outputs.quant)[0, 0] ^= 1


def _first(name: str) -> Read:
    """One operand is that of the first call on the workspace."""

    def read(kernel: PlantedKernel, inputs: RankInputs) -> RankInputs:
        stale: dict[str, Any] = {name: getattr(kernel.first or inputs, name)}
        if isinstance(stale[name], Tensor):
            same = stale[name].shape == getattr(inputs, name).shape and stale[name].dtype == getattr(inputs, name).dtype
            stale = {name: stale[name].clone()} if same else {}
        return replace(inputs, **stale)

    return read


def _drops(value: str, operand: str, rank: int) -> Read:
    """One kind of special value becomes zero in one operand of one rank."""
    found: dict[str, Callable[[Tensor], Tensor]] = {
        "nan": torch.isnan,
        "inf": torch.isinf,
        "large": lambda x: x.isfinite() & (x.abs() > 2.0**14),
    }

    def read(kernel: PlantedKernel, inputs: RankInputs) -> RankInputs:
        if rank not in (-1, kernel.rank.index):
            return inputs
        changed = getattr(inputs, operand)
        changed = torch.where(found[value](changed), torch.zeros_like(changed), changed)
        given: dict[str, Any] = {operand: changed}
        return replace(inputs, **given)

    return read


def _after_a_pause(seconds: float) -> Spoil:
    return _where(lambda kernel, _inputs, _strategy: kernel.calls > 1 and kernel.idle > seconds, _zero(slice(0, 1)))


def _drifts(kernel: PlantedKernel, inputs: RankInputs) -> RankInputs:
    return replace(inputs, scale=inputs.scale * (1 + 1e-5 * (kernel.calls - 1)))


def _into_the_gap(_kernel: PlantedKernel, inputs: RankInputs, _outputs: RankOutputs, _strategy: Strategy) -> None:
    """Where rows have a gap between them, what lies behind the first row is written over."""
    partial = inputs.partial
    tokens, hidden = partial.shape
    if tokens > 1 and partial.stride(0) > hidden and partial.stride(1) == 1:
        behind = partial.as_strided((8,), (1,), partial.storage_offset() + hidden)
        behind.zero_()


def _strides_of(operand: str) -> Read:
    """The columns of an operand are taken to lie side by side."""

    def read(_kernel: PlantedKernel, inputs: RankInputs) -> RankInputs:
        tensor = getattr(inputs, operand)
        if tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
            return inputs
        strides = (*tensor.stride()[:-1], 1)
        given: dict[str, Any] = {operand: tensor.as_strided(tensor.shape, strides, tensor.storage_offset()).clone()}
        return replace(inputs, **given)

    return read


def _reuses(count: int) -> Spoil:
    """The outputs of so many calls ago are written over."""

    def spoil(kernel: PlantedKernel, _inputs: RankInputs, outputs: RankOutputs, _strategy: Strategy) -> None:
        kernel.kept.append(outputs)
        if len(kernel.kept) > count:
            _bytes(kernel.kept.pop(0).residual)[:] = 0x11

    return spoil


def _writes_gamma_again(kernel: PlantedKernel, inputs: RankInputs, _o: RankOutputs, _s: Strategy) -> None:
    """The second of two calls on equal inputs leaves a gamma that is not the one it got."""
    first = kernel.first
    if first is not None and first is not inputs and torch.equal(_words(first.partial), _words(inputs.partial)):
        inputs.gamma[-1] += 1
    kernel.first = inputs


def _words(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16)


FAULTS: dict[str, Fault] = {
    "rows-1024": Fault("rows", "codes of rows from 1,024 on are zero", spoil=_zero(slice(1024, None))),
    "rows-4096": Fault("rows", "codes of rows from 4,096 on are zero", spoil=_zero(slice(4096, None))),
    "rows-132": Fault(
        "rows",
        "a grid larger than the chip: row 132 of few more is nobody's",
        spoil=_where(lambda _k, inputs, _s: 132 < len(inputs.partial) < 200, _zero(slice(132, 133))),
    ),
    "message-chunks": Fault(
        "message",
        "from the third piece of 2^18 elements on, zeros",
        spoil=_where(lambda _k, inputs, _s: inputs.partial.numel() > 2 * CHUNK, _last_chunk),
    ),
    "message-64-mib": Fault(
        "message",
        "a message of more than 64 MiB lacks its last row",
        spoil=_where(lambda _k, inputs, _s: inputs.partial.nbytes > 2**26, _zero(slice(-1, None))),
    ),
    "hidden-models": Fault(
        "hidden", "wrong at models' sizes that are no power of two", spoil=_hidden(lambda h: h in MODEL_SIZES)
    ),
    "hidden-prime": Fault("hidden", "wrong at a prime times eight", spoil=_hidden(lambda h: h // 8 in PRIMES)),
    "hidden-1016": Fault("hidden", "wrong at 1,016 modulo 1,024", spoil=_hidden(lambda h: h % 1024 == 1016)),
    "hidden-200": Fault(
        "hidden", "wrong at 200 modulo 1,024, one size in 128", spoil=_hidden(lambda h: h % 1024 == 200)
    ),
    "hidden-wide": Fault("hidden", "beyond 8,192 half a row", parts=(("arithmetic", HalfARow),)),
    "hidden-less-one": Fault("declaration", "divisor hidden - 1", parts=(("arithmetic", MeanOverOneLess),)),
    "kernel-fp16": Fault(
        "kernel",
        "one code is off in fp16 under two-shot",
        spoil=_where(
            lambda _k, inputs, strategy: inputs.partial.dtype is torch.float16 and strategy is Strategy.TWOSHOT,
            _one_code_up,
        ),
    ),
    "tp-4": Fault(
        "world size",
        "one code is off among four ranks of few rows",
        spoil=_where(lambda kernel, inputs, _s: kernel.rank.world_size == 4 and len(inputs.partial) < 4, _one_code_up),
    ),
    "flag-6": Fault("workspace", "barrier flag of 6 bits", parts=(("twoshot", FlagOfBits),)),
    "flag-7": Fault("workspace", "barrier flag of 7 bits", parts=(("twoshot", FlagOf7Bits),)),
    "flag-8": Fault("workspace", "barrier flag of 8 bits", parts=(("twoshot", FlagOf8Bits),)),
    "third-8": Fault("workspace", "one-shot buffers counted in 8 bits", parts=(("oneshot", ThirdOf8Bits),)),
    "drift": Fault("workspace", "the scale grows by 1e-5 a call", read=_drifts),
    "call-280": Fault(
        "workspace",
        "one code is off from the 280th call on",
        spoil=_where(lambda kernel, _i, _s: kernel.calls >= 280, _one_code_up),
    ),
    "stale-scale": Fault("workspace", "the scale of the first call is kept", read=_first("scale")),
    "stale-eps": Fault("workspace", "the eps of the first call is kept", read=_first("eps")),
    "stale-gamma": Fault("workspace", "the gamma of the first call is kept", read=_first("gamma")),
    "stale-bias": Fault("workspace", "the weight bias of the first call is kept", read=_first("weight_bias")),
    "ring-16": Fault("workspace", "the stream of 16 calls ago is written over", spoil=_reuses(16)),
    "two-workspaces": Fault("workspace", "a static buffer of all workspaces", parts=(("twoshot", SharedSums),)),
    "pause-200-ms": Fault("workspace", "the first row is lost after 0.15 s", spoil=_after_a_pause(0.15)),
    "pause-1-s": Fault("workspace", "the first row is lost after 0.9 s", spoil=_after_a_pause(0.9)),
    "nan-partial": Fault("special value", "a NaN of rank 1 becomes zero", read=_drops("nan", "partial", 1)),
    "nan-residual": Fault(
        "special value", "a NaN of rank 1's residual becomes zero", read=_drops("nan", "residual", 1)
    ),
    "inf-gamma": Fault("special value", "an infinity in gamma becomes zero", read=_drops("inf", "gamma", -1)),
    "large-residual": Fault("special value", "a large residual becomes zero", read=_drops("large", "residual", -1)),
    "gap": Fault("layout", "the gap behind a row of a view is written over", spoil=_into_the_gap),
    "gamma-stride": Fault("layout", "gamma's stride is not looked at", read=_strides_of("gamma")),
    "residual-stride": Fault("layout", "the residual's column stride is not looked at", read=_strides_of("residual")),
    "gamma-again": Fault("layout", "a second call changes gamma", spoil=_writes_gamma_again),
}
"""The faults by name."""


def __getattr__(name: str) -> Callable[[], EmulatedBackend]:
    """`planted_reach:flag_6` loads the fault `flag-6`; every call makes a backend of its own."""
    fault = FAULTS.get(key := name.replace("_", "-"))
    if fault is None:
        raise AttributeError(name)
    return lambda: fault.backend(key)

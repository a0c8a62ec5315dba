"""Faulty kernels as backends: `fusecheck.faults.backend:KA-01`, loaded by rank processes as any plug-in."""

from __future__ import annotations

from typing import Any

from fusecheck.backends.emulated import EmulatedBackend, EmulatedKernel
from fusecheck.backends.emulated_arithmetic import Arithmetic
from fusecheck.backends.emulated_protocol import Lamport, TwoShot
from fusecheck.backends.emulated_quantise import Quantising
from fusecheck.faults.catalogue import Fault, kernel_faults, resolve
from fusecheck.interface import STATIC_OPS, Kernel, Limits, Operation, Rank
from fusecheck.operations import Collective, compose


class FaultyBackend(EmulatedBackend):
    """The emulated kernel with one hook overridden; it declares the dataflow of the right one.

    Args:
        fault: an entry whose hook is one of the kernel's.
    """

    def __init__(self, fault: Fault) -> None:
        patch = resolve(fault.patch)
        replaced: dict[str, Any] = {}
        if issubclass(patch, Arithmetic):
            replaced["arithmetic"] = patch
        elif issubclass(patch, Quantising):
            replaced["quantising"] = patch
        elif issubclass(patch, Lamport) or fault.exchange == "oneshot":
            replaced["oneshot"] = patch
        elif issubclass(patch, TwoShot):
            replaced["twoshot"] = patch
        super().__init__(flow=fault.flow, **replaced)
        self.name, self.ops = f"fault:{fault.id}", _operations(fault)
        self.kernel: type[EmulatedKernel] = patch if issubclass(patch, EmulatedKernel) else EmulatedKernel

    def open(self, rank: Rank, limits: Limits) -> Kernel:
        """As the right kernel opens, with its refusals."""
        super().open(rank, limits)
        return self.kernel(self, rank, limits)


class RightBackend(EmulatedBackend):
    """The kernel without the fault, where no known dataflow declares the same."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(flow=fault.flow)
        self.name, self.ops = f"right:{fault.id}", _operations(fault)


def _operations(fault: Fault) -> tuple[Operation, ...]:
    """What the fault is looked for in."""
    if not fault.quantiser:
        return STATIC_OPS
    return tuple(
        compose(Collective.ALL_REDUCE, residual=True, quantiser=fault.quantiser, norm_out=norm_out)
        for norm_out in (True, False)
    )


def __getattr__(name: str) -> EmulatedBackend:
    """The faulty kernel of this id, or the right one behind `right-`."""
    known, plain = kernel_faults(), name.removeprefix("right-")
    if plain not in known:
        raise AttributeError(name)
    return FaultyBackend(known[name]) if plain == name else RightBackend(known[plain])

"""Faulty kernels as backends: `fusecheck.faults.backend:KA-01`, loaded by rank processes as any plug-in."""

from __future__ import annotations

from typing import Any

from fusecheck.backends.emulated import EmulatedBackend, EmulatedKernel
from fusecheck.backends.emulated_arithmetic import Arithmetic
from fusecheck.backends.emulated_protocol import Lamport, TwoShot
from fusecheck.faults.catalogue import Fault, kernel_faults, resolve
from fusecheck.interface import Kernel, Limits, Rank


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
        elif issubclass(patch, Lamport) or fault.exchange == "oneshot":
            replaced["oneshot"] = patch
        elif issubclass(patch, TwoShot):
            replaced["twoshot"] = patch
        super().__init__(fault.dataflow, **replaced)
        self.name = f"fault:{fault.id}"
        self.kernel: type[EmulatedKernel] = patch if issubclass(patch, EmulatedKernel) else EmulatedKernel

    def open(self, rank: Rank, limits: Limits) -> Kernel:
        """As the right kernel opens, with its refusals."""
        super().open(rank, limits)
        return self.kernel(self, rank, limits)


def __getattr__(name: str) -> FaultyBackend:
    """The faulty kernel of this id."""
    known = kernel_faults()
    if name not in known:
        raise AttributeError(name)
    return FaultyBackend(known[name])

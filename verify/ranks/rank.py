"""One rank's place in its group: index, device, process group, shared memory."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

RENDEZVOUS_SECONDS = 60.0
"""How long a rank waits for its peers in `symmetric`; a pool's own deadline usually comes first."""


@dataclass
class LocalRank:
    """A rank whose peers' memory, if it shares any, is on this host.

    Attributes:
        index: the rank in its group.
        world_size: how many ranks the group has.
        device: where the rank computes.
        directory: the pool's own directory, the same for all ranks of the host; removed with the pool.
        rendezvous: where the process group meets, as `torch.distributed` takes it (`file://` or `tcp://`); empty for
            a rank without peers in a process that belongs to a larger group.
        prefix: of the names of its memory, where ranks of several groups share the directory.
    """

    index: int
    world_size: int
    device: torch.device
    directory: Path
    rendezvous: str
    prefix: str = ""
    _mapped: dict[str, tuple[int, list[Tensor]]] = field(default_factory=dict, repr=False)

    def alone(self) -> LocalRank:
        """This process as the only rank of another group, whose memory nobody else maps."""
        return LocalRank(0, 1, self.device, self.directory, "", f"alone-{self.index}-")

    @property
    def group(self) -> ProcessGroup | None:
        """The process group of all ranks: gloo on CPU, NCCL on CUDA; a collective call when first asked for.

        It is made late, because a kernel that needs none should not pay for it at every restart.
        """
        if not self.rendezvous:
            return None
        if not torch.distributed.is_initialized():
            cuda = self.device.type == "cuda"
            torch.distributed.init_process_group(
                "nccl" if cuda else "gloo",
                init_method=self.rendezvous,
                rank=self.index,
                world_size=self.world_size,
                device_id=self.device if cuda else None,
            )
        return torch.distributed.group.WORLD

    def symmetric(self, name: str, nbytes: int) -> list[Tensor]:
        """Map every rank's buffer of this name; see `fusecheck.interface.Rank.symmetric`.

        Returns:
            One uint8 tensor [nbytes] per rank, in rank order; zero when first mapped.

        Raises:
            RuntimeError: the device is not the CPU, a size below 1, the name is in use with another size
                (here or on a peer), the memory cannot be had, or a peer did not come within the deadline.
        """
        if self.device.type != "cpu":
            raise RuntimeError(f"symmetric({name!r}) on {self.device}: only CPU ranks share memory in this way")
        if nbytes < 1:
            raise RuntimeError(f"symmetric({name!r}) of {nbytes} bytes: give a size of at least 1")
        if name not in self._mapped:
            self._create(name, nbytes)
            deadline = time.monotonic() + RENDEZVOUS_SECONDS
            buffers = [self._map(name, rank, nbytes, deadline) for rank in range(self.world_size)]
            self._mapped[name] = (nbytes, buffers)
        known, buffers = self._mapped[name]
        if known != nbytes:
            raise RuntimeError(f"symmetric({name!r}) of {nbytes} bytes: the name is in use with {known}; take another")
        return list(buffers)

    def _path(self, name: str, rank: int) -> Path:
        return self.directory / f"{self.prefix}{quote(name, safe='')}.{rank}"

    def _create(self, name: str, nbytes: int) -> None:
        """Reserve this rank's buffer and publish it under its final name only when it is whole."""
        final = self._path(name, self.index)
        if final.exists():
            # Left by an attempt that a peer spoiled; it must be the same memory, so it is not made anew.
            return
        part = final.with_name(final.name + ".part")
        try:
            _reserve(part, nbytes)
        except OSError as error:
            part.unlink(missing_ok=True)
            if error.errno != errno.ENOSPC:
                raise RuntimeError(f"symmetric({name!r}) of {nbytes} bytes: {error}") from error
            # Containers often have a tiny /dev/shm; an ordinary file shares memory as well, only less fast.
            elsewhere = Path(tempfile.gettempdir()) / self.directory.name
            elsewhere.mkdir(exist_ok=True)
            try:
                _reserve(elsewhere / final.name, nbytes)
            except OSError as full:
                raise RuntimeError(f"symmetric({name!r}) of {nbytes} bytes: {full}") from full
            part.symlink_to(elsewhere / final.name)
        os.replace(part, final)

    def _map(self, name: str, rank: int, nbytes: int, deadline: float) -> Tensor:
        path = self._path(name, rank)
        while not path.exists():
            if time.monotonic() > deadline:
                raise RuntimeError(f"symmetric({name!r}): rank {rank} did not come in {RENDEZVOUS_SECONDS:.0f} s")
            # Two cores may host eight ranks: give the core to the peer that is waited for.
            os.sched_yield()
        with path.open("r+b") as file:
            found = os.fstat(file.fileno()).st_size
            if found != nbytes:
                raise RuntimeError(f"symmetric({name!r}) of {nbytes} bytes: rank {rank} asked for {found}")
            return torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=torch.uint8)


def _reserve(path: Path, nbytes: int) -> None:
    """Create a file of zeros whose pages exist: a later write must not meet a full file system (SIGBUS)."""
    with path.open("xb") as file:
        os.posix_fallocate(file.fileno(), 0, nbytes)

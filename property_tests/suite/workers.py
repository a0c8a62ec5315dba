"""Small workers for the tests of the rank pool: well-behaved ones, and every way to die."""

from __future__ import annotations

import ctypes
import os
import signal
import stat
import subprocess
import sys
import time
from typing import Any

import torch
import torch.distributed

from fusecheck.interface import Rank
from fusecheck.ranks.rank import LocalRank


class Echo:
    """Answers; nothing else."""

    def __init__(self, rank: Rank, *arguments: Any) -> None:
        self.rank = rank
        self.arguments = arguments

    def nothing(self) -> None:
        """The empty call."""

    def echo(self, value: Any) -> Any:
        return value

    def place(self) -> tuple[int, int, str, int, tuple[Any, ...]]:
        return self.rank.index, self.rank.world_size, str(self.rank.device), os.getpid(), self.arguments

    def threads(self) -> int:
        return torch.get_num_threads()

    def total(self) -> float:
        """The sum of rank + 1 over the process group."""
        value = torch.tensor([float(self.rank.index + 1)])
        torch.distributed.all_reduce(value, group=self.rank.group)
        return float(value)

    def write_and_read(self, name: str, nbytes: int) -> list[int]:
        """Write rank + 1 into the own buffer's last byte and read everybody's, once all have written."""
        buffers = self.rank.symmetric(name, nbytes)
        buffers[self.rank.index][-1] = self.rank.index + 1
        while not all(int(buffer[-1]) for buffer in buffers):
            os.sched_yield()
        return [int(buffer[-1]) for buffer in buffers]

    def directory(self) -> str:
        """The pool's directory in shared memory."""
        assert isinstance(self.rank, LocalRank)
        return str(self.rank.directory)

    def uneven(self, name: str) -> int:
        """Ask for a size that differs by rank."""
        return len(self.rank.symmetric(name, 64 + self.rank.index))

    def symmetric_sum(self, name: str, nbytes: int) -> int:
        return sum(int(buffer.sum()) for buffer in self.rank.symmetric(name, nbytes))


class Doomed(Echo):
    """Dies in the named way, on one rank or on all, while the other ranks wait for it or not."""

    def die(self, manner: str, victim: int = 0, *, peers_wait: bool = False) -> str:
        """Die on rank `victim` (-1: on all); the others answer at once, or spin for ever as a barrier does."""
        if victim in (-1, self.rank.index):
            getattr(self, manner)()
        elif peers_wait:
            self.spin()
        return "alive"

    def die_waiting(self, manner: str, victim: int = 0) -> str:
        return self.die(manner, victim, peers_wait=True)

    def die_later(self, seconds: float) -> None:
        """Answer, and be killed thereafter."""
        if self.rank.index == 0:
            subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -9 {os.getpid()}"])

    def waits_for(self, program: str, seconds: float) -> str:
        """Rank 0 waits for a program that it starts, its peers for rank 0."""
        if self.rank.index == 0:
            subprocess.run([program, str(seconds)], check=True)
        torch.distributed.barrier(group=self.rank.group)
        return "done"

    def forgets(self, program: str) -> None:
        """Start a program, never ask how it ended, and hang."""
        subprocess.Popen([program])
        self.wedge()

    def spin(self) -> None:
        while True:
            pass

    def wedge(self) -> None:
        """Hold the interpreter's lock for ever, as a wedged native kernel does."""
        ctypes.PyDLL(None).pause()

    def sigkill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def sigsegv(self) -> None:
        ctypes.string_at(0)

    def exit(self) -> None:
        os._exit(7)

    def sys_exit(self) -> None:
        sys.exit(3)

    def throw(self) -> None:
        raise ValueError("this rank only")

    def leak(self) -> None:
        held = []
        while True:
            held.append(torch.ones(4 << 20))

    def garbage(self) -> None:
        """Write rubbish to every stream that this process holds, then spin."""
        for name in os.listdir("/proc/self/fd"):
            number = int(name)
            try:
                if number > 2 and stat.S_ISSOCK(os.fstat(number).st_mode):
                    os.write(number, b"\x00\xff rubbish " * 100)
            except OSError:
                continue
        self.spin()

    def lose_device(self) -> None:
        """Raise as a kernel does that has read out of bounds: CUDA refuses all that follows."""

        def refuse() -> None:
            raise RuntimeError("an illegal memory access was encountered")

        vars(torch.cuda).update(is_initialized=lambda: True, synchronize=refuse)
        refuse()

    def stop(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def unpicklable(self) -> Any:
        return lambda: None

    def grandchildren(self) -> None:
        """Start processes that leave the session and ignore polite signals, then crash."""
        script = "import os, signal, time; os.setsid(); signal.signal(15, 1); print(1, flush=True); time.sleep(600)"
        for _ in range(2):
            process = subprocess.Popen([sys.executable, "-S", "-c", script], stdout=subprocess.PIPE)
            assert process.stdout is not None
            process.stdout.readline()
        self.sigkill()

    def slow(self, seconds: float) -> tuple[float, float]:
        """Sleep; returns when it began and ended, on the clock that all processes share."""
        begun = time.monotonic()
        time.sleep(seconds)
        return begun, time.monotonic()

    def zeros(self, size: int) -> bytes:
        return bytes(size)

    def start_daemon(self) -> int:
        """Start a process that leaves the session and outlives its parent if it can; returns its id."""
        script = "import os, time; os.setsid(); print(os.getpid(), flush=True); time.sleep(600)"
        process = subprocess.Popen([sys.executable, "-S", "-c", script], stdout=subprocess.PIPE)
        assert process.stdout is not None
        return int(process.stdout.readline())


class Stuck(Echo):
    """Never gets built."""

    def __init__(self, rank: Rank) -> None:
        super().__init__(rank)
        time.sleep(600)

"""The rank process: builds the worker, then answers calls until its keeper goes."""

from __future__ import annotations

import faulthandler
import importlib
import io
import os
import pickle
import signal
import socket
import sys
import traceback
from dataclasses import dataclass, field
from typing import Any

import torch

from verify.errors import UsageError
from verify.ranks.frames import FrameReader, frame
from verify.ranks.rank import LocalRank
from verify.ranks.residue import shared_root

START_ID = 0
"""The request that every rank answers unasked, once its worker is built (or could not be)."""


@dataclass(frozen=True)
class RankPlan:
    """Everything that a keeper needs to start the ranks of one pool on its host.

    Attributes:
        worker: the worker class as `package.module:Class`; built in the rank as `Class(rank, *arguments)`.
        arguments: what the class receives beside the rank.
        world_size: how many ranks the group has, on all hosts.
        device: `cpu` or `cuda`.
        devices: the CUDA device of each rank; empty for rank r on device r.
        directory: the name of the pool's directory in shared memory, new for every start.
        rendezvous: where the process group meets; empty for a file in the directory.
        path: `sys.path` of the parent.
        cwd: the parent's working directory.
        environment: variables set in the ranks.
        memory_limit: private resident bytes that one rank may hold; 0 for no limit.
        preload: modules that the keeper imports once, so that a restart need not; they must not start CUDA.
        threads: torch's threads in a CPU rank.
    """

    worker: str
    arguments: tuple[Any, ...]
    world_size: int
    device: str
    devices: tuple[int, ...]
    directory: str = ""
    rendezvous: str = ""
    path: tuple[str, ...] = ()
    cwd: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    memory_limit: int = 0
    preload: tuple[str, ...] = ()
    threads: int = 1


def split_worker(worker: str) -> tuple[str, str]:
    """Split `package.module:Class`.

    Raises:
        UsageError: the text has not that form.
    """
    module, colon, name = worker.partition(":")
    if not (module and colon and name):
        raise UsageError(f"worker {worker!r}: expected package.module:Class")
    return module, name


def serve(plan: RankPlan, index: int, link: socket.socket) -> None:
    """Run one rank in this (freshly forked) process; returns when the keeper closes the link.

    Args:
        plan: what to build.
        index: this rank.
        link: the stream to the keeper, blocking.
    """
    _settle(plan)
    answer, worker = _answer(START_ID, _build, plan, index)
    link.sendall(answer)
    reader = FrameReader()
    while data := link.recv(1 << 16):
        for payload in reader.feed(data):
            request, method, arguments = pickle.loads(payload)
            answer, _ = _answer(request, _invoke, worker, method, arguments)
            link.sendall(answer)


def _settle(plan: RankPlan) -> None:
    # The parent decides what Ctrl-C means: a rank that died of it would look like a crash.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    sys.path[:] = plan.path
    os.chdir(plan.cwd)
    os.environ.update(plan.environment)
    if plan.device == "cpu":
        torch.set_num_threads(plan.threads)
        # A machine whose own name does not resolve makes gloo wait for long; the ranks are on this host.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _build(plan: RankPlan, index: int) -> Any:
    directory = shared_root() / plan.directory
    rank = LocalRank(
        index,
        plan.world_size,
        _device(plan, index),
        directory,
        plan.rendezvous or f"file://{directory / 'rendezvous'}",
    )
    module, name = split_worker(plan.worker)
    return getattr(importlib.import_module(module), name)(rank, *plan.arguments)


def _device(plan: RankPlan, index: int) -> torch.device:
    if plan.device == "cpu":
        return torch.device("cpu")
    number, count = plan.devices[index] if plan.devices else index, torch.cuda.device_count()
    if plan.devices and count == 1:
        # A launcher may leave each of its processes one device, which is then number 0 for all of them.
        number = 0
    if number >= count:
        raise RuntimeError(f"rank {index} needs CUDA device {number}; visible are {count}")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def _invoke(worker: Any, method: str, arguments: tuple[Any, ...]) -> Any:
    return getattr(worker, method)(*arguments)


def _answer(request: int, function: Any, *arguments: Any) -> tuple[bytes, Any]:
    """Call and pack the outcome; every exception is an answer, SystemExit too."""
    value = None
    try:
        value = function(*arguments)
        # The worker itself stays here: it is no answer.
        return frame(pickle.dumps((request, "ok", None if request == START_ID else value))), value
    except BaseException as error:
        text = traceback.format_exc()
        reply = (request, "error", type(error).__name__, str(error)[:10_000], text[-20_000:])
        return frame(pickle.dumps(reply)), value

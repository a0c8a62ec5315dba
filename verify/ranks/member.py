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
from typing import Any

import torch

from fusecheck.errors import RAISED_IN
from fusecheck.ranks.frames import FrameReader, frame
from fusecheck.ranks.plan import START_ID, RankPlan, split_worker
from fusecheck.ranks.rank import LocalRank
from fusecheck.ranks.residue import shared_root


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
    # On a GPU, too: what is left for the host is small there, and threads of several ranks that wait for each other on
    # the same cores stall it for milliseconds at a time.
    torch.set_num_threads(plan.threads)
    if plan.device == "cpu":
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
        status = "lost" if _device_lost() else "error"
        method, place = getattr(error, RAISED_IN, ("", ""))
        reply = (request, status, type(error).__name__, str(error)[:10_000], text[-20_000:], method, place)
        return frame(pickle.dumps(reply)), value


def _device_lost() -> bool:
    """Whether CUDA refuses everything from now on, as it does after an illegal access or a device-side assertion."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False

"""What a rank process does for an evaluation: holds its share of the model, and scores what the parent sends."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusecheck.backends import backend
from fusecheck.eval.arm import ORACLE
from fusecheck.eval.checkpoint import Checkpoint
from fusecheck.eval.collective import told_by_first
from fusecheck.eval.fold import fold
from fusecheck.eval.llama import Cache, Llama
from fusecheck.eval.paths import KernelPath, OraclePath
from fusecheck.eval.trace_rank import WatchedKernel, to_records
from fusecheck.interface import Backend, Kernel, Limits, Rank
from fusecheck.problem import Problem

if TYPE_CHECKING:
    from fusecheck.eval.exported import ExportedModel

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

LOGITS = 1 << 27
"""Logits that are held at once, 512 MiB in float32; more rows are scored in parts."""


class EvalRank:
    """One rank of the evaluated model. All methods are collective calls; only rank 0 returns results."""

    def __init__(self, rank: Rank, folder: str) -> None:
        """Load this rank's share of the checkpoint in `folder`."""
        with Checkpoint(Path(folder)) as checkpoint:
            self.model = Llama(checkpoint, rank)
        self.rank, self._folder = rank, Path(folder)
        self._decoder: Llama | ExportedModel = self.model
        self._kernel: Kernel | None = None
        self._made: Backend | None = None
        self._path: KernelPath | OraclePath | None = None
        self._cache: Cache | None = None
        self._next = torch.zeros(0, dtype=torch.int64)
        self._lengths = torch.zeros(0, dtype=torch.int64)
        self._finite = torch.ones((), dtype=torch.bool, device=rank.device)
        self._began = 0.0

    def open_arm(self, arm: str, backend_name: str, max_tokens: int) -> None:
        """Choose the way through the model: the oracle's, or the named backend's kernel."""
        self._finite = torch.ones_like(self._finite)
        self._began, self._decoder = time.process_time(), self.model
        if arm == ORACLE:
            self._path = OraclePath(self.rank)
            return
        limits = Limits(max_tokens, self.model.shape.hidden, self.model.dtype)
        made = self._made = backend(backend_name)
        self._kernel = self.open_kernel(made, limits)
        # So does a model in another form, see `fusecheck.eval.exported`.
        make_model = getattr(made, "model", None)
        if make_model is not None:
            self._decoder = make_model(self._folder, self.rank)
        # A planted bug of the graph, not of the kernel, comes as a backend with a path of its own.
        path: type[KernelPath] = getattr(made, "path", KernelPath)
        self._path = path(self._kernel, self.model.dtype)

    def open_kernel(self, made: Backend, limits: Limits) -> Kernel:
        """Open the arm's kernel; a collective call."""
        return made.open(self.rank, limits)

    @torch.inference_mode()
    def trace(self, ids: Ints, lengths: Ints) -> tuple[int, list[dict[str, Any]]]:
        """Run texts once, and judge every call of the kernel by its declaration; see `fusecheck.eval.trace_rank`.

        Args:
            ids: tokens [batch, length], padded on the right.
            lengths: tokens of each row [batch].

        Returns:
            The number of calls, and the deviations among them, on this rank.
        """
        path = self._path
        assert isinstance(path, KernelPath)
        assert self._made is not None
        shape = self.model.shape
        problem = Problem(
            dtype=shape.dtype, world_size=self.rank.world_size, tokens=ids.size, hidden=shape.hidden, eps=shape.eps
        )
        own = path.kernel
        watched = WatchedKernel(own, self.rank, self._made.dataflow(problem), lengths.tolist(), ids.shape[1])
        path.kernel = watched
        try:
            self._forward(ids)
        finally:
            path.kernel = own
        return watched.sites, to_records(watched.deviations)

    def close_arm(self) -> dict[str, Any]:
        """Close the kernel; return this rank's counters."""
        path = self._path
        assert path is not None
        if self._kernel is not None:
            self._kernel.close()
        self._kernel, self._path, self._cache = None, None, None
        spent = time.process_time() - self._began
        return {"calls": path.calls, "rows": path.rows, "finite": bool(self._finite), "cpu_seconds": spent}

    @torch.inference_mode()
    def score_last(self, ids: Ints, lengths: Ints, wanted: Ints) -> tuple[Floats, Ints, Floats] | None:
        """Score the token after each row.

        Args:
            ids: tokens [batch, length], padded on the right.
            lengths: tokens of each row [batch].
            wanted: the continuations of each row [batch, some].

        Returns:
            The folded log-probabilities [batch, columns], the most likely tokens [batch], and the log-probabilities
            of `wanted` [batch, some]. The whole rows stay on the device.
        """
        hidden = self._forward(ids)
        last = torch.from_numpy(lengths).to(hidden.device) - 1
        table = self._log_probabilities(hidden[torch.arange(len(last), device=hidden.device), last])
        if table is None:
            return None
        picked = table.gather(1, torch.from_numpy(wanted).to(table.device))
        return fold(table).cpu().numpy(), table.argmax(-1).cpu().numpy(), picked.cpu().numpy()

    @torch.inference_mode()
    def score_spans(self, ids: Ints, lengths: Ints, begins: Ints) -> tuple[Floats, Ints] | None:
        """Score the tokens `begins[i]` to the end of each row, given those before them.

        Returns:
            Each scored token's log-probability and the most likely token in its place, row after row, [scored].
        """
        hidden = self._forward(ids)
        spans = list(zip(begins.tolist(), lengths.tolist(), strict=True))
        picked = torch.cat([hidden[i, begin - 1 : end - 1] for i, (begin, end) in enumerate(spans)])
        targets = torch.from_numpy(np.concatenate([ids[i, begin:end] for i, (begin, end) in enumerate(spans)]))
        scores, top = [], []
        rows = max(1, LOGITS // self.model.shape.vocabulary)
        for part, wanted in zip(torch.split(picked, rows), torch.split(targets.to(picked.device), rows), strict=True):
            table = self._log_probabilities(part)
            if table is None:
                return None
            scores.append(table.gather(1, wanted[:, None])[:, 0])
            top.append(table.argmax(-1))
        return torch.cat(scores).cpu().numpy(), torch.cat(top).cpu().numpy()

    def room(self) -> int:
        """Positions of a cache for which there is memory: a third of what is free on a GPU; 0 on a CPU."""
        if self.rank.device.type == "cpu":
            return 0
        shape = self.model.shape
        heads = -(-shape.kv_heads // self.rank.world_size)
        free: int = torch.cuda.mem_get_info(self.rank.device)[0]
        return free // 3 // (2 * 4 * shape.layers * heads * shape.head_dim)  # keys and values, the oracle's in float32

    def begin(self, ids: Ints, lengths: Ints, capacity: int, behind: int = 0) -> Ints | None:
        """Prefill prompts and return the first greedy token of each row, [batch].

        Args:
            ids: tokens [batch, length], padded on the right.
            lengths: tokens of each row [batch].
            capacity: positions that the cache has room for.
            behind: rows that have begun, and with which these decode; 0 to forget all others.
        """
        before = (self._cache, self._lengths, self._next) if behind else None
        self._cache = Cache(self.model.shape.layers)
        hidden = self._forward(ids, capacity)
        self._lengths = torch.from_numpy(lengths).to(hidden.device)
        self._next = begun = self._choose(hidden[torch.arange(len(ids), device=hidden.device), self._lengths - 1])
        if before is not None and before[0] is not None:
            self._cache.put_behind(before[0])
            self._lengths = torch.cat([before[1], self._lengths])
            self._next = torch.cat([before[2], begun])
        return begun.cpu().numpy() if self.rank.index == 0 else None

    def proceed(self, rows: Ints, steps: int) -> Ints | None:
        """Keep these rows of the batch and decode greedily; returns [steps, rows kept]."""
        assert self._cache is not None
        assert self._path is not None
        keep = torch.from_numpy(rows).to(self._next.device)
        if len(rows) < len(self._next):
            self._cache.keep(keep)
            self._next, self._lengths = self._next[keep], self._lengths[keep]
        chosen = []
        for _ in range(steps):
            hidden = self.model.forward(self._path, self._next[:, None], self._lengths, self._cache)
            self._lengths = self._lengths + 1
            self._next = self._choose(hidden[:, 0])
            chosen.append(self._next)
        return torch.stack(chosen).cpu().numpy() if self.rank.index == 0 else None

    def _forward(self, ids: Ints, capacity: int = 0) -> Tensor:
        assert self._path is not None
        tokens = torch.from_numpy(ids).to(self.rank.device)
        starts = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        return self._decoder.forward(self._path, tokens, starts, self._cache if capacity else None, capacity)

    @torch.inference_mode()
    def _log_probabilities(self, hidden: Tensor) -> Tensor | None:
        """Return float32 [rows, vocabulary] on rank 0."""
        return torch.log_softmax(self._logits(hidden), -1) if self.rank.index == 0 else None

    def _logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits and remember whether they were finite, without waiting for the device."""
        logits = self.model.logits(hidden)
        self._finite = self._finite & torch.isfinite(logits).all()
        return logits

    @torch.inference_mode()
    def _choose(self, hidden: Tensor) -> Tensor:
        """Pick each row's most likely token on rank 0 and tell the others, [batch] int64."""
        tokens = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        if self.rank.index == 0:
            tokens = self._logits(hidden).argmax(-1)
        return told_by_first(tokens, self.rank)

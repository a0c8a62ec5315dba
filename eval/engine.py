"""The parent's side of an evaluation: sends batches to the rank processes and puts their answers in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusecheck.errors import UsageError
from fusecheck.eval.fold import CLASSES
from fusecheck.kernel.virtual import VirtualPool
from fusecheck.ranks.pool import Pool
from fusecheck.ranks.replies import culprits

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Row = Sequence[int] | NDArray[np.int32]
"""The tokens of one text."""

WORKER, VIRTUAL = "fusecheck.eval.worker:EvalRank", "fusecheck.eval.virtual:VirtualMember"
PEER_SECONDS = 240.0
"""How long a virtual rank waits for its peers: rank 0 has the head, and computes it while the others wait."""
CHUNK = 16
"""Decode steps between two looks at the stop strings."""
REPLY_BYTES = 32 << 20
"""A rank's answer must fit one message; log-probabilities of more rows are asked for in parts."""


class ArmError(RuntimeError):
    """The ranks failed in the middle of an arm: a crash, a hang, or an exception of the kernel."""


@dataclass(frozen=True)
class BatchPlan:
    """How much goes through the model at once.

    Attributes:
        rows: of a batch.
        tokens: of a batch, padding included.
        pool: rows that decode together, of several batches; 0 where each batch decodes by itself.
    """

    rows: int = 32
    tokens: int = 2048
    pool: int = 0


BATCHES = {
    "cpu": (BatchPlan(96, 8192), BatchPlan(40, 3500)),
    # A decode step of few rows costs a GPU what one of many costs.
    "cuda": (BatchPlan(512, 65536, 2048), BatchPlan(180, 30000, 700)),
}
"""Batch plans by device; the second is for the arm that repeats the unfused one, whose difference is batching noise."""


CPU_MULTIPLIES = 2**40
"""Of a batch on a CPU: at 10^10 a second, which two loaded cores reach, under two minutes of a batch's five."""


def batch_plans(device: str, rows: int | None = None, multiplies: int = 1) -> tuple[BatchPlan, BatchPlan]:
    """Return a device's two plans.

    Args:
        device: `cpu` or `cuda`.
        rows: of the first plan; all else shrinks or grows with it. None for the device's own.
        multiplies: that a token takes in this model; on a CPU fewer rows of a large model go at once.
    """
    first, second = BATCHES[device]
    share = 1.0 if rows is None else rows / first.rows
    if rows is None and device == "cpu":
        share = min(1.0, max(4 / first.rows, CPU_MULTIPLIES / multiplies / first.tokens))

    def scaled(plan: BatchPlan) -> BatchPlan:
        return BatchPlan(max(1, round(plan.rows * share)), round(plan.tokens * share), round(plan.pool * share))

    return scaled(first), scaled(second)


@dataclass(frozen=True)
class Next:
    """What the model expects after a text.

    Attributes:
        row: of the text's last token in its batch's token matrix.
        table: its log-probabilities, folded (see `fusecheck.eval.fold`), float32 [columns].
        best: the most likely token.
        scores: log-probabilities of the tokens that were asked for, float32, in their order.
    """

    row: int
    table: Floats
    best: int
    scores: Floats


@dataclass(frozen=True)
class Generated:
    """One answer: its tokens, and whether it was cut at the limit."""

    tokens: list[int]
    truncated: bool


def batches(lengths: Sequence[int], plan: BatchPlan) -> Iterator[list[int]]:
    """Yield the positions of each batch, longest texts first; the same batches for the same lengths."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == plan.rows or (len(batch) + 1) * lengths[batch[0]] > plan.tokens):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def pools(lengths: Sequence[int], plan: BatchPlan, limit: int, positions: int) -> Iterator[list[list[int]]]:
    """Yield the batches of rows that decode together: as many as the plan's pool and the caches' positions allow.

    Args:
        lengths: of the rows, in tokens.
        plan: of batch and pool.
        limit: new tokens of a row.
        positions: that there is room for.
    """
    pool: list[list[int]] = []
    for batch in batches(lengths, plan):
        count = sum(map(len, pool)) + len(batch)
        longest = lengths[(pool or [batch])[0][0]] + limit
        if pool and (count > plan.pool or count * longest > positions):
            yield pool
            pool = []
        pool.append(batch)
    if pool:
        yield pool


def padded(rows: Sequence[Row]) -> tuple[Ints, Ints]:
    """Pad token rows on the right with 0: tokens [batch, longest] and lengths [batch]."""
    lengths = np.array([len(row) for row in rows], np.int64)
    ids = np.zeros((len(rows), int(lengths.max())), np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return ids, lengths


class Engine:
    """A pool of ranks that hold one model, and the arm that is open on them.

    Attributes:
        answered: texts that the open arm has scored or continued.
        watch: told of `answered` after every batch.

    Args:
        folder: the checkpoint.
        world_size: ranks.
        device: `cpu` or `cuda`.
        vocabulary: columns of a row of log-probabilities.
        virtual: all ranks in one process, on one device.
        timeout: seconds that one batch may take.
    """

    def __init__(
        self,
        folder: Path,
        world_size: int,
        *,
        device: str,
        vocabulary: int,
        virtual: bool = False,
        timeout: float = 300.0,
    ) -> None:
        given: dict[str, Any] = {"device": device, "start_timeout": 600.0, "arguments": (str(folder.resolve()),)}
        self._pool: Pool | VirtualPool
        if virtual:
            self._pool = VirtualPool(world_size, VIRTUAL, patience=PEER_SECONDS, **given)
        else:
            self._pool = Pool(WORKER, world_size, **given)
        self._timeout, self._on_one_device = timeout, world_size if virtual else 1
        self._rows_a_reply = max(1, REPLY_BYTES // (4 * min(vocabulary, CLASSES)))
        self.plan = BatchPlan()
        self.answered = 0
        self.watch: Callable[[int], None] = lambda _answered: None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call every rank and return their values.

        Raises:
            UsageError: a rank refused its input with one.
            ArmError: a rank failed otherwise.
        """
        replies = self._pool.call(method, *arguments, timeout=self._timeout)
        failures = culprits(replies)
        refused = [f for f in failures if f.error == UsageError.__name__]
        if refused:
            raise UsageError(refused[0].message.removeprefix(f"{UsageError.__name__}: "))
        if failures:
            raise ArmError(f"{method}: {'; '.join(map(str, failures))}")
        return [reply.value for reply in replies]

    def open_arm(self, arm: str, backend: str, plan: BatchPlan, longest: int) -> None:
        """Choose the arm; `longest` is the longest text in tokens, which the kernel's workspace must take."""
        self.plan, self.answered = plan, 0
        self.call("open_arm", arm, backend, max(plan.tokens, longest))

    def close_arm(self) -> list[dict[str, Any]]:
        """Close the arm and return the counters of every rank."""
        return self.call("close_arm")

    def last(self, rows: Sequence[Row], wanted: Sequence[Sequence[int]], keep: Callable[[int, Next], None]) -> None:
        """Score the token after each row.

        Args:
            rows: tokens of each text.
            wanted: the tokens whose log-probabilities are asked for, by text.
            keep: called with a text's number and what was found.
        """
        plan = BatchPlan(min(self.plan.rows, self._rows_a_reply), self.plan.tokens)
        for batch in batches([len(row) for row in rows], plan):
            ids, lengths = padded([rows[i] for i in batch])
            asked, _ = padded([wanted[i] for i in batch])
            table, best, scores = self.call("score_last", ids, lengths, asked)[0]
            for k, i in enumerate(batch):
                row = k * ids.shape[1] + int(lengths[k]) - 1
                keep(i, Next(row, table[k], int(best[k]), scores[k, : len(wanted[i])]))
            self._count(batch)

    def spans(self, rows: Sequence[Row], begins: Sequence[int]) -> list[tuple[Floats, Ints]]:
        """Score the tokens of each row from `begins` on: their log-probabilities, and the most likely tokens."""
        found: dict[int, tuple[Floats, Ints]] = {}
        for batch in batches([len(row) for row in rows], self.plan):
            ids, lengths = padded([rows[i] for i in batch])
            starts = np.array([begins[i] for i in batch], np.int64)
            scores, top = self.call("score_spans", ids, lengths, starts)[0]
            ends = np.cumsum(lengths - starts)
            for k, i in enumerate(batch):
                part = slice(int(ends[k] - (lengths[k] - starts[k])), int(ends[k]))
                found[i] = (scores[part], top[part])
            self._count(batch)
        return [found[i] for i in range(len(rows))]

    def generate(self, rows: Sequence[Row], limit: int, stops: Callable[[list[int]], bool]) -> list[Generated]:
        """Decode greedily after each row until `stops` says so of its new tokens, or `limit` new tokens are there."""
        found: dict[int, Generated] = {}
        # A decode step is as long as its longest neighbour's; the cache holds prompt and answer.
        positions = min(self.call("room")) // self._on_one_device if self.plan.pool else 0
        for pool in pools([len(row) for row in rows], self.plan, limit, positions):
            found.update(self._generate(pool, rows, limit, stops))
            self._count([i for batch in pool for i in batch])
        return [found[i] for i in range(len(rows))]

    def _count(self, batch: Sequence[int]) -> None:
        self.answered += len(batch)
        self.watch(self.answered)

    def _generate(
        self, pool: Sequence[list[int]], rows: Sequence[Row], limit: int, stops: Callable[[list[int]], bool]
    ) -> Iterator[tuple[int, Generated]]:
        members = [i for batch in pool for i in batch]
        capacity = max(len(rows[i]) for i in members) + limit
        answers: list[list[int]] = []
        for batch in pool:
            first = self.call("begin", *padded([rows[i] for i in batch]), capacity, len(answers))[0]
            answers += [[int(token)] for token in first]
        active = list(range(len(members)))
        kept = active
        while True:
            done = [k for k in active if stops(answers[k]) or len(answers[k]) >= limit]
            for k in done:
                yield members[k], Generated(answers[k], not stops(answers[k]))
            active = [k for k in active if k not in done]
            if not active:
                return
            steps = min(CHUNK, limit - len(answers[active[0]]))
            tokens = self.call("proceed", np.array([kept.index(k) for k in active], np.int64), steps)[0]
            kept = active
            for column, k in enumerate(active):
                answers[k] += tokens[:, column].tolist()

"""Record what the kernel gets inside the golden model on real questions: `activations.safetensors` beside this file.

`python -m fusecheck.golden.model.capture` runs the model on eight ranks, unfused, over questions of MMLU, GSM8K and the
generated tasks, and keeps some rows of every call: `partial` [sites, ranks, tokens, hidden], `residual` [sites, tokens,
hidden] and `gamma` [sites, hidden] in bfloat16, `scale` [sites] in float32 (1 where the site's reader takes no codes).
For a smaller group, add neighbouring ranks' partials in float32 and round: what a rank with their shares computes, but
for its own rounding.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from fusecheck.errors import UsageError
from fusecheck.eval.arm import UNFUSED
from fusecheck.eval.data import EMBEDDED, GENERATED, read_rows
from fusecheck.eval.paths import KernelPath
from fusecheck.eval.worker import EvalRank
from fusecheck.golden.model.export import write_safetensors
from fusecheck.interface import RankInputs
from fusecheck.ranks.pool import Pool
from fusecheck.ranks.replies import values

FOLDER = Path(__file__).parent
ACTIVATIONS = FOLDER / "activations.safetensors"
RANKS = 8
QUESTIONS = 12
ROWS = 2
"""Rows kept of each question: its first token, where activations are largest, and its last."""

Ints = NDArray[np.int64]


class CaptureRank(EvalRank):
    """A rank that also tells what its kernel was called with."""

    def capture(self, ids: Ints, lengths: Ints, rows: Ints) -> list[tuple[NDArray[np.int16], ...]]:
        """Score a batch; return for every call the kept rows of partial and residual, gamma and scale, as raw bits."""
        calls: list[tuple[NDArray[np.int16], ...]] = []
        picked = torch.from_numpy(rows)

        def tap(inputs: RankInputs) -> None:
            parts = (inputs.partial[picked], inputs.residual[picked], inputs.gamma, inputs.scale)
            calls.append(tuple(part.contiguous().view(torch.int16).numpy().copy() for part in parts))

        assert isinstance(self._path, KernelPath)
        self._path.tap = tap
        self.score_last(ids, lengths, ids[:, :1])
        self._path.tap = None
        return calls


def questions() -> list[str]:
    """Return real prompts: MMLU's and GSM8K's, and generated ones, in equal shares."""
    rng = random.Random(3)
    share = QUESTIONS // 4
    found = []
    for source in (EMBEDDED, GENERATED):
        rows = read_rows(source / "mmlu" / "test.jsonl", ("question", "choices"))
        for row in rng.sample(rows, share):
            choices = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", row["choices"], strict=True))
            found.append(f"{row['question']}\n{choices}\nAnswer:")
        rows = read_rows(source / "gsm8k" / "test.jsonl", ("question",))
        found += [f"Question: {row['question']}\nAnswer:" for row in rng.sample(rows, share)]
    return found


def capture() -> dict[str, Tensor]:
    """Run the model and return the four tensors."""
    from fusecheck.eval.asked import Asked
    from fusecheck.eval.engine import padded
    from fusecheck.eval.run import open_job

    job = open_job(Asked(FOLDER, RANKS, "unfused"))
    ids, lengths = padded([job.tokens.encode(text)[:400] for text in questions()])
    starts = np.arange(len(ids)) * ids.shape[1]
    rows = np.stack([starts, starts + lengths - 1], 1).reshape(-1)
    with Pool("fusecheck.golden.model.capture:CaptureRank", RANKS, arguments=(str(FOLDER),)) as pool:
        values(pool.call("open_arm", UNFUSED, "unfused", ids.size, timeout=300))
        ranks = values(pool.call("capture", ids, lengths, rows, timeout=300))

    def native(part: NDArray[np.int16]) -> Tensor:
        return torch.from_numpy(part).view(torch.bfloat16)

    sites = range(len(ranks[0]))
    if len({rank[site][1].tobytes() for rank in ranks for site in sites}) > len(sites):
        raise UsageError("the ranks' residuals differ; the unfused kernel is at fault")
    return {
        "partial": torch.stack([torch.stack([native(rank[site][0]) for rank in ranks]) for site in sites]),
        "residual": torch.stack([native(ranks[0][site][1]) for site in sites]),
        "gamma": torch.stack([native(ranks[0][site][2]) for site in sites]),
        "scale": torch.cat([torch.from_numpy(ranks[0][site][3]).view(torch.float32) for site in sites]),
    }


def load_activations() -> dict[str, Tensor]:
    """Read the recorded activations; see the module for their shapes."""
    return load_file(ACTIVATIONS)


if __name__ == "__main__":
    write_safetensors(ACTIVATIONS, capture(), {"source": "fusecheck.golden.model.capture"})

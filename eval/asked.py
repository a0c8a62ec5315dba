"""What a run of the arms is asked for; the fields are the options of `fusecheck accuracy`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fusecheck.eval.chat import PLAIN, Chat


@dataclass(frozen=True)
class Asked:
    """What to run.

    Attributes:
        model: a checkpoint in Hugging Face's layout; None for the golden model.
        tp: ranks, each a process.
        backend: the fused arm's backend by name.
        tasks: lm-eval's tasks or groups, or `golden_mmlu`, `golden_gsm8k`.
        data: the user's copies of MMLU and GSM8K; None for the embedded samples.
        limit: questions of each task; None for all.
        shots: examples before each question; None for the tasks' own numbers.
        device: `cpu` or `cuda`.
        batch: rows of a batch at most; None for the device's own.
        virtual: all ranks in one process, on one device.
        chat: how prompts are put.
        trace: whether the fused arm is traced even where it passes.
    """

    model: Path | None = None
    tp: int = 2
    backend: str = "emulated"
    tasks: Sequence[str] = ()
    data: Path | None = None
    limit: int | None = None
    shots: int | None = None
    device: str = "cpu"
    batch: int | None = None
    virtual: bool = False
    chat: Chat = PLAIN
    trace: bool = False

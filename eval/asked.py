"""What a run of the arms is asked for; the fields are the options of `fusecheck accuracy`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusecheck.errors import UsageError
from fusecheck.eval.arm import RECORD_NAME
from fusecheck.eval.chat import PLAIN, Chat
from fusecheck.report.result import write_aside


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

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be meant.

        Raises:
            UsageError: one is too small.
        """
        for name, least in (("tp", 1), ("limit", 1), ("shots", 0), ("batch", 4)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name} {value}: expected at least {least}")


HELD = "asked.json"
"""In the folder of a run that is gone on with: what its arms were asked for."""


def keep_to(folder: Path, asked: dict[str, Any]) -> None:
    """Note what the arms in a folder are asked for, so that no others are put beside them.

    Args:
        folder: of arms that an earlier run left are taken as they are.
        asked: by option, JSON-ready.

    Raises:
        UsageError: its arms were asked for otherwise, or what they were asked for is not known.
    """
    place, asked = folder / HELD, json.loads(json.dumps(asked))
    if not place.exists() and not any(folder.rglob(RECORD_NAME)):
        folder.mkdir(parents=True, exist_ok=True)
        write_aside(place, json.dumps(asked, indent=1) + "\n")
    try:
        held = dict(json.loads(place.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise UsageError(f"{folder}: {HELD} does not say what its arms were run with; give another --run-dir") from None
    for name in {**held, **asked}:
        if held.get(name) != asked.get(name):
            raise UsageError(
                f"{folder}: its arms were run with {name} {held.get(name)!r}, asked for is {asked.get(name)!r}; "
                "give the same options, or another --run-dir"
            )

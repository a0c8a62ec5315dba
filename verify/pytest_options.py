"""The options of a run of the property tests, read and checked."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from fusecheck import backends
from fusecheck.corpus import Corpus, Kept, read
from fusecheck.dataflow import dataflow
from fusecheck.errors import UsageError
from fusecheck.operations import WORLD_SIZES

PROFILES = {"dev": 12, "ci": 80, "nightly": 2000}
"""Hypothesis profiles and the examples that each test tries."""
DEFAULT_PROFILE = "ci"
PROFILE_VARIABLE = "FUSECHECK_PROFILE"
OPTIONS = ("backend", "tp", "device", "dataflow", "case_timeout", "cases_from", "corpus")


@dataclass(frozen=True)
class Settings:
    """The options, checked.

    Attributes:
        backend: the kernel under test.
        world_size: `--tp`.
        device: `cpu` or `cuda`.
        dataflow: to judge by, or None.
        timeout: seconds for a case.
        corpus: where failing Problems are kept.
        kept: the Problems to try first.
        broken: what could not be read, a sentence each.
    """

    backend: str
    world_size: int
    device: str
    dataflow: str | None
    timeout: float
    corpus: Path
    kept: tuple[Kept, ...]
    broken: tuple[str, ...]

    @classmethod
    def of(cls, config: pytest.Config) -> Settings:
        """Read and check the options.

        Raises:
            UsageError: an option that cannot be meant; one line.
        """
        profile = os.environ.get(PROFILE_VARIABLE, DEFAULT_PROFILE)
        if profile not in PROFILES:
            raise UsageError(f"{PROFILE_VARIABLE}={profile}, expected one of: {', '.join(PROFILES)}")
        backends.backend(config.option.backend)
        if config.option.dataflow is not None:
            dataflow(config.option.dataflow)
        path = _corpus_path(config)
        files = [path] if path.exists() else []
        if config.option.cases_from is not None:
            files.insert(0, Path(config.option.cases_from))
        found: list[Corpus] = [read(file) for file in files]
        return cls(
            backend=config.option.backend,
            world_size=_world_size(config.option.tp),
            device=config.option.device,
            dataflow=config.option.dataflow,
            timeout=_seconds(config.option.case_timeout),
            corpus=path,
            kept=tuple({kept.to_json(): kept for each in found for kept in each.kept}.values()),
            broken=tuple(line for each in found for line in each.broken),
        )

    def fits(self, kept: Kept) -> bool:
        """Whether a kept Problem is one for this world size and this kernel."""
        same = kept.problem.world_size == self.world_size
        return same and backends.backend(self.backend).supports(kept.problem).ok

    @property
    def fitting(self) -> list[Kept]:
        """The kept Problems that this run tries first."""
        return [kept for kept in self.kept if self.fits(kept)]


def _corpus_path(config: pytest.Config) -> Path:
    if config.option.corpus is not None:
        return Path(config.option.corpus)
    folder = config.rootpath / "property_tests"
    return folder / "corpus.jsonl" if folder.is_dir() else config.rootpath / "fusecheck-corpus.jsonl"


def _world_size(text: str) -> int:
    if not text.isdecimal() or int(text) not in WORLD_SIZES:
        raise UsageError(f"--tp {text}: expected one of {', '.join(map(str, WORLD_SIZES))}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UsageError(f"--case-timeout {text}: expected seconds above 0")
    return seconds

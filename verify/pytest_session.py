"""A run of the property tests: its options, its ranks, its header, and what becomes of a failing Problem."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import torch

from verify import backends
from verify.corpus import Corpus, Kept, keep, read
from verify.dataflow import dataflow
from verify.errors import Inconclusive, UsageError
from verify.problem import WORLD_SIZES
from verify.ranks import mpi
from verify.ranks.launch import Pools, open_pools
from verify.ranks.lease import Lease, lease_devices, visible_devices

if TYPE_CHECKING:
    from property_tests.kernel.bench import Bench

PROFILES = {"dev": 12, "ci": 80, "nightly": 2000}
"""Hypothesis profiles and the examples that each test tries."""
DEFAULT_PROFILE = "ci"
PROFILE_VARIABLE = "FUSECHECK_PROFILE"
OPTIONS = ("backend", "tp", "device", "dataflow", "case_timeout", "cases_from", "corpus")
PACKAGES = ("torch", "hypothesis", "pytest", "flashinfer-python", "tensorrt-llm", "mpi4py")
UNUSED = "[NOTSET]"
"""How pytest ends the name of a test for which there are no parameters."""


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


SETTINGS = pytest.StashKey[Settings]()
POOLS = pytest.StashKey[Pools]()


class Count:
    """Counts the tests that really ran; under xdist, on the controller too."""

    def __init__(self) -> None:
        self.ran = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a report of a test's own part."""
        self.ran += report.when == "call" and report.outcome != "skipped"


COUNT = pytest.StashKey[Count]()


def register_profiles() -> None:
    """Make the profiles known to Hypothesis, and load the one that the environment names, or the default."""
    for name, examples in PROFILES.items():
        hypothesis.settings.register_profile(
            name,
            max_examples=examples,
            deadline=None,
            print_blob=name != "dev",
            report_multiple_bugs=False,
            suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
        )
    wanted = os.environ.get(PROFILE_VARIABLE, DEFAULT_PROFILE)
    hypothesis.settings.load_profile(wanted if wanted in PROFILES else DEFAULT_PROFILE)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Check the options; under mpirun, take this process's part: only rank 0 runs tests."""
    try:
        settings = Settings.of(config)
        if mpi.detect() is not None and getattr(config.option, "numprocesses", None):
            raise UsageError("mpirun and -n exclude each other: mpirun already brings the ranks, so leave -n out")
        if not config.option.collectonly and mpi.detect() is not None:
            config.stash[POOLS] = _pools(settings)
    except UsageError as error:
        if (mpi.detect() or (0, 0))[0]:
            return int(pytest.ExitCode.USAGE_ERROR)  # rank 0 says why
        raise pytest.UsageError(str(error)) from None
    except SystemExit:  # this rank has served, and is done
        return 0
    config.stash[SETTINGS] = settings
    return None


def pytest_configure(config: pytest.Config) -> None:
    """Read the options where `pytest_cmdline_main` is not called: in xdist's workers."""
    config.stash[COUNT] = Count()
    config.pluginmanager.register(config.stash[COUNT])
    if SETTINGS not in config.stash:
        try:
            config.stash[SETTINGS] = Settings.of(config)
        except UsageError as error:
            raise pytest.UsageError(str(error)) from None


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the ranks that mpirun brought."""
    if POOLS in config.stash:
        config.stash[POOLS].close()


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Echo every option, the versions, the GPUs, and what the corpus holds."""
    settings = config.stash[SETTINGS]
    options = " ".join(f"--{name.replace('_', '-')}={getattr(config.option, name)}" for name in OPTIONS)
    launcher = config.stash[POOLS].launcher if POOLS in config.stash else "local processes"
    fitting = [kept for kept in settings.kept if kept.problem.world_size == settings.world_size]
    lines = [
        f"fusecheck {importlib.metadata.version('fusecheck')}: {options}",
        f"fusecheck ranks: {launcher}; hypothesis profile {hypothesis.settings.get_current_profile_name()}; "
        f"{_versions()}; {_gpus()}",
        f"fusecheck corpus: {len(fitting)} kept cases are tried first"
        + (f", {len(settings.kept) - len(fitting)} are for another --tp" * (len(fitting) < len(settings.kept))),
    ]
    return lines + [f"fusecheck corpus: SKIPPED a broken line, {line}" for line in settings.broken]


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """The kernel under test with its ranks, for the whole session."""
    from property_tests.kernel.bench import Bench

    config = request.config
    settings = config.stash[SETTINGS]
    lease = _lease(settings)
    own = None if POOLS in config.stash else _pools(settings, devices=lease.devices if lease else ())
    pools = own or config.stash[POOLS]
    try:
        yield Bench(
            backend=settings.backend,
            world_size=settings.world_size,
            pools=pools.pools,
            flow=settings.dataflow,
            timeout=settings.timeout,
            fresh=settings.device == "cpu",
        )
    finally:
        if own is not None:
            own.close()
        if lease is not None:
            lease.release()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give the kept cases of this world size to the test that asks for one."""
    if "kept" in metafunc.fixturenames:
        settings = metafunc.config.stash[SETTINGS]
        fitting = [kept for kept in settings.kept if kept.problem.world_size == settings.world_size]
        metafunc.parametrize("kept", fitting, ids=[kept.origin for kept in fitting])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the kept cases first; without any, take their test out rather than skip it."""
    unused = [item for item in items if "kept" in getattr(item, "fixturenames", ()) and item.name.endswith(UNUSED)]
    if unused:
        config.hook.pytest_deselected(items=unused)
    kept_first = sorted(items, key=lambda item: "kept" not in getattr(item, "fixturenames", ()))
    items[:] = [item for item in kept_first if item not in unused]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what replays a failing Problem, put it among the JUnit properties, and keep it in the corpus."""
    funcargs: dict[str, Any] = getattr(item, "funcargs", {})
    failure = getattr(funcargs.get("bench"), "failure", None)
    if call.when != "call" or failure is None:
        return (yield)
    funcargs["bench"].failure = None
    if call.excinfo is None:
        return (yield)
    settings = item.config.stash[SETTINGS]
    kept = Kept(failure.problem, settings.backend, item.name, failure.relation, failure.parameters)
    replay = failure.problem.to_json()
    item.user_properties += [("replay", replay), ("backend", settings.backend), ("finding", failure.lines[0])]
    report = yield
    told = list(failure.lines)
    if not failure.relation and failure.replays:
        told.append(f"fusecheck replay --backend {settings.backend} '{replay}'")
    if failure.replays and "kept" not in funcargs and keep(settings.corpus, kept):
        told.append(f"kept in {settings.corpus}: the next run tries it first")
    report.sections.append(("fusecheck: what failed, and what replays it", "\n".join(told)))
    return report


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run in which everything was skipped is no green run; pytest itself sees to one that collected nothing."""
    if (
        exitstatus == pytest.ExitCode.OK
        and not session.config.stash[COUNT].ran
        and not session.config.option.collectonly
    ):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    """Say again what is easily overlooked: broken lines of the corpus, a run that judged nothing."""
    for line in config.stash[SETTINGS].broken:
        terminalreporter.write_line(f"fusecheck corpus: SKIPPED a broken line, {line}", red=True, bold=True)
    if not config.stash[COUNT].ran and not config.option.collectonly:
        terminalreporter.write_line("fusecheck: nothing was run, so nothing is verified", red=True, bold=True)


def _pools(settings: Settings, devices: tuple[int, ...] = ()) -> Pools:
    from property_tests.kernel.bench import WORKER

    options: dict[str, Any] = {"device": settings.device, "preload": ("property_tests.kernel.relation_worker",)}
    if devices:
        options["devices"] = devices
    return open_pools(WORKER, settings.world_size, **options)


def _lease(settings: Settings) -> Lease | None:
    """Devices of this xdist worker's own; without xdist, or on the CPU, none are needed.

    Raises:
        pytest.UsageError: there are fewer devices than ranks, or none came free.
    """
    if settings.device == "cpu" or "PYTEST_XDIST_WORKER" not in os.environ:
        return None
    try:
        return lease_devices(settings.world_size, visible_devices())
    except (UsageError, Inconclusive) as error:
        raise pytest.UsageError(str(error)) from None


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


def _versions() -> str:
    installed = {package: _version(package) for package in PACKAGES}
    told = [f"{package} {version}" for package, version in installed.items() if version]
    return ", ".join([f"Python {platform.python_version()}", *told])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _gpus() -> str:
    names = visible_devices() if torch.version.cuda else []
    return f"{len(names)} GPUs: {', '.join(names)}" if names else f"no GPU, {os.cpu_count()} cores ({sys.platform})"

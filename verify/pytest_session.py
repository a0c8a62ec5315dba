"""A run of the property tests: its options, its ranks, its header, and what becomes of a failing Problem."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import torch

from fusecheck.corpus import Kept, keep
from fusecheck.errors import Inconclusive, UsageError
from fusecheck.pytest_options import DEFAULT_PROFILE, OPTIONS, PROFILE_VARIABLE, PROFILES, Settings
from fusecheck.ranks import mpi
from fusecheck.ranks.launch import Pools, open_pools
from fusecheck.ranks.lease import Lease, lease_devices, models, visible_devices
from fusecheck.report.who import KERNEL_PACKAGES

if TYPE_CHECKING:
    from fusecheck.property_tests.kernel.bench import Bench

PACKAGES = ("torch", "hypothesis", "pytest", *KERNEL_PACKAGES, "mpi4py")
UNUSED = "[NOTSET]"
"""How pytest ends the name of a test for which there are no parameters."""
NEEDS_RANKS = "needs_ranks"
"""The mark of a test that means nothing with fewer ranks."""


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
            # The finding says what is wrong; which lines of ours ran in failing examples only does not.
            phases=set(hypothesis.Phase) - {hypothesis.Phase.explain},
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
    config.addinivalue_line("markers", f"{NEEDS_RANKS}(least): left out when --tp is below")
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
    fitting, others = len(settings.fitting), len(settings.kept) - len(settings.fitting)
    lines = [
        f"fusecheck {importlib.metadata.version('fusecheck')}: {options}",
        f"fusecheck ranks: {launcher}; hypothesis profile {hypothesis.settings.get_current_profile_name()}; "
        f"{_versions()}; {_gpus()}",
        f"fusecheck corpus: {fitting} kept cases are tried first"
        + (f", {others} are for another --tp or backend" * (others > 0)),
    ]
    return lines + [f"fusecheck corpus: SKIPPED a broken line, {line}" for line in settings.broken]


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """The kernel under test with its ranks, for the whole session."""
    from fusecheck.property_tests.kernel.bench import Bench

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
    """Give the kept cases that fit this run to the test that asks for one."""
    if "kept" in metafunc.fixturenames:
        fitting = metafunc.config.stash[SETTINGS].fitting
        metafunc.parametrize("kept", fitting, ids=[kept.origin for kept in fitting])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the kept cases first, and take tests out that have nothing to try in this run."""
    unused = [item for item in items if _is_unused(item, config.stash[SETTINGS].world_size)]
    if unused:
        config.hook.pytest_deselected(items=unused)
    kept_first = sorted(items, key=lambda item: "kept" not in getattr(item, "fixturenames", ()))
    items[:] = [item for item in kept_first if item not in unused]


def _is_unused(item: pytest.Item, world_size: int) -> bool:
    """Whether there are no kept cases for a test that asks for one, or fewer ranks than it needs."""
    needed = item.get_closest_marker(NEEDS_RANKS)
    without_case = "kept" in getattr(item, "fixturenames", ()) and item.name.endswith(UNUSED)
    return without_case or (needed is not None and world_size < needed.args[0])


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
    replay = failure.question or failure.problem.to_json()
    item.user_properties += [("replay", replay), ("backend", settings.backend), ("finding", failure.lines[0])]
    report = yield
    told = list(failure.lines)
    if not failure.relation and failure.replays:
        told.append(shlex.join(["fusecheck", "replay", replay]))
    if failure.replays and "kept" not in funcargs and keep(settings.corpus, kept):
        told.append(f"kept in {settings.corpus}: the next run tries it first")
    report.sections.append(("fusecheck: what failed, and what replays it", "\n".join(told)))
    return report


def pytest_collection_finish() -> None:
    """Keep what is loaded out of every later garbage collection: in Hypothesis's hook of one a Ctrl-C would be lost."""
    gc.collect()
    gc.freeze()


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
    from fusecheck.property_tests.kernel.bench import WORKER

    options: dict[str, Any] = {"device": settings.device}
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
    names = models(visible_devices()) if torch.version.cuda else []
    return f"{len(names)} GPUs: {', '.join(names)}" if names else f"no GPU, {os.cpu_count()} cores ({sys.platform})"

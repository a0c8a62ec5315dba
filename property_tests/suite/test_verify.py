"""`fusecheck verify`: what was asked for and not answered is no pass; one's own kernel goes into every part."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree as ET

import pytest

from fusecheck import backends, verify_command
from fusecheck.backends import backend
from fusecheck.dataflow import DATAFLOWS
from fusecheck.errors import Inconclusive, UsageError
from fusecheck.interrupts import Interruption
from fusecheck.operations import Operation
from fusecheck.parts import asked as asking
from fusecheck.parts.agenda import KERNEL_SECONDS, REAL_SECONDS, STEPS, Form, Step, divide
from fusecheck.parts.runner import Steps, missing
from fusecheck.property_tests.suite.command_line import refused, run
from fusecheck.ranks import launch
from fusecheck.report import Verdict, make_run_dir
from fusecheck.verify_command import console


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask about one kernel at one world size, on a machine without lm-eval."""
    monkeypatch.setattr(asking, "WORLD_SIZES", (2,))
    monkeypatch.setattr(asking, "LARGER", ())
    monkeypatch.setattr(asking, "DATAFLOWS", {"trtllm": DATAFLOWS["trtllm"]})
    _hide(monkeypatch)


def _hide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take lm-eval and FlashInfer away."""
    find = importlib.util.find_spec
    hidden = ("lm_eval", "flashinfer")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name in hidden else find(name, *rest))


@pytest.mark.usefixtures("small")
def test_a_question_left_out_for_want_of_a_package_or_of_time_is_said_first_and_is_no_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("verify", "--cases", 1, "--only", "accuracy,faults", "--budget", "20s")
    assert run(*asked, "--run-dir", tmp_path / "run", "--markdown", tmp_path / "run.md") == 3
    printed = capsys.readouterr().out.splitlines()
    told = [line for line in printed if "accuracy" in line or line.startswith(("pass  ", "inconclusive  "))]
    assert told[0].startswith(
        "inconclusive  accuracy: asked for and not answered: needs lm-eval, which is not installed"
    )
    assert told[1].startswith("inconclusive  faults: asked for and not answered: takes about ")
    assert told[2].startswith("pass  kernel: ")
    assert "inconclusive: no answer from accuracy, faults" in printed
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    unanswered = {left["part"]: left["unanswered"] for left in record["summary"]["not_run"]}
    quiet = dict.fromkeys(("graph", "protocol", "invariance", "latency"), False)
    assert unanswered == {**quiet, "accuracy": True, "faults": True}
    assert (record["verdict"], record["summary"]["kernel_verdict"]) == ("inconclusive", "pass")
    root = ET.parse(tmp_path / "run" / "junit.xml").getroot()
    assert (len(list(root.iter("error"))), len(list(root.iter("skipped")))) == (2, 4)
    assert "**not answered**: accuracy: " in (tmp_path / "run.md").read_text()


@pytest.mark.parametrize(
    ("gpus", "required", "expected"),
    [(0, (), []), (0, ("latency",), [Verdict.INCONCLUSIVE]), (2, (), [Verdict.INCONCLUSIVE])],
)
def test_a_missing_gpu_is_noted_unless_a_gate_requires_the_answer_and_a_missing_package_never_only_noted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpus: int, required: tuple[str, ...], expected: list[Verdict]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    _hide(monkeypatch)
    steps = Steps(tmp_path, console, None, Interruption(), required=required)
    latency = STEPS[-1]
    steps.take(latency, latency.quick, wanted=True)
    assert steps.verdicts() == expected
    lack = missing("latency")
    assert lack is not None
    assert lack.mendable == (gpus == 2)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("--require", "kernels"),
            "--require 'kernels', expected none or of: kernel, graph, protocol, invariance, accuracy, faults",
        ),
        (
            ("--only", "graph", "--require", "kernel,accuracy"),
            "--require accuracy asks for what --only graph leaves",
        ),
        (("--backend", "emulatd"), "unknown backend 'emulatd', did you mean emulated?"),
        (("--resume", "ci"), "--resume ci: nothing of a verify run is here; give its directory, or leave it out"),
    ],
)
def test_what_cannot_be_required_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    (tmp_path / "ci").mkdir()
    monkeypatch.chdir(tmp_path)
    assert told in refused("verify", *words)


def test_what_only_names_is_required() -> None:
    every = {step.name for step in STEPS}
    assert verify_command._required("", None, every) == set()
    assert verify_command._required("", "latency", {"latency"}) == {"latency"}
    assert verify_command._required("kernel,graph", None, every) == {"kernel", "graph"}


def test_a_kernel_of_ones_own_goes_into_every_part_that_takes_one() -> None:
    steps = {step.name: step.about({"--backend": "a:b", "--device": "cpu"}) for step in STEPS}
    kernel = ("--backend", "a:b", "--device", "cpu")
    for name, quick, full in (("graph", kernel, kernel), ("accuracy", kernel, kernel), ("faults", (), ())):
        whole = steps[name].full
        assert whole is not None
        assert steps[name].quick.arguments[-4:] == (quick or steps[name].quick.arguments[-4:])
        assert whole.arguments == full
    assert "--backend" not in steps["faults"].quick.arguments
    assert steps["latency"].quick.arguments[-2:] == ("--backend", "a:b")
    assert Step("x", Form((), 1.0)).about({"--backend": "a:b"}) == Step("x", Form((), 1.0))


def test_a_kernel_of_ones_own_is_asked_at_the_world_sizes_that_it_takes_and_the_others_are_named() -> None:
    asked = asking.Asked(0, 1, 2**13, None, f"{__name__}:ForTwo")
    run_, refused = asked.run()
    assert [(subject.backend, subject.world_size) for subject in run_.subjects] == [(f"{__name__}:ForTwo", 2)]
    assert refused == {"kernel at tp 4, 8": "for two ranks"}
    with pytest.raises(UsageError, match="refuses every case at tp 2: for two ranks"):
        asking.Asked(0, 1, 2**13, None, f"{__name__}:ForNone").run()
    with pytest.raises(Inconclusive, match="needed"):
        asking.Asked(0, 1, 2**13, None, "flashinfer").run()


def test_where_there_are_gpus_the_kernels_that_are_installed_are_judged_unasked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(asking, "shipped", lambda: [f"{__name__}:{kind}" for kind in ("OnGpus", "ForNone")])
    asked = asking.Asked(0, 1, 2**13, None)
    run_, refused = asked.run()
    assert [(subject.backend, subject.world_size) for subject in run_.subjects] == [(f"{__name__}:OnGpus", 2)]
    assert (run_.device, run_.joint, run_.plan.whole) == ("cuda", False, True)
    told = {
        f"{__name__}:ForNone at tp 2": "for two ranks",
        "installed kernels at tp 4": "2 CUDA GPUs here, 4 needed",
        "emulated kernels": "real ones are here",
    }
    assert all(told[part] in refused[part] for part in told), refused
    whole = run_.plan.about(backend(run_.subjects[0].backend))
    assert [op.name for op in (*whole.ops, *whole.others)] == ["RESIDUAL_RMS_NORM", "ALL_REDUCE"]


def test_where_no_installed_kernel_runs_the_emulator_is_judged_and_the_reasons_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    names = [f"{__name__}:{kind}" for kind in ("ForNone", "HasNone", "NotThere")]
    monkeypatch.setattr(asking, "shipped", lambda: names)
    asked = asking.Asked(0, None, 2**13, None)
    run_, refused = asked.run()
    assert (run_.device, run_.joint, len(run_.subjects)) == ("cpu", True, 2 * len(DATAFLOWS))
    told = {
        f"{names[0]} at tp 2": "for two ranks",
        f"{names[0]} and {names[1]} at tp 4": "2 CUDA GPUs here, 4 needed",
        f"{names[1]} at tp 2": "HasNone.operations is (), expected a tuple",
        f"{names[2]} at tp 2, 4": "has no attribute 'NotThere'",
    }
    assert refused.keys() == told.keys()
    assert all(told[part] in reason for part, reason in refused.items()), refused
    assert asked.takes() == KERNEL_SECONDS


def test_a_budget_leaves_each_real_kernel_the_time_of_its_core_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(asking, "shipped", lambda: [f"{__name__}:OnGpus", f"{__name__}:AlsoOnGpus"])
    asked = asking.Asked(0, None, 2**13, 1200.0)
    assert asked.takes() == 2 * REAL_SECONDS
    division = divide(STEPS, 1200.0, 5 * REAL_SECONDS)
    assert division.kernel is not None
    assert division.kernel >= 5 * REAL_SECONDS


def test_world_sizes_that_mpirun_started_no_ranks_for_are_named_and_one_gpu_a_rank_is_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    for module in (launch, asking):
        monkeypatch.setattr(module, "detect", lambda: (0, 2))
    monkeypatch.setattr(asking, "shipped", lambda: [f"{__name__}:OnGpus"])
    run_, refused = asking.Asked(0, None, 2**13, None).run()
    assert [(subject.backend, subject.world_size) for subject in run_.subjects] == [(f"{__name__}:OnGpus", 2)]
    assert refused["installed kernels at tp 4"].startswith("--tp 4 does not divide the MPI world of 2")


@pytest.mark.usefixtures("small")
def test_a_gate_that_requires_the_kernel_question_is_not_answered_by_the_emulator_where_kernels_are_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(asking.Asked, "_shipped", lambda _: [f"{__name__}:ForNone"])
    assert run("verify", "--cases", 1, "--only", "none", "--require", "kernel", "--run-dir", tmp_path / "run") == 3
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (record["verdict"], record["summary"]["kernel_verdict"]) == ("inconclusive", "pass")
    left = {each["part"]: each["reason"] for each in record["summary"]["not_run"] if each["unanswered"]}
    assert left == {"installed kernels at tp 2": "0 CUDA GPUs here, 2 needed: run it where there are"}


def test_the_packages_that_bring_kernels_are_found_without_being_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str, *_: object) -> object:
        if name == "sgl_kernel":
            raise ValueError(f"{name}.__spec__ is None")
        here = {"flashinfer": "flashinfer/__init__.py", "vllm": "vllm/__init__.py", "tensorrt_llm": None}
        return SimpleNamespace(origin=here[name]) if name in here else None  # the last is a mere folder

    monkeypatch.setattr("importlib.util.find_spec", find_spec)
    more = {name: f"{__name__}:{kind}" for name, kind in (("z", "OnGpus"), ("broken", "NotThere"), ("two", "ForTwo"))}
    monkeypatch.setattr(backends, "_plug_ins", lambda: more)
    assert backends.shipped() == ["flashinfer", "flashinfer:fp32,pdl", "vllm", "z", "broken"]


class ForTwo:
    """A kernel for two ranks only."""

    name = "two"
    sizes: tuple[int, ...] = (2,)

    def supports(self, problem: object) -> object:
        from fusecheck import Support

        return Support(getattr(problem, "world_size", 0) in self.sizes, "for two ranks")

    def dataflow(self, _problem: object) -> object:
        return DATAFLOWS["trtllm"]

    def open(self, rank: object, limits: object) -> object:
        raise AssertionError


class OnGpus(ForTwo):
    """The same on GPUs, with two operations."""

    device = "cuda"
    operations = tuple(map(Operation.named, ("RESIDUAL_RMS_NORM", "ALL_REDUCE")))


class AlsoOnGpus(OnGpus):
    """Another one."""


class HasNone(OnGpus):
    """The same, with none."""

    name = "HasNone"
    operations = ()


class ForNone(ForTwo):
    """A kernel that takes nothing."""

    sizes = ()


def test_runs_of_one_second_have_a_directory_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = [make_run_dir("kernel", None) for _ in range(20)]  # of whom all, or all but few, begin in one second
    assert len({path.resolve() for path in made}) == 20
    assert all(path.is_dir() for path in made)


def test_a_run_directory_in_use_is_refused_and_free_again_when_its_run_has_ended(tmp_path: Path) -> None:
    told = "import sys, pathlib; from fusecheck.report import make_run_dir\n"
    told += "make_run_dir('kernel', pathlib.Path(sys.argv[1])); print('ready', flush=True); input()"
    command = [sys.executable, "-c", told, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(UsageError, match="is in use by another run; wait for its end, or give another --run-dir"):
            make_run_dir("kernel", tmp_path)
        other.communicate("\n")
    assert make_run_dir("kernel", tmp_path) == tmp_path
    assert make_run_dir("kernel", tmp_path) == tmp_path  # the same process goes on in it

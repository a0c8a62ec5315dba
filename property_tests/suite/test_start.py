"""The way in: help and typos come at once, and whatever ends the program, it is said in one line."""

from __future__ import annotations

import ast
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from fusecheck import cli
from fusecheck.commands import COMMANDS
from fusecheck.property_tests.suite import command_line
from fusecheck.property_tests.suite.repository import checkout

FUSECHECK = (sys.executable, "-m", "fusecheck")
HEAVY = ("torch", "numpy", "scipy", "matplotlib", "hypothesis", "pytest", "jinja2")
QUICK = (
    ["--help"],
    ["--version"],
    ["backends"],
    ["kernle"],
    ["kernel", "--bakend", "x"],
    ["verify", "--only", "kernle"],
    ["report", "--help"],
    ["replay", "--help"],
)


@pytest.mark.parametrize("words", QUICK, ids=" ".join)
def test_help_and_typos_take_less_than_a_second_of_the_processor(words: list[str]) -> None:
    told = "import sys, atexit; sys.argv[0] = 'fusecheck'\n"
    told += f"atexit.register(lambda: print('HEAVY', sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr))\n"
    told += "from fusecheck.__main__ import main; main()"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", told, *words], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode in (0, 2)
    assert done.stderr.endswith("HEAVY []\n")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_the_list_of_commands_names_each_under_which_its_module_adds_it() -> None:
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    assert {name: command.name for name, command in commands.items()} == {name: name for name in COMMANDS}


def test_without_a_command_the_help_is_shown_as_it_is_written() -> None:
    done = subprocess.run(FUSECHECK, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "\nCommands:\n" in done.stderr
    assert "Ask every question that this machine can answer." in done.stderr


@pytest.mark.parametrize("module", ["typer.models", "numpy.linalg", "torch._C", "torch.distributed"])
def test_ctrl_c_while_importing_is_one_line(module: str, tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "fusecheck", "kernel", "--cases", "1"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if line.rpartition("|")[2].strip() == module:
                child.send_signal(signal.SIGINT)
                break
        rest = [line for line in child.stderr.read().splitlines() if not line.startswith("import time:")]
    assert child.returncode == 3
    assert rest == ["fusecheck: interrupted"]


def test_a_full_disk_behind_stdout_is_one_line() -> None:
    for words in (["backends"], ["--help"]):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run([*FUSECHECK, *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("fusecheck: stdout cannot be written (No space left on device)")
        assert done.stderr.count("\n") == 1


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "pace", ("matplotlib_is_not_here", "?"))
    monkeypatch.setattr(cli, "_EXTRAS", {"matplotlib_is_not_here": "latency"})
    told = command_line.refused("pace", code=3)
    assert "matplotlib_is_not_here is not installed here" in told
    assert "pip install 'fusecheck[latency]'" in told


def test_json_that_is_nested_too_deeply_and_a_broken_program_are_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    deep, program = tmp_path / "deep.json", tmp_path / "broken.pt2"
    deep.write_text("[" * 100_000)
    program.write_bytes(b"PK\x03\x04 this is no program")
    for words, told in (
        (("replay", deep), "replay line is not JSON (maximum recursion"),
        (("report", deep), "cannot be read as JSON"),
        (("latency", "--from", deep), "nested too deeply"),
        (("golden", "check", deep), "is no golden record (RecursionError"),
        (("graph", "--graph", program), "is not a graph of torch.export.save"),
    ):
        assert command_line.run(*words) == 2, words
        printed = capfd.readouterr()
        assert told in printed.err
        assert (printed.err + printed.out).count("\n") == 1, printed


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--device", "cuda"), 3, "CUDA GPUs here, 2 needed"),
        (
            ("--shots", "6", "--tasks", "mmlu_anatomy", "--margin", "mmlu_anatomy=1"),
            2,
            "--shots 6: task mmlu_anatomy has 5 examples",
        ),
    ],
)
def test_no_model_is_started_without_the_gpus_and_the_examples_that_it_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: tuple[str, ...], code: int, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert told in command_line.refused("accuracy", *words, code=code)


def test_only_the_tests_import_what_only_the_tests_need() -> None:
    own = ("property_tests/", "verify/pytest_", "golden/h200x2/")
    wrong = {
        path.relative_to(checkout.ROOT).as_posix(): found
        for path in checkout.python_files()
        if not path.relative_to(checkout.ROOT).as_posix().startswith(own)
        and (found := top_imports(path) & {"pytest", "hypothesis", "matplotlib", "xdist"})
    }
    assert wrong == {}


def top_imports(path: Path) -> set[str]:
    """The packages that a module imports as soon as it is imported itself."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    return found

"""The command line: verdicts, exit codes, what is written, and one line for every wrong call."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from html import unescape
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from fusecheck import DATAFLOWS, Problem
from fusecheck.journal import FILE_NAME, read
from fusecheck.kernel.report import Group, KernelReport, Subject
from fusecheck.kernel.screen import show_kernel
from fusecheck.property_tests.suite.command_line import refused, run, told

ONE_KERNEL = ("--op", "RESIDUAL_RMS_NORM_QUANT_FP8", "--dtype", "bf16", "--strategy", "ONESHOT", "--tp", 2)
"""What leaves few cells to a core plan, beside --tokens, --hidden and --family."""


def test_a_conforming_kernel_passes_and_leaves_its_files(tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"
    arguments = ("--backend", "emulated:flashinfer-fp32", *ONE_KERNEL, "--hidden", 64, "--family", "exact,gaussian")
    assert run("kernel", *arguments, "--tokens", "1,5", "--json", copy, "--run-dir", tmp_path / "run") == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result == json.loads(copy.read_text())
    assert (result["schema"], result["command"], result["verdict"]) == (1, "kernel", "pass")
    assert result["findings"] == []
    summary = result["summary"]
    core = summary["core"]
    assert summary["cases"] == core["cases"] == core["done"] > 10
    assert core["reached"] == core["cells"] == sum(map(len, summary["coverage"].values()))
    assert summary["coverage"]["workspace"]["period 256 ONESHOT"] >= 1
    assert summary["subjects"][0]["starting_seconds"] > 0
    assert 1 <= summary["codes_per_element"] < 1.2
    journal = read(tmp_path / "run" / FILE_NAME)
    assert len(journal.ended) == core["cases"]
    assert journal.unfinished == []


def test_a_core_plan_that_was_not_finished_is_no_pass(tmp_path: Path) -> None:
    small = ("kernel", *ONE_KERNEL, "--tokens", "2", "--hidden", "64", "--seed", 9, "--family", "exact")
    code, said = told(*small, "--cases", 4, "--run-dir", tmp_path)
    assert code == 3
    assert re.search(r"inconclusive \(the core plan has \d+ cases, 4 were run", said)
    assert run(*small, "--resume", tmp_path) == 0
    record = json.loads((tmp_path / "result.json").read_text())["summary"]
    assert record["cases"] == record["core"]["cases"] - 4
    assert record["core"]["reached"] == record["core"]["cells"]


def test_a_core_plan_of_which_most_is_refused_is_no_pass_unless_that_is_accepted(tmp_path: Path) -> None:
    wide = ("kernel", *ONE_KERNEL, "--tokens", "2", "--hidden", "64,8200,8216,8232,8248", "--family", "exact")
    code, said = told(*wide, "--run-dir", tmp_path)
    assert code == 3
    assert "most of the core plan is refused, such as: hidden/8=" in said
    assert re.search(r"\d+ of \d+ cells of the core plan reached, \d+ refused \(hidden/8", said)
    assert run(*wide, "--run-dir", tmp_path / "accepted", "--accept-refusals") == 0


def test_a_kernel_judged_by_another_dataflow_fails_and_its_line_alone_fails_again(tmp_path: Path) -> None:
    arguments: tuple[object, ...] = ("--backend", "emulated:trtllm", "--dataflow", "trtllm-fp32", "--tp", 4)
    arguments += ("--tokens", 16, "--hidden", 512, "--family", "gaussian", "--dtype", "bf16", "--cases", 2)
    code, printed = told("kernel", *arguments, "--run-dir", tmp_path)
    assert code == 1
    assert "residual (computes like trtllm, " in printed
    assert "got 0x" in printed
    line = json.loads((tmp_path / "result.json").read_text())["findings"][0]["question"]
    asked = json.loads(line)
    assert (asked["backend"], asked["dataflow"], asked["device"]) == ("emulated:trtllm", "trtllm-fp32", "cpu")
    assert (asked["problem"]["tokens"], asked["problem"]["hidden"], asked["problem"]["world_size"]) == (16, 512, 4)
    # The same text on the console, in JUnit and on the page.
    assert f"replay='{line}'" in printed
    command = shlex.join(["fusecheck", "replay", line])
    assert all(command in unescape((tmp_path / name).read_text()) for name in ("junit.xml", "report.html"))
    assert run("replay", line, "--run-dir", tmp_path / "again") == 1
    assert run("replay", line, "--backend", "emulated:trtllm-fp32", "--run-dir", tmp_path / "own") == 0


def test_an_older_line_is_read_with_a_backend_and_refused_without(tmp_path: Path) -> None:
    line = Problem(world_size=2, tokens=5, hidden=72).to_json()
    assert run("replay", line, "--backend", "emulated", "--run-dir", tmp_path) == 0
    assert "the replay line lacks backend; give --backend" in refused("replay", line)


def test_a_model_gives_its_shape(tmp_path: Path) -> None:
    arguments = ("--model", "gpt-oss-20b", "--tokens", "3", "--cases", "3", "--run-dir", tmp_path)
    assert run("kernel", *arguments) == 3
    coverage = json.loads((tmp_path / "result.json").read_text())["summary"]["coverage"]
    assert {size: number > 0 for size, number in coverage["hidden"].items()} == {"2880": True}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kernel", "--backend", "nope"), "unknown backend 'nope'"),
        (("kernel", "--quantiser", "mxfp9"), "--quantiser 'mxfp9', expected some of: none, static-fp8, dynamic-fp8"),
        (
            ("kernel", "--quantiser", "mxfp8", "--hidden", "72"),
            "--hidden 72, expected a multiple of the groups of mxfp8",
        ),
        (("kernel", "--op", "RMS_NORM_QUANT_FP3"), "quantiser='fp3', expected one of: none, static-fp8"),
        (("kernel", "--backend", "torch-symm", "--quantiser", "mxfp8"), "expected some of: none, static-fp8"),
        (("kernel", "--backend", "no.such.module:kernel"), "importing 'no.such.module' raised"),
        (
            ("kernel", "--backend", "fusecheck.journal:read"),
            "cannot be made without arguments",
        ),
        (("kernel", "--model", "llama-9"), "unknown model 'llama-9'"),
        (("kernel", "--dataflow", "nope"), "unknown dataflow 'nope', expected one of: trtllm, "),
        (("kernel", "--hidden", "100"), "hidden=100, expected a multiple of 8"),
        (("kernel", "--tokens", "0"), "--tokens '0'"),
        (("kernel", "--tokens", "two"), "--tokens 'two', expected whole numbers"),
        (("kernel", "--tp", "3"), "world_size=3"),
        (("kernel", "--tp", "2", "--hidden", "8200"), "refuses every case at tp 2: hidden/8=1025 is odd"),
        (("kernel", "--eps", "-1"), "eps=-1.0"),
        (("kernel", "--eps", "nan"), "eps=nan"),
        (("kernel", "--cases", "0"), "--cases 0"),
        (("kernel", "--seconds", "-1"), "--seconds -1"),
        (("kernel", "--case-timeout", "0"), "--case-timeout 0"),
        (("kernel", "--case-timeout", "nan"), "--case-timeout nan"),
        (("replay", "{}", "--case-timeout", "0"), "--case-timeout 0"),
        (("graph", "--case-timeout", "nan"), "--case-timeout nan"),
        (("faults", "--case-timeout", "inf"), "--case-timeout inf"),
        (("kernel", "--device", "tpu"), "--device 'tpu', expected cpu or cuda"),
        (("kernel", "--family", "nope"), "--family 'nope'"),
        (("kernel", "--run-dir", "/proc/nothing"), "run directory /proc/nothing: cannot be written"),
        (("kernel", "--resume", "/nowhere"), "journal /nowhere/cases.jsonl: cannot be read"),
        (("replay", '{"op'), "replay line is not JSON"),
        (("replay", "{}"), "a Problem lacks op, strategy"),
        (("replay", '{"scale": [1, 2]}'), "a Problem lacks op, strategy"),
        (("replay", '{"backend": "emulated", "problem": {}}'), "the replay line lacks dataflow, device, checks"),
        (("kernel", "--most-elements", "-1"), "--most-elements -1, expected more than 0"),
        (("pace", "--batch", "0"), "'--batch'"),
        (("pace", "--seconds", "-1"), "'--seconds'"),
        (("pace", "--tokens", ""), "--tokens '', expected whole numbers"),
        (("graph", "--device", "gpu"), "--device 'gpu', expected cpu or cuda"),
        (("replay", "/nowhere"), "neither a JSON object nor a readable file"),
        (("nonsense",), "No such command 'nonsense'"),
        (("kernel", "--frobnicate"), "No such option: --frobnicate"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2_and_writes_nothing(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(*arguments)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("words", [("kernel", "--backend", "flashinfer"), ("graph", "--device", "cuda")], ids=" ".join)
def test_without_a_gpu_what_needs_one_is_inconclusive_in_one_line(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert "0 CUDA GPUs here, 2 needed" in refused(*words, code=3)
    assert os.listdir(tmp_path) == []


def test_backends_and_version_are_listed() -> None:
    code, listed = told("backends")
    assert code == 0
    assert all(name in listed for name in ("emulated", "unfused", "trtllm-fp32", "flashinfer-mnnvl-oneshot"))
    assert "mxfp8 RESIDUAL_RMS_NORM_QUANT_MXFP8, " in listed
    code, version = told("--version")
    assert (code, version.split()[0]) == (0, "fusecheck")


def completed(monkeypatch: pytest.MonkeyPatch, *words: str) -> list[str]:
    """What bash would offer for the last of these words."""
    monkeypatch.setenv("_FUSECHECK_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", " ".join(["fusecheck", *words]))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    return told()[1].split()


def test_a_shell_completes_commands_and_the_names_that_options_take(monkeypatch: pytest.MonkeyPatch) -> None:
    for words, offered in (
        (("g",), ["graph", "golden"]),
        (("kernel", "--virt"), ["--virtual-ranks"]),
        (("kernel", "--model", "llama-3.1"), ["llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b"]),
        (("kernel", "--backend", "emul"), ["emulated", *(f"emulated:{name}" for name in DATAFLOWS)]),
        (("replay", "--dataflow", "vllm"), ["vllm-native", "vllm-c", "vllm-fused-quant"]),
        (("kernel", "--family", "gaussian,ex"), ["gaussian,exact"]),
        (("kernel", "--strategy", "T"), ["TWOSHOT"]),
        (("kernel", "--model", "nothing-like-it"), []),
    ):
        assert sorted(completed(monkeypatch, *words)) == sorted(offered), words


def test_help_folds_to_the_terminal_and_cuts_nothing_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    done = subprocess.run(
        [sys.executable, "-m", "fusecheck", "kernel", "--help"], capture_output=True, text=True, check=True
    )
    lines = [line for line in done.stdout.splitlines() if not line.lstrip().startswith("fusecheck ")]
    assert 30 < max(map(len, lines)) <= 40
    assert "\x1b" not in done.stdout
    assert "package.module:attribute" in done.stdout.replace("\n", "").replace(" ", "")
    assert "…" not in done.stdout


@pytest.mark.parametrize(("columns", "shown"), [(40, "failed"), (60, "elements"), (100, "seconds")])
def test_the_table_of_a_run_has_the_columns_that_fit_and_whole_numbers(columns: int, shown: str) -> None:
    report = KernelReport()
    for name in ("emulated:trtllm", "emulated:unfused"):
        report.groups[Subject(name, 8)] = Group(Subject(name, 8), 16, 2, 123_456_789, 0, 1.5)
    out = StringIO()
    show_kernel(report, Console(file=out, width=columns))
    table = out.getvalue().splitlines()[:3]
    assert max(map(len, table)) <= columns
    assert shown in table[0]
    assert ("123,456,789" in table[1]) is (columns >= 60)
    assert "…" not in out.getvalue()


def test_no_escape_sequence_is_written_where_colour_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    report = KernelReport()
    report.groups[Subject("emulated", 2)] = Group(Subject("emulated", 2), 1, 0, 10, 1, 0.1)
    out = StringIO()
    show_kernel(report, Console(file=out, force_terminal=True, width=100))
    assert not re.search(r"\x1b\[(?:\d+;)*(?:3|9)\d", out.getvalue())  # no colour; bold may stay

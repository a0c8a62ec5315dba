"""What the pages say works as they say it: commands parse, links lead somewhere, the examples run."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import typer

from fusecheck import Dataflow, cli, manual
from fusecheck.property_tests.suite.command_line import run, told
from fusecheck.property_tests.suite.repository import pages
from fusecheck.property_tests.suite.repository.checkout import ROOT, tracked_files

NAMES = [path.relative_to(ROOT).as_posix() for path in pages.pages()]


@pytest.mark.parametrize("name", NAMES)
def test_every_command_line_of_a_page_is_one_that_the_program_takes(name: str) -> None:
    for words in pages.commands(pages.read(name)):
        pages.parse(words)


def test_the_readme_names_every_command() -> None:
    named = {words[0] for words in pages.commands(pages.read())}
    command = typer.main.get_command(cli.app)
    assert set(getattr(command, "commands", {})) - {"golden", "exhaust", "latency", "pace"} <= named


@pytest.mark.parametrize("words", [["kernel", "--backends", "x"], ["kernels"], ["verify", "--cases", "many"]])
def test_a_command_line_that_the_program_does_not_take_is_noticed(words: list[str]) -> None:
    with pytest.raises(AssertionError, match=r"(?i)fusecheck .*(no such|valid integer)"):
        pages.parse(words)


@pytest.mark.parametrize("name", NAMES)
def test_every_link_and_path_of_a_page_leads_somewhere(name: str) -> None:
    text, folder = pages.read(name), (ROOT / name).parent
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert target.startswith("https://") or (folder / target).exists(), f"{name}: {target}"
    tops = "verify|golden|property_tests|eval|ci"
    for path in re.findall(rf"`((?:{tops})/[\w./-]+)`", text):
        generated = path == "property_tests/corpus.jsonl"  # the file of failing cases, made by a failing run
        assert generated or (ROOT / path).exists() or (folder / path).exists(), f"{name}: {path}"


def test_the_readme_leads_to_every_folder_and_page() -> None:
    linked = set(re.findall(r"\]\(([^)#\s]+)", pages.read()))
    tops = {path.relative_to(ROOT).parts[0] for path in tracked_files() if len(path.relative_to(ROOT).parts) > 1}
    assert {f"{top}/" for top in tops if not top.startswith(".")} <= {link.split("/")[0] + "/" for link in linked}
    assert set(NAMES) - {"README.md"} <= linked


def test_the_page_on_declarations_names_every_field() -> None:
    rows = pages.table(pages.read("verify/backends/README.md"), "field")
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert named == {field.name for field in dataclasses.fields(Dataflow)} - {"name", "source"}


def test_no_figure_is_left_open() -> None:
    assert [name for name in NAMES if re.search(r"TODO|\?\?\?|FIXME", pages.read(name))] == []


def test_the_kernel_in_30_lines_is_short_and_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = pages.blocks(pages.read(), "python")[0]
    lines = [line for line in source.splitlines() if line.strip()]
    assert len(lines) <= 30
    (tmp_path / "mykernel.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    words = next(words for words in pages.commands(pages.read()) if "mykernel:MyKernel" in words)
    few = ("--tp", 2, "--tokens", "1,5", "--hidden", "64", "--family", "exact,special", "--dtype", "bf16")
    code, printed = told(*words, *few, "--strategy", "AUTO", "--run-dir", tmp_path / "run")
    assert code == 0
    assert re.search(r"pass: (\d+) of \1 cells of the core plan reached", printed)


def test_the_finding_that_is_taken_apart_is_what_the_command_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = pages.read()
    shown = next(block for block in pages.blocks(text, "text") if block.startswith("residual (computes like "))
    words = next(words for words in pages.commands(text) if "trtllm-fp32" in words)
    assert run(*words, "--run-dir", tmp_path) == 1
    printed = capsys.readouterr().out
    for part in re.sub(r",\.\.\.\}+'\n", "", shown).split("\n"):
        assert part.strip() in printed


def test_every_command_has_examples_that_the_program_takes() -> None:
    def texts(command: object, above: str) -> list[tuple[str, str]]:
        inner = getattr(command, "commands", {})
        own = [] if above in ("", "golden ") else [(above.strip(), str(getattr(command, "help", "")))]
        return own + [found for name, each in inner.items() for found in texts(each, f"{above}{name} ")]

    found = texts(typer.main.get_command(cli.app), "")
    assert {name.split()[0] for name, _ in found} >= {"kernel", "verify", "report", "graph", "accuracy", "faults"}
    assert set(manual.EXAMPLES) <= {name for name, _ in found}
    for name, text in found:
        lines = re.findall(r"^ +(fusecheck .*)$", text, flags=re.MULTILINE)
        assert lines, f"fusecheck {name} --help has no example"
        for words in pages.commands("```\n" + "\n".join(lines) + "\n```"):
            pages.parse(words)

"""The museum of `fusecheck protocol`: every fault shows and reads well, every repaired form is right; the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from fusecheck.errors import UsageError
from fusecheck.protocol import check, command
from fusecheck.protocol.arrangements import Alternating
from fusecheck.protocol.check import check_exhibit, explore, smallest
from fusecheck.protocol.explorer import MEMORIES, Explorer
from fusecheck.protocol.kernels.moe_finalize import MoeFinalize
from fusecheck.protocol.kernels.oneshot import OneShot
from fusecheck.protocol.kernels.twoshot import TwoShot
from fusecheck.protocol.language import Array, Block, Launch, Size, store
from fusecheck.protocol.museum import FULL, KERNELS, MUSEUM, Exhibit
from fusecheck.protocol.schedule import reaches, schedule

EXAMPLE = "fusecheck.property_tests.suite.example_protocol"
HERE = "fusecheck.property_tests.suite.test_protocol_museum"
MOST_STEPS = 30
KNOWN: dict[tuple[str, str, str], dict[str, Any]] = {}
"""Records of repaired forms: faults share them."""

app = typer.Typer()
command.register(app)


@pytest.mark.parametrize("exhibit", MUSEUM, ids=lambda exhibit: exhibit.name)
def test_a_published_fault_shows_and_its_repaired_form_is_right(exhibit: Exhibit) -> None:
    sizes = [replace(size, calls=min(size.calls, 5 - size.ranks)) for size in exhibit.sizes]
    row = check_exhibit(exhibit, sizes, MEMORIES, KNOWN)
    assert row["killed"]
    assert [x["verdict"] for x in row["repaired"]] == ["pass"] * len(sizes) * len(MEMORIES)
    assert 0 < len(row["faulty"]["steps"]) <= MOST_STEPS
    assert row["faulty"]["outcome"]


@pytest.mark.parametrize("exhibit", MUSEUM, ids=lambda exhibit: exhibit.name)
def test_the_steps_shown_lead_to_the_failure(exhibit: Exhibit) -> None:
    for memory in MEMORIES:
        found = Explorer(exhibit.faulty.launches(exhibit.size), memory).explore()
        if found.failure is not None:
            assert reaches(found.memory, schedule(found).moves, found.failure)


def test_the_museum_has_the_breadth_that_it_claims() -> None:
    assert len(MUSEUM) >= 18
    assert len({exhibit.name for exhibit in MUSEUM}) == len(MUSEUM)
    assert all(exhibit.link.startswith("https://github.com/") for exhibit in MUSEUM)


def test_faults_of_order_alone_need_the_relaxed_memory() -> None:
    subtle = {x.name for x in MUSEUM if Explorer(x.faulty.launches(x.size), "sc").explore().failure is None}
    assert subtle == {"trigger-no-flush", "relaxed-flag", "flag-not-acquired", "flag-not-released", "device-scope"}


WRONG_TODAY = {
    "two-shot-trtllm": "block 1 call 2 reads",
    "hand-over-trtllm": "reads the old operand in residual[0, 0, 0]",
    "moe-finalize": "waits for ever to take the rows",
}


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_of_today_are_right_but_for_three(name: str) -> None:
    for memory in MEMORIES:
        found = smallest(KERNELS[name][1], Size(2, 2, 4), memory).to_record()
        assert len(found.get("steps", [])) <= MOST_STEPS
        if name in WRONG_TODAY:
            assert WRONG_TODAY[name] in "; ".join(found["outcome"])
        else:
            assert found["verdict"] == "pass"


def test_moe_finalize_hangs_because_a_fast_sender_clears_what_a_slow_rank_polls() -> None:
    found = smallest(KERNELS["moe-finalize"][1], Size(2, 1, 3), "sc").to_record()
    assert (found["kind"], found["size"]) == ("hang", "N=2 B=1 K=2")
    fast = found["steps"][-1]
    assert (fast["rank"], fast["call"]) == (0, 1)
    assert "clear" in fast["does"]


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("size", FULL, ids=str)
def test_moe_finalize_hangs_before_a_call_that_clears_and_is_right_before_one_with_a_barrier(
    size: Size, memory: str
) -> None:
    finalize, mended = MoeFinalize(), MoeFinalize(polls_senders=False)
    least = replace(size, blocks=1, calls=2, rows=(1, 1))
    assert explore(Alternating(finalize, OneShot()), least, memory).to_record()["kind"] == "hang"
    for model in (Alternating(finalize, TwoShot()), Alternating(mended, OneShot())):
        assert explore(model, size, memory).verdict == "pass"


class Raising:
    def launches(self, size: Size) -> list[Launch]:
        raise KeyError("x")


class Nothing:
    def launches(self, size: Size) -> None:
        del size


class Silent:
    def launches(self, size: Size) -> list[Launch]:
        return size.each(self.kernel, "mine")

    def kernel(self, block: Block) -> Any:
        del block


class Divides(Silent):
    def kernel(self, block: Block) -> Any:
        yield store(Array("x")[0], 1 // (block.ranks - block.ranks))


class Textual(Silent):
    def kernel(self, block: Block) -> Any:
        del block
        yield store("x", 1)  # type: ignore[arg-type]


def ask(*arguments: str, folder: Path) -> tuple[int, dict[str, object]]:
    run = CliRunner().invoke(app, [*arguments, "--run-dir", str(folder)])
    if isinstance(run.exception, UsageError):
        raise run.exception
    return run.exit_code, json.loads((folder / "result.json").read_text(encoding="utf-8"))


def test_a_right_protocol_of_ones_own_passes_and_a_careless_one_fails(tmp_path: Path) -> None:
    code, record = ask("--model", f"{EXAMPLE}:Pushed", "--calls", "4", folder=tmp_path)
    assert (code, record["verdict"]) == (0, "pass")
    code, record = ask("--model", f"{EXAMPLE}:Careless", "--calls", "4", folder=tmp_path)
    assert (code, record["verdict"]) == (1, "fail")
    assert "reads rank 1's rows of call 1" in str(record["findings"])


def test_ctrl_c_ends_the_museum_with_a_record_of_what_is_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def until_the_second(exhibit: Exhibit, *given: Any) -> dict[str, Any]:
        if exhibit is MUSEUM[1]:
            raise KeyboardInterrupt
        return check_exhibit(exhibit, *given)

    monkeypatch.setattr(check, "check_exhibit", until_the_second)
    code, record = ask("--ranks", "2", "--blocks", "1", "--calls", "1", folder=tmp_path)
    summary: Any = record["summary"]
    assert (code, record["verdict"], summary["interrupted"], len(summary["exhibits"])) == (3, "inconclusive", True, 1)


def test_an_exploration_that_is_cut_off_is_inconclusive(tmp_path: Path) -> None:
    code, record = ask("two-shot", "--states", "20", folder=tmp_path)
    assert (code, record["verdict"]) == (3, "inconclusive")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no-such"], "--list"),
        (["two-shot", "--memory", "tso"], "sc, relaxed"),
        (["two-shot", "--ranks", "0"], "1 to 8"),
        (["--model", "json:nothing"], "package.module:attribute"),
        (["--model", f"{HERE}:Raising"], r"KeyError: 'x'; mend the protocol \(test_protocol_museum.py:\d+\)"),
        (["--model", f"{HERE}:Divides"], r"mine raised ZeroDivisionError: .*\(test_protocol_museum.py:\d+\)"),
        (["--model", f"{HERE}:Silent"], "mine: its body returns None, expected a generator"),
        (["--model", f"{HERE}:Nothing"], "gives None, expected a list of Launch"),
        (["--model", f"{HERE}:Textual"], "acts on 'x', expected a cell"),
        (["--model", "json:JSONDecoder"], "launches"),
        (["two-shot", "--model", f"{EXAMPLE}:Pushed"], "one of them"),
    ],
)
def test_wrong_usage_is_told_in_a_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        ask(*arguments, folder=tmp_path)

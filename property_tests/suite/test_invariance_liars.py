"""A declared order or depth that a probe refutes is a finding; who keeps its word is accused of nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fusecheck import backends
from fusecheck.declaration import Order
from fusecheck.errors import UsageError
from fusecheck.invariance import sweep
from fusecheck.invariance.binaries import hashed
from fusecheck.invariance.calls import Call
from fusecheck.invariance.certificate import findings, probed, sentence
from fusecheck.invariance.launch import launch
from fusecheck.invariance.orders import Mask
from fusecheck.invariance.probes import ORDER, TREE, Probes
from fusecheck.invariance.subject import Kernels
from fusecheck.invariance.sweep import line, shown
from fusecheck.operations import Operation
from fusecheck.problem import Problem
from fusecheck.property_tests.suite.command_line import told
from fusecheck.property_tests.suite.company import MULTIPROCESSORS, Choice, Company, Way, Where, flashinfer_like
from fusecheck.property_tests.suite.in_process import InProcess

MOST = 13
FUSED = Operation.named("RESIDUAL_RMS_NORM_OUT_QUANT_FP8")
ONE_BLOCK, FOUR_BLOCKS = "128 threads x 8, warps, 1 block, 14 deep", "32 threads x 8, warps, 4 blocks, 15 deep"
TWO_BLOCKS = "64 threads x 8, warps, 2 blocks, 14 deep"


@dataclass(frozen=True)
class Declared:
    """A kernel and what it says of itself; `words` are those of what is read, `claim` what is refuted."""

    choose: Choice
    words: str
    claim: str = ""
    size: int = 0
    order: Order = "any"
    depth: int | None = None
    world_size: int = 1
    op: Operation = FUSED
    changes: tuple[int, ...] = ()


SUM: dict[str, Any] = {"world_size": 4, "op": Operation.named("ALL_REDUCE"), "order": "rank"}
KERNELS = {
    "liar: ring": Declared(lambda _: Way(first=1), "in a ring from rank 1 on, in float32", ORDER, 1, **SUM),
    "liar: ring by block": Declared(
        lambda w: Way(first=w.place // 4 % w.ranks),
        "from row 0 to 3 in rank order; from row 4 to 7 in a ring from rank 1 on; from row 8 to 11 in a ring from rank "
        "2 on; from row 12 to 12 in a ring from rank 3 on, in float32 in 13 rows on 4 ranks by ONESHOT, "
        "13 rows on 4 ranks by TWOSHOT; in 1 rows on 4 ranks by ONESHOT, 1 rows on 4 ranks by TWOSHOT otherwise",
        ORDER, 13, **SUM,
    ),
    "liar: own rank first": Declared(
        lambda w: Way(first=w.rank),
        "on rank 0 in rank order; on rank 1 in a ring from rank 1 on; on rank 2 in a ring from rank 2 on; on rank 3 in "
        "a ring from rank 3 on, in float32",
        ORDER, 1, **SUM,
    ),
    "liar: four blocks": Declared(lambda _: Way(blocks=4), FOUR_BLOCKS, TREE, 1, depth=14),
    "liar: one block": Declared(lambda _: Way(blocks=1), ONE_BLOCK, TREE, 1, depth=10),
    "liar: small batches": Declared(
        flashinfer_like, f"{FOUR_BLOCKS}; from 6 rows on {TWO_BLOCKS}; from 11 rows on {ONE_BLOCK}", TREE, 1, depth=14,
        changes=(6, 11),
    ),
    "liar: ring from five rows on": Declared(
        lambda w: Way(first=int(w.tokens >= 5)),
        "in a ring from rank 1 on, in float32 in 13 rows on 4 ranks by ONESHOT, 13 rows on 4 ranks by TWOSHOT, 5 rows "
        "on 4 ranks by ONESHOT, 5 rows on 4 ranks by TWOSHOT; in 1 rows on 4 ranks by ONESHOT, 1 rows on 4 ranks by "
        "TWOSHOT otherwise",
        ORDER, 5, changes=(5,), **SUM,
    ),
    "liar: deeper later": Declared(
        lambda w: Way(blocks=4 if w.tokens >= 6 else 1), f"{ONE_BLOCK}; from 6 rows on {FOUR_BLOCKS}", TREE, 1,
        depth=13, changes=(6,),
    ),
    "right: two trees in turn": Declared(
        lambda w: Way(blocks=4 if w.tokens % 2 else 1),
        "; ".join(
            f"from {n} rows on {FOUR_BLOCKS if n % 2 else ONE_BLOCK}" if n > 1 else FOUR_BLOCKS
            for n in range(1, MOST + 1)
        ),
        changes=tuple(range(2, MOST + 1)),
    ),
    "right: in rank order": Declared(lambda _: Way(), "in rank order, in float32", **SUM),
    "right: ring, undeclared": Declared(
        lambda _: Way(first=3), "in a ring from rank 3 on, in float32", **{**SUM, "order": "any"}
    ),
    "right: four blocks": Declared(lambda _: Way(blocks=4), FOUR_BLOCKS, depth=15),
    "right: launch, unseen by rows": Declared(
        flashinfer_like, f"{FOUR_BLOCKS}; from 6 rows on {TWO_BLOCKS}; from 11 rows on {ONE_BLOCK}", depth=None
    ),
}  # fmt: skip


def kernel(name: str) -> Company:
    declared = KERNELS[name]
    made = Company(name, declared.choose)
    made.flow = replace(made.flow, order=declared.order, depth=declared.depth)
    return made


@pytest.fixture(autouse=True)
def _kernels_by_name(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    known = backends.backend
    monkeypatch.setattr(backends, "backend", lambda name: kernel(name) if name in KERNELS else known(name))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def asked(kernels: Kernels, changes: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    world = kernels.problem.world_size
    return probed(kernels, Probes(kernels, (world,), ("ONESHOT", "TWOSHOT"), changes).records())


@pytest.mark.parametrize("name", KERNELS)
def test_what_is_read_is_what_was_planted_and_liars_alone_are_found(name: str) -> None:
    declared = KERNELS[name]
    problem = Problem(op=declared.op, hidden=1024, tokens=MOST, world_size=declared.world_size)
    with InProcess(name, problem) as kernels:
        records = {record["claim"]: record for record in asked(kernels, declared.changes)}
        read = records[ORDER if declared.world_size > 1 else TREE]
        assert read["words"] == declared.words
        found = list(findings(kernels, list(records.values()), require=False))
        assert [finding["stage"] for finding in found] == ([declared.claim] if declared.claim else [])
        assert all(record.get("size", declared.size) == declared.size for record in records.values())
        assert sum(record["calls"] for record in records.values()) < 900


@pytest.mark.parametrize(
    ("problem", "why"),
    [
        (Problem(op=FUSED, dtype="fp16"), "do not reach the end of float32; give --dtype bf16"),
        (Problem(op=FUSED, hidden=8), "hidden=8 is below 64"),
        (Problem(op=Operation.named("ALL_REDUCE")), "the operation has no norm"),
    ],
)
def test_a_tree_that_cannot_be_asked_about_is_untold_with_the_reason(problem: Problem, why: str) -> None:
    with InProcess("right: four blocks", replace(problem, world_size=1)) as kernels:
        order, tree = asked(kernels)
        assert (order["verdict"], tree["verdict"]) == ("untold", "untold")
        assert why in tree["untold"]
        assert sentence(tree) == f"{TREE}: not told, {tree['untold']}"


class Liar(Company):
    """For the command line: it declares fewer additions than there are."""

    def __init__(self) -> None:
        super().__init__("liar", flashinfer_like)
        self.flow = replace(self.flow, depth=11)
        self.binaries = (str(Path(__file__)),)


def test_a_refuted_depth_has_a_replay_line_and_stands_in_the_certificate(tmp_path: Path) -> None:
    name = "fusecheck.property_tests.suite.test_invariance_liars:Liar"

    question = (
        "--tokens",
        "7",
        "--hidden",
        "128",
        "--rows",
        "4",
        "--tp",
        "1",
        "--multiprocessors",
        str(MULTIPROCESSORS),
    )
    code, out = told("invariance", "--backend", name, *question, "--run-dir", str(tmp_path / "liar"))
    assert code == 1, out
    assert (
        "not as declared in a batch of 1 rows, norm first: 12 additions above an element; the kernel declares a depth"
        in out
    )
    made = json.loads((tmp_path / "liar" / "certificate.json").read_text(encoding="utf-8"))
    assert made["binaries"] == hashed([__file__])
    assert [record["claim"] for record in made["claims"]][-2:] == [ORDER, TREE]
    [finding] = json.loads((tmp_path / "liar" / "result.json").read_text(encoding="utf-8"))["findings"]
    code, out = told("replay", finding["question"], "--run-dir", str(tmp_path / "again"))
    assert code == 1, out
    assert "12 additions above an element, 11 are declared" in out
    code, out = told("replay", finding["question"], "--backend", "unfused", "--run-dir", str(tmp_path / "other"))
    assert code == 0, out
    changed = dict(made, claims=[{**record, "words": "other"} for record in made["claims"]])
    (tmp_path / "changed.json").write_text(json.dumps(changed), encoding="utf-8")
    code, out = told("invariance", "--compare", str(tmp_path / "liar"), str(tmp_path / "changed.json"))
    assert code == 0
    assert f"{TREE}: breaks from 1 4 threads x 8, warps, 4 blocks, 12 deep" in out


def test_a_probe_of_a_replay_line_that_is_cut_short_is_refused() -> None:
    mask = Mask(4, 8, (0, 2), "float32", "ONESHOT", (3,))
    whole = {"world_size": 4, "tokens": 8, "pair": [0, 2], "level": "float32", "strategy": "ONESHOT", "rows": [3]}
    assert Mask.from_record(whole) == mask
    for broken in ({}, {**whole, "pair": [2, 2]}, {**whole, "rows": [8]}, {**whole, "level": "other"}, "x"):
        with pytest.raises(UsageError, match="expected that of a finding"):
            Mask.from_record(broken)


def test_binaries_are_named_by_file_folder_or_what_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    for name in ("a.cubin", "b.so"):
        (tmp_path / "cache" / name).write_bytes(name.encode())
    maps = tmp_path / "maps"
    maps.write_text(
        f"7f00-7f01 r-xp 00000000 08:01 12 {tmp_path}/cache/b.so\n7f02-7f03 rw-p 0 0:0 0\n", encoding="utf-8"
    )
    assert [each["file"] for each in hashed([str(tmp_path / "cache")], maps)] == ["a.cubin", "b.so"]
    assert [each["file"] for each in hashed(["/cache/"], maps)] == ["b.so"]
    assert hashed([], maps) == hashed(["nowhere"], maps) == []


@pytest.mark.parametrize("collective", ["MOE_REDUCTION", "MOE_FINALIZE"])
def test_sums_of_experts_are_asked_about_too(collective: str) -> None:
    problem = Problem(op=Operation.named(f"{collective}_RESIDUAL_RMS_NORM"), hidden=128, tokens=6, world_size=4)
    with InProcess("right: in rank order", problem) as kernels:
        order, tree = asked(kernels)
        assert order["words"] == "in rank order, in float32"
        assert tree["words"] == "4 threads x 8, warps, 4 blocks, 12 deep"
        alone, among = (kernels.ask(call) for call in (Call(1, (7,)), Call(6, (5, 7, 4), place=2, company="nan")))
        assert alone["norm"][0, 7] == among["norm"][0, 7]
        assert alone["norm"][0, 7] != among["norm"][0, 5]


class Launched(Company):
    """For the sweep: the launch rule at hidden 2048, with one batch size at which it is another."""

    def __init__(self, odd: int = 0) -> None:
        def choose(where: Where) -> Way:
            rows = 99 if where.tokens == odd else where.tokens
            return Way(launch(2048, rows, MULTIPROCESSORS).blocks)

        super().__init__("launched", choose)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--backend", "nobody"), 2, "unknown backend 'nobody'"),
        (("--backend", "emulated"), 2, "give --multiprocessors"),
        (("--backend", "emulated", "--virtual-ranks"), 2, "virtual ranks share a GPU"),
        (("--backend", "flashinfer"), 3, "0 CUDA GPUs here"),
        (("--backend", "emulated", "--out", "/nowhere/sweep.json"), 2, "there is no folder /nowhere"),
    ],
)
def test_a_sweep_that_cannot_be_made_is_said_in_one_line(
    options: tuple[str, ...], code: int, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert sweep.main(["--out", str(tmp_path / "sweep.json"), *options]) == code
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("odd", [0, 7])
def test_a_sweep_sets_what_is_predicted_beside_what_is_measured(monkeypatch: pytest.MonkeyPatch, odd: int) -> None:
    monkeypatch.setattr(backends, "backend", lambda _: Launched(odd))
    problem = Problem(op=Operation.named("RESIDUAL_RMS_NORM"), hidden=2048, tokens=14, world_size=1)
    with InProcess("launched", problem) as kernels:
        found = line(kernels, MULTIPROCESSORS)
    both = {1: "128 threads x 8, warps, 2 blocks", 11: "256 threads x 8, warps, 1 block"}
    assert found["predicted"] == found["measured"] == both
    assert (found["misses"], found["extras"], found["unread"]) == ({}, {}, {})
    assert found["other_sizes"] == ([odd] if odd else [])
    assert found["calls"] < 600  # a tree is looked for once at a batch size, and not below where another begins
    assert ("agree" if not odd else "DIFFER") in shown(found)

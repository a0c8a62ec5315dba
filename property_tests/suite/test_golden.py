"""Recorded outputs of real kernels: explained by the recorded dataflow and by no other, and every change noticed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fusecheck.case.run import WORKER
from fusecheck.errors import UsageError
from fusecheck.golden import check, record
from fusecheck.golden.command import committed
from fusecheck.interface import FusionOp
from fusecheck.ranks import Pool


def _named(name: str) -> record.Golden:
    return record.read(next(path for path in committed() if path.stem == name))


def _one(golden: record.Golden, op: FusionOp) -> record.Golden:
    """The recording with only its first finite Problem of this op that has whole tensors."""
    entry = next(e for e in golden.entries if e.outputs and e.problem.op is op and e.problem.family == "gaussian")
    return replace(golden, entries=(entry,))


@pytest.mark.parametrize("path", committed(), ids=lambda path: path.stem)
def test_recorded_kernels_follow_their_recorded_dataflow_on_this_machine(path: Path) -> None:
    golden = record.read(path)
    found = check.check_anywhere(golden)
    assert found.wrong == []
    assert found.entries == len(golden.entries) >= 100
    assert found.elements > 100_000
    assert found.undecided < 0.1 * found.outputs


def test_four_ranks_are_rejected_under_the_other_accumulation() -> None:
    golden = _named("flashinfer-virtual4")
    some = replace(golden, entries=golden.entries[:40])
    assert check.check_anywhere(some).wrong == []
    assert len(check.check_anywhere(check.wrong_dataflow(some, "flashinfer-fp32")).wrong) > 10


@pytest.mark.parametrize("name", ["residual", "norm", "quant"])
def test_one_changed_bit_of_a_recorded_tensor_is_noticed(name: str) -> None:
    golden = _one(_named("flashinfer-tp2"), FusionOp.RESIDUAL_RMS_NORM_OUT_QUANT_FP8)
    assert check.check_anywhere(golden).wrong == []
    outputs = {key: tensor.clone() for key, tensor in golden.entries[0].outputs.items()}
    outputs[name][0, 3] ^= 2
    changed = replace(golden, entries=(replace(golden.entries[0], outputs=outputs),))
    wrong = check.check_anywhere(changed).wrong
    assert any(line.startswith(name) for line in wrong)


def test_a_recording_survives_its_files_and_is_reproduced_bit_for_bit(tmp_path: Path) -> None:
    backend = "emulated:flashinfer"
    given = list(record.problems(backend, 2, 5, virtual=False))
    with Pool(WORKER, 2) as pool:
        made = record.record(pool, backend, given, virtual=False)
        record.write(made, tmp_path / "made.json")
        read = record.read(tmp_path / "made.json")
        assert [e.problem for e in read.entries] == given
        for ours, theirs in zip(made.entries, read.entries, strict=True):
            assert ours.digests == theirs.digests
            assert all(torch.equal(ours.outputs[name], theirs.outputs[name]) for name in ours.outputs)
        assert check.check_same(read, pool).wrong == []
        first = read.entries[0]
        stale = replace(first, digests={**first.digests, "residual": first.digests["residual"] ^ 1})
        wrong = check.check_same(replace(read, entries=(stale,)), pool).wrong
        assert len(wrong) == 1
        assert wrong[0].startswith("residual differ")


def test_a_file_that_is_no_recording_is_refused_in_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"schema": 1')
    with pytest.raises(UsageError, match="no golden record") as refusal:
        record.read(broken)
    assert "\n" not in str(refusal.value)

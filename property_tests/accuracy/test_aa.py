"""A-A pairs from a run's own noise: the gate keeps its levels, and one that would not is called so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusecheck.errors import UsageError
from fusecheck.eval.aa import ErrorRate, aa_rates
from fusecheck.eval.gate import GateSettings, Verdict
from fusecheck.property_tests.accuracy.console import call
from fusecheck.property_tests.accuracy.made_runs import choice_rows, write_run

PAIRS = 200


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,400 questions: 2.5 % flip when the unfused arm is repeated, and the oracle is as far from one as the other."""
    folder = tmp_path_factory.mktemp("run")
    for arm, right, shift, seed in (
        ("unfused", lambda i: i % 3 != 0, 0.02, 0),
        ("unfused-again", lambda i: (i % 3 != 0) != (i % 40 == 7), 0.02, 1),
        ("oracle", lambda i: i % 3 != 0, 0.0, 0),
    ):
        rows = choice_rows(2400, right, shift=0.0)
        rng = np.random.default_rng(seed)
        for row in rows:
            for pair in row["filtered_resps"]:
                pair[0] = str(float(pair[0]) + shift * rng.normal())
        write_run(folder / arm, {"mmlu_a": rows, "mmlu_b": choice_rows(8, lambda _: True, subject="b")})
    return folder


def test_the_gate_keeps_its_levels_on_pairs_of_the_same_kernel(run: Path) -> None:
    rates = aa_rates(run, GateSettings(), pairs=PAIRS, seed=0)
    assert [rate.what.partition(":")[2].split(",")[0].split(" at ")[0] for rate in rates] == [
        " FAIL",
        " PASS",
        " FAIL",
    ]
    assert rates[0].noise == "60 of 2,408"
    assert all(rate.kept and rate.pairs == PAIRS for rate in rates)
    # 5 %: a count of 0 would mean that nothing was tried.
    assert 0 < rates[1].wrong < 25
    assert rates[2].wrong == 0


def test_a_gate_that_is_too_easy_is_called_so(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def easy(lost: Any, gained: Any, n: int, **_: Any) -> Any:
        return np.where(lost - gained < 0.01 * n, Verdict.PASS.value, Verdict.FAIL.value)

    monkeypatch.setattr("fusecheck.eval.aa.decide", easy)
    rates = aa_rates(run, GateSettings(), pairs=PAIRS, seed=0)
    assert [rate.kept for rate in rates] == [True, False, True]


def test_a_count_is_above_its_level_where_chance_does_not_explain_it() -> None:
    assert ErrorRate("x", "", 17, 200, 0.05).kept
    assert not ErrorRate("x", "", 19, 200, 0.05).kept
    assert ErrorRate("x", "", 0, 200, 1e-4).kept
    assert not ErrorRate("x", "", 2, 200, 1e-4).kept


def test_the_table_names_errors_levels_and_pairs(run: Path, tmp_path: Path) -> None:
    result = call(["--operating-characteristics", "--noise", run, "--simulations", "200"])
    assert result.exit_code == 0
    assert "A-A pairs from this run's own noise" in result.output
    assert result.output.count("kept") == 3
    for arguments, folder, said in (
        ([], run, "--noise: goes with --operating-characteristics"),
        (["--operating-characteristics"], tmp_path, "has no arm unfused; give the --run-dir of a run"),
    ):
        refused = call([*arguments, "--noise", folder])
        assert isinstance(refused.exception, UsageError)
        assert said in str(refused.exception)

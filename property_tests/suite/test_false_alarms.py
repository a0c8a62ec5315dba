"""Right kernels of all that is known, judged: nothing is found, something could be, and the record holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusecheck import DATAFLOWS, RankOutputs
from fusecheck.inputs.families import FAMILIES
from fusecheck.property_tests.suite import false_alarms
from fusecheck.property_tests.suite.false_alarms import execute, known, rooms
from fusecheck.property_tests.suite.family import emulated
from fusecheck.quantflow import QUANT_FLOWS

RECORD = json.loads((Path(__file__).parents[2] / "golden" / "false_alarms.json").read_text(encoding="utf-8"))
UNIQUE = 1.0


def test_a_turn_judges_every_format_and_arithmetic_and_finds_nothing() -> None:
    run = next(execute(1, 2**10, 60))
    assert (
        run.calls
        == len(list(known()))
        == 1 + sum(len(flows) for flows in QUANT_FLOWS.values()) - len(QUANT_FLOWS["static-fp8"])
    )
    assert set(run.by_format) == set(QUANT_FLOWS)
    assert run.outputs == sum(run.by_format.values()) > 30 * 2 * 2**10
    assert run.findings == []


def test_a_kernel_that_is_wrong_in_one_scale_is_an_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **words: Any) -> RankOutputs:
        outputs = emulated(*arguments, **words)
        if outputs.scale is not None:
            first = (0,) * outputs.scale.dim()
            old = outputs.scale[first]
            outputs.scale[first] = old * 8 if old.is_floating_point() else old ^ 8
        return outputs

    monkeypatch.setattr(false_alarms, "emulated", wrong)
    run = next(execute(1, 2**10, 60))
    found = {line.split()[0] for line in run.findings}
    assert "scale" in found
    assert len(run.findings) >= len(list(known())) - len(QUANT_FLOWS["static-fp8"])


def test_the_record_judges_a_billion_outputs_of_everything_that_is_known_without_an_alarm() -> None:
    summary = RECORD["summary"]
    assert (RECORD["verdict"], summary["false_alarms"], RECORD["findings"]) == ("pass", 0, [])
    assert summary["outputs"] == sum(summary["outputs_by_format"].values()) >= 1e9
    assert summary["dataflows"] == len(DATAFLOWS)
    assert summary["arithmetics"] == len(list(known()))
    assert summary["families"] == len(FAMILIES)


def test_as_many_scales_and_codes_are_admissible_as_the_record_and_the_theory_say() -> None:
    recorded = RECORD["summary"]["admissible"]
    found = {name: room.to_record() for name, room in rooms(128).items()}
    assert set(found) == set(recorded)
    for name, means in recorded.items():
        for key in ("scales_per_group", "codes_per_element"):
            assert found[name][key] == pytest.approx(means[key], rel=0.06), name
        rules = flow_of(name)
        exact = rules.scale_rule not in ("approx", "rcp", "log2")
        assert not exact or means["scales_per_group"] == UNIQUE, name
        power = rules.pow2 != "no" or rules.given == "scale"  # what is divided by, or a number that makes no ties
        point = rules.code_rule in ("divide", "reciprocal") or (rules.exact_pow2 and power)
        assert not point or means["codes_per_element"] == UNIQUE, name
        assert means["codes_per_element"] < 1.0062 or "g=512" in name, name
        assert means["codes_per_element"] < 1.016, name  # every tie of E2M1's, one element in 64


def flow_of(name: str) -> Any:
    quantiser, rules, *_ = name.split()
    return QUANT_FLOWS[quantiser][rules]

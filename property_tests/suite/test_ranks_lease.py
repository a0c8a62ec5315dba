"""Device leases: exclusive, patient, and given back by the dead."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fusecheck.errors import Inconclusive, UsageError
from fusecheck.property_tests.suite.repository.checkout import ROOT
from fusecheck.ranks.lease import choose_visible, lease_devices, models, visible_devices

NAMES = ["GPU-a", "GPU-b", "GPU-c", "GPU-d"]


def test_leases_do_not_overlap_and_come_back(tmp_path: Path) -> None:
    with lease_devices(2, NAMES, directory=tmp_path) as first, lease_devices(2, NAMES, directory=tmp_path) as second:
        assert first.devices == (0, 1)
        assert second.devices == (2, 3)
        assert second.names == ("GPU-c", "GPU-d")
    with lease_devices(4, NAMES, directory=tmp_path) as every:
        assert every.devices == (0, 1, 2, 3)


def test_the_same_device_is_exclusive_however_it_is_numbered(tmp_path: Path) -> None:
    with lease_devices(1, ["GPU-a"], directory=tmp_path):
        with lease_devices(1, ["GPU-b", "GPU-a"], directory=tmp_path) as other:
            assert other.names == ("GPU-b",)
        with lease_devices(1, ["GPU-a", "GPU-b"], directory=tmp_path) as other:
            assert other.devices == (1,)


def test_a_lease_waits_says_so_and_gets_what_comes_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusecheck.ranks.lease._NOTICE_SECONDS", 0.1)
    said: list[str] = []
    first = lease_devices(3, NAMES, directory=tmp_path)
    timer = threading.Timer(0.6, first.release)
    timer.start()
    with lease_devices(2, NAMES, directory=tmp_path, say=said.append) as second:
        assert len(second.devices) == 2
    timer.join()
    assert len(said) == 2
    assert "waiting for 2 of 4 devices" in said[0]
    assert "got 2 devices" in said[1]


def test_a_lease_that_waits_in_vain_is_inconclusive_and_holds_nothing(tmp_path: Path) -> None:
    with lease_devices(3, NAMES, directory=tmp_path):
        with pytest.raises(Inconclusive, match="no 2 of 4 devices came free"):
            lease_devices(2, NAMES, directory=tmp_path, timeout=0.3)
        with lease_devices(1, NAMES, directory=tmp_path) as rest:
            assert rest.devices == (3,)


HOLDER = """
import sys, time
from pathlib import Path
from fusecheck.ranks.lease import lease_devices
lease = lease_devices(2, ["GPU-a", "GPU-b"], directory=Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_the_lease_of_a_killed_process_is_free_again(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(Inconclusive):
        lease_devices(1, ["GPU-a", "GPU-b"], directory=tmp_path, timeout=0.3)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with lease_devices(2, ["GPU-a", "GPU-b"], directory=tmp_path, timeout=5) as lease:
        assert lease.devices == (0, 1)


@pytest.mark.parametrize("count", [0, 5])
def test_more_devices_than_there_are_is_wrong_usage(tmp_path: Path, count: int) -> None:
    with pytest.raises(UsageError, match=f"{count} devices asked for: expected 1 to 4"):
        lease_devices(count, NAMES, directory=tmp_path)


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        (None, ["GPU-aa", "GPU-ab", "GPU-b"]),
        ("2,0", ["GPU-b", "GPU-aa"]),
        ("GPU-b, GPU-aa", ["GPU-b", "GPU-aa"]),
        ("1,7,0", ["GPU-ab"]),
        ("GPU-a", []),
        ("-1", []),
        ("", []),
    ],
)
def test_visible_devices_are_named_by_uuid_in_cudas_order(wanted: str | None, chosen: list[str]) -> None:
    assert choose_visible({"0": "GPU-aa", "1": "GPU-ab", "2": "GPU-b"}, wanted) == chosen


def test_devices_are_listed_by_nvidia_smi_and_called_by_their_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (visible_devices(), models(["GPU-a"])) == ([], ["GPU-a"])
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\ncase $1 in *index,uuid*) echo 0, GPU-a;; *) echo GPU-a, NVIDIA H200, long;; esac\n")
    program.chmod(0o755)
    assert visible_devices() == ["GPU-a"]
    assert models(["GPU-a", "GPU-b"]) == ["NVIDIA H200, long", "GPU-b"]

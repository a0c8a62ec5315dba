"""Shared memory between ranks: the same for all, refused in words, and gone with the pool."""

from __future__ import annotations

import errno
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from fusecheck.ranks import Pool, culprits, rank, values
from fusecheck.ranks.rank import LocalRank
from fusecheck.ranks.residue import PREFIX, hold, remove, sweep

ECHO = "fusecheck.property_tests.suite.workers:Echo"
TIMEOUT = 30.0


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(ECHO, 4) as opened:
        yield opened


def lone_rank(directory: Path, index: int = 0, world_size: int = 1, device: str = "cpu") -> LocalRank:
    return LocalRank(index, world_size, torch.device(device), directory, "")


def test_all_ranks_see_what_each_wrote(pool: Pool) -> None:
    assert values(pool.call("write_and_read", "buffer", 4097, timeout=TIMEOUT)) == [[1, 2, 3, 4]] * 4


def test_asking_again_gives_the_same_memory(pool: Pool) -> None:
    assert values(pool.call("write_and_read", "again", 64, timeout=TIMEOUT)) == [[1, 2, 3, 4]] * 4
    assert values(pool.call("symmetric_sum", "again", 64, timeout=TIMEOUT)) == [10] * 4


@pytest.mark.parametrize("name", ["a/b", "../up", "two words", "ü", "x" * 100])
def test_memory_is_zero_at_first_whatever_its_name(pool: Pool, name: str) -> None:
    assert values(pool.call("symmetric_sum", name, 1000, timeout=TIMEOUT)) == [0] * 4


def test_a_name_in_use_is_refused_with_another_size(pool: Pool) -> None:
    values(pool.call("symmetric_sum", "fixed", 64, timeout=TIMEOUT))
    failures = culprits(pool.call("symmetric_sum", "fixed", 65, timeout=TIMEOUT))
    assert [f.error for f in failures] == ["RuntimeError"] * 4
    assert "in use with 64" in failures[0].message


def test_ranks_that_disagree_on_a_size_are_told_and_may_ask_again(pool: Pool) -> None:
    failures = culprits(pool.call("uneven", "uneven", timeout=TIMEOUT))
    assert [f.error for f in failures] == ["RuntimeError"] * 4
    assert any("asked for" in f.message for f in failures)


@pytest.mark.parametrize("nbytes", [0, -1, 1 << 60])
def test_a_size_that_cannot_be_had_is_refused(pool: Pool, nbytes: int) -> None:
    failures = culprits(pool.call("symmetric_sum", f"size{nbytes}", nbytes, timeout=TIMEOUT))
    assert [f.error for f in failures] == ["RuntimeError"] * 4


def test_a_gpu_rank_is_told_that_it_has_none(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="only CPU ranks"):
        lone_rank(tmp_path, device="meta").symmetric("a", 8)


def test_a_peer_that_does_not_come_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank, "RENDEZVOUS_SECONDS", 0.05)
    with pytest.raises(RuntimeError, match="rank 1 did not come"):
        lone_rank(tmp_path, 0, 2).symmetric("a", 8)


def test_memory_that_does_not_fit_lies_among_the_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, elsewhere = tmp_path / "shm" / "pool", tmp_path / "tmp"
    shared.mkdir(parents=True)
    elsewhere.mkdir()
    reserve = rank._reserve

    def full(path: Path, nbytes: int) -> None:
        if elsewhere not in path.parents:
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(path, nbytes)

    monkeypatch.setattr(rank, "_reserve", full)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(elsewhere))
    first, second = lone_rank(shared).symmetric("a", 8), lone_rank(shared).symmetric("a", 8)
    first[0][3] = 7
    assert second[0].tolist() == [0, 0, 0, 7, 0, 0, 0, 0]


def test_the_directory_goes_with_the_pool_even_when_all_ranks_were_killed() -> None:
    with Pool(ECHO, 2) as pool:
        directory = Path(values(pool.call("directory", timeout=TIMEOUT))[0])
        values(pool.call("symmetric_sum", "a", 64, timeout=TIMEOUT))
        assert directory.is_dir()
        for place in values(pool.call("place", timeout=TIMEOUT)):
            os.kill(place[3], signal.SIGKILL)
    assert not directory.exists()


def test_a_restarted_pool_starts_from_zero_in_a_new_directory() -> None:
    with Pool(ECHO, 2) as pool:
        values(pool.call("write_and_read", "a", 64, timeout=TIMEOUT))
        before = values(pool.call("directory", timeout=TIMEOUT))[0]
        pool.cancel()
        assert values(pool.call("symmetric_sum", "a", 64, timeout=TIMEOUT)) == [0, 0]
        assert values(pool.call("directory", timeout=TIMEOUT))[0] != before


def test_directories_of_the_dead_are_swept_and_those_in_use_are_kept(tmp_path: Path) -> None:
    held, dead, other = tmp_path / f"{PREFIX}1", tmp_path / f"{PREFIX}2", tmp_path / "other"
    lock = hold(held)
    os.close(hold(dead))
    other.mkdir()
    assert sweep(tmp_path) == [dead]
    assert held.is_dir()
    assert other.is_dir()
    remove(held, lock)
    assert not held.exists()


def test_a_directory_is_removed_by_the_last_who_holds_it(tmp_path: Path) -> None:
    first, second = hold(tmp_path / PREFIX), hold(tmp_path / PREFIX)
    remove(tmp_path / PREFIX, first)
    assert (tmp_path / PREFIX).is_dir()
    remove(tmp_path / PREFIX, second)
    assert not (tmp_path / PREFIX).exists()


def test_a_killed_keepers_directory_is_swept_by_the_next_pool() -> None:
    with Pool(ECHO, 1) as pool:
        directory = Path(values(pool.call("directory", timeout=TIMEOUT))[0])
        keeper = psutil.Process(values(pool.call("place", timeout=TIMEOUT))[0][3]).parent()
        assert keeper is not None
        keeper.kill()
        pool.call("nothing", timeout=TIMEOUT)
    assert directory.is_dir()
    with Pool(ECHO, 1):
        assert not directory.exists()

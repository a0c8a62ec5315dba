"""Real lm-eval runs, made once a session; and no deadlines, since the machine may be shared."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

settings.register_profile("no-deadline", settings.default, deadline=None)
settings.load_profile("no-deadline")


@pytest.fixture(scope="session")
def stock_runs(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The folder with the runs of `stock_runs`: baseline, repeat, close, broken, fewshot."""
    for name in ("lm_eval", "accelerate"):
        pytest.importorskip(name, reason="stock lm-eval runs need pip install fusecheck[eval] accelerate")
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent
    out = shared / "stock_runs"
    with FileLock(shared / "stock_runs.lock"):
        if not (out / "done").exists():
            command = [sys.executable, "-m", "fusecheck.property_tests.accuracy.stock_runs", str(out)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
            (out / "done").touch()
    return out

"""Collect these tests only where there is a checkout to look at."""

from __future__ import annotations

from fusecheck.property_tests.suite.repository.checkout import ROOT

collect_ignore_glob = [] if (ROOT / "Makefile").exists() else ["test_*.py"]

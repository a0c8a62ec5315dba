# `make verify` and `make test` need nothing but Python 3.10 and a package index: each makes .venv first.
#
#   PYTHON=python3.12     the interpreter to start from
#   TORCH_INDEX=URL       an index to take torch from (the CPU wheels, on a machine without a GPU)
#   WORKERS=4             how many pytest workers, each with ranks of its own; 0 for none, default one a core up to 8
#   PYTEST_ARGS='-x'      more arguments for pytest

PYTHON ?= python3
TORCH_INDEX ?=
WORKERS ?= logical
PYTEST_ARGS ?=
BIN := .venv/bin
READY := .venv/.fusecheck-ready

.DEFAULT_GOAL := verify
.PHONY: setup verify test bench clean

setup: $(READY)

$(READY): pyproject.toml ci/setup.py
	@TORCH_INDEX='$(TORCH_INDEX)' $(PYTHON) ci/setup.py
	@touch $@

verify: $(READY)
	$(BIN)/fusecheck verify

# A core has a worker and its ranks already: threads of torch beside them would wait for each other, and triple the time.
test: $(READY)
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python ci/links.py --mypy
	$(BIN)/python -m mypy ci/setup.py ci/bundle.py ci/links.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal $(PYTEST_ARGS)

bench: $(READY)
	$(BIN)/python -m fusecheck.property_tests.suite.judging

clean:
	rm -rf .venv runs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Everything runs in its own virtual environment, made on first use and brought up to date when the requirements change.
#   make test ARGS="-k rotation"   make quickstart ARGS="--help"   make test PYTHON=python3.12 VENV=.venv312
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

PY = $(VENV)/bin/python
INSTALL = $(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt
STAMP = $(VENV)/.installed

.PHONY: help quickstart test lint format clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "%-12s%s\n", $$1, $$2 }' Makefile

quickstart: $(STAMP)  ## quantize a small model and generate with it
	@$(PY) -m recipes.quickstart $(ARGS)

test: lint  ## lint, check the format, run the tests, one process a core (ARGS go to pytest)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(STAMP)  ## ruff: lint and format check
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: $(STAMP)  ## ruff: mend what it can, then format
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

clean:  ## remove builds and caches (the virtual environment and out/ stay)
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	@find pq_ao tests recipes benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# torch goes first and alone, so that its build (CPU or CUDA: a matter of how pip is configured) is settled before anything
# that depends on it comes, and no other release with gigabytes of CUDA libraries is drawn in on a CPU machine.
$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (a few minutes, once)"
	@$(PYTHON) -c "import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 10) and \"PYTHON=$(PYTHON) is Python \" + v + \"; pq_ao needs 3.10 or newer: make PYTHON=python3.11\")"
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) torch
	@$(INSTALL) -e ".[test]"
	@touch $@

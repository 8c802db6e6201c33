# Everything a person or a machine needs to do here. `make` alone lists it.
#   PYTHON=python3.12   which Python makes the virtual environment (3.11 or newer)
#   PIP_FLAGS=...       more flags for pip, e.g. an index with CPU-only torch (CONTRIBUTING.md)

PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt
PINNED := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test clients lint check format clean

help:
	@echo "make demo    install, fetch the default model, answer one question with and without speculation"
	@echo "make test    install what tests need, run them"
	@echo "make clients install the other programs that the server's tests ask it with (one is 6 GB)"
	@echo "make lint    formatting, lint, types, import contracts"
	@echo "make check   lint and test"
	@echo "make format  rewrite files to the house format"
	@echo "make clean   remove the virtual environment and caches of tools"

# One stamp for each set of packages: a second run installs nothing, a changed pin installs again.
.venv/made:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(f"Python {v} is too old: redrafter needs 3.11 or newer; make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/runs: .venv/made $(PINNED)
	$(PIP) -e .
	@touch $@

.venv/tests: .venv/made $(PINNED)
	$(PIP) -e '.[test,serve]'
	@$(PIP) --only-binary mlx,mlx-cpu,mlx-metal -e '.[mlx]' || echo "no MLX for this machine: its tests will be skipped"
	@$(PIP) -e '.[browser]' || echo "no Playwright for this machine: the page's tests will be skipped"
	@$(MAKE) --no-print-directory .venv/clients/llm || echo "no llm for this machine: its tests will be skipped"
	@touch $@

# They pin versions that others here do not have: each in an environment of its own, whatever is newest.
.venv/clients/%: .venv/made
	$(PYTHON) -m venv --clear $@
	@$@/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) $* || { rm -r $@; exit 1; }

.venv/lints: .venv/made $(PINNED)
	$(PIP) -e '.[dev]'
	@touch $@

# Pinned threads: the two runs that are compared should not move between cores.
demo: export OMP_PROC_BIND = close
demo: export OMP_PLACES = cores
demo: .venv/runs
	$(BIN)/redrafter generate "Why is the sky blue?" --compare

test: .venv/tests
	$(BIN)/python -m pytest

clients: .venv/clients/llm .venv/clients/guidellm

lint: .venv/lints
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

format: .venv/lints
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache build

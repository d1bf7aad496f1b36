# Needs python >= 3.11 and make; everything else is installed into .venv by `make install`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell grep '^torch==' constraints.txt)
PIP := $(BIN)/python -m pip install -q -c constraints.txt
CODE := dgs moe tests experiments
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install demo test check format static proto clean python

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

install: $(STAMP)  ## create .venv with everything that development needs

# torch goes first and alone, so that nothing else decides which build of it is fetched
$(STAMP): pyproject.toml constraints.txt
	@$(MAKE) -s python
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH) ..."
	@$(PIP) "$(TORCH)"
	@echo "installing dgs and the tools for its development ..."
	@$(PIP) -e '.[dev,experiments]'
	@touch $@

python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: $(PYTHON) was not found; install Python 3.11 or newer," \
	    "or name it: make PYTHON=/path/to/python3.11 install" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: dgs needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1);" \
	    "name a newer one: make PYTHON=/path/to/python3.11 install" >&2; exit 1; }

demo: $(STAMP)  ## start a server and workers on this machine and watch them train
	@$(BIN)/dgs demo

static: $(STAMP)
	@$(BIN)/ruff format --check --quiet $(CODE) || { \
	  echo "error: some files are not formatted; run: make format" >&2; exit 1; }
	@$(BIN)/ruff check --quiet $(CODE)
	@$(BIN)/mypy --no-error-summary

test: static  ## run everything that CI runs: format, lint, types and all tests
	@$(PYTEST)

check: static  ## run the quick part of it: no slow tests, no GPU
	@$(PYTEST) -m "not slow and not gpu"

format: $(STAMP)  ## format the code and fix what lint can fix
	@$(BIN)/ruff check --quiet --fix $(CODE) || true
	@$(BIN)/ruff format $(CODE)

proto: python  ## generate dgs/_proto again from the .proto
	@PYTHON=$(PYTHON) proto/generate.sh

clean:  ## remove .venv, caches and build products
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

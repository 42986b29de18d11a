# Each target works on a machine with only Python (3.11 or later), make and pip: it makes .venv on first use.
# On Linux without a GPU, spare the CUDA download:
#   make test PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS)
DEMO_ARGS ?= --out demo --overwrite
PYTEST_ARGS ?= -n auto
# of NumPy, SciPy and torch each: the tests themselves take all cores, and pools of threads beside them wait for each other
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help demo test coverage boundscheck lint bench docs clean
help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing specpert into $(VENV) (a few minutes the first time) ..."
	$(PIP_INSTALL) --upgrade pip
	$(PIP_INSTALL) --editable '.[experiments]'
	@touch $@

$(VENV)/.%: $(VENV)/.base
	$(PIP_INSTALL) --editable '.[all]' --group $*
	@touch $@

demo: $(VENV)/.base  ## train a network on scanned digits and explain its Lipschitz bound (picture and table in demo/)
	$(BIN)/lipdyn demo $(DEMO_ARGS)

test: $(VENV)/.test  ## run all tests and doctests
	$(ONE_THREAD) $(BIN)/python -m pytest $(PYTEST_ARGS)

coverage: $(VENV)/.test  ## lines of specpert run by its tests, kernels included (at least 95 per cent)
	$(ONE_THREAD) NUMBA_DISABLE_JIT=1 $(BIN)/python -m pytest tests/specpert specpert $(PYTEST_ARGS) -m "not slow" --cov=specpert --cov-fail-under=95

boundscheck: $(VENV)/.test  ## the compiled kernels with every index checked
	NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR=$$(mktemp -d) $(BIN)/python -m pytest tests/specpert/test_methods.py -k "kernel or fast" -q

lint: $(VENV)/.dev  ## style, import contracts and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: $(VENV)/.bench  ## measure side by side; results go to bench/results/
	$(BIN)/python -m bench

docs: $(VENV)/.docs  ## build the pages into docs/_build/html
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

clean:  ## remove the environment and everything built
	rm -rf $(VENV) docs/_build .pytest_cache .mypy_cache .ruff_cache

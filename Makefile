# Needs make, Python >= 3.11 and a network; everything is installed into $(VENV).
PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
PYTEST_FLAGS ?=
WORKERS ?= 2

ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif

# One thread per worker: spinning OpenMP threads of two processes slow each other down many times.
TEST_ENV := OMP_NUM_THREADS=1 GOMP_SPINCOUNT=0 OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_FLAGS)

.PHONY: help quickstart test test-all lint wheel clean
.DELETE_ON_ERROR:

help:
	@echo "make quickstart  install into $(VENV), align a tiny text-to-image model on the CPU, write a report"
	@echo "make test        install what the tests need and run all that fits 15 minutes on 2 cores"
	@echo "make test-all    the same and the slow tests"
	@echo "make lint        ruff and pyright"
	@echo "make wheel       build dist/alignkit-*.whl with recipes and assets inside"

# The stamps say which set of dependencies is installed, so that a second call does not reinstall.
$(VENV)/.python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	  { echo "alignkit needs Python 3.11 or newer; '$(PYTHON)' is older or missing. Use: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu it needs the package python3-venv"; exit 1; }
	$(BIN)/python -m pip install $(PIP_FLAGS) --upgrade pip
	@touch $@

$(VENV)/.installed-run: pyproject.toml $(VENV)/.python
	$(BIN)/python -m pip install $(PIP_FLAGS) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.python
	$(BIN)/python -m pip install $(PIP_FLAGS) -e ".[dev]"
	@touch $@ $(VENV)/.installed-run

quickstart: $(VENV)/.installed-run
	$(BIN)/alignkit run quickstart
	@echo "The report is in runs/quickstart/report.html"

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.installed-dev
	$(PYTEST)

lint: $(VENV)/.installed-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pyright --pythonpath $(BIN)/python

wheel: $(VENV)/.installed-dev
	$(BIN)/python -m build --wheel

clean:
	rm -rf build dist .pytest_cache .ruff_cache

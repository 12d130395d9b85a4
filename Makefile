# What a contributor types; `make` alone lists it. Needs nothing but a Python (3.11 or newer) and pip:
# the virtual environment is made on the first run, and again when pyproject.toml or the Python version changes.
#
#   make test                         with python3
#   PYTHON=python3.13 make test       with another Python
#   make test ARGS="-k planar"        with more arguments for pytest

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
VERSION_CODE := import sys, pip; print("%d.%d" % sys.version_info[:2])
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
PYTHON_NEW_ENOUGH := $(shell $(PYTHON) -c 'import sys; print(sys.version_info >= (3, 11))' 2>/dev/null)

# A stamp is written only after its installation went through. `venv --clear` removes those of another Python.
INSTALLED := $(VENV)/.stamp-$(PYTHON_VERSION)
DOCS_INSTALLED := $(VENV)/.stamp-$(PYTHON_VERSION)-docs

# One thread a test process: pytest-xdist already keeps every core busy.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

.DEFAULT_GOAL := help
.PHONY: help check-python venv demo test test-all lint format docs bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/make \1\t\2/p' Makefile | expand -t 18

check-python:
ifneq ($(PYTHON_NEW_ENOUGH),True)
	@echo "pyro-flows needs Python 3.11 or newer, but '$(PYTHON)'" \
	  "$(if $(PYTHON_VERSION),is Python $(PYTHON_VERSION),does not run)." \
	  "Name another one, for example: PYTHON=python3.12 make test" >&2
	@exit 1
endif

$(INSTALLED): pyproject.toml | check-python
	@if [ -e "$(VENV)" ] && [ ! -e "$(VENV)/pyvenv.cfg" ]; then \
	  echo "VENV='$(VENV)' is there but is no virtual environment, so it is left alone. Name another folder." >&2; \
	  exit 1; \
	fi
	@if [ "$$($(BIN)/python -c '$(VERSION_CODE)' 2>/dev/null)" != "$(PYTHON_VERSION)" ]; then \
	  echo "Making $(VENV) with Python $(PYTHON_VERSION)"; \
	  $(PYTHON) -m venv --clear "$(VENV)"; \
	fi
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -e ".[dev]"
	@touch $@

$(DOCS_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install -e ".[docs]"
	@touch $@

venv: $(INSTALLED)  ## make the virtual environment and install what development needs

demo: $(INSTALLED)  ## fit eight schools and write plots and results to demo-output/
	$(BIN)/pyro-flows demo --out demo-output

test: $(INSTALLED)  ## the tests and doctests, without the slow ones
	$(PYTEST) $(ARGS)

test-all: $(INSTALLED)  ## all tests and doctests
	$(PYTEST) -m "" $(ARGS)

lint: $(INSTALLED)  ## style, format and types, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## rewrite the files in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DOCS_INSTALLED)  ## the documentation, to docs/_build/html/index.html
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

bench: $(INSTALLED)  ## the benchmarks (ARGS are handed on)
	$(BIN)/python -m benchmarks $(ARGS)

clean:  ## remove what the other targets wrote, but for the virtual environment
	rm -rf build dist demo-output docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find pyro_flows tests examples benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

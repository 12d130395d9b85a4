# What a contributor types; `make` alone lists it. Needs nothing but a Python (3.11 or newer) and pip:
# the virtual environment is made on the first run, and brought up to date when pyproject.toml, setup.py or the C code change.
#
#   make test                         with python3
#   PYTHON=python3.13 make test       with another Python, in an environment of its own
#   make test ARGS="-k planar"        with more arguments for pytest
#   make demo VENV=/tmp/env           in an environment of that name
#   make demo TORCH="..."             after `pip install ...`, for another build of PyTorch
#   make demo PIP_ARGS="..."          with more arguments for each `pip install`

PYTHON ?= python3
TORCH ?=
PIP_ARGS ?=
ARGS ?=

VERSION_CODE := import sys; print("%d.%d" % sys.version_info[:2])
PYTHON_VERSION := $(shell $(PYTHON) -c '$(VERSION_CODE)' 2>/dev/null)
PYTHON_NEW_ENOUGH := $(shell $(PYTHON) -c 'import sys; print(sys.version_info >= (3, 11))' 2>/dev/null)

# The first Python gets .venv, each other one .venv-X.Y beside it. No environment is ever removed.
ifeq ($(strip $(VENV)),)
  FOUND := $(shell .venv/bin/python -c '$(VERSION_CODE)' 2>/dev/null)
  override VENV := .venv$(if $(filter-out $(PYTHON_VERSION),$(FOUND)),-$(PYTHON_VERSION))
endif
ifneq ($(words $(VENV)),1)
  $(error VENV='$(VENV)' has a space in it, which make cannot handle. Name another folder)
endif
BIN := $(VENV)/bin
VENV_VERSION := $(shell "$(BIN)/python" -c '$(VERSION_CODE)' 2>/dev/null)
VENV_STATE := $(shell if [ -e "$(VENV)/pyvenv.cfg" ]; then echo environment; \
  elif [ -e "$(VENV)" ] || [ -h "$(VENV)" ]; then echo foreign; fi)

# A stamp is written only after its installation went through.
RUNTIME := $(VENV)/.stamp-$(PYTHON_VERSION)-runtime
DEV := $(VENV)/.stamp-$(PYTHON_VERSION)-dev
DOCS := $(VENV)/.stamp-$(PYTHON_VERSION)-docs
NOTEBOOKS := $(VENV)/.stamp-$(PYTHON_VERSION)-notebooks
DIST := $(VENV)/.stamp-$(PYTHON_VERSION)-dist

# Where `make dist` installs the wheel. It is made anew each time, so it stands in build/, which is all written by tools.
CLEAN := build/wheel-$(PYTHON_VERSION)

# One thread a test process: pytest-xdist already keeps every core busy.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help check-python check-venv again install venv demo test test-all lint format docs notebooks dist bench evidence ledger ledger-quick mutation clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/make \1\t\2/p' Makefile | expand -t 18

check-python:
ifneq ($(PYTHON_NEW_ENOUGH),True)
	@echo "pyro-flows needs Python 3.11 or newer, but '$(PYTHON)'" \
	  "$(if $(PYTHON_VERSION),is Python $(PYTHON_VERSION),does not run)." \
	  "Name another one, for example: PYTHON=python3.12 make test" >&2
	@exit 1
endif

check-venv: check-python
ifeq ($(VENV_STATE),foreign)
	@echo "VENV='$(VENV)' is there but is no virtual environment, so it is left alone. Name another folder," \
	  "for example: make VENV=.venv-$(PYTHON_VERSION) test" >&2
	@exit 1
else ifeq ($(VENV_STATE)$(VENV_VERSION),environment)
	@echo "The Python of the virtual environment '$(VENV)' does not run (was it moved, or its Python removed?)." \
	  "It is left alone: remove it, or name another folder, for example: make VENV=.venv-$(PYTHON_VERSION) test" >&2
	@exit 1
else ifneq ($(filter-out $(PYTHON_VERSION),$(VENV_VERSION)),)
	@echo "VENV='$(VENV)' has Python $(VENV_VERSION), but '$(PYTHON)' is Python $(PYTHON_VERSION). It is left alone:" \
	  "leave out VENV=, or name another folder, for example: make VENV=.venv-$(PYTHON_VERSION) test" >&2
	@exit 1
endif

# $(call install,EXTRAS,WHAT): say what comes, make the environment if there is none or only a part of it, install.
PIP = "$(BIN)/python" -m pip install $(PIP_ARGS)
COMMA := ,
CUDA := pip downloads PyTorch too, 3 GB with CUDA, which Linux gets unless you ask for the CPU build (see README.md)
SIZE := $(if $(strip $(TORCH)),PyTorch comes as TORCH= says,$(CUDA))
define install
	@echo "Installing pyro-flows $(2) into $(VENV), with Python $(PYTHON_VERSION);" \
	  "$$("$(BIN)/python" -m pip show --quiet torch 2>/dev/null && echo 'PyTorch is there already' || echo '$(SIZE)')."
	@"$(BIN)/python" -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv "$(VENV)"
	$(PIP) --upgrade pip
	$(if $(strip $(TORCH)),$(PIP) $(TORCH))
	$(PIP) -e ".$(1)"
endef

# What an installation is made of: a change of one of these files installs again.
BUILT := pyproject.toml setup.py pyro_flows/model/graphs/interpreter.c

# With TORCH or PIP_ARGS, pip runs even if everything is installed.
AGAIN := $(if $(strip $(TORCH)$(PIP_ARGS)),again)
again:

$(RUNTIME): $(BUILT) $(AGAIN) | check-venv
	$(call install,,and the libraries that it runs on)
	@touch "$@"

$(DEV): $(BUILT) $(AGAIN) | check-venv
	$(call install,[dev],with its libraries and what development needs (pytest$(COMMA) ruff$(COMMA) mypy))
	@touch "$(RUNTIME)" "$@"

$(DOCS): $(DEV)
	$(PIP) -e ".[docs]"
	@touch "$@"

$(NOTEBOOKS): $(DEV)
	$(PIP) -e ".[notebooks]"
	@touch "$@"

$(DIST): $(DEV)
	$(PIP) -e ".[dist]"
	@touch "$@"

install: $(RUNTIME)  ## make the virtual environment and install the package

venv: $(DEV)  ## make the virtual environment and install what development needs

demo: $(RUNTIME)  ## fit eight schools and write plots and results to demo-output/
	$(BIN)/python -m pyro_flows demo --out demo-output

test: $(DEV)  ## the tests and doctests, without the slow ones
	$(PYTEST) $(ARGS)

test-all: $(NOTEBOOKS)  ## all tests and doctests; the notebooks run too
	$(PYTEST) -m "" $(ARGS)

lint: $(DEV)  ## style, format and types, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV)  ## rewrite the files in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DOCS)  ## the documentation, to docs/_build/html/index.html
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

notebooks: $(NOTEBOOKS)  ## run the notebooks from clean kernels and store their outputs (ARGS="01 02" runs two)
	OMP_NUM_THREADS=1 $(BIN)/python examples/notebooks/execute.py $(ARGS)

dist: $(DIST)  ## wheel and source package, to dist/; the wheel runs README's code in an environment of its own
	rm -rf dist "$(CLEAN)"
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	@echo "Installing the wheel and the libraries that it runs on into $(CLEAN), with Python $(PYTHON_VERSION);" \
	  "$(SIZE). What pip has in its cache is not downloaded again."
	$(PYTHON) -m venv "$(CLEAN)"
	$(if $(strip $(TORCH)),"$(CLEAN)/bin/python" -m pip install $(PIP_ARGS) $(TORCH))
	"$(CLEAN)/bin/python" -m pip install $(PIP_ARGS) dist/*.whl
	cd build && "../$(CLEAN)/bin/python" ../tests/markdown.py ../README.md
	cd build && "../$(CLEAN)/bin/pyro-flows" demo --out "../$(CLEAN)/demo-output"

bench: $(DEV)  ## the benchmarks (ARGS are handed on)
	$(BIN)/python -m benchmarks $(ARGS)

evidence: $(DEV)  ## the benchmarks whose tables are of older code, then the tables (ARGS="--list" only says which)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.evidence $(ARGS)

ledger: $(DEV)  ## every fit of the evidence anew, and what has changed against the stored rows (ARGS are handed on)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.ledger $(ARGS)

ledger-quick: $(DEV)  ## a tenth of it, in minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.ledger --quick --out build/ledger-quick $(ARGS)

mutation: $(DEV)  ## deliberate mistakes, one at a time: the tests of each room have to notice (ARGS="--only graphs")
	$(BIN)/python -m tests.mutations $(ARGS)

clean:  ## remove what the other targets wrote, but for the virtual environment
	rm -rf build dist demo-output examples/notebooks/results docs/_build docs/_notebooks *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find pyro_flows tests examples benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

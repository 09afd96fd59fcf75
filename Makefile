# balanced-rep: everything from a clean checkout. `make help` lists the targets.
PYTHON ?= python3
CXX    ?= g++
VENV   ?= .venv
ARGS   ?=

BIN    := $(VENV)/bin
PY     := $(BIN)/python
PIP    := $(PY) -m pip --disable-pip-version-check
PINS   := $(VENV)/.pins.txt
PYTEST := $(PY) -m pytest
# A file of tests is the work of one process: its fixtures, compiled kernels among them, are made once.
PARALLEL := -n logical --maxprocesses 4 --dist loadfile

# Two busy OpenMP runtimes that spin made a 0.1 s forward pass take 13 s.
export OMP_WAIT_POLICY ?= PASSIVE
export PYTHONUNBUFFERED ?= 1

# A compiler named by the caller is the one that builds the extension.
ifneq ($(origin CXX),default)
export CXX
endif

SOURCES := setup.py pyproject.toml $(shell find csrc -type f -not -name '*.py[co]' 2>/dev/null)
CXX_FILES = $(shell find csrc tests -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' \))

.DEFAULT_GOAL := help
.PHONY: help env demo test test-slow lint format bench docs tables wheel clean distclean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

env: $(VENV)/.dev $(VENV)/.built  ## the development environment, in .venv/

demo: $(VENV)/.built  ## find the memorized digits: about a minute after set-up
	$(BIN)/balanced-rep demo $(ARGS)

test: $(VENV)/.dev $(VENV)/.built  ## the test suite, without what is marked slow or needs a GPU
	$(PYTEST) $(PARALLEL) -m "not slow and not gpu" $(ARGS)

test-slow: $(VENV)/.dev $(VENV)/.built  ## only the tests marked slow
	$(PYTEST) -m "slow and not gpu" $(ARGS)

lint: $(VENV)/.dev  ## ruff, pyright, clang-format
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(PY)
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.dev  ## rewrite what the linters can rewrite
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

bench: $(VENV)/.dev $(VENV)/.built  ## benchmarks on this machine
	$(PYTEST) bench $(ARGS)

docs: $(VENV)/.dev $(VENV)/.built  ## the documentation site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

tables: $(VENV)/.dev $(VENV)/.built  ## rewrite what is generated in README.md and docs/: tables, figures of benchmarks
	$(PY) scripts/update_tables.py
	$(PY) bench/_plot.py

wheel: $(VENV)/.dev  ## sdist and wheel, in dist/
	rm -rf dist
	$(PY) -m build --outdir dist

clean:  ## remove what was built, keep the environment
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks $(VENV)/.built
	find balanced_rep kernels -name '*.so' -delete
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print | xargs rm -rf

distclean: clean  ## remove the environment too
	rm -rf $(VENV)

# --- the environment: a stamp for each step, older than what it depends on if it must be done again ---------------------

$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || { echo "error: '$(PYTHON)' not found; name a Python 3.11 to 3.13: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { \
	  echo "error: $$($(PYTHON) -V) is not supported; name a Python 3.11 to 3.13: make PYTHON=python3.12" >&2; exit 1; }
	@command -v $(CXX) >/dev/null || { echo "error: C++ compiler '$(CXX)' not found; install g++, or name one: make CXX=clang++" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig; raise SystemExit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { \
	  echo "error: the headers of $(PYTHON) are missing; install python3-dev" >&2; exit 1; }
	@[ -x $(PY) ] || $(PYTHON) -m venv $(VENV) || { echo "error: no virtual environment; install python3-venv" >&2; exit 1; }
	@touch $@

# torch comes first and alone: any package that depends on it would otherwise choose the build.
$(VENV)/.torch: constraints.txt | $(VENV)/.made
	grep -vE '^(triton|cuda-|nvidia-)' $< > $(PINS)
	$(PIP) install --progress-bar off -c $(PINS) torch setuptools pybind11
	@! $(PY) -c 'import torch; raise SystemExit(torch.version.cuda is not None)' 2>/dev/null || cp $< $(PINS)
	@touch $@

$(VENV)/.base: pyproject.toml scripts/requirements.py $(VENV)/.torch
	$(PY) scripts/requirements.py > $@.txt
	$(PIP) install --progress-bar off -c $(PINS) -r $@.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PY) scripts/requirements.py dev > $@.txt
	$(PIP) install --progress-bar off -c $(PINS) -r $@.txt
	@touch $@

# Without build isolation: setuptools and pybind11 are here already, at their pinned versions.
$(VENV)/.built: $(SOURCES) $(VENV)/.base
	$(PIP) install -q --no-deps --no-build-isolation -e .
	@touch $@

-include tests/gpusim/gpusim.mk

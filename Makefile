PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= server,test

PYTEST := $(BIN)/python -m pytest -rs --numprocesses 3 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-slow test-all lint lint-style lint-types lint-page install
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("pusa needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]"
	$(BIN)/python -m compileall -q src/pusa  # as pip does, but for what is editable: half a second of every start
	touch $@

# Makes a few videos in demo/ and says where they are.
demo: install
	$(BIN)/python -m pusa.demo

# What tells whether it works. Tests that need something this machine lacks say so and are skipped.
test: install
	$(PYTEST) -m "not slow"

# Killed servers, fuzzed requests, whole training runs.
test-slow: install
	$(PYTEST) -m slow

# Both at once, which starts once and leaves no process waiting for the last of the others.
test-all: install
	$(PYTEST)

lint: lint-style lint-types lint-page

lint-style: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

lint-types: install
	$(BIN)/mypy

# Types of the studio's page, where npm is.
lint-page:
	.ci/check-page

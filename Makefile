PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

PYTEST := $(BIN)/python -m pytest -rs --numprocesses 3 --dist loadfile

.PHONY: demo test test-slow test-all lint install
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("pusa needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[studio,test]"
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

test-all: test test-slow

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

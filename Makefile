# The verbs of this repository.  Each sets up what it needs: a fresh machine wants Python 3.11 and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup check test demo bench clean

setup: .venv/ready

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

check: setup  ## lint, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: setup
	$(BIN)/pytest

demo: setup  ## store, look up, kill -9, warm restart, hit
	$(BIN)/python -m cache_server.demo

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis out

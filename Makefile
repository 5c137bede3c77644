# The verbs of this repository.  Each sets up what it needs: a fresh machine wants Python 3.11 and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup check test demo bench clean

setup: .venv/ready

# The CPU build of vLLM pins the CPU build of torch, and can't be imported beside the CUDA builds of the other three.
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,engine]'
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
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

bench: setup  ## the server's figures, as JSON in out/; 6 minutes
	mkdir -p out
	$(BIN)/python -m bench.server --out out/server.json

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis out

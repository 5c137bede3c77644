# The verbs of this repository.  Each sets up what it needs: a fresh machine wants Python 3.11 and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup tools check test sim mutants chaos demo bench soak clean

setup: .venv/ready

# The CPU build of vLLM pins the CPU build of torch, and can't be imported beside the CUDA builds of the other three.
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,engine]'
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

tools:  ## what the tests want of Debian: a browser, promtool, kubectl; installed where that is possible
	.ci/tools

check: setup  ## lint, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: setup tools
	$(BIN)/pytest

sim: setup  ## replay one world of the whole-system simulation: make sim SEED=…
	PYTHONPATH=.:tests $(BIN)/python -m sim.whole.replay $(SEED)

mutants: setup  ## after how many schedules is each planted bug caught?  Rewrites the record that the tests go by
	PYTHONPATH=.:tests $(BIN)/python -m sim.mutants.record

chaos: setup  ## a real vLLM through hundreds of faults in an hour: make chaos [TIME=seconds] [SEED=…]
	PYTHONPATH=.:tests $(BIN)/python -m chaos.campaign.main --seconds $(or $(TIME),3600) $(if $(SEED),--seed $(SEED))

demo: setup  ## a real vLLM, cold and cached, through a kill -9 of the cache server; 2 minutes
	$(BIN)/lmconnector demo

bench: setup  ## the server's figures, as JSON in out/; 6 minutes
	mkdir -p out
	$(BIN)/python -m bench.server --out out/server.json

soak: setup  ## does the server's health raise a false alarm?  Mixed load and long legal work: make soak TIME=600
	mkdir -p out
	$(BIN)/python -m bench.health_soak --seconds $(or $(TIME),600) --out out/health_soak.json

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis out

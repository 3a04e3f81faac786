# The one door: people, the README and CI use these targets. `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
# Where torch comes from. Without an NVIDIA GPU, Linux gets PyTorch's own CPU build, which is
# gigabytes smaller; everyone else, and whoever cannot reach it, the default of pip.
TORCH_INDEX ?= $(shell test "$$(uname -s)" = Linux && ! command -v nvidia-smi > /dev/null \
  && echo https://download.pytorch.org/whl/cpu)

BIN := $(VENV)/bin
READY := $(VENV)/.ready
INSTALL := python -m pip --disable-pip-version-check install --quiet
PIP := $(BIN)/$(INSTALL) --constraint constraints.txt
# Of `bench`, such as BENCH='--rows 1,4'.
BENCH ?=
PEERS := $(patsubst benchmarks/peers/%.txt,build/peers/%/.ready,$(wildcard benchmarks/peers/*.txt))
DEMO := $(BIN)/cellseg predict --ckpt_path demo/lightning_logs/version_0/checkpoints/best.ckpt

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check format bench bench-peers clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Create the environment in .venv

$(READY): pyproject.toml constraints.txt
	@echo "Installing into $(VENV): a few minutes the first time"
	@$(PYTHON) -m venv $(VENV)
	@$(if $(TORCH_INDEX),$(PIP) torch --no-deps --retries 0 --index-url $(TORCH_INDEX) || true)
	@$(PIP) --editable '.[dev]'
	@touch $@

demo: demo/.trained ## Train on generated nuclei for two minutes, then find those of a folder
	@$(BIN)/python -c "from cellseg.data.synthetic import write; write('demo/images', 6, first=1000)"
	@$(DEMO) --data.predict_dir demo/images --output.dir demo/results
	@$(BIN)/cellseg predict --data.predict_dir demo/images --output.dir demo/nuclei-1
	@echo
	@echo "Overlays to look at   demo/results/*_overlay.png"
	@echo "Of the shipped model  demo/nuclei-1/*_overlay.png"
	@echo "Labels for Fiji       demo/results/*_labels.tif"
	@echo "Counts and sizes      demo/results/summary.csv"
	@echo "The training          $(BIN)/tensorboard --logdir demo"

demo/.trained: configs/demo.yaml | $(READY)
	@rm -rf demo
	@$(BIN)/cellseg fit --config configs/demo.yaml
	@touch $@

test: $(READY) ## Run the tests
	@$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist worksteal

test-slow: $(READY) ## Run the tests that take long or need a browser
	@$(BIN)/python -m pytest -m slow

check: $(READY) ## Check format, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(READY) ## Format the code
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format .

bench: $(READY) ## Measure the speed, half an hour on a quiet machine (docs/performance.md)
	@$(BIN)/python benchmarks/bench.py $(BENCH)

bench-peers: $(PEERS) ## Install the programs that `bench` compares with, each for itself

build/peers/%/.ready: benchmarks/peers/%.txt
	@echo "Installing into $(@D): a few minutes"
	@$(PYTHON) -m venv --clear $(@D)
	@$(if $(TORCH_INDEX),torch=$$(grep ^torch= $<) && $(@D)/bin/$(INSTALL) $$torch --no-deps \
	  --retries 0 --index-url $(TORCH_INDEX) || true)
	@$(@D)/bin/$(INSTALL) --requirement $<
	@touch $@

clean: ## Delete the environments, the demo and what was measured
	rm -rf $(VENV) demo build

# Each command makes .venv and installs into it what it needs, once.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/ready

.PHONY: cross-check benchmark test lint

# Compares with the real tf.keras. Options go into ARGS: make cross-check ARGS="--cases 10000"
cross-check: $(READY)
	$(BIN)/python scripts/cross_check.py --html cross-check.html --json cross-check.json $(ARGS)

# Measures time and memory beside other implementations, seven minutes; ARGS="--quick" for one.
benchmark: $(READY)
	$(BIN)/python scripts/benchmark.py $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n auto $(ARGS)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -c constraints.txt -e '.[tensorflow,report]' --group dev
	touch $(READY)

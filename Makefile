PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
export PATH := $(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup demo bench bench-gpu test test-kill test-soak test-fuzz lint format typecheck clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@echo "Installing btrain into $(VENV) (a minute or two) …"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the development tools …"
	$(PIP) --editable ".[dev]"
	@touch $@

setup: $(VENV)/.installed-dev  ## install btrain and its development tools into .venv

demo: $(VENV)/.installed  ## train TRADES with and without BulletTrain on real digits, compare them
	scripts/demo.sh

bench: $(VENV)/.installed  ## time training steps beside the plain defense (BENCH="option=value …")
	OMP_NUM_THREADS=1 btrain bench $(BENCH)

bench-gpu: $(VENV)/.installed  ## the fixed set for one CUDA device, under eight minutes
	btrain bench gpu

test: lint typecheck  ## lint, type check and run all tests
	python -m pytest

test-kill: setup  ## kill 100 short runs and 100 sweeps at random moments, resume them (half an hour or less)
	python -m pytest -m slow tests/test_kill.py -s

test-soak: setup  ## 2,000 tiny epochs: memory, open files and step time stay flat (some minutes)
	python -m pytest -m slow tests/test_soak.py -s

test-fuzz: setup  ## read 20,000 damaged and hostile files with every reader (an hour)
	cd tests && python -m fuzz --inputs 20000

lint: setup  ## check style and formatting
	ruff check .
	ruff format --check .

format: setup  ## reformat the sources
	ruff check --fix .
	ruff format .

typecheck: setup  ## mypy, strict
	mypy

clean:  ## remove everything that make made; runs and data stay
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

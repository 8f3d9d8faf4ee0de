PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
export PATH := $(BIN):$(PATH)

.DEFAULT_GOAL := help
PAPER := table1 table2 table3 table4 figure2 figure3 figure4 figure5 figure6 figure7 sparse_table sparse_augmix
PROFILE ?= smoke
JOBS ?= 1

.PHONY: help setup paper $(PAPER) cheapest_table mixtrain_table mixtrain_choice demo hero concepts bench bench-gpu test test-same test-kill test-soak test-fuzz lint format typecheck docs dist clean

help:  ## show this list
	@grep -hE '^[a-z_-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-15s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@echo "Installing btrain into $(VENV) (a minute or two) …"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the development tools …"
	$(PIP) --editable ".[dev]"
	@touch $@

$(VENV)/.installed-paper: $(VENV)/.installed
	@echo "Installing what the paper's tables need …"
	$(PIP) --editable ".[report,eval,sweep]"
	@touch $@

setup: $(VENV)/.installed-dev  ## install btrain and its development tools into .venv

$(VENV)/.installed-report: $(VENV)/.installed
	$(PIP) --editable ".[report,eval]"
	@touch $@

demo: $(VENV)/.installed-report  ## TRADES with and without BulletTrain on a part of MNIST, three seeds (two minutes on two cores)
	python scripts/demo.py

# One thread a run: small networks gain nothing by more, and JOBS runs go side by side.
define reproduce
OMP_NUM_THREADS=$(or $(OMP_NUM_THREADS),1) btrain paper $(1) profile=$(PROFILE) \
	$(if $(filter-out 1,$(JOBS)),hydra/launcher=joblib hydra.launcher.n_jobs=$(JOBS)) $(ARGS)
endef

paper: $(VENV)/.installed-paper  ## the paper's tables and figures (PROFILE=smoke|cpu|gpu|paper JOBS=1 ARGS="option=value …")
	$(call reproduce,all)

$(PAPER):%: $(VENV)/.installed-paper  # one of them: make table2 PROFILE=cpu
	$(call reproduce,$@)

cheapest_table: $(VENV)/.installed-paper  ## TRADES and its cheaper forms side by side (PROFILE=smoke|cpu|gpu COLOUR=dataset.root=PATH MNIST=dataset.root=PATH)
	$(call reproduce,cheapest_table) out=runs/cheapest/$(PROFILE) $(COLOUR)
	$(call reproduce,cheapest_mnist) out=runs/cheapest/$(PROFILE)-mnist $(MNIST)

mixtrain_table: $(VENV)/.installed-paper  ## training by bounds: MixTrain and its rivals, clean against verified (PROFILE=smoke|cpu|gpu|paper); its figures: scripts/mixtrain_*.py
	$(call reproduce,mixtrain_table mixtrain_front)

mixtrain_choice: $(VENV)/.installed-paper  ## BulletTrain's choice of the images that MixTrain bounds, beside chance (PROFILE=cpu: 5 seeds)
	$(call reproduce,mixtrain_choice)

hero: $(VENV)/.installed-report  ## the README's picture, from results/
	python scripts/hero.py

concepts: $(VENV)/.installed-report  ## the pictures of docs/concepts.md, from a network of results/weights
	python scripts/concepts.py

bench: $(VENV)/.installed  ## time training steps beside the plain defense (BENCH="option=value …")
	OMP_NUM_THREADS=1 btrain bench $(BENCH)

bench-gpu: $(VENV)/.installed  ## the fixed set for one CUDA device, under eight minutes
	btrain bench gpu

# A core takes one file after another, in the order that tests/conftest.py gives them.
test: lint typecheck  ## lint, type check and run all tests, on every core
	python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder

test-same: setup  ## the same bits as an earlier commit, trained on the CPU? (some minutes; SAME="COMMIT --keep FOLDER …")
	python scripts/same_bits.py $(SAME)

test-kill: setup  ## kill 100 short runs, sweeps, parents and workers at random moments, resume them (an hour)
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

docs: setup  ## the documentation as a site under build/site, strict: no link is broken
	$(PIP) --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 mkdocs build

dist: setup  ## wheel and source archive under dist/, checked as an index would
	rm -rf dist
	python -m build --outdir dist
	twine check --strict dist/*

clean:  ## remove everything that make made; runs and data stay
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# Every target works from a clean clone with only make and Python 3.11 or newer: the environment is made on the way.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# What `make bench` reads, and where its results go. make bench BENCH='--llama-python PATH' adds to `bench engines`.
SUITE ?= docs/benchmarks/prompts.jsonl
TEXT ?= docs/design.md
RESULTS ?= build/bench

.PHONY: help bench demo test test-full lint format types docs man clean distclean

help: ## this list
	@awk -F ':[^#]*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/installed ## answer a reasoning prompt with the default model (downloads it once, 92 MB)
	$(BIN)/longspec pull smollm2
	$(BIN)/longspec run --no-stdin --stats --template demo

# Most tests take one thread: they run on a few processors at once, each process with a model of its own in memory.
ONCE := -n auto --maxprocesses 4 --dist worksteal

test: $(VENV)/installed-dev ## the tests, without the long matrices
	$(BIN)/python -m pytest $(ONCE)

test-full: $(VENV)/installed-dev ## every test, the long matrices too
	$(BIN)/python -m pytest $(ONCE) -m 'full or not full'

lint: $(VENV)/installed-dev ## ruff: its rules, and the layout of the code
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(VENV)/installed-dev ## mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(VENV)/installed-dev ## mypy, strict
	$(BIN)/mypy

docs: $(VENV)/installed-docs ## the site, into site/
	$(BIN)/python -m mkdocs build --strict

man: $(VENV)/installed ## the manual pages, after an option has changed
	$(BIN)/python docs/man.py

bench: $(VENV)/installed-bench ## measure engines, drafters and caches on this machine (most of an hour), into build/bench
	mkdir -p $(RESULTS)
	$(BIN)/longspec pull smollm2
	$(BIN)/longspec bench engines --suite $(SUITE) --sample 2 --text $(TEXT) $(BENCH) \
	  --output $(RESULTS)/engines.json --plot $(RESULTS)/engines.svg
	$(BIN)/longspec bench drafters --suite $(SUITE) --prompts 5 --transformers --output $(RESULTS)/drafters.json \
	  --plot $(RESULTS)/drafters.svg
	$(BIN)/longspec bench cache --text $(TEXT) --context 512 --context 2048 --context 7000 \
	  --output $(RESULTS)/cache.json --plot $(RESULTS)/cache.svg

clean: ## remove what builds and checks leave behind
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
	find longspec cli cache prompts tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and the environment too
	rm -rf $(VENV)

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON) was not found. longspec needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) --version 2>&1), and longspec needs Python 3.11 or newer:" \
	    "make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)

# The stamps lie in the environment and go when it goes. An editable install is repeated only when its metadata changes.
$(VENV)/installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable .
	@touch $@

$(VENV)/installed-bench: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[bench]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[dev]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[docs]'
	@touch $@ $(VENV)/installed

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

# An index of torch's builds for the CPU: make demo TORCH_INDEX=https://... Where it can't be reached, pip goes on without it.
TORCH_INDEX ?=
PIP_INSTALL = $(BIN)/python -m pip install $(if $(TORCH_INDEX),--retries 1 --extra-index-url $(TORCH_INDEX)) --editable

# What `make fuzz` tries: mutants of each kind of file, of requests and templates, by this seed.
SEED ?= $(shell date +%s)
MUTANTS ?= 6000

.PHONY: help bench demo fuzz guided test test-full test-arm test-clients wheel lint format types docs man clean distclean

help: ## this list
	@awk -F ':[^#]*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/installed ## write an answer with the default model (92 MB, once), drafted and plain
	$(BIN)/longspec pull smollm2
	$(BIN)/python docs/demo.py

# Most tests take one thread: they run on a few processors at once, each process with a model of its own in memory.
ONCE := -n auto --maxprocesses 4 --dist worksteal

test: $(VENV)/installed-dev ## the tests, without the long matrices
	$(BIN)/python -m pytest $(ONCE)

test-full: $(VENV)/installed-dev ## every test, the long matrices too
	$(BIN)/python -m pytest $(ONCE) -m 'full or not full'

test-clients: $(VENV)/installed-dev ## the server by the clients that people have (of pip and npm), client by client
	$(PIP_INSTALL) '.[dev,clients]'
	if command -v npm >/dev/null; then npm install --no-audit --no-fund --prefix build/clients \
	  openai ai @ai-sdk/openai @ai-sdk/openai-compatible zod; fi
	$(BIN)/python -m pytest -v tests/clients

test-arm: $(VENV)/installed-dev ## the kernels for ARM under qemu (gcc-aarch64-linux-gnu, qemu-user)
	$(BIN)/python -m pytest tests/kernels/test_variants.py -k arm

wheel: $(VENV)/installed-wheel ## wheels for x86-64 and ARM with their kernels built in, into dist/ (80 MB of compiler, once)
	$(BIN)/python docs/wheel.py x86_64 aarch64

fuzz: $(VENV)/installed-dev ## damaged and hostile files, for ten minutes (make fuzz SEED=0 tries those of the tests)
	$(BIN)/python -m pytest tests/hostile -m full -s --seed $(SEED) --mutants $(MUTANTS)

guided: $(VENV)/installed-fuzz ## coverage-guided fuzzing of what reads files and requests, two minutes for each kind, into build/fuzz
	for kind in gguf safetensors snapshot head config request template schema; do mkdir -p build/fuzz/$$kind && \
	  $(BIN)/python tests/hostile/guided.py $$kind -max_total_time=120 -rss_limit_mb=2048 -timeout=10 build/fuzz/$$kind || exit 1; done

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
	@echo "Installing into $(VENV): 0.3 GB where pip finds torch for the CPU, 5 GB with its CUDA packages (Linux' usual index)."
	@echo "make $(MAKECMDGOALS) TORCH_INDEX=URL names an index of builds for the CPU; docs/install.md has one."
	$(PIP_INSTALL) .
	@touch $@

$(VENV)/installed-bench: pyproject.toml | $(BIN)/python
	$(PIP_INSTALL) '.[bench]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-dev: pyproject.toml | $(BIN)/python
	$(PIP_INSTALL) '.[dev]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-wheel: pyproject.toml | $(BIN)/python
	$(PIP_INSTALL) '.[wheel]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-fuzz: pyproject.toml | $(BIN)/python
	$(PIP_INSTALL) '.[dev,fuzz]'
	@touch $@ $(VENV)/installed-dev

$(VENV)/installed-docs: pyproject.toml | $(BIN)/python
	$(PIP_INSTALL) '.[docs]'
	@touch $@ $(VENV)/installed

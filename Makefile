# Needs Python 3.11 or later, make and a package registry; everything else goes into .venv.

PYTHON ?= $(firstword $(foreach p,python3 python3.11 python3.12 python3.13,\
  $(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))
BIN := .venv/bin

# Hundreds of Pythons start in a test run. None shall compile what another one has compiled already.
unexport PYTHONDONTWRITEBYTECODE

STAMP := .venv/.set-up
COMPILED := build/compiled
MUTANTS := build/mutants
STOCK := build/stock
TRITON := build/triton
TORCH := .venv/.torch
RAY := .venv/.ray
PIP := -m pip --quiet --disable-pip-version-check
# The first pip that knows dependency groups, and the first setuptools that knows licences by their names.
INSTALLERS := 'pip>=25.1' 'setuptools>=77'
CLIENT := packages/clockwork-client
SERVE := packages/clockwork-serve
LAB := packages/clockwork-lab
SOURCES := -e $(CLIENT) -e $(SERVE) -e '$(LAB)[demo,figures]'

.DEFAULT_GOAL := help
.PHONY: help setup demo test check static lint types layers bench busy cases compiled docs engine faults faults-all fuzz hostile soak nightly mutants planted peers stock optional collected triton constraints fix clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## make .venv with the three distributions, their tests and tools; leaves .venv/bin/clockwork

$(STAMP): pyproject.toml packages/*/pyproject.toml $(SERVE)/setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or later found; install one or name it: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || { echo "making .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv .venv; }
	@echo "installing into .venv (the versions in constraints.txt)"
	@$(BIN)/python $(PIP) install -c constraints.txt $(INSTALLERS)
	@$(BIN)/python $(PIP) install -c constraints.txt $(SOURCES) --group dev
	@$(BIN)/python $(PIP) install -c constraints.txt perf-analyzer 2>/dev/null \
	  || echo "perf_analyzer is not for this machine (it needs x86-64 and glibc 2.38): its tests are skipped"
	@$(BIN)/python $(PIP) install -c constraints.txt --only-binary atheris --group fuzz 2>/dev/null \
	  || echo "atheris is not for this machine (it needs x86-64 and Python up to 3.13): fuzzers go by chance alone"
	@touch $@

$(TRITON)/.set-up: constraints-triton.txt
	@$(BIN)/python -m venv --without-pip --clear $(TRITON)
	@$(BIN)/python $(PIP) --python $(TRITON)/bin/python install --no-deps --only-binary :all: -r $<
	@touch $@

# Not part of the set-up, for it is large and only serves model.pt2.
$(TORCH): $(STAMP)
	@echo "installing torch into .venv"
	@$(BIN)/python $(PIP) install -c constraints.txt -e $(CLIENT) -e '$(SERVE)[torch]' torchvision
	@touch $@

# Nor this, for it is large and only serves `clockwork ray`.
$(RAY): $(STAMP)
	@echo "installing Ray into .venv"
	@$(BIN)/python $(PIP) install -c constraints.txt -e $(CLIENT) -e '$(SERVE)[ray]'
	@touch $@

demo: $(STAMP) ## real pretrained models, real inputs, one screen of results
	@$(BIN)/clockwork demo

check: $(STAMP) static ## format, lint, types, layers, quick tests: under two minutes
	@$(BIN)/pytest -q -n auto --dist loadfile -m 'not slow and not system'

# One beside the other, for types and layers use a core each.
static: $(STAMP)
	@$(MAKE) --no-print-directory --output-sync -j 3 lint types layers

lint: $(STAMP)
	@$(BIN)/ruff format --check --quiet || { $(BIN)/ruff format --check; exit 1; }
	@$(BIN)/ruff check --quiet

types: $(STAMP)
	@$(BIN)/mypy

layers: $(STAMP)
	@$(BIN)/lint-imports --no-logo

test: $(STAMP) ## set-up, every check, then every test
	@$(MAKE) --no-print-directory --output-sync -j 5 lint types layers optional collected
	@$(BIN)/pytest -n auto --dist loadfile --basetemp "$$(mktemp -d -t cw-XXXXXX)"  # short: sockets' paths are limited

# What some tests use, where it is for this machine. It is fetched while types are checked, which need nothing of it;
# not while layers are, for pip takes our packages out and puts them in again.
optional: $(STAMP) layers
	@test -d $(TRITON) && test ! -e $(TRITON)/.set-up \
	  || $(MAKE) --no-print-directory --silent $(TRITON)/.set-up 2>/dev/null \
	  || echo "Triton is not for this machine (it needs x86-64, glibc 2.35, Python 3.11 or 3.12): its tests are skipped"
	@$(MAKE) --no-print-directory --silent $(TORCH) 2>/dev/null \
	  || echo "torch cannot be installed on this machine (is there a build of it for it?): its tests are skipped"
	@command -v $${CXX:-g++} >/dev/null || echo "there is no C++ compiler (g++): tests of torch models are skipped"

# Whoever collects tests first writes what all processes of a run then read: half a minute of two cores.
collected: $(STAMP)
	@$(BIN)/pytest -q --collect-only >/dev/null 2>&1 || true

bench: $(STAMP) ## measure what the docs promise; prints one table per question
	@$(BIN)/python benchmarks/run.py

cases: $(STAMP) ## known graphs alone and in company: is each served, batched rightly, answered right? CASES_WITH="--short"
	@$(BIN)/python -m qa.cases $(CASES_WITH)

compiled: $(STAMP) ## build the brains and the simulator's loop with mypyc in a venv of its own, run their tests
	@test -x $(COMPILED)/bin/python || $(BIN)/python -m venv $(COMPILED)
	@$(COMPILED)/bin/python $(PIP) install -c constraints.txt $(INSTALLERS)
	@$(COMPILED)/bin/python $(PIP) install -c constraints.txt $(CLIENT) $(SERVE) '$(LAB)[demo,figures]' --group compiled --group test
	@rm -rf packages/*/build  # setuptools would pack what an earlier build left there
	@CLOCKWORK_MYPYC=1 $(COMPILED)/bin/python $(PIP) install -c constraints.txt --no-build-isolation --no-deps --force-reinstall $(CLIENT) $(SERVE) $(LAB)
	@$(COMPILED)/bin/python -c 'import clockwork_serve.controller.belief as m, clockwork_serve.sim.host as n; assert (m.__file__ + n.__file__).count(".so") == 2; print("compiled:", m.__file__)'
	@$(COMPILED)/bin/python -m pytest -q -p no:cacheprovider -m 'not slow' tests/controller tests/worker tests/sim tests/harness/test_seeds.py tests/lab/oracle
	@CLOCKWORK_MYPYC=1 $(BIN)/pytest -q -p no:cacheprovider tests/distributions -k compiled

docs: $(STAMP) ## the documentation as a site with search, build/site/html; a link that leads nowhere fails it
	@$(BIN)/python docs/build.py

FUZZ_SECONDS ?= 600

fuzz: $(STAMP) ## every parser fed what is nearly right, FUZZ_SECONDS=600 each: does one trip, hang or grow?
	@$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) $(FUZZ_WITH)

busy: $(STAMP) ## tests beside programs that want every core; BUSY_WITH="--whole" for make test, else half an hour
	@$(BIN)/python -m qa.busy $(BUSY_WITH)

faults: $(STAMP) ## faults done to real processes under load: what is lost, how long does it take? Under five minutes
	@$(BIN)/python -m qa.faults --short $(FAULTS_WITH)

faults-all: $(STAMP) ## every fault, and workers and controllers killed again and again: half an hour
	@mkdir -p build/faults
	@$(BIN)/python -m qa.faults --json build/faults/rows.json $(FAULTS_WITH); rows=$$?; \
	  $(BIN)/python -m qa.faults kills --json build/faults/kills.json && exit $$rows

hostile: $(STAMP) ## ten minutes of hostile traffic beside honest clients: does anything end, grow or slow down?
	@$(BIN)/python -m qa.hostile $(HOSTILE_WITH)

engine: $(RAY) ## a server on a Ray cluster of three nodes here: up, hit, down; ENGINE_WITH="--short" takes two minutes
	@$(BIN)/python -m qa.engine $(ENGINE_WITH)

soak: $(STAMP) ## an hour of mixed load with faults: does anything grow, leak, drift or go wrong? SOAK_WITH="--minutes 2"
	@$(BIN)/python -m qa.soak $(SOAK_WITH)

nightly: $(STAMP) ## 10,000 scenarios by chance with faults and all checks: about an hour; an interrupted night goes on
	@$(BIN)/python -m qa.simulator_nightly $(NIGHTLY_WITH)

planted: $(STAMP) ## bugs written by hand into the code that recovers: which test, and which seed, finds each?
	@$(BIN)/python -m qa.mutants --planted $(PLANTED_WITH)

mutants: $(STAMP) ## break the brains in 400 ways, one at a time: do tests and seeds notice? About 20 minutes
	@test -x $(MUTANTS)/bin/python || $(BIN)/python -m venv $(MUTANTS)
	@$(MUTANTS)/bin/python $(PIP) install -c constraints.txt $(INSTALLERS)
	@$(MUTANTS)/bin/python $(PIP) install -c constraints.txt $(SOURCES) --group mutants --group test
	@$(MUTANTS)/bin/python -m qa.mutants $(MUTANTS_WITH)

peers: $(STAMP) ## other model servers, each in a venv of its own under build/peers; PEERS="triton" for some
	@$(BIN)/python -m comparison.peers install $(PEERS)
	@$(BIN)/python -m comparison.peers check

stock: $(STAMP) ## KServe's clients, perf_analyzer and the newest tritonclient in a venv of their own, on a server
	@test -x $(STOCK)/bin/python || $(BIN)/python -m venv $(STOCK)
	@$(STOCK)/bin/python $(PIP) install $(INSTALLERS)
	@$(STOCK)/bin/python $(PIP) install -c constraints-stock.txt $(SOURCES) --group stock --group test
	@$(STOCK)/bin/python -m pytest -q -p no:cacheprovider tests/end_to_end/stock

triton: $(STAMP) ## a real Triton server in a venv of its own, and the same requests to it and to ours
	@$(MAKE) --no-print-directory --silent $(TRITON)/.set-up
	@$(BIN)/python -m pytest -q tests/end_to_end/triton

constraints: ## write constraints.txt from what .venv holds
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --all --exclude-editable | grep -E '^[A-Za-z0-9._-]+==' | grep -vE '^(torch|torchvision|triton|nvidia-.*|cuda-.*)=='; } > constraints.new
	@mv constraints.new constraints.txt

fix: $(STAMP) ## format and repair what ruff can repair
	@$(BIN)/ruff check --fix --quiet || true
	@$(BIN)/ruff format

clean: ## remove what was built; leaves caches of models alone
	@rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache packages/*/build packages/*/dist packages/*/src/*.egg-info

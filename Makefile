# One command sets everything up and does the main job; see `make help`.
#
#   make cohort                                          an invented hospital, from nothing to the report
#   make cohort DATA=records.csv SCHEMA=schema.toml EPSILON=3
#   make test                                            the whole test suite

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

VENV ?= .venv
TORCH ?= torch==2.13.0
# The first interpreter of a version that is supported; `make PYTHON=/path/to/python` chooses another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  if $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; \
  then echo $$p; exit; fi; done)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# What is installed first stays: no later requirement may exchange this torch for another build.
KEEP := --constraint $(VENV)/torch.txt
SOURCES := pyproject.toml $(shell find csrc -type f)

.PHONY: help cohort test lint bench dev clean FORCE

help:
	@echo 'make cohort [DATA= SCHEMA= EPSILON=3 DELTA=1e-6 GENERATOR=diffusion|gan UNIT= ROWS= STEPS= OUT=out'
	@echo '             PATIENTS=20000 FRESH=1]   train, sample, evaluate; again: goes on, or shows it again'
	@echo 'make test [ARGS="-m \"not slow\""]     the test suite'
	@echo 'make lint | bench | dev | clean        checks; measurements; set-up for developers; remove set-up'
	@echo 'PYTHON=, VENV= and TORCH= choose the interpreter, the environment and the torch that is installed.'

# A variable counts when it stands on make's command line, never when the environment happens to have one.
given = $(if $(filter command,$(origin $(1))),$(if $($(1)),$(2) '$($(1))'))

cohort: $(VENV)/package.stamp
	@$(BIN)/synthward cohort $(call given,DATA,--data) $(call given,SCHEMA,--schema) \
	  $(call given,EPSILON,--epsilon) $(call given,DELTA,--delta) $(call given,GENERATOR,--generator) \
	  $(call given,UNIT,--unit) $(call given,ROWS,--rows) $(call given,STEPS,--steps) \
	  $(call given,PATIENTS,--patients) $(call given,OUT,--out) $(if $(call given,FRESH,x),--fresh)

# Plain `pytest`, never `python -m pytest`: that would make `engine` and `kernels` importable a second time.
test: $(VENV)/test.stamp
	$(BIN)/pytest $(if $(filter command,$(origin ARGS)),$(ARGS))

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/typecheck

bench: $(VENV)/test.stamp
	$(BIN)/python -m benchmarks.kernel_table
	$(BIN)/python -m benchmarks.noise
	$(BIN)/python -m benchmarks.model_step
	$(BIN)/python -m benchmarks.distributed
	$(BIN)/python -m benchmarks.generator_step
	$(BIN)/python -m benchmarks.diabetes130

dev: $(VENV)/lint.stamp $(VENV)/test.stamp
	$(BIN)/pre-commit install

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

# Set-up. Each stamp is younger than what it was made from, and made last: a broken-off step is done again.

# A copied or moved checkout gets an environment of its own: scripts in an environment hold its old path.
ifneq ($(shell cat $(VENV)/place.txt 2>/dev/null),$(CURDIR))
$(VENV)/python.stamp: FORCE
endif

$(VENV)/python.stamp:
	@test -n '$(PYTHON)' || { echo 'synthward needs Python 3.11, 3.12 or 3.13: make PYTHON=/path/to/python'; exit 1; }
	@echo 'Setting up $(VENV) with $(PYTHON) (once; takes minutes, most of them to download)'
	$(PYTHON) -m venv --clear $(VENV)
	echo '$(TORCH)' > $(VENV)/torch.txt
	$(PIP) install --quiet --upgrade 'pip>=25.1'
	echo '$(CURDIR)' > $(VENV)/place.txt
	touch $@

# By name and first, so that the package's own requirement (any torch >= 2.11) is already met.
$(VENV)/torch.stamp: $(VENV)/python.stamp
	$(PIP) install '$(TORCH)'
	touch $@

$(VENV)/package.stamp: $(VENV)/torch.stamp $(SOURCES)
	$(PIP) install --quiet $(KEEP) --group build
	$(PIP) install --quiet $(KEEP) --no-build-isolation --editable .
	touch $@

$(VENV)/test.stamp: $(VENV)/package.stamp
	$(PIP) install --quiet $(KEEP) --group test
	touch $@

$(VENV)/lint.stamp: $(VENV)/package.stamp
	$(PIP) install --quiet $(KEEP) --group lint
	touch $@

# `make demo` and `make test` work in a fresh clone: they set up .venv by themselves.

PYTHON ?= python3
VENV ?= .venv
# Installed first, so that the rest finds torch satisfied. Where the package index offers a build
# for the CPU only, this version has one; `make TORCH=torch==2.15.0 demo` takes another.
TORCH ?= torch==2.13.0
# That build asks for no Triton: the release that belongs to it. Others bring their own.
TRITON ?= $(if $(filter torch==2.13.0,$(TORCH)),triton==3.7.1)
BIN := $(VENV)/bin
ROOMS := kernels compiler zoo cli
# Parts of the tests, of which two run at a time, the longest first.
TESTS_ops := tests/test_ops.py
TESTS_compiler := $(wildcard tests/test_[a-f]*.py)
TESTS_offline := tests/test_offline.py tests/test_guards.py
TESTS_kernels := $(filter-out $(TESTS_ops) $(TESTS_offline),$(wildcard tests/test_[g-o]*.py))
TESTED := $(TESTS_ops) $(TESTS_compiler) $(TESTS_offline) $(TESTS_kernels)
TESTS_rest := $(filter-out $(TESTED),$(wildcard tests/test_*.py))
PARTS := compiler rest kernels ops offline
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
READY_TEST := $(VENV)/.ready-test

# Prints the version where the base Python already has a torch that convloom works with.
INSTALLED_TORCH := import torch; v = tuple(map(int, torch.__version__.split(".")[:2])); \
  print(torch.__version__ if (2, 11) <= v < (2, 16) else "")

.PHONY: help demo test gpu gate docs lint types clean $(PARTS:%=test-%)

help:
	@echo "make demo    compile, run and check real networks (about two minutes)"
	@echo "make test    every test that needs no GPU, and how much of compiler/ and kernels/ they run"
	@echo "make gpu     on a machine with a GPU: tests, tuning, benchmark; call again until it is done"
	@echo "make gate    what changed in the machine code of every op since the committed snapshot"
	@echo "make docs    the documentation as pages, in build/docs"
	@echo "make lint    ruff"
	@echo "make types   mypy --strict"
	@echo "make clean   remove .venv and what tools left behind"
	@echo "Each but gpu sets up $(VENV) when it is missing. PYTHON=, VENV= and TORCH= may be given."

demo: $(READY)
	$(BIN)/convloom demo

# Two processes of one thread, one for each core of a small machine: with more threads than cores
# they wait for one another, which took half of the time of whole networks. Host code must be run
# by 90%, branches included; `coverage report -m` then tells what was not.
test: $(READY_TEST)
	@rm -f .coverage .coverage.*; \
	echo "$(words $(PARTS)) parts, two at a time; each is printed when it is done (minutes)"; \
	$(MAKE) --no-print-directory -k -j2 -O $(PARTS:%=test-%); tests=$$?; \
	$(BIN)/python -m coverage combine -q && $(BIN)/python -m coverage report; exit $$((tests + $$?))

$(PARTS:%=test-%): test-%: $(READY_TEST)
	@OMP_NUM_THREADS=1 $(BIN)/python -m coverage run -m pytest --durations=10 $(TESTS_$*)

# Needs no network and installs nothing: uses the torch and triton of $(PYTHON). One call takes at
# most ten minutes; `make gpu ARGS=--dry-run` tries every stage on a CPU.
gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

# Before and after a change that should leave machine code alone; ARGS=--update takes a snapshot.
gate: $(READY_TEST)
	$(BIN)/python -m benchmarks.gate $(ARGS)

docs: $(READY_TEST)
	@mkdir -p $(VENV)/checked && ln -sfn "$(CURDIR)" $(VENV)/checked/convloom
	CONVLOOM_PARENT=$(VENV)/checked $(BIN)/python -m mkdocs build --strict
	@echo "open build/docs/index.html"

lint: $(READY_DEV)
	$(BIN)/ruff check .

# Checked under the package's own name, whatever the folder of this clone is called.
types: $(READY_DEV)
	@mkdir -p $(VENV)/checked && ln -sfn "$(CURDIR)" $(VENV)/checked/convloom
	MYPYPATH=$(VENV)/checked $(BIN)/mypy $(ROOMS:%=-p convloom.%) \
	  -m convloom -m convloom.atomic -m convloom.errors -m convloom.extensions \
	  -m convloom.progress -m convloom.settings -m convloom.testing

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-output \
	  .coverage .coverage.*

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "convloom needs Python 3.11 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@set -e; found=$$($(PYTHON) -c '$(INSTALLED_TORCH)' 2>/dev/null || true); \
	if [ ! -x $(BIN)/python ]; then \
	  $(PYTHON) -m venv $${found:+--system-site-packages} $(VENV); \
	fi; \
	$(BIN)/python -c '$(INSTALLED_TORCH)' 2>/dev/null | grep -q . || \
	  $(BIN)/python -m pip install --disable-pip-version-check "$(TORCH)" $(TRITON); \
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[demo]'
	@touch $@

$(READY_DEV): $(READY_TEST)
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]'
	@touch $@

# With what the tests of the documentation and of the HTTP example need.
$(READY_TEST): $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[test,docs,http]'
	@touch $@

# `make demo` trains and scores a model from nothing, `make test` runs the tests. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest
# Two processes. A file of tests runs whole, in one process; tests/conftest.py puts long ones first.
PARALLEL := --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test check test-cluster bench gpu lint setup clean
setup: $(VENV)/.ready

# torch first and by itself: what comes later must find the pinned build and not pull another one.
$(VENV)/.ready: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" launch/demo.sh

# All tests but those of a cluster.
test: setup lint
	$(PYTEST) tests --ignore tests/cluster $(PARALLEL) --durations 15

# A minute before a commit: lint, and the quick tests of the files that changed (tests/changed.py).
check: setup lint
	tests=$$($(BIN)/python tests/changed.py) && \
	    { [ -z "$$tests" ] || $(PYTEST) $$tests -m 'not slow' $(PARALLEL) --quiet; }

# On a real Slurm and over a real network, both on this machine: as root, on Debian or Ubuntu, whose
# packages it installs. KILLS=n: how often the fault injector kills a rank of one run.
KILLS ?= 30
test-cluster: setup
	tests/cluster/slurm.sh install
	KILLS=$(KILLS) $(PYTEST) tests/cluster --numprocesses 2 --no-loadscope-reorder --durations 15

# What this machine can measure, next to what was measured on it before. Results go to benchmarks/.
bench: setup
	PYTHON="$(CURDIR)/$(BIN)/python" benchmarks/bench.sh

# On a machine with an NVIDIA GPU: the tests that need one, the kernel benchmark and those of
# `make bench`. Results go to benchmarks/.
gpu: setup
	PYTHON="$(CURDIR)/$(BIN)/python" benchmarks/gpu.sh

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build *.egg-info

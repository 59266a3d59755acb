# Two commands: `make demo` trains and scores a model from nothing, `make test` runs the tests. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-cluster bench gpu lint setup clean
setup: $(VENV)/.ready

# torch first and by itself: whatever comes later must find the pinned build and not pull another one.
$(VENV)/.ready: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" launch/demo.sh

test: setup lint
	OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest tests --ignore tests/cluster --numprocesses 2 --dist loadfile --durations 15

# On a real Slurm and over a real network, both on this machine: as root, on Debian or Ubuntu, whose packages it installs.
# KILLS=n: how often the fault injector kills a rank of one run.
KILLS ?= 30
test-cluster: setup
	tests/cluster/slurm.sh install
	KILLS=$(KILLS) PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest tests/cluster --durations 15

# What this machine can measure, beside what was measured on it before; results go to benchmarks/.
bench: setup
	PYTHON="$(CURDIR)/$(BIN)/python" benchmarks/bench.sh

# On a machine with an NVIDIA GPU: the tests that need one, the kernel benchmark and those of `make bench`; results go to benchmarks/.
gpu: setup
	PYTHON="$(CURDIR)/$(BIN)/python" benchmarks/gpu.sh

lint: setup
	$(BIN)/ruff check .
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build *.egg-info

# Two commands: `make demo` trains and scores a model from nothing, `make test` runs the tests. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test gpu lint setup clean
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
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest tests --numprocesses 2 --dist loadfile

# On a machine with an NVIDIA GPU: the tests that need one and the kernel benchmark; results go to benchmarks/.
gpu: setup
	PYTHON="$(CURDIR)/$(BIN)/python" benchmarks/gpu.sh

lint: setup
	$(BIN)/ruff check .
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build *.egg-info

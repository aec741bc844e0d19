# Two commands: `make run` and `make test`. Both set up .venv on the first call.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
KERNELS := $(VENV)/.kernels
# one torch thread per process: processes over trials are faster than threads inside one
export OMP_NUM_THREADS := 1

.PHONY: run test kernels sanitize lint format bench docs clean

run: $(READY) $(KERNELS)
	@$(BIN)/python -c 'from steppe.quant.gru import path_in_words as say; print(say("fp32"))'
	$(BIN)/steppe run

test: $(READY) $(KERNELS)
	$(BIN)/python -m pytest -n logical --dist worksteal

# the native GRU is optional: without a C++ compiler nn.GRU serves, slower
kernels:
	rm -f $(KERNELS)
	$(MAKE) $(KERNELS)

sanitize: $(READY)
	kernels/sanitize.sh $(BIN)/python

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) $(KERNELS)
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/gru.py

docs: $(READY)
	$(BIN)/python docs/build.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "steppe needs Python 3.11 or newer: make PYTHON=python3.11 run")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
# torch first and pinned: no other package can then pull in another build of it
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all]"
	touch $(READY)

$(KERNELS): kernels/CMakeLists.txt kernels/pyproject.toml $(wildcard kernels/src/* kernels/steppe_kernels/*.py) | $(READY)
	@echo "building steppe-kernels, about 20 seconds"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt ./kernels >$(VENV)/kernels.log 2>&1 \
	|| echo "steppe-kernels were not built (no C++ compiler? see $(VENV)/kernels.log): nn.GRU serves"
	@touch $(KERNELS)

clean:
	rm -rf $(VENV) runs

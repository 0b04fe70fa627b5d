PYTHON ?= python3.11
BIN := .venv/bin
SOURCES := src tests benchmarks scripts

.PHONY: demo test test-gpu check bench clean

demo: .venv/installed
	$(BIN)/pissa demo --out pissa-demo --force

# The suite speaks of processors, also where there is a GPU, which has tests of its own.
test: .venv/installed
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(TESTS)

test-gpu: .venv/installed
	$(BIN)/python -m pytest tests/test_gpu.py

check: .venv/installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/installed
	for name in svd quant decompose step; do $(BIN)/python benchmarks/$$name.py || exit 1; done

# torch first and pinned: an unpinned one brings gigabytes of CUDA packages.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade "pip>=25" "setuptools>=77" wheel
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch .venv/installed

clean:
	rm -rf .venv pissa-demo build src/*.egg-info

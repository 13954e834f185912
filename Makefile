# demo, test, lint, bench, bench-gpu: each makes its own virtual environment first and uses it again later.
# It needs Python 3.11, a C++ compiler and a package index; nothing else from the network.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/ready
# no model or dataset is looked for on the hub by any target
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint bench bench-gpu clean

demo: $(READY)
	$(BIN)/prune-llm demo

# two files at a time, a thread each: most tests are too small for more threads to help; in the order
# of tests/conftest.py, the longest first, and not by how many tests a file has
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python eval/bench/bench_prune.py
	$(BIN)/python kernels/bench/bench_linear.py --quick
	$(BIN)/python eval/bench/bench_decode.py --rounds 2

# on a machine whose torch has CUDA: that python, with triton, runs it, not the virtual environment
bench-gpu:
	PYTHONPATH=kernels $(PYTHON) kernels/bench/bench_gpu.py --out out/gpu

# torch alone and first: a range would bring gigabytes of CUDA libraries to a machine without a GPU
$(READY): pyproject.toml constraints.txt $(wildcard kernels/CMakeLists.txt kernels/csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build out .pytest_cache .mypy_cache .ruff_cache

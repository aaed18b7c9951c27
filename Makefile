# `make demo` and `make test` do everything on a fresh machine, environment included.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-triton lint format build test-gpu bench device tables results docs clean help
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit("wfnet needs Python 3.10 or newer; run make PYTHON=...") if sys.version_info < (3, 10) else 0'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(READY) ## untrain every class of a small network on real digits, evaluate, draw (2 minutes)
	$(BIN)/wfnet demo --output demo $(ARGS)

test: $(READY) ## the test suite, no GPU needed
	# One thread a process: the tests' shapes are small, and the processes run side by side.
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto $(ARGS)

# The oldest Triton that wfnet runs on: that of PyTorch 2.11. Its wheel alone, beside what is installed.
OLD_TRITON := build/triton36
test-triton: $(READY) ## default kernels compile for Hopper with Triton 3.6.0 as well (needs its wheel)
	@if test -d $(OLD_TRITON)/triton || $(BIN)/python -m pip install --quiet --no-deps \
	    --disable-pip-version-check --retries 1 --target $(OLD_TRITON) triton==3.6.0; then \
	  PYTHONPATH=$(OLD_TRITON) $(BIN)/python -c 'import triton; print("Triton", triton.__version__)' && \
	  PYTHONPATH=$(OLD_TRITON) $(BIN)/pytest tests/kernels/test_aot.py -k "not 80 and not 100" $(ARGS); \
	else echo "NOT TESTED: there is no wheel of Triton 3.6.0 to be had here"; fi

lint: $(READY) ## ruff: style and formatting; mypy: types of the public interface
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

format: $(READY) ## ruff: mend style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: $(READY) ## wfnet/_C in place, the CUDA kernels for Hopper (needs nvcc, no GPU)
	$(BIN)/python csrc/build.py

test-gpu: ## the tests that need a CUDA device; installs this checkout offline, without dependencies
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps -e .
	$(PYTHON) -m pytest -m gpu tests/gpu $(ARGS)

# Results go to $(OUT); those that are committed were written to benchmarks/results.
OUT ?= runs/bench
bench: $(READY) ## whole steps on this CPU (10 minutes)
	$(BIN)/wfnet bench --model small/resnet resnet18 --img-size 32 --num-classes 10 -b 16 --output $(OUT)/step_cpu.json

# On a machine with a GPU: no network, nothing is downloaded (docs/devices.md).
BUDGET ?= 540
device: OUT = runs/device
device: ## everything that needs a GPU, within BUDGET seconds, results in OUT (docs/devices.md)
	$(PYTHON) benchmarks/device_run.py --output $(OUT) --budget $(BUDGET) $(ARGS)

tables: $(READY) ## tables and picture of the documents from benchmarks/results
	$(BIN)/python benchmarks/render.py

# Nothing is loaded while it builds, but for packages that are missing.
docs: $(READY) ## the documentation as a site in build/site, every link checked
	$(BIN)/python -c "import material, mkdocstrings_handlers.python" 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	rm -rf build/pages && mkdir -p build/pages
	cp --parents README.md CHANGELOG.md LICENSE docs/* benchmarks/results/* wfnet/*.py wfnet/*/*.py build/pages
	$(BIN)/python -m mkdocs build --strict

results: $(READY) ## the studies of the documents, hours, resumable (make results ARGS="digits --seeds 0")
	$(BIN)/python benchmarks/evidence.py $(ARGS)

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) wfnet/_C.*.so build dist *.egg-info demo .pytest_cache .ruff_cache

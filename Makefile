# One virtual environment in .venv; the tested versions come from constraints.txt.
PYTHON ?= python3
JOBS ?= 2
# accelerate starts CPU processes with one thread unless told otherwise
CORES := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo test test-slow lint format clean

demo: $(VENV)/.demo  ## run the whole loop on the embedded world (about five minutes on two free cores)
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process $(CORES) recipes/dpo_silkie.py

test: $(VENV)/.dev  ## everything that fits a CI run
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" -n $(JOBS) --dist loadfile

test-slow: $(VENV)/.dev  ## what takes longer: kill matrices, large data, full numerics
	$(BIN)/python -m pytest -m "slow and not gpu" --timeout 3600

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e ".[report]"
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info

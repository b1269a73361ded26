# One virtual environment in .venv; the tested versions come from constraints.txt.
PYTHON ?= python3
JOBS ?= 2
DEMO_ARGS ?=
PYTEST_ARGS ?=
GPU_ARGS ?=
# The package index's torch brings CUDA on Linux (several GB). `TORCH=cpu` takes torch's own CPU build instead, from TORCH_INDEX or a mirror of it.
TORCH ?=
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
ifeq ($(TORCH),cpu)
TORCH_STAMP = $(VENV)/.torch-cpu
NEED_GB := 4
else ifeq ($(TORCH),)
NEED_GB := 9
else
$(error TORCH=$(TORCH): leave it out for the package index's build, or TORCH=cpu)
endif
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo docs gpu reference test test-slow test-versions test-install check-install constraints lint format clean

demo: $(VENV)/.demo  ## run the whole loop on the embedded world (under five minutes on two free cores)
	$(BIN)/silkie demo $(DEMO_ARGS)

test: $(VENV)/.dev  ## everything that fits a CI run
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

test-slow: $(VENV)/.dev  ## what takes longer: kill matrices, large data, full numerics
	$(BIN)/python -m pytest -m "slow and not gpu" --timeout 3600 $(PYTEST_ARGS)

gpu:  ## what only a CUDA device can tell, under nine minutes, with the python that has torch there; REHEARSE=1 needs no device
	$(PYTHON) tests/benchmarks/gpu_run.py $(if $(REHEARSE),--rehearse --budget 3600) $(GPU_ARGS)

test-versions:  ## a chosen subset in fresh environments with the oldest and the newest versions allowed (several GB; WHICH=oldest or newest)
	PYTHON="$(PYTHON)" WHICH="$(WHICH)" PYTEST_ARGS="$(PYTEST_ARGS)" bash .ci/test_versions

test-install:  ## both README commands in a fresh clone with the package index's own torch (minutes, several GB, deleted afterwards)
	PYTHON="$(PYTHON)" DEMO_ARGS="$(DEMO_ARGS)" PYTEST_ARGS="$(PYTEST_ARGS)" bash .ci/test_install

check-install: $(VENV)/.dev  ## the pinned set resolves from the package index alone, for every supported Python and platform
	$(BIN)/python .ci/check_install.py

constraints: $(VENV)/.dev  ## write constraints.txt anew; pinned versions stay, unless UPGRADE="-P torch" (or --upgrade) names them
	$(BIN)/python .ci/check_install.py --write $(UPGRADE)

reference: $(VENV)/.dev  ## write examples/reference anew from the code
	$(BIN)/python examples/reference/generate.py

docs: $(VENV)/.dev  ## the documentation site, in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --config-file examples/site/mkdocs.yml

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	@$(PYTHON) .ci/preflight.py machine $(VENV) $(NEED_GB)
	$(PYTHON) -m venv $(VENV)

# Replaces a CUDA build that is there already; it stays until `make clean`.
$(VENV)/.torch-cpu: constraints.txt | $(VENV)/bin/python
	@$(BIN)/python .ci/preflight.py index $(TORCH_INDEX)
	$(PIP) --no-deps --force-reinstall --index-url $(TORCH_INDEX) torch
	touch $@

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python $(TORCH_STAMP)
	@$(BIN)/python .ci/preflight.py index
	$(PIP) -e ".[report]"
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python $(TORCH_STAMP)
	@$(BIN)/python .ci/preflight.py index
	$(PIP) -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info

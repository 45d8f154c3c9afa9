# Two commands do everything on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_DEMO := runs/demo

.PHONY: help setup setup-dev demo test check soak deploy clean

help:
	@echo "make demo    set up, run the built-in case, write the report (about 7 minutes on two cores, installation aside)"
	@echo "make test    set up, run the tests"
	@echo "make check   lint, types, import contracts"
	@echo "make deploy  register all flows with the Prefect API that PREFECT_API_URL names (POOLS, GPUS, DEPLOY_OPTIONS: see infra/README.md)"
	@echo "make soak    the long tests: many kills, many seeds"

INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"stagediff needs Python 3.11 or newer, this is {sys.version.split()[0]}; use make PYTHON=..."'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	$(BIN)/stagediff compile
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(INSTALL) -e '.[dev]'
	@touch $@

setup: $(VENV)/.ready
setup-dev: $(VENV)/.ready-dev

demo: setup
	$(BIN)/stagediff demo --store $(RUN_DEMO)

# two files of tests at a time; TEST_PROCESSES=0 runs them one after the other
TEST_PROCESSES ?= 2
test: setup-dev
	$(BIN)/python -m pytest -m "not integration and not soak" -n $(TEST_PROCESSES) --dist loadfile

check: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

soak: setup-dev
	$(BIN)/python -m pytest -m soak

# POOLS="stagediff=process big=slurm": steps on both, pipelines on the first. GPUS=2 or GPUS="big=8"
POOLS ?= stagediff=process
deploy: setup
	$(BIN)/python -m flows.deploy $(addprefix --pool ,$(POOLS)) $(addprefix --gpus ,$(GPUS)) $(DEPLOY_OPTIONS)

clean:
	rm -rf $(VENV) $(RUN_DEMO)

# The two commands of a newcomer are `make quickstart` and `make test`; `make help` lists the rest.

VENV   ?= .venv
PYTHON ?= $(shell command -v python3.12 || command -v python3.11 || command -v python3)
BIN    := $(VENV)/bin

.PHONY: help quickstart test test-all lint format drawings clean

help: ## list the commands
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else f"make: Python 3.11 or 3.12 is needed, this is {v[0]}.{v[1]}; try make PYTHON=/path/to/python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed-cpu: setup.py | $(BIN)/python
	$(BIN)/python -m pip install -qq --editable '.[cpu]'
	@touch $@

$(VENV)/.installed-dev: setup.py | $(BIN)/python
	$(BIN)/python -m pip install -qq --editable '.[cpu,dev]'
	@touch $@ $(VENV)/.installed-cpu

quickstart: $(VENV)/.installed-cpu ## install, train on the sample for about two minutes, say where the pictures are
	$(BIN)/trainer --config=configs/sample.yaml --model_dir=runs/sample

test: $(VENV)/.installed-dev ## install, run the tests that fit before every commit
	$(BIN)/python -m pytest

test-all: $(VENV)/.installed-dev ## run every test, the long ones too
	$(BIN)/python -m pytest -m 'slow or not slow'

lint: $(VENV)/.installed-dev ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## lay the code out
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

drawings: $(VENV)/.installed-cpu ## draw both networks from the code into docs/images
	$(BIN)/python docs/draw_networks.py

clean: ## remove the virtual environment and caches, not the runs
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

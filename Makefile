# The two commands of a newcomer are `make quickstart` and `make test`; `make help` lists the rest.

VENV   ?= .venv
# The first Python that runs and is 3.11 or 3.12; a name on the path may be a stub for a version that is not there.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)
# TensorFlow 2.20 is tested on Python 3.12 where there is one, so that both versions of both are.
PYTHON_OF_TF220 ?= $(or $(shell for p in python3.12 $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.12*/bin/python; do \
	$$p -c '' 2>/dev/null && echo $$p && break; done),$(PYTHON))
BIN    := $(VENV)/bin
# $(call install,FOLDER) installs into a virtual environment, by pip, or in a third of the time by uv: make UV=uv test.
install = $(if $(UV),$(UV) pip install --quiet --compile-bytecode --python $(1)/bin/python,$(1)/bin/python -m pip install -qq)
LOCK = $(BIN)/uv pip compile -q --upgrade --generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_31 \
	--no-emit-index-url --no-annotate --custom-compile-command "make lock"
# pytest keeps the tests that it has rewritten: later runs begin some seconds earlier.
unexport PYTHONDONTWRITEBYTECODE
# Tiers: see docs/testing.md. Two files of tests run at a time; what compares times runs with nothing beside it.
PYTEST ?= $(BIN)/python -m pytest
TWO_AT_ONCE := -n 2 --dist loadfile --no-loadscope-reorder
QUICK := not slow and not clock and not container
CLOCKED = $(shell grep -rl --include='test_*.py' 'mark\.clock' tests)

.PHONY: help quickstart test test-slow test-full test-tf220 test-tf220-full mutations lint workflow format lock drawings clean

help: ## list the commands
	@grep -E '^[a-z0-9-]+:.*##' Makefile | sed -E 's/^([a-z0-9-]+):.*## /  make \1\t/' | expand -t 20

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or 3.12 found; try make PYTHON=/path/to/python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(call install,$(VENV)) --upgrade pip

$(VENV)/.installed-cpu: setup.py | $(BIN)/python
	@echo "installing TensorFlow and the trainer into $(VENV): about 1.7 GB, a minute or more"
	$(call install,$(VENV)) --editable '.[cpu]'
	@touch $@

$(VENV)/.installed-dev: setup.py | $(BIN)/python
	@echo "installing TensorFlow, the trainer and the tools for tests into $(VENV): about 2 GB, a minute or more"
	$(call install,$(VENV)) --editable '.[cpu,dev]'
	@touch $@ $(VENV)/.installed-cpu

quickstart: $(VENV)/.installed-cpu ## install, train on the sample for about two minutes, say where the pictures are
	$(BIN)/trainer --config=configs/sample.yaml --model_dir=runs/sample

test: $(VENV)/.installed-dev ## install, run the tests that fit before every commit: under 4 minutes
	$(PYTEST) $(TWO_AT_ONCE) -m '$(QUICK)'

test-slow: $(VENV)/.installed-dev ## run the tests that take longer: real processes, buckets, long stories
	$(PYTEST) $(TWO_AT_ONCE) -m 'slow and not clock' --durations=10
	$(PYTEST) -m clock -s $(CLOCKED)

test-full: test test-slow ## run every test but the containers': under 25 minutes

test-tf220: .venv-tf220/.installed ## run the tests marked tf220 on TensorFlow 2.20, which the TPU image has, and Python 3.12
	@.venv-tf220/bin/python --version
	.venv-tf220/bin/python -m pytest $(TWO_AT_ONCE) -m 'tf220 and not clock'

test-tf220-full: .venv-tf220/.installed ## run every test on TensorFlow 2.20, before a release
	.venv-tf220/bin/python -m pytest $(TWO_AT_ONCE) -m 'not container and not clock'
	.venv-tf220/bin/python -m pytest -m 'clock' $(CLOCKED)

.venv-tf220/.installed: setup.py
	test -x .venv-tf220/bin/python || $(PYTHON_OF_TF220) -m venv .venv-tf220
	$(call install,.venv-tf220) --editable '.[cpu,dev]' 'tensorflow-cpu==2.20.*'
	@touch $@

mutations: $(VENV)/.installed-dev ## make each listed mistake in a copy of the project; say which no test notices
	$(BIN)/python -m tests.mutations --baseline

lint: $(VENV)/.installed-dev ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint --failure-threshold warning Dockerfile
	$(BIN)/mypy

workflow: ## check .github/workflows with actionlint
	.ci/workflow

format: $(VENV)/.installed-dev ## lay the code out
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(VENV)/.installed-dev ## lock the images' dependencies with hashes into docker/
	for target in cpu gpu tpu; do $(LOCK) setup.py --extra $$target -o docker/requirements-$$target.txt || exit 1; done
	printf 'setuptools>=77\nwheel\n' | $(LOCK) - -o docker/requirements-build.txt

drawings: $(VENV)/.installed-cpu ## draw networks and data flow from the code into docs/images
	$(BIN)/python docs/draw_networks.py
	$(BIN)/python docs/draw_distribution.py

clean: ## remove the virtual environment and caches, not the runs
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

# Everything runs from .venv, which is made from requirements.lock the first time any target needs it.
# The first Python that is new enough, else whatever python3 is, to be complained about.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null && $$p -c '$(NEW_ENOUGH)' && { command -v $$p; exit; }; done; command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A file's tests stay in one process, so that what they share is made once. More than four would want much memory.
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# A folder that was moved or copied has a .venv that points at its old place: it is made again.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

.PHONY: help setup quickstart test fast lint format lock clean
help:
	@echo "make quickstart  train the quickstart sweep, fit it, check it on held-out runs (about 5 minutes)"
	@echo "make test        every test;  make fast: without those marked slow (about 2 minutes)"
	@echo "make lint        ruff check and format check;  make format: apply them"
	@echo "make lock        write requirements.lock again from pyproject.toml"
	@echo "make clean       remove .venv (runs/ stays)"

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no python3 found; install Python 3.11 or newer (PYTHON=/path/to/python3 to choose one)" >&2; exit 2; }
	@"$(PYTHON)" -c '$(NEW_ENOUGH)' || { echo "error: $(PYTHON) is $$("$(PYTHON)" --version 2>&1); Python 3.11 or newer is needed (PYTHON=/path/to/python3 to choose one)" >&2; exit 2; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) has no venv; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	@echo "setting up $(VENV) (once)"
	@rm -rf $(VENV)
	@"$(PYTHON)" -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@printf '%s\n' "$(CURDIR)" > $(STAMP)

quickstart: $(STAMP)
	@$(BIN)/python -m sweeps.cli sweep quickstart
	@$(BIN)/python -m sweeps.cli report runs/quickstart

test: $(STAMP)
	@$(PYTEST)

fast: $(STAMP)
	@$(PYTEST) -m "not slow"

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

lock: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --extra dev \
		--no-emit-index-url --no-header --no-annotate pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV)

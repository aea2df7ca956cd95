# One line each; PYTHON=... uses another environment than .venv.
PYTHON ?= .venv/bin/python
setup: ; python3 -m venv .venv && .venv/bin/pip install -e '.[dev]'
run: ; $(PYTHON) run.py
test: ; $(PYTHON) -m pytest
lint: ; $(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check . && $(dir $(PYTHON))lint-imports
types: ; $(PYTHON) -m mypy
format: ; $(PYTHON) -m ruff format . && $(PYTHON) -m ruff check --fix .
starter: ; $(PYTHON) -m azr_async starter
.PHONY: setup run test lint types format starter

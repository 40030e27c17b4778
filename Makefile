# Two commands on a fresh clone: `make demo` and `make test`. Both create .venv and install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: demo test bench lint clean

demo: $(VENV)/.demo
	$(BIN)/visionhybrid demo --out demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

bench: $(VENV)/.test
	$(BIN)/python -m visionhybrid.bench models

lint: $(VENV)/.test
	$(BIN)/pip install -q ruff pyright
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install -q -e ".[demo]"
	@touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install -q -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) demo build dist *.egg-info

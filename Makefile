# `make setup` makes .venv from the pinned constraints; every other target runs inside it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup check test compiled demo clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	# torch first and by exact version: a range would bring the CUDA build and gigabytes with it
	$(BIN)/pip install -q -c constraints.txt "torch==2.13.0"
	$(BIN)/pip install -q -c constraints.txt -e ".[runtime,dev]"
	touch $(STAMP)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

# the same package with its hot modules compiled by mypyc: PYTHONPATH=build/compiled .venv/bin/disagg run FILE
compiled: $(STAMP)
	$(BIN)/python -m disagg.experiments.compiled --output build/compiled

demo: $(STAMP)
	$(BIN)/python -m disagg.experiments.demo --output demo

clean:
	rm -rf $(VENV) demo runs build *.egg-info

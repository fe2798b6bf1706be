# make run    the quickstart from a fresh clone: train on a local Ray cluster, compare with the lock, audit, settle
# make test   environment, style, types, layers, tests
# make lint   the first three checks of `make test`
# make clean  what the other targets made

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Where `make run` keeps its objects; every `make run` trains from nothing.
STORE  ?= build/quickstart
# What `make test` runs; `make test PYTEST='-m "not slow"'` leaves the long ones out.
PYTEST ?=
# How many processes do so: one more than two cores, for tests that wait for hosts and blocks.
WORKERS ?= 3

.DEFAULT_GOAL := help
.PHONY: help run test lint clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Trueweight needs Python 3.11 or newer, got " + sys.version.split()[0] + "; choose one with: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	touch $@

run: $(VENV)/.installed
	rm -rf $(STORE)
	$(BIN)/python -m trueweight run recipes/quickstart.toml --replicas 2 --stages 2 --store $(STORE) --lock recipes/quickstart.lock.toml
	$(BIN)/python -m trueweight audit quickstart --sample 1 --store $(STORE)
	$(BIN)/python -m trueweight settle quickstart --terms recipes/quickstart.terms.toml --store $(STORE)
	@echo "This machine produced the published bytes: the roots equal recipes/quickstart.lock.toml, a replay gave them again, and their work is paid."

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

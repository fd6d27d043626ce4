# Needs Python 3.11+, Java 17+ and Maven; everything is installed into .venv/ and .stack/ of this checkout.
# `make test ARGS="-k relay -x"` passes arguments to pytest, which runs in two processes, each with servers of its own
# (`-n 0`: in one); `make PYTHON=python3.13 setup` chooses the Python.

PYTHON ?= python3
ARGS ?=
UV_VERSION := 0.13.9

SHELL := /bin/sh
VENV := .venv/bin
export PYTHONPATH := examples

.DEFAULT_GOAL := help
.PHONY: help setup lock up down status demo example test faults bench format lint types clean

help: ## list the targets
	@awk 'BEGIN { FS = ":.*## " } /^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

setup: ## install everything (a second run takes no time)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed and \`$(PYTHON)\` is none: install it, or run make with PYTHON=/path/to/python3.11." >&2; \
	  exit 1; }
	@$(PYTHON) examples/devstack/install.py

# hatchling builds the project itself and is not a dependency of it; without it the editable install would
# fetch an unpinned one.
lock: setup ## pin the Python packages anew, in requirements-dev.lock and bench/requirements.lock
	@test -x .stack/uv/bin/uv || { $(PYTHON) -m venv .stack/uv && .stack/uv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION); }
	@echo 'hatchling>=1.27' | .stack/uv/bin/uv pip compile pyproject.toml - --extra relay --group dev \
	  --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links \
	  --custom-compile-command 'make lock' --upgrade --quiet --output-file requirements-dev.lock
	@.stack/uv/bin/uv pip compile --group bench --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-emit-find-links \
	  --custom-compile-command 'make lock' --upgrade --quiet --output-file bench/requirements.lock

up: setup ## start PostgreSQL and Kafka and keep them running; prints the URLs
	@$(VENV)/python -m devstack up

down: ## stop what `make up` started and remove its data (KEEP=1 keeps it)
	@if test -x $(VENV)/python; then $(VENV)/python -m devstack down $(if $(filter-out 0,$(KEEP)),--keep); fi

status: ## say what `make up` keeps running
	@$(VENV)/python -m devstack status

demo: setup ## run stock pgbench through the outbox and compare the topics with the tables
	@$(VENV)/python -m pgbench_demo $(ARGS)

example: setup ## start three services that never call each other, with load and a page; prints its address
	@$(VENV)/python -m marketplace $(ARGS)

test: setup ## run every check and every test, in order, up to the first failure
	$(VENV)/ruff format --check
	$(VENV)/ruff check
	$(VENV)/mypy
	$(VENV)/lint-imports
	$(VENV)/pytest -n 2 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder $(ARGS)

faults: setup ## inject hundreds of faults on real servers and judge the topics (half an hour; ARGS="killed --times 2")
	@PYTHONPATH=tests:examples $(VENV)/python -m faults $(ARGS)

bench: setup ## measure the relay beside others and the limits, all parts (hours; ARGS=drain is one; ARGS=--help)
	@PYTHONPATH=.:examples $(VENV)/python -m bench $(ARGS)

format: setup ## write the code in the project's format
	@$(VENV)/ruff format
	@$(VENV)/ruff check --fix --exit-zero --quiet

lint: setup ## check format, style and which module may import which
	$(VENV)/ruff format --check
	$(VENV)/ruff check
	$(VENV)/lint-imports

types: setup ## check the types, strictly
	$(VENV)/mypy

clean: down ## remove what was installed, made and measured: .venv, .stack, .bench and the tools' caches
	@rm -rf .venv .stack .bench .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build

# `make` alone lists the verbs.
SHELL := /bin/bash
ARGS ?=
.DEFAULT_GOAL := help
.PHONY: help setup demo up test test-all test-engine lint shots clean

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: ## Make the two environments (safe to repeat).
	@bash infra/setup.sh

demo: setup ## Take the loop round with simulated users, then serve (ARGS=--exit stops by itself).
	@.venv/bin/everloop demo $(ARGS)

up: setup ## Start everything and serve until Ctrl-C.
	@.venv/bin/everloop up $(ARGS)

test-engine: setup ## The engine plug-in against vLLM's own functions, in the engine's environment.
	@cd infra/engine_plugin && ../../.venv-engine/bin/python -P -m pytest -q

test: setup lint test-engine ## What CI runs: linters, types, layers, and all tests but the slow ones.
	@.venv/bin/python -m pytest -m "not slow" --durations=20 $(ARGS)

test-all: setup lint test-engine ## Everything, the slow tests too.
	@.venv/bin/python -m pytest $(ARGS)

lint: setup ## ruff, strict mypy, import-linter, the types of the pages' JavaScript.
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports
	@PATH="$$PATH:$$PWD/.venv/bin" node infra/web/node_modules/typescript/bin/tsc --project infra/web/jsconfig.json

shots: setup ## Take the pictures of the pages in docs/img/ (a real stack, a real browser).
	@mkdir -p docs/img
	@EVERLOOP_SHOTS=docs/img .venv/bin/python -m pytest -q -m "not slow" tests/e2e

clean: ## Remove both environments and all caches (not what Everloop has learned).
	@rm -rf .venv .venv-engine agent/static/vendor infra/web/node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info build

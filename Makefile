# `make` alone lists the verbs.
SHELL := /bin/bash
ARGS ?=
.DEFAULT_GOAL := help
.PHONY: help setup up demo test test-all test-engine lint type docs bench shots clean

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 13
	@echo "Options go in ARGS: make test ARGS='-k feedback', make up ARGS=--detach."

setup: ## Make the two environments (safe to repeat).
	@bash infra/setup.sh

up: setup ## Start everything and serve until Ctrl-C.
	@.venv/bin/everloop up $(ARGS)

demo: setup ## Take the loop round with simulated users, then serve (ARGS=--exit stops by itself).
	@.venv/bin/everloop demo $(ARGS)

test-engine: setup ## The engine plug-in against vLLM's own functions, in the engine's environment.
	@cd infra/engine_plugin && ../../.venv-engine/bin/python -P -m pytest -q

test: setup lint test-engine ## What CI runs: linters, types, layers, and all tests but the slow ones.
	@.venv/bin/python -m pytest -m "not slow" --durations=20 $(ARGS)

test-all: setup lint test-engine ## Everything, the slow tests too.
	@.venv/bin/python -m pytest $(ARGS)

lint: setup type ## Style, types and layers: ruff, strict mypy, import-linter, the pages' JavaScript.
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/lint-imports

type: setup ## Types alone: strict mypy, and those of the pages' JavaScript.
	@.venv/bin/mypy
	@PATH="$$PATH:$$PWD/.venv/bin" node infra/web/node_modules/typescript/bin/tsc --project infra/web/jsconfig.json

docs: setup ## Write what is made from the code: settings, events and their schemas, OpenAPI, AsyncAPI.
	@.venv/bin/python -m infra.event_docs
	@.venv/bin/python -m flows.metric_docs
	@.venv/bin/python -m infra.settings_docs
	@.venv/bin/python -m infra.asyncapi
	@.venv/bin/python -m agent.api_document
	@.venv/bin/python -m agent.compatibility

bench: setup ## Measure (ARGS="serving --help" tells how; alone, lists the benches).
	@.venv/bin/everloop bench $(or $(ARGS),--help)

shots: setup ## Take the pictures of the pages in docs/img/ (a real stack, a real browser).
	@mkdir -p docs/img
	@EVERLOOP_SHOTS=docs/img .venv/bin/python -m pytest -q -m "not slow" tests/e2e

clean: ## Remove both environments and all caches (not what Everloop has learned).
	@rm -rf .venv .venv-engine agent/static/vendor infra/web/node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info build

